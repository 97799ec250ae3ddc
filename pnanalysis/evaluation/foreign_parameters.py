"""Losses and networks that compute with a network's parameters other than through the network they are given.

A loss that closes over the network, ``lambda o, t: F.cross_entropy(o, t) + 0.1 * norm(net)``, computes with the
parameters of the caller's network, and analyses move those of a copy. Such a term would be a constant, and all of its
derivatives would be missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pnanalysis.errors import ModelError
from pnanalysis.evaluation.batch_pass import BatchPass
from pnanalysis.evaluation.losses import InspectedLoss
from pnanalysis.inputs.random_states import random_states_kept


def check_no_foreign(label: str, network: nn.Module, batch: tuple[Any, Any], loss: InspectedLoss) -> None:
    """Refuse a loss, or a network, that computes with the network's parameters as something else holds them.

    Parameters
    ----------
    label : str
        How the message refers to the network.
    network : Module
    batch : (inputs, targets)
    loss : InspectedLoss

    Raises
    ------
    ModelError
    """
    if not all(parameter.is_leaf for parameter in network.parameters()):
        return  # of a copy of a scripted network, whose parameters are computed from those of the original
    with torch.enable_grad(), random_states_kept(), _without_gradients(network):
        value = BatchPass.of(network, loss, *batch, predict=False).value()
        names = foreign(value, network)
    if names:
        raise ModelError(f"{label}: {described(names)}")


@contextmanager
def _without_gradients(network: nn.Module) -> Iterator[None]:
    """Within the body, none of the network's own parameters requires gradients."""
    own = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in own:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in own:
            parameter.requires_grad_(True)


def foreign(value: Tensor, network: nn.Module) -> list[str]:
    """The parameters of a network that a value was computed with as tensors of another owner.

    Parameters
    ----------
    value : Tensor
        Computed from tensors that require no gradients, in place of the network's parameters.
    network : Module
        With its own values.

    Returns
    -------
    list of str
        Names of the parameters that are equal to a leaf of the value's graph, but for those that are constant all over,
        such as biases of zero, which may be equal by chance.
    """
    leaves = list(_leaves(value))
    found = []
    for name, parameter in network.named_parameters() if leaves else ():
        own = parameter.detach()
        if own.numel() > 1 and bool((own != own.flatten()[0]).any()):
            alike = (leaf.detach() for leaf in leaves if leaf.shape == own.shape)
            if any(torch.equal(leaf.to(own.device, own.dtype), own) for leaf in alike):
                found.append(name)
    return found


def described(names: list[str]) -> str:
    """What is wrong, and what to do, as a sentence."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        "the loss, or code of the network, refers to parameters of the network from outside "
        f"({names[0]!r}{more}); they would stay as they are where this analysis moves its own copy: write it as "
        "loss(model, batch) and use the model that it is given, or detach what is meant as a constant"
    )


def _leaves(value: Tensor) -> Iterator[Tensor]:
    """The tensors requiring gradients that a value was computed from."""
    if value.grad_fn is None:
        if value.requires_grad:
            yield value
        return
    seen, waiting = {value.grad_fn}, [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for other, _ in node.next_functions:
            if other is not None and other not in seen:
                seen.add(other)
                waiting.append(other)

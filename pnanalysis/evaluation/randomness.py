"""Networks and losses that draw random numbers where one expects none: in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pnanalysis.errors import ModelError
from pnanalysis.evaluation.batch_pass import BatchPass
from pnanalysis.evaluation.forward import forward, learnt_from
from pnanalysis.evaluation.losses import InspectedLoss
from pnanalysis.inputs.copies import copied
from pnanalysis.inputs.random_states import random_states, random_states_kept, set_seed
from pnanalysis.torch_internals import tree_leaves

#: Passes of a network that draws; rare events (a layer that is dropped in one of ten passes) should be among them.
_PASSES_OF_ONE_THAT_DRAWS = 16
#: Differences within this many units of round-off, relative to the largest entry, are the order of summation.
_ROUND_OFF_UNITS = 100


def check_repeatable(label: str, network: nn.Module, batch: tuple[Any, Any], loss: InspectedLoss | None = None) -> None:
    """Refuse a network, or a loss, of which two passes over the same batch differ.

    Parameters
    ----------
    label : str
        How the message refers to the network.
    network, batch, loss
        See :func:`differs_between_passes`.

    Raises
    ------
    ModelError
    """
    inputs, targets = batch
    if (loss is None or not loss.takes_model) and differs_between_passes(network, inputs):
        who = "the network"
    elif loss is not None and differs_between_passes(network, inputs, loss, targets):
        who = "its loss"
    else:
        return
    raise ModelError(
        f"{label}: {who} draws at random in eval mode (two passes over the same batch differ), so numbers would be "
        "those of single draws; make it deterministic (return the mean instead of a sample, "
        "F.dropout(..., training=self.training)); hessian can average with draws=K"
    )


def differs_between_passes(
    network: nn.Module, inputs: Any, loss: InspectedLoss | None = None, targets: Any = None
) -> bool:
    """Whether passes over the same batch give different results under different seeds, beyond round-off.

    Parameters
    ----------
    network : Module
        In the mode in which it will be used; passes run on a copy of it.
    inputs : nest of tensors
    loss : InspectedLoss, optional
        Compare values of this loss instead of outputs.
    targets : nest of tensors, optional

    Returns
    -------
    bool
        The state of all random number generators is as before.
    """
    copy = copied(network)  # what a pass leaves on the modules is thrown away
    with random_states_kept(), torch.no_grad():
        first, draws = _seeded_pass(0, copy, inputs, loss, targets)
        learnt_from(copy, network)
        for seed in range(1, _PASSES_OF_ONE_THAT_DRAWS if draws else 2):
            other, _ = _seeded_pass(seed, copy, inputs, loss, targets)
            if len(first) != len(other) or not all(map(_same, first, other)):
                return True
    return False


def _seeded_pass(
    seed: int, network: nn.Module, inputs: Any, loss: InspectedLoss | None, targets: Any
) -> tuple[list[Tensor], bool]:
    """All tensors of the result; and whether random numbers were drawn."""
    set_seed(seed)
    before = random_states()
    if loss is None:
        result = forward(network, inputs)
    else:
        result = BatchPass.of(network, loss, inputs, targets, predict=False).value()
    return list(_tensors(result)), not _equal(before, random_states())


def _tensors(outputs: Any) -> Iterator[Tensor]:
    """The tensors of a nest, and those held by objects in it that torch cannot take apart."""
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            yield leaf.detach().to_dense() if leaf.layout is not torch.strided else leaf.detach()
        elif hasattr(leaf, "__dict__"):
            yield from (value.detach() for value in vars(leaf).values() if isinstance(value, Tensor))


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_quantized or not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    differing = ~((a == b) | (a.isnan() & b.isnan()))
    if not bool(differing.any()):
        return True
    size = a[a.isfinite()].abs().max() if bool(a.isfinite().any()) else 0.0
    return bool(((a - b)[differing].abs() <= _ROUND_OFF_UNITS * torch.finfo(a.dtype).eps * size).all())


def _equal(a: Any, b: Any) -> bool:
    """Whether two states of the generators are equal."""
    if isinstance(a, tuple | list):
        if all(type(entry) is int for entry in a):  # the hundreds of words of Python's generator
            return bool(a == b)
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    return bool(a == b)

"""The loss of one batch as a function of the chosen parameters, for anyone's network and loss."""

from __future__ import annotations

from collections.abc import Collection
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pnanalysis.curvature.parameters import Named, as_given, requiring_grad
from pnanalysis.curvature.passes import autocast, unchanged
from pnanalysis.evaluation.losses import InspectedLoss, loss_on
from pnanalysis.inputs.batches import as_arguments, map_tensors, tensors


class LossArguments(NamedTuple):
    """All that the loss of one batch depends on: chosen parameters, other parameters and buffers, and the batch."""

    theta: Named
    others: Named
    inputs: Any
    targets: Any


class NetworkLoss:
    """The loss of a batch, and the network's outputs, as functions of the chosen parameters.

    Parameters
    ----------
    model : Module
        A prepared copy; its own weights are not used.
    loss_fn : InspectedLoss
    device : torch.device
    dtype : torch.dtype
    amp : {"no", "tf32", "bf16"}
    complex_names : collection of str
        The chosen parameters that are complex: they are given as real tensors with a last dim of two.

    Attributes
    ----------
    protected : bool
        Whether passes work on copies of their arguments, because the network writes into them.
    """

    def __init__(
        self, model: nn.Module, loss_fn: InspectedLoss, device: torch.device, dtype: torch.dtype, amp: str,
        complex_names: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.model, self.loss_fn, self.device, self.dtype, self.amp = model, loss_fn, device, dtype, amp
        self.complex_names = frozenset(complex_names)
        self.protected = False

    def outputs(self, at: LossArguments, theta: Named) -> Any:
        """What the network returns."""
        inputs, state = at.inputs, self._state(at, theta)
        if self.protected:
            inputs, state = map_tensors((inputs, state), torch.clone)
        arguments, keywords = as_arguments(inputs, self.model)
        with autocast(self.device, self.amp), unchanged(self.model):
            return functional_call(self.model, state, arguments, keywords)

    def of_outputs(self, outputs: Any, targets: Any) -> Tensor:
        """The loss, given what the network returns."""
        # losses are sums of exponentials and logarithms: in bfloat16 they would lose what the network computed
        if self.amp == "bf16" and isinstance(outputs, Tensor):
            outputs = outputs.float()
        return self.loss_fn(outputs, map_tensors(targets, torch.clone) if self.protected else targets)

    def __call__(self, at: LossArguments, theta: Named) -> Tensor:
        """The loss."""
        return self.of_outputs(self.outputs(at, theta), at.targets)

    def gradient(self, at: LossArguments, theta: Named) -> list[Tensor]:
        """Its gradient, by reverse mode; zeros for parameters that the loss does not depend on."""
        theta = requiring_grad(theta)
        loss = self(at, theta)
        if not loss.requires_grad:  # it depends on none of them
            return [torch.zeros_like(tensor) for tensor in theta.values()]
        return list(torch.autograd.grad(loss, list(theta.values()), materialize_grads=True))

    def protect(self, at: LossArguments) -> None:
        """Find out whether a pass writes into its arguments, with copies of them; from then on passes get copies."""
        copies: LossArguments = map_tensors(at, torch.clone)
        held = list(tensors(copies))
        before = [tensor._version for tensor in held]
        self(copies, copies.theta)
        self.protected = [tensor._version for tensor in held] != before

    def in_double(self) -> NetworkLoss:
        """The same in float64, without autocast."""
        twin = copy(self)
        twin.dtype, twin.amp = torch.float64, "no"
        twin.loss_fn = loss_on(self.loss_fn, self.device, torch.float64)
        return twin

    def _state(self, at: LossArguments, theta: Named) -> Named:
        return {**at.others, **as_given(theta, self.complex_names)}

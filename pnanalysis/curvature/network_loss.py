"""The loss of one batch as a function of the chosen parameters, for anyone's network and loss."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pnanalysis.curvature.blocks import Block, assembled
from pnanalysis.curvature.parameters import Named, as_given, requiring_grad
from pnanalysis.curvature.passes import autocast, unchanged
from pnanalysis.curvature.recomputed import recomputing
from pnanalysis.errors import CurvatureError
from pnanalysis.evaluation.foreign_parameters import described, foreign
from pnanalysis.evaluation.forward import WithModel, within_model
from pnanalysis.evaluation.losses import InspectedLoss, check_finite, check_targets, loss_on
from pnanalysis.inputs.batches import as_arguments, map_tensors, tensors
from pnanalysis.inputs.functional_calls import functional_call
from pnanalysis.inputs.random_states import random_states_kept, set_seed


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
    blocks : mapping of str to Block, optional
        The chosen parts of parameters, by their labels.

    Attributes
    ----------
    protected : bool
        Whether passes work on copies of their arguments, because the network writes into them.
    seed : int or None
        Of the random numbers that network and loss draw in every pass; ``None`` where they draw none.
    recomputed : list of str
        Modules whose activations are not kept: see :mod:`pnanalysis.curvature.recomputed`. What is differentiated twice
        has to be computed in :meth:`keeping_activations`.
    """

    def __init__(
        self, model: nn.Module, loss_fn: InspectedLoss, device: torch.device, dtype: torch.dtype, amp: str,
        complex_names: Collection[str] = (), blocks: Mapping[str, Block] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.loss_fn, self.device, self.dtype, self.amp = model, loss_fn, device, dtype, amp
        self.complex_names, self.blocks = frozenset(complex_names), blocks or {}
        self.protected = False
        self.seed: int | None = None
        self.recomputed: list[str] = []
        self._checkpointed: list[Any] | None = None
        self._bound = WithModel(model, loss_fn) if loss_fn.takes_model else None

    def outputs(self, at: LossArguments, theta: Named) -> Any:
        """What the network returns."""
        inputs, state = self._arguments(at.inputs, at, theta)
        arguments, keywords = as_arguments(inputs, self.model)
        with self._pass():
            return functional_call(self.model, state, arguments, keywords)

    def of_outputs(self, outputs: Any, targets: Any) -> Tensor:
        """The loss, given what the network returns.

        Raises
        ------
        CurvatureError
            If the loss takes the network itself.
        """
        if self._bound is not None:
            raise CurvatureError(
                "a loss(model, batch) is no function of the network's outputs, which this matrix needs; "
                "use the Hessian, or a loss(outputs, targets)"
            )
        # losses are sums of exponentials and logarithms: in bfloat16 they would lose what the network computed
        if self.amp == "bf16" and isinstance(outputs, Tensor):
            outputs = outputs.float()
        return self.loss_fn(outputs, map_tensors(targets, torch.clone) if self.protected else targets)

    def __call__(self, at: LossArguments, theta: Named) -> Tensor:
        """The loss."""
        if self._bound is None:
            outputs = self.outputs(at, theta)
            with self._drawing():
                return self.of_outputs(outputs, at.targets)
        batch, state = self._arguments((at.inputs, at.targets), at, theta)
        with self._pass():
            loss: Tensor = functional_call(self._bound, within_model(state), (batch,))
            return loss

    def gradient(self, at: LossArguments, theta: Named) -> list[Tensor]:
        """Its gradient, by reverse mode; zeros for parameters that the loss does not depend on."""
        theta = requiring_grad(theta)
        loss = self(at, theta)
        if not loss.requires_grad:  # it depends on none of them
            return [torch.zeros_like(tensor) for tensor in theta.values()]
        return list(torch.autograd.grad(loss, list(theta.values()), materialize_grads=True))

    def try_out(self, at: LossArguments) -> None:
        """Run network and loss on copies; if they write into their arguments, all later passes get copies.

        Raises
        ------
        DataError
            See :func:`pnanalysis.evaluation.losses.check_targets`.
        ModelError
            If the loss is not finite.
        CurvatureError
            If network or loss use parameters of the network other than those they are given.
        """
        copies: LossArguments = map_tensors(at, torch.clone)
        held = list(tensors(copies))
        before = [tensor._version for tensor in held]
        with torch.enable_grad():
            if self._bound is None:
                outputs = self.outputs(copies, copies.theta)
                check_targets(self.loss_fn, outputs, copies.targets)
                value = self.of_outputs(outputs, copies.targets)
            else:
                value = self(copies, copies.theta)
        check_finite(value)
        self.protected = [tensor._version for tensor in held] != before
        names = foreign(value, self.model)
        if names:
            raise CurvatureError(described(names))

    def in_double(self) -> NetworkLoss:
        """The same in float64, without autocast."""
        twin = copy(self)
        twin.dtype, twin.amp = torch.float64, "no"
        twin.loss_fn = loss_on(self.loss_fn, self.device, torch.float64)
        twin._bound = WithModel(self.model, twin.loss_fn) if twin.loss_fn.takes_model else None
        return twin

    @contextmanager
    def keeping_activations(self) -> Iterator[None]:
        """Within the body, passes keep all activations."""
        before, self.recomputed = self.recomputed, []
        try:
            yield
        finally:
            self.recomputed = before

    def checkpointed_by(self, at: LossArguments) -> list[Any]:
        """What the network itself passes to ``torch.utils.checkpoint``."""
        found: list[Any] = []
        self._checkpointed = found
        try:
            with torch.no_grad():
                self(at, at.theta)
        finally:
            self._checkpointed = None
        return found

    def _arguments(self, given: Any, at: LossArguments, theta: Named) -> tuple[Any, Named]:
        """What a pass is given, and the network's state; copies where it writes into them."""
        state = assembled({**at.others, **as_given(theta, self.complex_names)}, self.blocks)
        if not self.protected:
            return given, state
        copies: tuple[Any, Named] = map_tensors((given, state), torch.clone)
        return copies

    @contextmanager
    def _pass(self) -> Iterator[None]:
        note = None if self._checkpointed is None else self._checkpointed.append
        setting = partial(autocast, self.device, self.amp)
        blocks = recomputing(self.model, self.recomputed, setting)
        with setting(note), unchanged(self.model), self._drawing(), blocks:
            yield

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Random numbers from the seed, if there is one."""
        if self.seed is None:
            yield
            return
        with random_states_kept():
            set_seed(self.seed)
            yield

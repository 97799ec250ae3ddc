"""The loss of one network at many points of parameter space, per example and with several points per pass.

Points are given as *anchors*, a few states of the network, and *weights*, a row for each point: the point is the sum
of the anchors times its weights. Lines, planes and curves through checkpoints are all of this form.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import vmap

from pnanalysis.errors import ModelError
from pnanalysis.evaluation.forward import forward, prediction
from pnanalysis.evaluation.losses import (
    check_mean,
    check_targets,
    example_errors,
    example_losses,
    example_weights,
    linearised,
    loss_on,
)
from pnanalysis.geometry.batch_norm import RunningStatistics
from pnanalysis.inputs.batches import map_tensors
from pnanalysis.inputs.models import Loss, load_weights
from pnanalysis.io.weights import State
from pnanalysis.terminal.progress import Advance
from pnanalysis.torch_internals import ConvolutionBase

Matrix = NDArray[np.float64]
BATCH_NORM = ("reestimate", "interpolate")

_AT_ONCE = 32  # more points per pass gain nothing once launching operations no longer dominates
_SMALL = {"cpu": 50_000, "cuda": 4_000_000}  # parameters; larger networks keep the device busy one at a time


class _BatchValues(NamedTuple):
    """Losses, errors and their weights in the mean, (N,) each, of one batch at one point; and the batch's loss."""

    loss: Tensor
    weight: Tensor
    error: Tensor
    error_weight: Tensor
    batch_loss: Tensor


class PointValues(NamedTuple):
    """Loss of every example at one point, (N,), and its fraction of mistakes, (N,), NaN in regression.

    Of weighted means, what :func:`pnanalysis.evaluation.losses.linearised` makes of them.
    """

    loss: Matrix
    error: Matrix


class LossSurface:
    """Evaluates a network at points of its parameter space.

    Parameters
    ----------
    model : Module
        Only its architecture matters, not its weights.
    loss : callable
        ``loss(outputs, targets)``, averaged over the batch.
    device, dtype
        Where and how to compute; losses are summed in float64.
    bn_batches : iterable of batches, optional
        Re-estimate the running statistics of batch normalisation at each point in a pass over these. Without them,
        running statistics are combined like parameters (variances never below zero).
    at_once : int, optional
        Points per vectorised pass. By default 32 for networks of up to 50,000 parameters on a CPU, or 4,000,000 on
        CUDA, and 1 for larger ones; with convolutions 8 on CUDA and 1 on a CPU, where many at a time are slower.
        Networks that vmap cannot map are evaluated one by one.

    Notes
    -----
    Activations of a linear combination of two networks have smaller variance than those of either, which running
    statistics combined in the same way do not reflect; that alone can cause much of a barrier [1]_. Re-estimation
    sets every running mean and variance to the average over the batches, weighted by their sizes.

    References
    ----------
    .. [1] K. Jordan et al., "REPAIR: REnormalizing Permuted Activations for Interpolation Repair", ICLR 2023,
       arXiv:2211.08403.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        bn_batches: Iterable[Any] | None = None,
        at_once: int | None = None,
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.model = deepcopy(model).to(self.device, dtype).eval()
        self.loss = loss_on(loss, self.device, dtype)
        self.norms = RunningStatistics(self.model)
        self.bn_batches = bn_batches if self.norms else None
        self.at_once = at_once or self._points_at_once()

    @property
    def parameter_names(self) -> list[str]:
        """Names of the trainable parameters, as opposed to what else a state holds: buffers and frozen parameters."""
        return [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def anchor(self, state: Mapping[str, Tensor], origin: str = "weights") -> State:
        """A state of the model's architecture, on the device and in the precision of this surface."""
        load_weights(self.model, state, origin)
        own = [*self.model.named_parameters(), *self.model.named_buffers()]  # tied weights appear once
        return {name: tensor.detach().clone() for name, tensor in own}

    def combine(self, anchors: Sequence[State], weights: Matrix) -> State:
        """The points ``weights (k, A) @ anchors (A)``, stacked: each tensor gets a leading axis k.

        Tensors that are not floating-point are those of the first anchor.
        """
        w = torch.as_tensor(weights, dtype=self.dtype, device=self.device)
        points = {}
        for name, first in anchors[0].items():
            if not first.is_floating_point():
                points[name] = first.expand(len(w), *first.shape).clone()
                continue
            points[name] = torch.tensordot(w, torch.stack([anchor[name] for anchor in anchors]), 1)
        self.norms.make_valid(points)
        return points

    @torch.no_grad()
    def values(
        self, anchors: Sequence[State], weights: Matrix, batches: Iterable[Any], advance: Advance | None = None
    ) -> Iterator[PointValues]:
        """Losses and errors of all examples at each point in turn, with memory for a few points at a time.

        Parameters
        ----------
        anchors : sequence of A states
            See :meth:`anchor`.
        weights : array, shape (K, A)
        batches : re-iterable of (inputs, targets)
        advance : callable, optional
            Called for every point done.

        Raises
        ------
        ModelError
            If the loss is not a mean over examples.
        """
        chunk = max(self.at_once, 1)
        for begin in range(0, len(weights), chunk):
            points = self.combine(anchors, weights[begin : begin + chunk])
            size = len(weights[begin : begin + chunk])
            if self.bn_batches is not None:
                for k in range(size):
                    self.norms.reestimate({n: tensor[k] for n, tensor in points.items()}, self.bn_batches, self._cast)
            for k, found in enumerate(self._pass(points, size, batches)):
                yield found
                if advance is not None:
                    advance(text=f"point {begin + k + 1}")

    def value_and_gradient(
        self, state: State, batches: Iterable[Any], *, batch_statistics: bool = False
    ) -> tuple[float, State]:
        """Mean loss at a state over all batches, and its gradient by parameter name.

        With ``batch_statistics``, batch normalisation uses those of each batch, as in training.
        """
        theta = {name: state[name].detach().requires_grad_() for name in self.parameter_names}
        rest = {name: tensor.clone() for name, tensor in state.items() if name not in theta}
        total, weight_seen = 0.0, 0.0
        gradient = [torch.zeros_like(tensor) for tensor in theta.values()]
        with self.norms.of_batches(batch_statistics):
            for inputs, targets in batches:
                targets = self._cast(targets)
                outputs = forward(self.model, self._cast(inputs), {**rest, **theta})
                check_targets(self.loss, outputs, targets)
                value = self.loss(outputs, targets)
                weight = float(example_weights(self.loss, targets).sum())
                if weight == 0:
                    continue  # all positions are ignored; their mean loss is 0 / 0
                parts = torch.autograd.grad(value, list(theta.values()), allow_unused=True)
                for into, part in zip(gradient, parts, strict=True):
                    if part is not None:
                        into.add_(part, alpha=weight)
                total += float(value.detach()) * weight
                weight_seen += weight
        return total / weight_seen, {name: part / weight_seen for name, part in zip(theta, gradient, strict=True)}

    def _pass(self, points: State, size: int, batches: Iterable[Any]) -> Iterator[PointValues]:
        parts: list[list[_BatchValues]] = [[] for _ in range(size)]
        for inputs, targets in batches:
            for part, row in zip(parts, self._rows(points, size, self._cast(inputs), self._cast(targets)), strict=True):
                check_mean(self.loss, row.batch_loss, row.loss, row.weight)
                part.append(row)
        for part in parts:
            loss, weight, error, error_weight = (
                torch.cat(column).double().cpu().numpy() for column in list(zip(*part, strict=True))[:4]
            )
            yield PointValues(linearised(loss, weight), linearised(error, error_weight))

    def _rows(self, points: State, size: int, inputs: Any, targets: Any) -> list[_BatchValues]:
        """Values for a batch at each point."""
        if self.at_once > 1:
            try:
                found = vmap(self._measure, in_dims=(0, None, None))(points, inputs, targets)
                return [_BatchValues(*row) for row in zip(*found, strict=True)]
            except (RuntimeError, ModelError):  # vmap cannot map what the network or the loss does
                self.at_once = 1
        return [self._measure({n: t[k] for n, t in points.items()}, inputs, targets) for k in range(size)]

    def _measure(self, state: State, inputs: Any, targets: Any) -> _BatchValues:
        outputs = forward(self.model, inputs, state)
        loss, weight = example_losses(self.loss, outputs, targets)
        errors = example_errors(self.loss, prediction(outputs), targets)
        if errors is None:
            errors = torch.full_like(loss, torch.nan), torch.ones_like(loss)
        return _BatchValues(loss, weight, *errors, self.loss(outputs, targets))

    def _points_at_once(self) -> int:
        n_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        convolutions = any(isinstance(module, ConvolutionBase) for module in self.model.modules())
        small = n_parameters <= _SMALL.get(self.device.type, 0)
        if self.bn_batches is not None or not small or (convolutions and self.device.type == "cpu"):
            return 1
        return 8 if convolutions else _AT_ONCE

    def _cast(self, value: Any) -> Any:
        return map_tensors(value, lambda part: part.to(self.dtype) if part.is_floating_point() else part)

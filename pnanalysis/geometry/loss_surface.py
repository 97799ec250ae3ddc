"""The loss of one network at many points of parameter space: example by example, several points per pass over the data.

Points are given by *anchors*, a few states of the network, and *weights*, one row per point: the point is the sum of
the anchors times its weights. Lines, planes and curves through checkpoints are all of this form.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import vmap

from pnanalysis.errors import DataError, ModelError
from pnanalysis.evaluation.batch_pass import BatchPass
from pnanalysis.evaluation.diagnosis import clear_errors
from pnanalysis.evaluation.foreign_parameters import check_no_foreign
from pnanalysis.evaluation.losses import (
    NOTHING_COUNTS,
    check_finite,
    check_mean,
    counts,
    example_weights,
    linearised,
    loss_on,
)
from pnanalysis.evaluation.randomness import check_repeatable
from pnanalysis.geometry.batch_norm import normalise_by_batch, norms_with_statistics, reestimate
from pnanalysis.inputs.batches import map_tensors
from pnanalysis.inputs.copies import copied, in_precision, matching_dtype
from pnanalysis.inputs.loading import load_weights
from pnanalysis.inputs.models import Loss
from pnanalysis.inputs.random_states import random_states_kept
from pnanalysis.io.weights import State
from pnanalysis.terminal.progress import Advance
from pnanalysis.torch_internals import ConvolutionBase, tree_leaves

Matrix = NDArray[np.float64]
#: What to do with the running statistics of batch normalisation between checkpoints.
BATCH_NORM = ("reestimate", "interpolate")

# Small networks are bound by the overhead of single operations, which points in one vectorised pass share; large ones
# are bound by arithmetic and memory, of which a vectorised pass saves nothing.
_POINTS_PER_PASS = 32
_POINTS_PER_PASS_OF_CONVOLUTIONS = 8
_SMALL = {"cpu": 50_000, "cuda": 4_000_000}  # parameters of the largest network that counts as small


class ExampleValues(NamedTuple):
    """Loss and error of every example at one point.

    Where examples have weights, these are the values of :func:`pnanalysis.evaluation.losses.linearised`: their plain
    mean is the weighted mean.

    Attributes
    ----------
    loss : ndarray, shape (N,)
    error : ndarray, shape (N,)
        Fraction of an example's positions that are misclassified; NaN in regression.
    """

    loss: Matrix
    error: Matrix


class _BatchValues(NamedTuple):
    """What one batch of N examples gives at one point; all of shape (N,) but ``batch_loss``, shape ()."""

    loss: Tensor
    loss_weight: Tensor
    error: Tensor
    error_weight: Tensor
    batch_loss: Tensor


class LossSurface:
    """Evaluates a network at points of its parameter space.

    Parameters
    ----------
    model : Module
        The architecture; its weights are not used. It is evaluated in eval mode.
    loss : callable
        ``loss(outputs, targets)``, averaged over the batch.
    device, dtype
        Where and in which precision to compute; losses are summed in float64.
    bn_batches : iterable of batches, optional
        Re-estimate the running statistics of batch normalisation at each point in a pass over these; without them,
        running statistics are combined like parameters (variances never below zero).
    at_once : int, optional
        Points per vectorised pass. By default 32 for networks of up to 50,000 parameters on a CPU, or 4,000,000 on
        CUDA, and 1 for larger ones; with convolutions 8 on CUDA and 1 on a CPU, where larger numbers are slower.
        Networks and losses that cannot be vectorised are evaluated one point at a time.

    Notes
    -----
    A linear combination of two networks has activations of smaller variance than either, which running statistics
    combined in the same way do not reflect; much of a barrier can be due to that alone [1]_. Re-estimation sets
    every running mean and variance to the average over the batches, weighted by their sizes.

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
        self.model = in_precision(copied(model), dtype).to(self.device).eval()
        self.loss = loss_on(loss, self.device, dtype)
        self.norms = norms_with_statistics(self.model)
        self.bn_batches = bn_batches if self.norms else None
        self.at_once = at_once or self._default_at_once()

    @property
    def parameter_names(self) -> list[str]:
        """Names of the trainable parameters; a state also holds buffers and frozen parameters."""
        return [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    @property
    def moved_names(self) -> list[str]:
        """Names of all parameters, of which any may differ between checkpoints: those frozen in one are not in all."""
        return [name for name, _ in self.model.named_parameters()]

    def anchor(self, state: Mapping[str, Tensor], origin: str = "weights") -> State:
        """A state of the model's architecture, copied to the device and precision of this surface.

        ``origin`` names the state in error messages.
        """
        load_weights(self.model, state, origin)
        held = [*self.model.named_parameters(), *self.model.named_buffers()]  # these list tied weights only once
        return {name: tensor.detach().clone() for name, tensor in held}

    def cast(self, value: Any) -> Any:
        """Inputs or targets with their floating-point tensors in the precision of this surface."""
        return map_tensors(value, lambda part: part.to(matching_dtype(part, self.dtype)))

    def combine(self, anchors: Sequence[State], weights: Matrix) -> State:
        """The points ``weights (k, A) @ anchors (A)``, stacked: each tensor gets a leading axis k.

        Tensors of integers (counters, masks) are those of the first anchor.
        """
        w = torch.as_tensor(weights, dtype=self.dtype, device=self.device)
        points = {}
        for name, first in anchors[0].items():
            if not (first.is_floating_point() or first.is_complex()):
                points[name] = first.expand(len(w), *first.shape).clone()
                continue
            points[name] = torch.tensordot(w.to(first.dtype), torch.stack([anchor[name] for anchor in anchors]), 1)
        for name in self.norms:
            # Beyond the ends of a line weights are negative, and a combination of variances can be, too.
            points[f"{name}.running_var"].clamp_(min=0.0)
        return points

    @torch.no_grad()
    def values(
        self, anchors: Sequence[State], weights: Matrix, batches: Iterable[Any], advance: Advance | None = None
    ) -> Iterator[ExampleValues]:
        """Losses and errors of all examples at each point in turn; only a few points are in memory at a time.

        Parameters
        ----------
        anchors : sequence of A states
            See :meth:`anchor`.
        weights : array, shape (K, A)
        batches : re-iterable of (inputs, targets)
        advance : callable, optional
            Called after each point.

        Raises
        ------
        ModelError
            If the loss is not a mean over examples.
        """
        chunk = max(self.at_once, 1)
        for begin in range(0, len(weights), chunk):
            rows = weights[begin : begin + chunk]
            points = self.combine(anchors, rows)
            if self.bn_batches is not None:
                for k in range(len(rows)):
                    batch_inputs = (self.cast(inputs) for inputs, _ in self.bn_batches)
                    reestimate(self.model, self.norms, _point(points, k), batch_inputs)  # in place: points are views
            for k, values in enumerate(self.example_values(points, len(rows), batches)):
                yield values
                if advance is not None:
                    advance(text=f"point {begin + k + 1}")

    def value_and_gradient(
        self, state: State, batches: Iterable[Any], *, batch_statistics: bool = False
    ) -> tuple[float, State]:
        """Mean loss at a state over all batches, and its gradient by parameter name.

        With ``batch_statistics``, batch normalisation uses the statistics of each batch, as in training.
        """
        theta = {name: state[name].detach().requires_grad_() for name in self.parameter_names}
        rest = {name: tensor.clone() for name, tensor in state.items() if name not in theta}
        loss_sum, weight_sum = 0.0, 0.0
        gradient = [torch.zeros_like(tensor) for tensor in theta.values()]
        with normalise_by_batch(self.norms if batch_statistics else {}):
            for inputs, targets in batches:
                batch, at = (self.cast(inputs), self.cast(targets)), {**rest, **theta}
                one = BatchPass.of(self.model, self.loss, *batch, at, predict=False)
                value = one.value()
                is_known = self.loss.torch_loss is not None
                weight = float(example_weights(self.loss, one.targets).sum()) if is_known else one.n
                if weight == 0:  # every position is ignored, and the loss is 0 / 0
                    continue
                parts = torch.autograd.grad(value, list(theta.values()), allow_unused=True)
                for total, part in zip(gradient, parts, strict=True):
                    if part is not None:
                        total.add_(part, alpha=weight)
                loss_sum += float(value.detach()) * weight
                weight_sum += weight
        return loss_sum / weight_sum, {name: part / weight_sum for name, part in zip(theta, gradient, strict=True)}

    @torch.no_grad()
    def example_values(self, points: State, n_points: int, batches: Iterable[Any]) -> Iterator[ExampleValues]:
        """Losses and errors of all examples at each of some stacked points, in one pass over the data.

        Raises
        ------
        ModelError
            If the loss is not a mean over examples.
        """
        by_point: list[list[_BatchValues]] = [[] for _ in range(n_points)]
        for inputs, targets in batches:
            found = self._batch_values(points, n_points, self.cast(inputs), self.cast(targets))
            for seen, values in zip(by_point, found, strict=True):
                check_mean(self.loss, values.batch_loss, values.loss, values.loss_weight)
                seen.append(values)
        for seen in by_point:
            loss, loss_weight, error, error_weight = (
                torch.cat([values[field] for values in seen]).double().cpu().numpy() for field in range(4)
            )
            yield ExampleValues(linearised(loss, loss_weight), linearised(error, error_weight))

    def _batch_values(self, points: State, n_points: int, inputs: Any, targets: Any) -> list[_BatchValues]:
        """Values of a batch at each of some stacked points."""
        if self.at_once > 1:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # vmap names operations that it repeats in a loop
                    stacked = vmap(self._batch_values_at, in_dims=(0, None, None))(points, inputs, targets)
                return [_BatchValues(*values) for values in zip(*stacked, strict=True)]
            except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError):
                # The network or the loss cannot be vectorised (it writes in place, or branches on values). An error of
                # its own comes up again below, without vmap's words around it.
                self.at_once = 1
        return [self._batch_values_at(_point(points, k), inputs, targets) for k in range(n_points)]

    def _batch_values_at(self, state: State, inputs: Any, targets: Any) -> _BatchValues:
        """Values of a batch at one point."""
        one = BatchPass.of(self.model, self.loss, inputs, targets, state)
        loss, loss_weight = one.examples()
        errors = one.errors()
        if errors is None:
            errors = torch.full_like(loss, torch.nan), torch.ones_like(loss)
        return _BatchValues(loss, loss_weight, *errors, one.value().detach())

    def _default_at_once(self) -> int:
        n_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        convolutions = any(isinstance(module, ConvolutionBase) for module in self.model.modules())
        small = n_parameters <= _SMALL.get(self.device.type, 0)
        if self.bn_batches is not None or not small or (convolutions and self.device.type == "cpu"):
            return 1
        return _POINTS_PER_PASS_OF_CONVOLUTIONS if convolutions else _POINTS_PER_PASS


def check_same_function(
    surface: LossSurface, state: State, network: nn.Module, batches: Iterable[Any], names: tuple[str, str]
) -> None:
    """See that a surface, which has one network's code, computes what a network computes with its weights, every time.

    Weights of the same names and shapes may belong to other functions: a ReLU network's fit a tanh network.

    Parameters
    ----------
    surface : LossSurface
    state : mapping of tensors
        The network's :meth:`LossSurface.anchor`.
    network : Module
        Stays as it is.
    batches : re-iterable of (inputs, targets)
    names : (str, str)
        What messages call this network, and the one whose code the surface has.

    Raises
    ------
    ModelError
        If it does not, the network or its loss draws at random, or the loss is not finite.
    DataError
        If the network cannot take the data, or all targets are ignored.
    """
    inputs, targets = first = _first_that_counts(surface.loss, batches)
    network = in_precision(copied(network), surface.dtype).to(surface.device).eval()
    with clear_errors(names[0], network, [first], surface.loss):
        inputs, targets = surface.cast(inputs), surface.cast(targets)
        check_repeatable(names[0], network, (inputs, targets), surface.loss)
        check_no_foreign(names[0], network, (inputs, targets), surface.loss)
        with torch.no_grad(), random_states_kept():
            passes = [
                BatchPass.of(model, surface.loss, inputs, targets, at)
                for model, at in ((network, None), (surface.model, state))
            ]
            check_finite(passes[0].value())
            own, there = ([leaf for leaf in tree_leaves(one.outputs) if isinstance(leaf, Tensor)] for one in passes)
    if len(own) != len(there) or not all(map(_close, own, there)):
        same = "its own copy does" if names[0] == names[1] else f"{names[1]} does"
        raise ModelError(
            f"{names[0]} computes something else than {same} with the same weights; a landscape needs networks of one "
            "architecture, which compute with their parameters alone"
        )


def _first_that_counts(loss: Loss, batches: Iterable[Any]) -> Any:
    """The first batch with a target that is not ignored: the loss of others is 0 / 0.

    Raises
    ------
    DataError
        If there is none.
    """
    for batch in batches:
        _, targets = batch
        if counts(loss, targets):
            return batch
    raise DataError(NOTHING_COUNTS)


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(
        a.to(torch.complex64), b.to(torch.complex64), rtol=1e-3, atol=1e-5, equal_nan=True
    )


def _point(points: State, k: int) -> State:
    """One of several stacked points, as views."""
    return {name: tensor[k] for name, tensor in points.items()}

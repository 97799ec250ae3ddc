"""The loss of one network at many points of parameter space: per example, several points to a pass over the data.

Points are given as *anchors*, a few states of the network, and *weights*, a row for each point: the point is the sum
of the anchors times its weights. Lines, planes and curves through checkpoints are all of this form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map

from pnanalysis.data import LoaderSplit, Split
from pnanalysis.errors import ModelError
from pnanalysis.models import Loss, load_weights
from pnanalysis.progress import Advance
from pnanalysis.runs import State
from pnanalysis.sources import Source

Matrix = NDArray[np.float64]
BATCH_NORM = ("reestimate", "interpolate")

_BY_ELEMENT = (F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits)
_AT_ONCE = 32
_SMALL = {"cpu": 50_000, "cuda": 4_000_000}  # parameters up to which points share a pass


class Values(NamedTuple):
    """Loss of every example at one point, (N,), and whether it is misclassified, (N,), NaN in regression."""

    loss: Matrix
    error: Matrix


class Surface:
    """Evaluates a network at points of its parameter space.

    Parameters
    ----------
    model : Module
        Its architecture counts, not its weights; in eval mode.
    loss : callable
        ``loss(outputs, targets)``, averaged over the batch.
    device, dtype
        Where and how to compute; losses are summed in float64.
    bn_batches : iterable of batches, optional
        Re-estimate the running statistics of batch normalisation at each point in a pass over these; without,
        running statistics are combined like parameters (variances never below zero).
    at_once : int, optional
        Points to a vectorised pass. By default 32 for networks of up to 50,000 parameters on a CPU, or 4,000,000 on
        CUDA, and 1 for larger ones; with convolutions 8 on CUDA and 1 on a CPU, where many at a time are slower.
        What has no vectorised form is done one by one.

    Notes
    -----
    A linear combination of two networks has activations of smaller variance than either, which running statistics
    combined in the same way do not know of; much of a barrier can be due to that alone [1]_. Re-estimation sets
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
        self.model = deepcopy(model).to(self.device, dtype).eval()
        self.loss = loss
        self.norms = {name: module for name, module in self.model.named_modules() if _has_statistics(module)}
        self.bn_batches = bn_batches if self.norms else None
        self.at_once = at_once or self._points_at_once()
        self._checked = False

    @property
    def parameter_names(self) -> list[str]:
        """Names of the trainable parameters, as opposed to what else a state holds: buffers and frozen parameters."""
        return [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def anchor(self, state: Mapping[str, Tensor], origin: str = "weights") -> State:
        """A state on the device and in the precision of this surface; it must be of the model's architecture."""
        load_weights(self.model, state, origin)
        own = [*self.model.named_parameters(), *self.model.named_buffers()]  # tied weights appear once
        return {name: tensor.detach().clone() for name, tensor in own}

    def combine(self, anchors: Sequence[State], weights: Matrix) -> State:
        """The points ``weights (k, A) @ anchors (A)``, stacked: each tensor gets a leading axis k.

        What is not of a floating-point type is that of the first anchor.
        """
        w = torch.as_tensor(weights, dtype=self.dtype, device=self.device)
        points = {}
        for name, first in anchors[0].items():
            if not first.is_floating_point():
                points[name] = first.expand(len(w), *first.shape).clone()
                continue
            points[name] = torch.tensordot(w, torch.stack([anchor[name] for anchor in anchors]), 1)
        for name in self.norms:
            points[f"{name}.running_var"].clamp_(min=0.0)
        return points

    @torch.no_grad()
    def values(
        self, anchors: Sequence[State], weights: Matrix, batches: Iterable[Any], advance: Advance | None = None
    ) -> Iterator[Values]:
        """Losses and errors of all examples at each point in turn; memory for a few points at a time.

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
            If the loss is no mean over examples.
        """
        chunk = max(self.at_once, 1)
        for begin in range(0, len(weights), chunk):
            points = self.combine(anchors, weights[begin : begin + chunk])
            size = len(weights[begin : begin + chunk])
            if self.bn_batches is not None:
                for k in range(size):
                    self._reestimate({name: tensor[k] for name, tensor in points.items()})
            for k, found in enumerate(self._pass(points, size, batches)):
                yield found
                if advance is not None:
                    advance(text=f"point {begin + k + 1}")

    def value_and_gradient(
        self, state: State, batches: Iterable[Any], *, batch_statistics: bool = False
    ) -> tuple[float, State]:
        """Mean loss at a state over all batches, and its gradient by parameter name.

        ``batch_statistics`` has batch normalisation use those of each batch, as in training.
        """
        theta = {name: state[name].detach().requires_grad_() for name in self.parameter_names}
        rest = {name: tensor.clone() for name, tensor in state.items() if name not in theta}
        total, n_seen = 0.0, 0
        gradient = [torch.zeros_like(tensor) for tensor in theta.values()]
        self._train_norms(batch_statistics)
        try:
            for inputs, targets in batches:
                outputs = functional_call(self.model, {**rest, **theta}, (self._cast(inputs),))
                value = self.loss(outputs, self._cast(targets))
                parts = torch.autograd.grad(value, list(theta.values()), allow_unused=True)
                for into, part in zip(gradient, parts, strict=True):
                    if part is not None:
                        into.add_(part, alpha=len(targets))
                total += float(value.detach()) * len(targets)
                n_seen += len(targets)
        finally:
            self._train_norms(False)
        return total / n_seen, {name: part / n_seen for name, part in zip(theta, gradient, strict=True)}

    def _pass(self, points: State, size: int, batches: Iterable[Any]) -> Iterator[Values]:
        parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(size)]
        for inputs, targets in batches:
            inputs, targets = self._cast(inputs), self._cast(targets)
            if not self._checked:
                self._check_loss({name: tensor[0] for name, tensor in points.items()}, inputs, targets)
            for part, row in zip(parts, self._rows(points, size, inputs, targets), strict=True):
                part.append(row)
        for part in parts:
            columns = [torch.cat(column).double().cpu().numpy() for column in zip(*part, strict=True)]
            yield Values(*columns)

    def _rows(self, points: State, size: int, inputs: Any, targets: Any) -> list[tuple[Tensor, Tensor]]:
        """Losses and errors of a batch at each point."""
        if self.at_once > 1:
            try:
                loss, wrong = vmap(self._measure, in_dims=(0, None, None))(points, inputs, targets)
                return list(zip(loss, wrong, strict=True))
            except RuntimeError:  # the network does something that has no vectorised form
                self.at_once = 1
        return [self._measure({n: t[k] for n, t in points.items()}, inputs, targets) for k in range(size)]

    def _measure(self, state: State, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        outputs = functional_call(self.model, state, (inputs,))
        loss = example_losses(self.loss, outputs, targets)
        if isinstance(outputs, Tensor) and isinstance(targets, Tensor) and _are_classes(outputs, targets):
            return loss, (outputs.argmax(1) != targets).reshape(len(targets), -1).to(loss.dtype).mean(1)
        return loss, torch.full_like(loss, float("nan"))

    def _reestimate(self, state: State) -> None:
        """Running statistics of the state from the batches, in place."""
        assert self.bn_batches is not None
        momenta = {name: module.momentum for name, module in self.norms.items()}
        self._train_norms(True)
        try:
            n_seen = 0
            for inputs, targets in self.bn_batches:
                if len(targets) < 2 and n_seen:
                    continue  # one example has no variance
                n_seen += len(targets)
                for module in self.norms.values():
                    module.momentum = len(targets) / n_seen
                functional_call(self.model, state, (self._cast(inputs),))
        finally:
            for name, module in self.norms.items():
                module.momentum = momenta[name]
            self._train_norms(False)

    def _train_norms(self, on: bool) -> None:
        for module in self.norms.values():
            module.train(on)

    def _points_at_once(self) -> int:
        n_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        convolutions = any(isinstance(module, _ConvNd) for module in self.model.modules())
        small = n_parameters <= _SMALL.get(self.device.type, 0)
        if self.bn_batches is not None or not small or (convolutions and self.device.type == "cpu"):
            return 1
        return 8 if convolutions else _AT_ONCE

    def _check_loss(self, state: State, inputs: Any, targets: Any) -> None:
        """The loss must be a mean over examples, else it has no value for a single one."""
        outputs = functional_call(self.model, state, (inputs,))
        whole = float(self.loss(outputs, targets))
        mean = float(example_losses(self.loss, outputs, targets).double().mean())
        if np.isfinite(whole) and abs(mean - whole) > 1e-3 * max(abs(whole), 1e-6):
            raise ModelError(
                f"the loss of a batch ({whole:.6g}) is not the mean over its examples ({mean:.6g}); "
                "a landscape needs a loss that is"
            )
        self._checked = True

    def _cast(self, value: Any) -> Any:
        def cast(part: Any) -> Any:
            return part.to(self.dtype) if isinstance(part, Tensor) and part.is_floating_point() else part

        return tree_map(cast, value)


def example_losses(loss: Loss, outputs: Any, targets: Any) -> Tensor:
    """The loss of each example by itself, (B,).

    Raises
    ------
    ModelError
        If the loss cannot be taken one example at a time.
    """
    if loss in _BY_ELEMENT:
        by_element: Callable[..., Tensor] = loss
        return by_element(outputs, targets, reduction="none").reshape(len(targets), -1).mean(1)
    try:
        return vmap(lambda o, t: loss(*tree_map(lambda part: part.unsqueeze(0), (o, t))))(outputs, targets)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"the loss cannot be taken one example at a time ({reason})") from error


def examples(source: Source, split: str, n: int | None, seed: int, device: torch.device) -> Split | LoaderSplit:
    """``n`` examples of a split, drawn by seed, or all where there are fewer."""
    part = source.data.get(split)
    return part.subset(min(n, len(part)) if n is not None and isinstance(part, Split) else n, seed).to(device)


def mean_and_error(values: Matrix) -> tuple[float, float]:
    """Mean over examples and its standard error (NaN for a single example)."""
    n = len(values)
    with np.errstate(invalid="ignore", over="ignore"):  # losses far out may overflow
        return float(values.mean()), float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")


def _are_classes(outputs: Tensor, targets: Tensor) -> bool:
    """Whether targets are class indices of these outputs."""
    return not targets.is_floating_point() and outputs.ndim == targets.ndim + 1


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None

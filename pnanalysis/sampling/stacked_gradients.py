"""Losses and gradients of one network at several points of its parameter space, in one vectorised pass if possible."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from pnanalysis.evaluation.batch_pass import BatchPass
from pnanalysis.geometry.loss_surface import LossSurface
from pnanalysis.inputs.copies import as_real
from pnanalysis.io.weights import State

#: Relative to its largest entry, how far a vectorised gradient may be from that of one point in float32.
_ROUND_OFF = 1e-3
#: How far from the points gradients are compared, in root mean squares of the parameters, and these at least.
_ASIDE = 0.03


class StackedGradients:
    """Gradients of a surface's loss in some of its parameters.

    Points are rows of a matrix ``(k, P)``: the parameters one after the other, flattened, complex ones as two real
    numbers an entry.

    Parameters
    ----------
    surface : LossSurface
        Says whether several points at a time are faster.
    state : mapping of tensors
        Its :meth:`LossSurface.anchor`: values of everything that points leave as it is.
    names : sequence of str
        The parameters.
    """

    def __init__(self, surface: LossSurface, state: State, names: Sequence[str]) -> None:
        self.surface, self.names = surface, list(names)
        self.state = state
        self._shapes = [as_real(state[name]).shape for name in self.names]
        self._complex = {name for name in self.names if state[name].is_complex()}
        self._vectorised: bool | None = None if surface.at_once > 1 else False
        self._losses = vmap(self._loss, in_dims=(0, None, None))

    @property
    def centre(self) -> Tensor:
        """The point of the state itself, ``(P,)``."""
        return torch.cat([as_real(self.state[name]).flatten() for name in self.names])

    def states(self, points: Tensor) -> State:
        """All tensors of the network at some points ``(k, P)``, stacked."""
        k = len(points)
        stacked = {name: tensor.expand(k, *tensor.shape) for name, tensor in self.state.items()}
        return stacked | self._parameters(points)

    def __call__(self, points: Tensor, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Losses ``(k,)`` of a batch at some points ``(k, P)``, and their gradients ``(k, P)``."""
        inputs, targets = self.surface.cast(inputs), self.surface.cast(targets)
        if self._vectorised is None:
            self._vectorised = self._agrees(points, inputs, targets)
        if self._vectorised:
            return self._at_once(points, inputs, targets)
        found = [self._at_one(point, inputs, targets) for point in points]
        losses, gradients = zip(*found, strict=True)
        return torch.stack(losses), torch.stack(gradients)

    def losses(self, points: Tensor, inputs: Any, targets: Any) -> Tensor:
        """Losses ``(k,)`` of a batch at some points ``(k, P)``, without gradients."""
        inputs, targets = self.surface.cast(inputs), self.surface.cast(targets)
        if self._vectorised is None:
            self._vectorised = self._agrees(points, inputs, targets)
        with torch.no_grad():
            if not self._vectorised:
                each = [{name: part[0] for name, part in self._parameters(point[None]).items()} for point in points]
                return torch.stack([self._loss(theta, inputs, targets) for theta in each])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # vmap names operations that it repeats in a loop
                return self._losses(self._parameters(points), inputs, targets)

    def _agrees(self, points: Tensor, inputs: Any, targets: Any) -> bool:
        """Whether a vectorised pass is possible, and gives what the pass of a single point does.

        Compared are passes a little away from the points: at a minimum, gradients may be nothing but round-off, which
        differs between the two.
        """
        aside = torch.arange(points.shape[1], device=points.device, dtype=points.dtype).sin()
        points = points + _ASIDE * aside * (points.norm() / points.numel() ** 0.5).clamp_min(_ASIDE)
        try:
            losses, gradients = self._at_once(points, inputs, targets)
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError):
            return False  # an error of the network's own comes up again without vmap
        loss, gradient = self._at_one(points[-1], inputs, targets)
        error = (gradients[-1] - gradient).abs().max() / gradient.abs().max().clamp_min(1e-30)
        return bool(error < _ROUND_OFF) and bool((losses[-1] - loss).abs() <= _ROUND_OFF * loss.abs().clamp_min(1e-30))

    def _at_once(self, points: Tensor, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        theta = {name: part.detach().requires_grad_() for name, part in self._parameters(points).items()}
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore", UserWarning)  # vmap names operations that it repeats in a loop
            losses = self._losses(theta, inputs, targets)
            # no parameter belongs to two points, so that the gradient of the sum holds that of each
            parts = torch.autograd.grad(losses.sum(), list(theta.values()), materialize_grads=True)
        return losses.detach(), torch.cat([as_real(_dense(part)).flatten(1) for part in parts], dim=1)

    def _at_one(self, point: Tensor, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        theta = {name: part[0].detach().requires_grad_() for name, part in self._parameters(point[None]).items()}
        with torch.enable_grad():
            loss = self._loss(theta, inputs, targets)
            parts = torch.autograd.grad(loss, list(theta.values()), materialize_grads=True)
        return loss.detach(), torch.cat([as_real(_dense(part)).flatten() for part in parts])

    def _loss(self, theta: State, inputs: Any, targets: Any) -> Tensor:
        surface = self.surface
        state = {**self.state, **theta}
        return BatchPass.of(surface.model, surface.loss, inputs, targets, state, predict=False).value()

    def _parameters(self, points: Tensor) -> State:
        parts = points.split([shape.numel() for shape in self._shapes], dim=1)
        named = {
            name: _viewable(part).reshape(len(points), *shape)
            for name, shape, part in zip(self.names, self._shapes, parts, strict=True)
        }
        return {
            name: torch.view_as_complex(part.contiguous()) if name in self._complex else part
            for name, part in named.items()
        }


def _dense(part: Tensor) -> Tensor:
    """A gradient with all its entries; those of sparse embeddings have the touched rows only."""
    return part if part.layout is torch.strided else part.to_dense()


def _viewable(part: Tensor) -> Tensor:
    """Entries that a network may view as complex numbers, which torch cannot from an odd offset on."""
    return (
        part
        if part.is_contiguous() and part.storage_offset() % 2 == 0
        else part.clone(memory_format=torch.contiguous_format)
    )

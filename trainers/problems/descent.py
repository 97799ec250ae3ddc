"""Gradient descent on a surface of two parameters, from one start or from many at once.

A surface with a closed-form gradient is followed in plain arithmetic: Python floats for one start, NumPy arrays for
several. Any other surface goes through torch's autograd, all starts at once if it can be mapped over a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pnanalysis.errors import TrainingError

#: A function of two 0-d float64 tensors that returns one, made of torch operations.
PlaneFunction = Callable[[Tensor, Tensor], Tensor]
Number = TypeVar("Number", float, np.ndarray)
#: ``(x, y) -> (df/dx, df/dy)``, of Python floats or elementwise of NumPy arrays.
ClosedFormGradient = Callable[[Number, Number], tuple[Number, Number]]
_BatchedGradient = Callable[[Tensor, Tensor], tuple[tuple[Tensor, Tensor], Tensor]]


class Descent:
    """Gradient descents on one surface.

    Parameters
    ----------
    surface : callable
        Function of two 0-d float64 tensors that returns one.
    gradient : callable, optional
        The surface's gradient in closed form, ``(x, y) -> (df/dx, df/dy)``, finite wherever the surface is.
    strict : bool
        Whether to raise an error where the surface or its gradient is not finite; otherwise that descent ends as NaN.

    Raises
    ------
    TrainingError
        If the surface does not return one differentiable number.
    """

    def __init__(self, surface: PlaneFunction, gradient: ClosedFormGradient | None = None, strict: bool = True) -> None:
        self.surface, self.gradient, self.strict = surface, gradient, strict
        value = surface(*torch.tensor([0.5, 0.25], dtype=torch.float64, requires_grad=True))
        if not (isinstance(value, Tensor) and value.ndim == 0 and value.requires_grad):
            raise TrainingError("the surface must return one number, a 0-d tensor made from its arguments by torch")

    def run(self, starts: np.ndarray, lr: float, steps: Sequence[int]) -> np.ndarray:
        """Positions ``(len(steps), n, 2)`` at the given steps, the first of which is 0, from ``starts`` ``(n, 2)``."""
        if self.gradient is not None:
            positions = _follow(self.gradient, starts, lr, steps)
            # Only the walk through torch checks every step, and so can name the first one that failed.
            if not self.strict or np.isfinite(positions).all():
                return positions
        return self._by_autograd(starts, lr, steps)

    def _by_autograd(self, starts: np.ndarray, lr: float, steps: Sequence[int]) -> np.ndarray:
        here = np.array(starts, dtype=float)
        x, y = torch.from_numpy(here.T.copy())
        gradient_of = _batched_gradient(self.surface, x, y)
        positions = np.empty((len(steps), *here.shape))
        rows = {step: k for k, step in enumerate(steps)}
        for step in range(steps[-1] + 1):
            if step in rows:
                positions[rows[step]] = here
            if step == steps[-1] and not self.strict:
                break
            x, y = torch.from_numpy(here.T.copy())
            slopes, values = gradient_of(x, y)
            if self.strict:
                _check_finite(here, torch.stack([*slopes, values]), step)
            here = here - lr * torch.stack(slopes, dim=1).numpy()
        return positions


def _follow(gradient: ClosedFormGradient, starts: np.ndarray, lr: float, steps: Sequence[int]) -> np.ndarray:
    """What :meth:`Descent.run` returns, by a closed-form gradient."""
    positions = np.empty((len(steps), *np.shape(starts)))
    positions[0] = starts
    # One start as Python floats: a step takes a microsecond or two, ten times less than on NumPy arrays.
    x, y = starts[0].tolist() if len(starts) == 1 else starts.T
    lr = float(lr)
    with np.errstate(all="ignore"):  # a descent that runs away overflows
        for k, (before, now) in enumerate(pairwise(steps), start=1):
            for _ in range(now - before):
                slope_x, slope_y = gradient(x, y)
                x = x - lr * slope_x
                y = y - lr * slope_y
            positions[k] = np.stack([x, y], axis=-1)
    return positions


def values_at(surface: PlaneFunction, points: np.ndarray) -> np.ndarray:
    """Values ``(n,)`` of the surface at ``points`` ``(n, 2)``."""
    x, y = torch.from_numpy(np.ascontiguousarray(points.T, dtype=float))
    try:
        return torch.func.vmap(surface)(x, y).detach().numpy()
    except RuntimeError:  # not every function can be mapped over a batch (a branch on a value cannot)
        return np.array([float(surface(a, b)) for a, b in zip(x, y, strict=True)])


def _check_finite(positions: np.ndarray, numbers: Tensor, step: int) -> None:
    bad = (~numbers.isfinite()).any(0).nonzero()
    if len(bad):
        x, y = positions[int(bad[0])]
        raise TrainingError(
            f"the surface or its gradient is not finite at step {step}, at ({x:.6g}, {y:.6g}); "
            "start elsewhere or try a smaller lr"
        )


def _batched_gradient(surface: PlaneFunction, x: Tensor, y: Tensor) -> _BatchedGradient:
    """Slopes and value of the surface at many points: all at once, or point by point where that fails."""

    def at_point(a: Tensor, b: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        return torch.func.grad_and_value(surface, argnums=(0, 1))(a, b)

    def at_each(xs: Tensor, ys: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        slopes, values = zip(*(at_point(a, b) for a, b in zip(xs, ys, strict=True)), strict=True)
        slopes_x, slopes_y = (torch.stack(part) for part in zip(*slopes, strict=True))
        return (slopes_x, slopes_y), torch.stack(values)

    try:
        # Tracing pays vmap's and grad's overhead, a millisecond, once instead of at every step.
        return make_fx(torch.func.vmap(at_point))(x, y)
    except RuntimeError:  # a branch on a value, for example
        return at_each

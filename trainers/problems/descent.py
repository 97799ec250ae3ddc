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

from pnanalysis.errors import DivergenceError, TrainingError

#: A function of two 0-d float64 tensors that returns one, made of torch operations.
PlaneFunction = Callable[[Tensor, Tensor], Tensor]
Number = TypeVar("Number", float, np.ndarray)
#: ``(x, y) -> (df/dx, df/dy)``, of Python floats or elementwise of NumPy arrays.
ClosedFormGradient = Callable[[Number, Number], tuple[Number, Number]]


def descent_positions(
    surface: PlaneFunction,
    starts: np.ndarray,
    lr: float,
    steps: Sequence[int],
    gradient: ClosedFormGradient | None = None,
    strict: bool = True,
) -> np.ndarray:
    """Positions along gradient descents on one surface.

    Parameters
    ----------
    surface : callable
        Function of two 0-d float64 tensors that returns one.
    starts : ndarray, shape (n, 2)
    lr : float
    steps : sequence of int
        The steps whose positions are returned; the first is 0.
    gradient : callable, optional
        The surface's gradient in closed form, ``(x, y) -> (df/dx, df/dy)``, finite wherever the surface is.
    strict : bool
        Whether to raise an error where the surface or its gradient is not finite; otherwise that descent ends as NaN.

    Returns
    -------
    ndarray, shape (len(steps), n, 2)

    Raises
    ------
    TrainingError
        If the surface does not return one differentiable number, or see ``strict``.
    """
    value = surface(*torch.tensor([0.5, 0.25], dtype=torch.float64, requires_grad=True))
    if not (isinstance(value, Tensor) and value.ndim == 0 and value.requires_grad):
        raise TrainingError("the surface must return one number, a 0-d tensor made from its arguments by torch")
    if gradient is not None:
        positions = _by_closed_form(gradient, starts, lr, steps)
        # Only the descent through torch checks every step, and so can name the first one that failed.
        if not strict or np.isfinite(positions).all():
            return positions
    return _by_autograd(surface, starts, lr, steps, strict)


def values_at(surface: PlaneFunction, points: np.ndarray) -> np.ndarray:
    """Values ``(n,)`` of the surface at ``points`` ``(n, 2)``."""
    return _values(surface, *torch.from_numpy(points.T.astype(float))).detach().numpy()


def _by_closed_form(gradient: ClosedFormGradient, starts: np.ndarray, lr: float, steps: Sequence[int]) -> np.ndarray:
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


def _by_autograd(
    surface: PlaneFunction, starts: np.ndarray, lr: float, steps: Sequence[int], strict: bool
) -> np.ndarray:
    xy = torch.tensor(starts.T, dtype=torch.float64)
    positions, rows = np.empty((len(steps), *np.shape(starts))), {step: k for k, step in enumerate(steps)}
    for step in range(steps[-1] + 1):
        if step in rows:
            positions[rows[step]] = xy.T
        point = xy.clone().requires_grad_()
        values = _values(surface, *point)
        (slopes,) = torch.autograd.grad(values.sum(), point)
        if strict:
            _check_finite(xy, torch.cat([slopes, values[None]]), step)
        xy = xy - lr * slopes
    return positions


def _values(surface: PlaneFunction, x: Tensor, y: Tensor) -> Tensor:
    if len(x) > 1:  # for a single point vmap would take as long as the surface itself
        try:
            return torch.func.vmap(surface)(x, y)
        except RuntimeError:  # not every function can be mapped over a batch (a branch on a value cannot)
            pass
    return torch.stack([surface(a, b) for a, b in zip(x, y, strict=True)])


def _check_finite(xy: Tensor, numbers: Tensor, step: int) -> None:
    bad = (~numbers.isfinite()).any(0).nonzero()
    if len(bad):
        x, y = xy[:, int(bad[0])].tolist()
        raise DivergenceError(
            f"the surface or its gradient is not finite at step {step}, at ({x:.6g}, {y:.6g}); "
            "start elsewhere or try a smaller lr"
        )

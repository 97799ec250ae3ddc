"""Gradient descent on a surface of two parameters, as fast as the surface allows.

Most surfaces become plain arithmetic (:mod:`trainers.problems.compiled_gradient`): floats for one start, arrays for many. The rest
go through torch, all starts at once if the surface can be mapped over a batch, else one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pnanalysis.errors import TrainingError
from trainers.problems.compiled_gradient import Gradient, Surface, compile_gradient

_Batched = Callable[[Tensor, Tensor], tuple[tuple[Tensor, Tensor], Tensor]]


class Descent:
    """Gradient descents on one surface.

    Parameters
    ----------
    surface : callable
        Function of two 0-d float64 tensors that returns one.
    strict : bool
        Whether a value or gradient that is not finite is an error; otherwise its start is lost, as NaN.

    Raises
    ------
    TrainingError
        If the surface does not return one differentiable number.
    """

    def __init__(self, surface: Surface, strict: bool = True) -> None:
        self.surface, self.strict = surface, strict
        probe = surface(*torch.tensor([0.5, 0.25], dtype=torch.float64, requires_grad=True))
        if not (isinstance(probe, Tensor) and probe.ndim == 0 and probe.requires_grad):
            raise TrainingError("the surface must return one number, a 0-d tensor made from its arguments by torch")
        self._torch: _Batched | None = None

    def run(self, starts: np.ndarray, lr: float, steps: Sequence[int]) -> np.ndarray:
        """Positions ``(len(steps), n, 2)`` at the given steps, the first of which is 0, from ``starts`` ``(n, 2)``."""
        gradient = compile_gradient(self.surface, "float" if len(starts) == 1 else "array")
        positions = np.empty((len(steps), *np.shape(starts)))
        positions[0] = starts
        if self.strict:
            self._torch_steps(positions[0], lr, 0, 0)  # only checks
        for k, (before, now) in enumerate(pairwise(steps)):
            there = None if gradient is None else _plain_steps(gradient, positions[k], lr, now - before, self.strict)
            positions[k + 1] = self._torch_steps(positions[k], lr, before, now) if there is None else there
        if self.strict:
            self._torch_steps(positions[-1], lr, steps[-1], steps[-1])
        return positions

    def _torch_steps(self, positions: np.ndarray, lr: float, before: int, now: int) -> np.ndarray:
        """Steps through torch, each checked if strict: for what plain arithmetic cannot do or does not survive."""
        positions = positions.copy()
        for step in range(before, now + 1):
            gradient, value = self._batched(positions)
            if self.strict:
                _check(positions, torch.stack([*gradient, value]), step)
            if step < now:
                positions -= lr * torch.stack(gradient, dim=1).numpy()
        return positions

    def _batched(self, positions: np.ndarray) -> tuple[tuple[Tensor, Tensor], Tensor]:
        x, y = torch.from_numpy(positions.T.copy())
        if self._torch is None:
            self._torch = _trace(self.surface, x, y)
        return self._torch(x, y)


def _check(positions: np.ndarray, numbers: Tensor, step: int) -> None:
    bad = (~numbers.isfinite()).any(0).nonzero()
    if len(bad):
        x, y = positions[int(bad[0])]
        raise TrainingError(
            f"the surface or its gradient is not finite at step {step}, at ({x:.6g}, {y:.6g}); "
            "start elsewhere or try a smaller lr"
        )


def values_at(surface: Surface, points: np.ndarray) -> np.ndarray:
    """Values ``(n,)`` of the surface at ``points`` ``(n, 2)``."""
    x, y = torch.from_numpy(np.ascontiguousarray(points.T, dtype=float))
    try:
        return torch.func.vmap(surface)(x, y).detach().numpy()
    except RuntimeError:  # not every function can be mapped over a batch (a branch on a value cannot)
        return np.array([float(surface(a, b)) for a, b in zip(x, y, strict=True)])


def _plain_steps(gradient: Gradient, positions: np.ndarray, lr: float, steps: int, strict: bool) -> np.ndarray | None:
    """``steps`` steps in plain arithmetic; ``None`` if it breaks off or, if strict, meets what is not finite."""
    x, y = positions[0].tolist() if len(positions) == 1 else positions.T
    trace: float | np.ndarray = 0.0  # stays zero as long as all values are finite
    try:
        with np.errstate(all="ignore"):
            for _ in range(steps):
                slope_x, slope_y, value = gradient(x, y)
                x = x - lr * slope_x
                y = y - lr * slope_y
                trace = trace + (value - value)
    except (ArithmeticError, ValueError):
        return None
    there = np.stack(np.broadcast_arrays(x, y), axis=-1).reshape(-1, 2)
    return None if strict and not np.isfinite(there + np.reshape(trace, (-1, 1))).all() else there


def _trace(surface: Surface, x: Tensor, y: Tensor) -> _Batched:
    """Gradient and value of the surface at many points: one traced graph, or point by point where that fails."""

    def one(a: Tensor, b: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        return torch.func.grad_and_value(surface, argnums=(0, 1))(a, b)

    def each(xs: Tensor, ys: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        results = [one(a, b) for a, b in zip(xs, ys, strict=True)]
        gradients, values = zip(*results, strict=True)
        return (torch.stack([g[0] for g in gradients]), torch.stack([g[1] for g in gradients])), torch.stack(values)

    try:
        return make_fx(torch.func.vmap(one))(x, y)
    except RuntimeError:
        return each

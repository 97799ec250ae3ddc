"""Gradient descent on surfaces of two parameters: plain, persistent and restarted.

A surface is a function of two 0-d float64 tensors made of torch operations. :func:`two_well` is the paper's; any other
does as well. A penalised surface is again a surface, so every function here takes it too.

References
----------
Y. Min, "Persistent Neurons", arXiv:2007.01419, section 2.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pnanalysis import schema
from pnanalysis.errors import TrainingError
from pnanalysis.terminal.progress import progress_bar
from trainers.problems.compiled_gradient import Surface
from trainers.problems.descent import Descent, values_at
from trainers.seeds import derive_seed

START = (-0.335, -1.4)
WINDOW = ((-4.0, 4.0), (-4.0, 2.0))
Window = tuple[tuple[float, float], tuple[float, float]]
OnIteration = Callable[[xr.Dataset], None]


def two_well(x: Tensor, y: Tensor) -> Tensor:
    """The paper's surface (its eq. 1 with the sign put right): a wide well at (2, -2), a deeper one at (-2, -1)."""
    wide = torch.exp(-((x - 2) ** 2 + (y + 2) ** 2) / 5)
    return -wide - 1.5 * torch.exp(-((x + 2) ** 2 + (y + 1) ** 2))


def penalised(surface: Surface, ends: Sequence[Sequence[float]] | np.ndarray, lam: float) -> Surface:
    r"""The surface with a repulsion from earlier end points, the f_n of a persistent iteration.

    .. math:: f_n(\theta) = f(\theta) + \lambda\sum_k|\langle\Theta_k,\theta\rangle|/\lVert\Theta_k\rVert^2

    Parameters
    ----------
    surface : callable
    ends : array_like, shape (n, 2)
        Earlier end points; one at the origin repels nothing and is left out, with a warning.
    lam : float

    Raises
    ------
    TrainingError
        If ``lam`` is negative or not finite.
    """
    _check_lam(lam)
    slopes = []
    for a, b in np.asarray(ends, dtype=float).reshape(-1, 2).tolist():
        if norm := a * a + b * b:
            slopes.append((lam * a / norm, lam * b / norm))
        else:
            warnings.warn("an end point at the origin repels nothing: left out", stacklevel=2)
    if not slopes:
        return surface

    def repelled(x: Tensor, y: Tensor) -> Tensor:
        value = surface(x, y)
        for a, b in slopes:
            value = value + (a * x + b * y).abs()
        return value

    return repelled


def descend(
    surface: Surface = two_well,
    start: Sequence[float] = START,
    *,
    iterations: int = 2,
    lam: float = 0.1,
    lr: float = 1e-3,
    steps: int = 50_000,
    samples: int = 500,
    progress: bool = True,
    on_iteration: OnIteration | None = None,
    resume: xr.Dataset | None = None,
) -> xr.Dataset:
    """Plain descent (iteration 0) and persistent ones, all from one start, each repelled from all earlier end points.

    Parameters
    ----------
    surface : callable
        Function of two 0-d float64 tensors that returns one.
    start : sequence of two floats
    iterations : int
        Descents, the plain one included.
    lam : float
        Strength of the repulsion; both parameters together are one layer.
    lr, steps
        Gradient descent without momentum.
    samples : int
        Positions kept, besides the start.
    progress : bool
        Show a bar on a terminal.
    on_iteration : callable, optional
        Called after each iteration with the dataset so far.
    resume : xarray.Dataset, optional
        An earlier dataset of the same settings to go on from.

    Returns
    -------
    xarray.Dataset
        Kind ``descent``: ``path`` (iteration, step, component), ``value`` (iteration, step) of the unpenalised
        surface, ``end`` (iteration, component), ``end_value`` (iteration) and ``champion``, the iteration with the
        lowest.

    Raises
    ------
    TrainingError
        If a setting is unusable, or surface or gradient stop being finite on the way (the message names the step).
    """
    _check_lam(lam)
    here = _point(start)
    settings = {"strategy": "persistent", "lam": lam, "lr": lr, "steps": steps, "start": list(here)}
    study = _Study(surface, settings, samples, resume)
    with progress_bar("persistent descents", max(iterations - len(study.paths), 0), progress) as advance:
        for _ in range(len(study.paths), at_least(iterations, 1, "iterations")):
            ends = [path[-1] for path in study.paths]
            descent = Descent(penalised(surface, ends, lam))
            study.add(descent.run(np.array([here]), lr, study.steps))
            advance(1)
            if on_iteration is not None:
                on_iteration(study.dataset())
    return study.dataset()


def descend_restarts(
    surface: Surface = two_well,
    start: Sequence[float] = START,
    *,
    iterations: int = 2,
    window: Window = WINDOW,
    seed: int = 0,
    lr: float = 1e-3,
    steps: int = 50_000,
    samples: int = 500,
) -> xr.Dataset:
    """The control of equal cost: the plain descent and others from starts drawn uniformly from the window, all at once.

    Parameters and result are those of :func:`descend`; start k depends on ``seed`` and k alone.

    Raises
    ------
    TrainingError
        As for :func:`descend`.
    """
    (left, right), (bottom, top) = window
    starts = [_point(start)]
    for k in range(1, at_least(iterations, 1, "iterations")):
        u, v = np.random.default_rng(derive_seed(seed, "restart", k)).random(2)
        starts.append((left + (right - left) * u, bottom + (top - bottom) * v))
    study = _Study(surface, {"strategy": "restart", "lr": lr, "steps": steps, "seed": seed}, samples, None)
    study.add(Descent(surface).run(np.array(starts), lr, study.steps))
    return study.dataset()


def surfaces(surface: Surface, descent: xr.Dataset, *, window: Window = WINDOW, n: int = 201) -> xr.Dataset:
    """The surface every iteration of a persistent descent went down: f, f_1, f_2, ...

    Parameters
    ----------
    surface : callable
        The unpenalised one.
    descent : xarray.Dataset
        From :func:`descend`.
    window : pair of pairs
        Ends of the x and of the y axis.
    n : int
        Points along each axis.

    Returns
    -------
    xarray.Dataset
        Kind ``surface``: ``value`` (iteration, y, x), NaN where the surface has no value.
    """
    x, y = axes(window, n)
    ends, lam = descent["end"].values, descent.attrs.get("lam", 0.0)
    values = []
    for k in descent["iteration"].values:
        grid = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
        values.append(values_at(penalised(surface, ends[:k], lam), grid).reshape(n, n))
    ds = xr.Dataset({"value": (("iteration", "y", "x"), np.stack(values))}, coords={"x": x, "y": y})
    return schema.finish(ds.assign_coords(iteration=descent["iteration"].values), "surface", lam=lam)


class _Study:
    """Paths so far, and the dataset they make."""

    def __init__(self, surface: Surface, settings: dict[str, Any], samples: int, resume: xr.Dataset | None) -> None:
        steps, lr = at_least(settings["steps"], 1, "steps"), settings["lr"]
        if not (math.isfinite(lr) and lr > 0):
            raise TrainingError(f"lr is {lr}; it must be positive and finite")
        self.surface, self.settings = surface, settings
        sampled = np.linspace(0, steps, at_least(samples, 1, "samples") + 1).round().astype(int)
        self.steps: list[int] = np.unique(sampled).tolist()
        self.paths: list[np.ndarray] = []
        if resume is not None:
            self._restore(resume)

    def add(self, positions: np.ndarray) -> None:
        """Paths, shape (steps, starts, 2)."""
        self.paths += list(positions.transpose(1, 0, 2))

    def dataset(self) -> xr.Dataset:
        """Everything so far."""
        paths = np.stack(self.paths)
        value = values_at(self.surface, paths.reshape(-1, 2)).reshape(paths.shape[:2])
        variables = {
            "path": (("iteration", "step", "component"), paths),
            "value": (("iteration", "step"), value),
            "end": (("iteration", "component"), paths[:, -1]),
            "end_value": ("iteration", value[:, -1]),
            "champion": ((), int(value[:, -1].argmin())),
        }
        coords = {"iteration": np.arange(len(paths)), "step": self.steps, "component": ["x", "y"]}
        return schema.finish(xr.Dataset(variables, coords=coords), "descent", dtype="float64", **self.settings)

    def _restore(self, ds: xr.Dataset) -> None:
        schema.validate(ds, "descent")
        for name, value in self.settings.items():
            if ds.attrs.get(name) != (value if isinstance(value, int | float | str) else str(value)):
                raise TrainingError(f"cannot go on with descents of another {name}; start anew or use its {name}")
        if ds["step"].values.tolist() != self.steps:
            raise TrainingError("cannot go on with descents sampled at other steps; start anew")
        self.paths = list(ds["path"].values)


def axes(window: Window, n: int) -> tuple[np.ndarray, np.ndarray]:
    """``n`` points along x and ``n`` along y.

    Raises
    ------
    TrainingError
        If the window is empty or ``n`` too small.
    """
    (left, right), (bottom, top) = window
    if not (left < right and bottom < top):
        raise TrainingError(f"window {window} must be ((left, right), (bottom, top)) with left < right, bottom < top")
    at_least(n, 2, "n")
    return np.linspace(left, right, n), np.linspace(bottom, top, n)


def _point(start: Sequence[float]) -> tuple[float, float]:
    point = [float(value) for value in start]
    if len(point) != 2 or not all(map(math.isfinite, point)):
        raise TrainingError(f"start {tuple(start)} must be two finite numbers")
    return point[0], point[1]


def _check_lam(lam: float) -> None:
    if not (math.isfinite(lam) and lam >= 0):
        raise TrainingError(f"lam is {lam}; it must be a finite number, zero or more")


def at_least(value: int, least: int, name: str) -> int:
    """``value``, or a :class:`TrainingError` that names it."""
    if value < least:
        raise TrainingError(f"{name} is {value}; it must be at least {least}")
    return value

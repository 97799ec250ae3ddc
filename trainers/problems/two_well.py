"""Gradient descent on surfaces of two parameters: plain, persistent and restarted.

A surface is a function of two 0-d float64 tensors made of torch operations. :func:`two_well` is the paper's; any other
can take its place. A penalised surface is again a surface, so every function here accepts it too.

References
----------
Y. Min, "Persistent Neurons", arXiv:2007.01419, section 2.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pnanalysis import schema
from pnanalysis.errors import TrainingError
from pnanalysis.terminal.progress import progress_bar
from trainers.problems.descent import ClosedFormGradient, Number, PlaneFunction, descent_positions, values_at
from trainers.seeds import derive_seed

START = (-0.335, -1.4)
WINDOW = ((-4.0, 4.0), (-4.0, 2.0))
Window = tuple[tuple[float, float], tuple[float, float]]
OnIteration = Callable[[xr.Dataset], None]


def two_well(x: Tensor, y: Tensor) -> Tensor:
    """The paper's eq. 1, with its sign corrected: a wide well at (2, -2) and a deeper, narrow one at (-2, -1)."""
    wide = torch.exp(-((x - 2) ** 2 + (y + 2) ** 2) / 5)
    return -wide - 1.5 * torch.exp(-((x + 2) ** 2 + (y + 1) ** 2))


def penalised(surface: PlaneFunction, ends: Sequence[Sequence[float]] | np.ndarray, lam: float) -> PlaneFunction:
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
    lam, slopes = float(lam), []  # NumPy's scalars would make the arithmetic of a descent ten times slower
    for a, b in np.asarray(ends, dtype=float).reshape(-1, 2).tolist():
        if norm := a * a + b * b:
            slopes.append((lam * a / norm, lam * b / norm))
        else:
            warnings.warn("an end point at the origin repels nothing and is left out", stacklevel=2)
    return _Penalised(surface, tuple(slopes)) if slopes else surface


@dataclass(frozen=True)
class _Penalised:
    """A surface plus ``|a x + b y|`` for each pair of slopes (a, b)."""

    surface: PlaneFunction
    slopes: tuple[tuple[float, float], ...]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        value = self.surface(x, y)
        for a, b in self.slopes:
            value = value + (a * x + b * y).abs()
        return value


def closed_form_gradient(surface: PlaneFunction) -> ClosedFormGradient | None:
    """The gradient of :func:`two_well`, or of it penalised, in plain arithmetic; ``None`` for other surfaces.

    A step of descent is some forty multiplications, which cost a microsecond or two as Python floats and more than a
    hundred as torch operations.
    """
    if surface is two_well:
        return _two_well_gradient
    if isinstance(surface, _Penalised):
        unpenalised = closed_form_gradient(surface.surface)
        return None if unpenalised is None else _penalised_gradient(unpenalised, surface.slopes)
    return None


def _two_well_gradient(x: Number, y: Number) -> tuple[Number, Number]:
    exp: Callable[[Any], Any] = math.exp if isinstance(x, float) else np.exp  # np.exp is slow on a single float
    right, up = x - 2, y + 2  # from the centre of the wide well
    wide = 0.4 * exp((right * right + up * up) / -5)
    left, down = x + 2, y + 1  # from that of the deep one
    deep = 3 * exp(-(left * left + down * down))
    return wide * right + deep * left, wide * up + deep * down


def _penalised_gradient(unpenalised: ClosedFormGradient, slopes: Sequence[tuple[float, float]]) -> ClosedFormGradient:
    def gradient(x: Number, y: Number) -> tuple[Number, Number]:
        slope_x, slope_y = unpenalised(x, y)
        for a, b in slopes:
            side = _sign(a * x + b * y)
            slope_x = slope_x + a * side
            slope_y = slope_y + b * side
        return slope_x, slope_y

    return gradient


def _sign(value: Number) -> Any:
    """-1, 0 or 1; zero at the kink, like torch's gradient of ``abs``."""
    return float(value > 0) - float(value < 0) if isinstance(value, float) else np.sign(value)


def descend(
    surface: PlaneFunction = two_well,
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
    """Plain descent (iteration 0), then persistent ones from the same start, each repelled from all earlier end points.

    Parameters
    ----------
    surface : callable
        Function of two 0-d float64 tensors that returns one.
    start : sequence of two floats
    iterations : int
        Number of descents, the plain one included.
    lam : float
        Strength of the repulsion; both parameters together are one layer.
    lr, steps
        Gradient descent without momentum.
    samples : int
        Number of positions to keep along each path, in addition to the start.
    progress : bool
        Show a bar on a terminal.
    on_iteration : callable, optional
        Called after each iteration with the dataset so far.
    resume : xarray.Dataset, optional
        An earlier dataset with the same settings, to be continued.

    Returns
    -------
    xarray.Dataset
        Kind ``descent``: ``path`` (iteration, step, component), ``value`` (iteration, step) of the unpenalised
        surface, ``end`` (iteration, component), ``end_value`` (iteration) and ``champion``, the iteration with the
        lowest end value.

    Raises
    ------
    TrainingError
        If a setting is unusable, or the surface or its gradient stops being finite on the way (the message names the
        step).
    """
    _check_lam(lam)
    origin = _point(start)
    settings = {"strategy": "persistent", "lam": lam, "lr": lr, "steps": steps, "start": list(origin)}
    record = _DescentRecord(surface, settings, samples, resume)
    with progress_bar("persistent descents", max(iterations - len(record.paths), 0), progress) as advance:
        for _ in range(len(record.paths), at_least(iterations, 1, "iterations")):
            ends = [path[-1] for path in record.paths]
            repelled = penalised(surface, ends, lam)
            gradient = closed_form_gradient(repelled)
            record.add(descent_positions(repelled, np.array([origin]), lr, record.steps, gradient))
            advance(1)
            if on_iteration is not None:
                on_iteration(record.dataset())
    return record.dataset()


def descend_restarts(
    surface: PlaneFunction = two_well,
    start: Sequence[float] = START,
    *,
    iterations: int = 2,
    window: Window = WINDOW,
    seed: int = 0,
    lr: float = 1e-3,
    steps: int = 50_000,
    samples: int = 500,
) -> xr.Dataset:
    """The control of equal cost: the plain descent, and others from starts drawn uniformly from the window.

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
    record = _DescentRecord(surface, {"strategy": "restart", "lr": lr, "steps": steps, "seed": seed}, samples, None)
    record.add(descent_positions(surface, np.array(starts), lr, record.steps, closed_form_gradient(surface)))
    return record.dataset()


def surfaces(surface: PlaneFunction, descent: xr.Dataset, *, window: Window = WINDOW, n: int = 201) -> xr.Dataset:
    """The surfaces that the iterations of a persistent descent followed: f, f_1, f_2, ...

    Parameters
    ----------
    surface : callable
        The unpenalised one.
    descent : xarray.Dataset
        From :func:`descend`.
    window : pair of pairs
        Ends of the x axis and of the y axis.
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


class _DescentRecord:
    """The paths of finished descents, and the dataset that they make."""

    def __init__(
        self, surface: PlaneFunction, settings: dict[str, Any], samples: int, resume: xr.Dataset | None
    ) -> None:
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
        """Add paths, shape (steps, starts, 2): each start is an iteration."""
        self.paths += list(positions.transpose(1, 0, 2))

    def dataset(self) -> xr.Dataset:
        """All paths so far."""
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
            # Attributes that are neither numbers nor text (the start) are stored as text.
            if ds.attrs.get(name) != (value if isinstance(value, int | float | str) else str(value)):
                raise TrainingError(f"cannot resume descents with another {name}; use the same or start new ones")
        if ds["step"].values.tolist() != self.steps:
            raise TrainingError("cannot resume descents sampled at other steps; use the same or start new ones")
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

"""Loss and error along paths between two networks, and the barriers on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import xarray as xr

from pnanalysis.estimates import mean_and_se
from pnanalysis.geometry.curves import curve_weights
from pnanalysis.geometry.gram import displacement_gram
from pnanalysis.geometry.loss_surface import ExampleValues, LossSurface, Matrix
from pnanalysis.io.weights import State
from pnanalysis.terminal.progress import progress_bar


def profiles(
    surface: LossSurface,
    paths: Mapping[str, tuple[list[State], str]],
    batches: Mapping[str, Any],
    n_points: int,
    extrapolate: float = 0.0,
    progress: bool = True,
) -> xr.Dataset:
    """Loss and error along each path, as variables of kind ``barrier``.

    Parameters
    ----------
    surface : LossSurface
    paths : mapping
        Name to anchors, from the first end to the second, and the kind of curve they define (ignored for two anchors,
        which define a line).
    batches : mapping
        Batches of each split.
    n_points : int
        From end to end, both included.
    extrapolate : float
        How far to continue beyond both ends, as a fraction of the length.
    progress : bool

    Returns
    -------
    xarray.Dataset
        The variables of :func:`profile` along path, split and position; and for each path ``distance``, the straight
        one between its ends, and ``length``, that of the polygon through its points.
    """
    beyond = int(np.ceil(extrapolate * (n_points - 1) - 1e-9))  # 0.07 * 100 is 7.000000000000001, and means 7
    position = np.arange(-beyond, n_points + beyond) / (n_points - 1)
    rows = []
    with progress_bar("along the path", len(paths) * len(batches) * len(position), progress) as advance:
        for anchors, kind in paths.values():
            weights = _line_weights(position) if len(anchors) == 2 else curve_weights(kind, position, len(anchors) - 2)
            # The ends first: the excess at every other point is relative to theirs, example by example.
            order = np.argsort((position != 0) & (position != 1), kind="stable")
            splits = [
                profile(position[order], surface.values(anchors, weights[order], split_batches, advance))
                for split_batches in batches.values()
            ]
            displacements = displacement_gram(anchors, surface.moved_names)
            steps = np.diff(weights[(position >= 0) & (position <= 1)], axis=0)
            length = np.sqrt(np.einsum("ka,ab,kb->k", steps, displacements, steps).clip(0)).sum()
            row = xr.concat(splits, dim="split")
            rows.append(row.assign(distance=np.sqrt(displacements[-1, -1]), length=length))
    ds = xr.concat(rows, dim="path").assign_coords(path=list(paths), split=list(batches)).sortby("position")
    # regression has no error rates
    return ds.drop_vars([name for name in ds if "error" in str(name) and bool(ds[name].isnull().all())])


def profile(position: Matrix, values: Iterator[ExampleValues]) -> xr.Dataset:
    """Means, standard errors and barriers along one path.

    Parameters
    ----------
    position : array, shape (K,)
        0 and 1, the ends, first; then the other points in any order.
    values : iterator of ExampleValues
        In this order; at most three are in memory at a time.

    Returns
    -------
    xarray.Dataset
        ``loss``, ``error`` and ``excess`` along ``position``, with standard errors over examples (``_se``). The excess
        is the loss minus the linear interpolation of the losses at the ends; ``barrier`` is an estimate of its largest
        value between them, which lies about ``barrier_position``, and ``error_barrier`` the same of the error. Standard
        errors of an excess are paired: it is taken example by example.

    Notes
    -----
    The highest of many noisy points lies above the true barrier. The point is therefore picked on one half of the
    examples (every other one) and measured on the other half, and both ways are averaged, not below 0. Where the
    halves pick different points, what they measure is not independent, and their standard errors add up.
    """
    ends = [next(values), next(values)]
    columns = ("loss", "loss_se", "error", "error_se", "excess", "excess_se", "error_excess", "error_excess_se")
    table = np.empty((len(position), len(columns)))
    halves = {name: np.empty((len(position), 2, 2)) for name in ("excess", "error_excess")}
    for k, (t, at) in enumerate(zip(position, chain(ends, values), strict=True)):
        with np.errstate(invalid="ignore", over="ignore"):  # losses far out may overflow
            excess = at.loss - ((1 - t) * ends[0].loss + t * ends[1].loss)
            error_excess = at.error - ((1 - t) * ends[0].error + t * ends[1].error)
            table[k] = np.concatenate([mean_and_se(part) for part in (at.loss, at.error, excess, error_excess)])
            halves["excess"][k], halves["error_excess"][k] = _of_halves(excess), _of_halves(error_excess)
    by_name = dict(zip(columns, table.T, strict=True))
    variables: dict[str, Any] = {name: ("position", by_name[name]) for name in columns[:6]}
    inside = np.flatnonzero((position >= 0) & (position <= 1))
    for name, excess_name in (("barrier", "excess"), ("error_barrier", "error_excess")):
        variables[name], variables[f"{name}_se"] = _cross_measured(halves[excess_name][inside])
    variables["barrier_position"] = position[inside[_highest(by_name["excess"][inside])]]
    return xr.Dataset(variables, coords={"position": position})


def _of_halves(values: Matrix) -> Matrix:
    """Mean and standard error of every other example and of the rest, (half, 2); a single example is both."""
    return np.array([mean_and_se(half) for half in (values[::2], values[1::2] if len(values) > 1 else values)])


def _highest(values: Matrix) -> int:
    """Position of the largest value; one that is not a number has overflowed, and counts as the highest."""
    return int(np.argmax(np.nan_to_num(values, nan=np.inf)))


def _cross_measured(halves: Matrix) -> tuple[float, float]:
    """Largest mean over points and its standard error, from means and standard errors (point, half, 2)."""
    picked = [_highest(halves[:, half, 0]) for half in (0, 1)]
    (first, first_se), (second, second_se) = halves[picked[1], 0], halves[picked[0], 1]
    se = float(np.hypot(first_se, second_se) if picked[0] == picked[1] else first_se + second_se) / 2
    value = (first + second) / 2
    return float(value if np.isnan(value) else max(value, 0.0)), se


def _line_weights(position: Matrix) -> Matrix:
    """Weights of the two ends of a line, (K, 2)."""
    return np.stack([1 - position, position], axis=1)

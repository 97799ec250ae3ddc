"""Loss along paths between two ends, and the barriers on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
        Name to anchors, first end to second, and the kind of curve they define (of two anchors, a line).
    batches : mapping
        Batches of each split.
    n_points : int
        From end to end, both counted.
    extrapolate : float
        Share of the length to go on beyond both ends.
    progress : bool
    """
    beyond = int(np.ceil(extrapolate * (n_points - 1) - 1e-9))
    position = np.arange(-beyond, n_points + beyond) / (n_points - 1)
    rows = []
    with progress_bar("along the path", len(paths) * len(batches) * len(position), progress) as advance:
        for anchors, kind in paths.values():
            weights = _linear(position) if len(anchors) == 2 else curve_weights(kind, position, len(anchors) - 2)
            order = np.argsort((position != 0) & (position != 1), kind="stable")  # the ends first
            parts = [
                profile(position[order], surface.values(anchors, weights[order], part, advance))
                for part in batches.values()
            ]
            displacements = displacement_gram(anchors, surface.parameter_names)
            steps = np.diff(weights[(position >= 0) & (position <= 1)], axis=0)
            length = np.sqrt(np.einsum("ka,ab,kb->k", steps, displacements, steps).clip(0)).sum()
            row = xr.concat(parts, dim="split")
            rows.append(row.assign(distance=np.sqrt(displacements[-1, -1]), length=length))
    ds = xr.concat(rows, dim="path").assign_coords(path=list(paths), split=list(batches)).sortby("position")
    return ds.drop_vars([name for name in ds if "error" in str(name) and bool(ds[name].isnull().all())])


def profile(position: Matrix, values: Iterator[ExampleValues]) -> xr.Dataset:
    """Means, standard errors and barriers along one path.

    Parameters
    ----------
    position : array, shape (K,)
        The ends, 0 and 1, first; then the other points in any order.
    values : iterator of ExampleValues
        In this order; never more than three are held.
    """
    ends = [next(values), next(values)]
    columns = ("loss", "loss_se", "error", "error_se", "excess", "excess_se", "error_excess", "error_excess_se")
    table = np.empty((len(position), len(columns)))
    for k, (t, at) in enumerate(zip(position, _chain(ends, values), strict=True)):
        with np.errstate(invalid="ignore", over="ignore"):  # losses far out may overflow
            loss = at.loss - ((1 - t) * ends[0].loss + t * ends[1].loss)
            error = at.error - ((1 - t) * ends[0].error + t * ends[1].error)
            table[k] = np.concatenate([mean_and_se(part) for part in (at.loss, at.error, loss, error)])
    by_name = dict(zip(columns, table.T, strict=True))
    variables: dict[str, Any] = {name: ("position", by_name[name]) for name in columns[:6]}
    inside = np.flatnonzero((position >= 0) & (position <= 1))
    for name, excess in (("barrier", "excess"), ("error_barrier", "error_excess")):
        top = int(inside[np.argmax(np.nan_to_num(by_name[excess][inside], nan=np.inf))])
        variables |= {name: by_name[excess][top], f"{name}_se": by_name[f"{excess}_se"][top]}
        if name == "barrier":
            variables["barrier_position"] = position[top]
    return xr.Dataset(variables, coords={"position": position})


def _chain(ends: list[ExampleValues], rest: Iterator[ExampleValues]) -> Iterator[ExampleValues]:
    yield from ends
    yield from rest


def _linear(position: Matrix) -> Matrix:
    """Weights of the two ends, (K, 2)."""
    return np.stack([1 - position, position], axis=1)

"""Which start ends in which well of a surface."""

from __future__ import annotations

import numpy as np
import xarray as xr
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from pnanalysis import schema
from trainers.problems.descent import PlaneFunction, descent_positions, values_at
from trainers.problems.two_well import WINDOW, Window, at_least, axes, closed_form_gradient, two_well

_LEAST_ARRIVALS = 3


def basin_map(
    surface: PlaneFunction = two_well, *, window: Window = WINDOW, n: int = 101, lr: float = 1e-2, steps: int = 5_000
) -> xr.Dataset:
    """Which start ends in which well: descents from a grid of starts.

    Parameters
    ----------
    surface : callable
        For the basins of f_n, the result of :func:`trainers.problems.two_well.penalised`.
    window, n
        The grid, as for :func:`trainers.problems.two_well.surfaces`.
    lr, steps
        By default ten times the paper's learning rate for a tenth of its steps, which follows the same gradient flow.

    Returns
    -------
    xarray.Dataset
        Kind ``basin``: ``basin`` (y, x), the index of the well where the start ends, or -1 where the descent has not
        come to rest, ends where fewer than two others do, or is no longer finite; ``minimum`` (well, component),
        ``minimum_value`` and ``share`` (well), the fraction of starts. Wells are sorted by value, the lowest first.

    Notes
    -----
    A well is a point where at least three descents have come to rest: their ends lie within a quarter of the grid's
    spacing of one another, and moved by less than a tenth of that in the last tenth of the steps.
    """
    x, y = axes(window, n)
    starts = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    late = steps - at_least(steps, 10, "steps") // 10
    gradient = closed_form_gradient(surface)
    _, before, ends = descent_positions(surface, starts, lr, [0, late, steps], gradient, strict=False)
    near = min(x[1] - x[0], y[1] - y[0]) / 4
    with np.errstate(invalid="ignore"):
        resting = np.linalg.norm(ends - before, axis=1) < near / 10
    label = np.full(len(ends), -1)
    label[resting] = _group_labels(ends[resting], near)
    minima, values, label = _wells(surface, ends, label)
    variables = {
        "basin": (("y", "x"), label.reshape(n, n)),
        "minimum": (("well", "component"), minima),
        "minimum_value": ("well", values),
        "share": ("well", np.bincount(label[label >= 0], minlength=len(minima)) / len(label)),
    }
    coords = {"x": x, "y": y, "component": ["x", "y"], "well": np.arange(len(minima))}
    return schema.finish(xr.Dataset(variables, coords=coords), "basin", lr=lr, steps=steps)


def _group_labels(points: np.ndarray, near: float) -> np.ndarray:
    """A label for each group of points linked by distances below ``near``; -1 for groups of fewer than three."""
    if not len(points):
        return np.empty(0, dtype=int)
    # Ends of one well lie together: rounded to cells, thousands of points become a few, and so do the pairs to link.
    cells, cell = np.unique(np.round(points / (near / 8)), axis=0, return_inverse=True)
    pairs = cKDTree(cells).query_pairs(8, output_type="ndarray")
    links = coo_matrix((np.ones(len(pairs)), pairs.T), shape=(len(cells), len(cells)))
    label = connected_components(links, directed=False)[1][cell]
    return np.where(np.bincount(label)[label] >= _LEAST_ARRIVALS, label, -1)


def _wells(surface: PlaneFunction, ends: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The lowest end point of each group and its value, sorted by value, and the labels renumbered in that order."""
    minima, values = [], []
    old = np.unique(label[label >= 0])
    for group in old:
        members = ends[label == group]
        value = values_at(surface, members)
        minima.append(members[value.argmin()])
        values.append(value.min())
    order = np.argsort(values)
    relabelled = np.full(len(label), -1)
    for new, k in enumerate(order):
        relabelled[label == old[k]] = new
    return np.array(minima).reshape(-1, 2)[order], np.array(values)[order], relabelled

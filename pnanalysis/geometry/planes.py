"""Planes in parameter space: through three states, or along two random filter-normalised directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pnanalysis.errors import RunError
from pnanalysis.estimates import mean_and_se
from pnanalysis.geometry.gram import displacement_gram, filter_directions
from pnanalysis.geometry.loss_surface import LossSurface, Matrix
from pnanalysis.io.weights import State
from pnanalysis.terminal.progress import progress_bar

COLLINEAR = "the start and the two end points lie on one line and span no plane; add another iteration"


def through_three(
    surface: LossSurface,
    states: Sequence[State],
    names: Sequence[str],
    batches: Mapping[str, Any],
    span: Sequence[float] | None = None,
    n_points: int = 21,
    progress: bool = True,
) -> xr.Dataset:
    """Loss and error on the plane through three states, as variables of kind ``landscape``.

    ``span`` (x_min, x_max, y_min, y_max) by default extends a quarter beyond the three states, and neither side is less
    than half the other.

    Raises
    ------
    RunError
        If they lie on one line.
    """
    displacements = displacement_gram(states, surface.parameter_names)
    _, points = plane_weights(displacements, np.zeros(1), np.zeros(1))
    low, high = points.min(0), points.max(0)
    half = 0.75 * (high - low)
    half = np.maximum(half, half.max() / 2)  # three states almost on a line would give a sliver
    around = ((low + high)[:, None] / 2 + half[:, None] * [-1, 1]).reshape(-1)
    x, y = _grid(around if span is None else span, n_points)
    weights, _ = plane_weights(displacements, *_flat(x, y))
    ds = _on_grid(surface, states, weights, x, y, batches, progress)
    ds.x.attrs |= {"long_name": f"along {_short(names[0])} to {_short(names[1])}", "units": "parameter units"}
    ds.y.attrs |= {"long_name": f"across, towards {_short(names[2])}", "units": "parameter units"}
    return ds.assign(point_position=(("point", "component"), points)).assign_coords(point=list(names))


def _short(name: str) -> str:
    """A checkpoint's name without its run's and its epoch."""
    parts = [part for part in name.split("/") if not part.startswith("epoch")]
    return parts[-1] if parts else name


def about_one(
    surface: LossSurface,
    state: State,
    name: str,
    batches: Mapping[str, Any],
    span: Sequence[float] | None = None,
    n_points: int = 21,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Loss and error on the plane around a state along two :func:`random_directions`, by default from -1 to 1."""
    directions = random_directions(state, surface.parameter_names, seed)
    x, y = _grid((-1.0, 1.0, -1.0, 1.0) if span is None else span, n_points)
    along, across = _flat(x, y)
    weights = np.stack([np.ones_like(along), along, across], axis=1)
    ds = _on_grid(surface, [state, *directions], weights, x, y, batches, progress)
    for axis, text in ((ds.x, "first"), (ds.y, "second")):
        axis.attrs |= {"long_name": f"{text} random direction", "units": "filter norms"}
    return ds.assign(point_position=(("point", "component"), np.zeros((1, 2)))).assign_coords(point=[name])


def on_plane(moved: Matrix, onto: Matrix, among: Matrix) -> Matrix:
    """Orthonormal coordinates (T, 2) on the plane of two directions; NaN where these are parallel.

    ``onto`` (T, 2) are the displacements' inner products with the directions, ``among`` (2, 2) the directions' own.
    """
    a2, ab, b2 = among[0, 0], among[0, 1], among[1, 1]
    height2 = b2 - ab**2 / a2 if a2 > 0 else 0.0
    if height2 <= 1e-10 * max(b2, a2):  # parallel up to round-off of the inner products
        return np.full((len(moved), 2), np.nan)
    x = onto[:, 0] / np.sqrt(a2)
    return np.stack([x, (onto[:, 1] - ab / a2 * onto[:, 0]) / np.sqrt(height2)], axis=1)


def plane_weights(displacements: Matrix, x: Matrix, y: Matrix) -> tuple[Matrix, Matrix]:
    """The plane through three states, in orthonormal coordinates: the first at the origin, the second on the x axis.

    Parameters
    ----------
    displacements : array, shape (3, 3)
        The states' :func:`pnanalysis.geometry.gram.displacement_gram`.
    x, y : arrays, shape (K,)
        Points of the plane, in parameter units; the same coordinates as ``plane`` of :func:`pnanalysis.trajectory`.

    Returns
    -------
    weights : array, shape (K, 3)
        Of the three states; each row sums to one.
    points : array, shape (3, 2)
        Where the three states lie.

    Raises
    ------
    RunError
        If the three lie on one line.
    """
    points = on_plane(displacements, displacements[:, 1:], displacements[1:, 1:])
    if np.isnan(points).any():
        raise RunError(COLLINEAR)
    (length, _), (shift, height) = points[1:]
    second = y / height
    first = (x - shift * second) / length
    return np.stack([1 - first - second, first, second], axis=1), points


def random_directions(state: Mapping[str, Tensor], names: Sequence[str], seed: int = 0) -> tuple[State, State]:
    """Two Gaussian directions, each filter scaled to the norm of the state's; biases and batch norm do not move.

    The same directions as the first random plane of :func:`pnanalysis.trajectory` with this seed and checkpoint.

    Parameters
    ----------
    state : mapping of tensors
    names : sequence of str
        Its parameters. Those with fewer than two axes (biases, batch normalisation), and buffers, get zeros.
    seed : int

    References
    ----------
    H. Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018, arXiv:1712.09913, section 4.
    """
    generator = torch.Generator().manual_seed(seed)
    first, second = ({name: torch.zeros_like(tensor) for name, tensor in state.items()} for _ in range(2))
    for name in names:
        first[name], second[name] = filter_directions(state[name], 2, generator).to(state[name])
    return first, second


def _on_grid(
    surface: LossSurface, anchors: Sequence[State], weights: Matrix, x: Matrix, y: Matrix, batches: Mapping[str, Any],
    progress: bool,
) -> xr.Dataset:  # fmt: skip
    table = np.empty((3, len(batches), len(weights)))
    with progress_bar("on the plane", table[0].size, progress) as advance:
        for s, part in enumerate(batches.values()):
            for k, found in enumerate(surface.values(anchors, weights, part, advance)):
                table[:, s, k] = (*mean_and_se(found.loss), found.error.mean())
    grids = dict(zip(("loss", "loss_se", "error"), table.reshape(3, len(batches), len(y), len(x)), strict=True))
    if np.isnan(grids["error"]).all():
        del grids["error"]
    variables = {name: (("split", "y", "x"), grid) for name, grid in grids.items()}
    return xr.Dataset(variables, coords={"split": list(batches), "x": x, "y": y})


def _grid(span: Sequence[float] | Matrix, n_points: int) -> tuple[Matrix, Matrix]:
    return np.linspace(span[0], span[1], n_points), np.linspace(span[2], span[3], n_points)


def _flat(x: Matrix, y: Matrix) -> tuple[Matrix, Matrix]:
    """Coordinates of all grid points, rows of y first."""
    grid_y, grid_x = np.meshgrid(y, x, indexing="ij")
    return grid_x.reshape(-1), grid_y.reshape(-1)

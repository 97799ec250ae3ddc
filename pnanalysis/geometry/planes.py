"""Loss and error on planes: through three states, or along two random directions scaled filter by filter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from pnanalysis.errors import RunError
from pnanalysis.estimates import mean_and_se
from pnanalysis.geometry.directions import random_directions
from pnanalysis.geometry.gram import displacement_gram
from pnanalysis.geometry.loss_surface import LossSurface, Matrix
from pnanalysis.io.weights import State
from pnanalysis.terminal.progress import progress_bar

COLLINEAR = "the start and the two end points lie on one line and span no plane; add another iteration"


def plane_through_three(
    surface: LossSurface,
    states: Sequence[State],
    names: Sequence[str],
    batches: Mapping[str, Any],
    span: Sequence[float] | None = None,
    n_points: int = 21,
    progress: bool = True,
) -> xr.Dataset:
    """Loss and error on the plane through three states, as variables of kind ``landscape``.

    Parameters
    ----------
    surface : LossSurface
    states : sequence of three states
    names : sequence of str
        Their names.
    batches : mapping
        Batches of each split.
    span : sequence of float, optional
        ``x_min, x_max, y_min, y_max``. By default a margin of a quarter of the three points' extent on each side, and
        no side shorter than half the other.
    n_points : int
        Along each axis.
    progress : bool

    Raises
    ------
    RunError
        If they lie on one line.
    """
    displacements = displacement_gram(states, surface.moved_names)
    _, points = plane_weights(displacements, np.zeros(1), np.zeros(1))
    low, high = points.min(0), points.max(0)
    half = 0.75 * (high - low)  # half the extent and a quarter more
    half = np.maximum(half, half.max() / 2)
    default_span = ((low + high)[:, None] / 2 + half[:, None] * [-1, 1]).reshape(-1)
    x, y = _grid_axes(default_span if span is None else span, n_points)
    weights, _ = plane_weights(displacements, *_grid_points(x, y))
    ds = _on_grid(surface, states, weights, x, y, batches, progress)
    ds.x.attrs |= {"long_name": f"along {_short_name(names[0])} to {_short_name(names[1])}", "units": "parameter units"}
    ds.y.attrs |= {"long_name": f"across, towards {_short_name(names[2])}", "units": "parameter units"}
    return ds.assign(point_position=(("point", "component"), points)).assign_coords(point=list(names))


def random_plane(
    surface: LossSurface,
    state: State,
    name: str,
    batches: Mapping[str, Any],
    span: Sequence[float] | None = None,
    n_points: int = 21,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Loss and error on the plane through a state along two random directions, by default from -1 to 1.

    See :func:`pnanalysis.geometry.directions.random_directions`; parameters as for :func:`plane_through_three`.
    """
    directions = random_directions(state, surface.parameter_names, seed)
    names = ("first random direction", "second random direction")
    span = (-1.0, 1.0, -1.0, 1.0) if span is None else span
    return plane_along(surface, state, name, batches, directions, names, "filter norms", span, n_points, progress)


def plane_along(
    surface: LossSurface, state: State, name: str, batches: Mapping[str, Any], directions: Sequence[State],
    axes: Sequence[str], units: str, span: Sequence[float], n_points: int = 21, progress: bool = True,
) -> xr.Dataset:  # fmt: skip
    """Loss and error on the plane through a state along two directions, in the form of the state.

    ``axes`` and ``units`` label the coordinates; other parameters as for :func:`plane_through_three`.
    """
    x, y = _grid_axes(span, n_points)
    first, second = _grid_points(x, y)
    weights = np.stack([np.ones_like(first), first, second], axis=1)
    ds = _on_grid(surface, [state, *directions], weights, x, y, batches, progress)
    for coordinate, axis in zip((ds.x, ds.y), axes, strict=True):
        coordinate.attrs |= {"long_name": axis, "units": units}
    return ds.assign(point_position=(("point", "component"), np.zeros((1, 2)))).assign_coords(point=[name])


def plane_weights(displacements: Matrix, x: Matrix, y: Matrix) -> tuple[Matrix, Matrix]:
    """Points of the plane through three states, as sums of these.

    Coordinates are orthonormal, with the first state at the origin and the second on the x axis.

    Parameters
    ----------
    displacements : array, shape (3, 3)
        Inner products of the states' displacements from the first
        (:func:`pnanalysis.geometry.gram.displacement_gram`).
    x, y : arrays, shape (K,)
        Points of the plane, in parameter units, in the coordinates of ``plane`` of :func:`pnanalysis.trajectory`.

    Returns
    -------
    weights : array, shape (K, 3)
        Of the three states; each row sums to one.
    points : array, shape (3, 2)
        Coordinates of the three states.

    Raises
    ------
    RunError
        If the three lie on one line.
    """
    points = plane_coordinates(displacements, displacements[:, 1:], displacements[1:, 1:])
    if np.isnan(points).any():
        raise RunError(COLLINEAR)
    (length, _), (shift, height) = points[1:]
    third = y / height  # only the third state has a y coordinate
    second = (x - shift * third) / length
    return np.stack([1 - second - third, second, third], axis=1), points


def plane_coordinates(moved: Matrix, onto: Matrix, among: Matrix) -> Matrix:
    """Orthonormal coordinates on the plane spanned by two directions a and b: Gram-Schmidt on inner products alone.

    Parameters
    ----------
    moved : array, shape (T, T)
        Inner products of T displacements.
    onto : array, shape (T, 2)
        Inner products of the displacements with a and b.
    among : array, shape (2, 2)
        Inner products of a and b.

    Returns
    -------
    array, shape (T, 2)
        Coordinates along a and, across it, towards b; NaN where a and b are parallel.
    """
    aa, ab, bb = among[0, 0], among[0, 1], among[1, 1]
    height2 = bb - ab**2 / aa if aa > 0 else 0.0  # squared norm of the part of b that is orthogonal to a
    # A difference of two nearly equal numbers: at 1e-10 of their size it has some six correct digits left.
    if height2 <= 1e-10 * max(bb, aa):
        return np.full((len(moved), 2), np.nan)
    x = onto[:, 0] / np.sqrt(aa)
    y = (onto[:, 1] - ab / aa * onto[:, 0]) / np.sqrt(height2)
    return np.stack([x, y], axis=1)


def _on_grid(
    surface: LossSurface, anchors: Sequence[State], weights: Matrix, x: Matrix, y: Matrix, batches: Mapping[str, Any],
    progress: bool,
) -> xr.Dataset:  # fmt: skip
    """Loss and error of each split at the points of a grid, which ``weights`` holds row of y by row of y."""
    shape = (len(batches), len(weights))
    loss, loss_se, error = (np.empty(shape) for _ in range(3))
    with progress_bar("on the plane", loss.size, progress) as advance:
        for s, split_batches in enumerate(batches.values()):
            for k, values in enumerate(surface.values(anchors, weights, split_batches, advance)):
                loss[s, k], loss_se[s, k] = mean_and_se(values.loss)
                error[s, k] = values.error.mean()
    found = {"loss": loss, "loss_se": loss_se, "error": error}
    if np.isnan(error).all():  # regression
        del found["error"]
    grid = (len(batches), len(y), len(x))
    variables = {name: (("split", "y", "x"), values.reshape(grid)) for name, values in found.items()}
    return xr.Dataset(variables, coords={"split": list(batches), "x": x, "y": y})


def _grid_axes(span: Sequence[float] | Matrix, n_points: int) -> tuple[Matrix, Matrix]:
    return np.linspace(span[0], span[1], n_points), np.linspace(span[2], span[3], n_points)


def _grid_points(x: Matrix, y: Matrix) -> tuple[Matrix, Matrix]:
    """Coordinates of all grid points, rows of y first."""
    grid_y, grid_x = np.meshgrid(y, x, indexing="ij")
    return grid_x.reshape(-1), grid_y.reshape(-1)


def _short_name(name: str) -> str:
    """A checkpoint's name without its run and epoch."""
    parts = [part for part in name.split("/") if not part.startswith("epoch")]
    return parts[-1] if parts else name

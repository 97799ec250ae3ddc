"""Trajectories through parameter space: on planes through their end points, on principal components, layer by layer.

Everything follows from the T x T Gram matrix of the checkpoints' displacements from the starting point, which is
summed over blocks of parameters (:mod:`pnanalysis.geometry.gram`): however large the network, only a block of each
checkpoint is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.linalg import eigh
from torch import nn

from pnanalysis import schema
from pnanalysis.checks import at_least, check_seed, one_of
from pnanalysis.errors import ModelError, RunError
from pnanalysis.geometry.gram import layer_grams
from pnanalysis.geometry.planes import COLLINEAR, plane_coordinates
from pnanalysis.inputs.models import ModelLike, parameter_layers
from pnanalysis.inputs.selection import Given, as_sources
from pnanalysis.inputs.sources import AnyCheckpoint, Source

PROJECTIONS = ("plane", "pca", "pca_end", "random")
DEFAULT_PROJECTIONS = PROJECTIONS[:3]
WHOLE = "all"

Matrix = NDArray[np.float64]
_Variables = dict[str, tuple[tuple[str, ...], Matrix]]


def trajectory(
    *given: Given,
    model: ModelLike | None = None,
    iterations: Sequence[int] | None = None,
    projections: Sequence[str] = DEFAULT_PROJECTIONS,
    n_components: int = 2,
    n_random: int = 1,
    per_layer: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Project the trajectories of one or more runs through the space of trainable parameters, and measure them.

    Each checkpoint is read once, a block of parameters at a time: 2,000 checkpoints of LeNet-5 or 200 of ResNet-18 need
    well under 4 GB. A complex parameter counts as two real ones.

    Parameters
    ----------
    *given : Run, Source, path, Module, state dict, or mapping or sequence of these
        Runs of one architecture. Networks, state dicts and files count as one path, in the order given.
    model : str, Module or callable, optional
        The architecture of state dicts and files: ``trajectory([state, ...], model=net)``.
    iterations : sequence of int, optional
        Which iterations of each run; all by default.
    projections : sequence of {"plane", "pca", "pca_end", "random"}
        Which to give, see below.
    n_components : int
        Principal components to give, at least 2.
    n_random : int
        Random planes to give.
    per_layer : bool
        Give everything for each layer (the modules that own parameters) too, along ``layer``, whose first entry,
        ``all``, is the whole network.
    seed : int
        Of the random planes.
    progress : bool

    Returns
    -------
    xarray.Dataset
        Kind ``trajectory``, dim ``checkpoint`` with coordinates run, iteration and epoch. All coordinates are in
        parameter units, on orthonormal axes, and have NaN where there are fewer axes than components.

        ``plane``
            On the plane through the start and two end points (the plain one and the champion; where they coincide, the
            last one): the start lies at the origin, the first end on the first axis. ``plane_residual`` is the distance
            from that plane.
        ``pca``
            On the principal components about the mean of all checkpoints.
        ``pca_end``
            On the principal components of the displacements from the plain end point (Li et al. 2018, section 7.2),
            which lies at the origin.
        ``random``
            On planes of two random filter-normalised directions (Li et al. 2018, section 4) along ``draw``, the start
            at the origin.
        ``explained_variance``, ``explained_variance_end``, ``explained_variance_plane``, ``explained_variance_random``
            Fraction of the squared distances from the mean (``pca``), from the plain end (``pca_end``), or from the
            start that lies along each axis.
        ``distance_from_start``, ``path_length``
            Along each path.
        ``distance_to_end``, ``cosine``
            To the end point of each path, along ``end``: the distance, and the cosine
            <Theta_k, theta> / (|Theta_k| |theta|) of the parameters themselves, which the persistent penalty pushes
            down if the end point is of an earlier iteration.

    Raises
    ------
    RunError
        If there are fewer than three checkpoints, or the plane's three points lie on one line.
    ModelError
        If the checkpoints are of different architectures, or a file is damaged.
    PnError
        If there is no such projection.

    References
    ----------
    H. Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018, arXiv:1712.09913.
    Y. Min, "Persistent Neurons", arXiv:2007.01419, fig. 6.
    """
    for name in projections:
        one_of(PROJECTIONS, projection=name)
    at_least(1, n_components=n_components, n_random=n_random)
    check_seed(seed=seed)
    sources = as_sources(given, model)
    points = [point for source in sources for point in path_points(source, iterations)]
    if len(points) < 3:
        raise RunError(f"a trajectory needs at least three checkpoints, there are {len(points)}")
    n_components = min(max(n_components, 2), len(points))
    ends = _plane_ends(sources[0], points)
    n_directions = 2 * n_random if "random" in projections else 0
    ds = project_path(
        points, _layers(sources[0]), ends, projections, network=sources[0].template, n_components=n_components,
        n_directions=n_directions, per_layer=per_layer, seed=seed, progress=progress,
    )  # fmt: skip
    first = sources[0]
    return schema.finish(
        ds, "trajectory", **first.attrs, plane_points=[points[0].name, *(points[end].name for end in ends)],
        champion=None if first.run is None else first.run.manifest["champion"], dtype="float64",
        seed=seed if n_directions else None,
    )  # fmt: skip


def project_path(
    points: Sequence[PathPoint],
    layers: Mapping[str, Sequence[str]],
    ends: tuple[int, int],
    projections: Sequence[str] = DEFAULT_PROJECTIONS,
    *,
    network: nn.Module | None = None,
    n_components: int = 2,
    n_directions: int = 0,
    per_layer: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Projections and distances of checkpoints, on disk or in memory, that lie on one or more paths.

    Parameters
    ----------
    points : sequence of PathPoint
        At least three; the first point of each path is its start.
    layers : mapping of str to sequence of str
        Names of each layer's trainable parameters.
    ends : (int, int)
        Indices of the two points that span the plane with the first.
    projections, n_components, per_layer, seed, progress
        See :func:`trajectory`.
    network : Module, optional
        The architecture, where checkpoints may name its parameters otherwise.
    n_directions : int
        Random directions to draw, two per plane.

    Raises
    ------
    RunError
        If the plane's three points lie on one line.
    """
    whole: Matrix | float = 0.0
    found: dict[str, _Variables] = {WHOLE: {}}
    for layer, gram in layer_grams(
        [point.checkpoint for point in points], layers, network=network, reference=ends[0], n_directions=n_directions,
        seed=seed, progress=progress,
    ):  # fmt: skip
        whole = whole + gram
        if per_layer:
            found[layer] = _measure(gram, points, ends, projections, n_components)
    found[WHOLE] = _measure(np.asarray(whole), points, ends, projections, n_components)
    if "plane" in projections and np.isnan(found[WHOLE]["plane"][1][:, 0]).all():
        raise RunError(COLLINEAR)
    ds = xr.Dataset(_stacked(found) if per_layer else found[WHOLE], coords=_coordinates(points, n_components))
    ds["validation_error"] = (("checkpoint",), np.array([point.error for point in points]))
    return ds.assign_coords(layer=list(found)) if per_layer else ds


def plane_points(*sources: Source) -> list[tuple[str, Source, AnyCheckpoint]]:
    """The three checkpoints that span the plane of :func:`trajectory`, and their names: start, two ends."""
    found = [(source, point) for source in sources for point in path_points(source, None)]
    if len(found) < 3:
        raise RunError(f"a plane needs three checkpoints, there are {len(found)}")
    ends = _plane_ends(sources[0], [point for _, point in found])
    return [(found[i][1].name, found[i][0], found[i][1].checkpoint) for i in (0, *ends)]


@dataclass(frozen=True)
class PathPoint:
    """A checkpoint on a path; ``path`` identifies the path, by run and iteration, and its first point is its start."""

    name: str
    run: str
    path: tuple[str, int]
    iteration: int
    checkpoint: AnyCheckpoint
    error: float


def path_points(source: Source, iterations: Sequence[int] | None) -> Iterator[PathPoint]:
    """The points of a source in order: of each iteration of a run, or of a user's own checkpoints as one path."""
    run = source.run
    if run is None:
        for checkpoint in source.checkpoints:
            yield PathPoint(checkpoint.name, source.label, (source.label, 0), 0, checkpoint, float("nan"))
        return
    errors = run.history.validation_error
    there = sorted({checkpoint.iteration for checkpoint in run.checkpoints})
    for iteration in there if iterations is None else iterations:
        for checkpoint in run.trajectory(iteration):
            known = checkpoint.epoch in errors.epoch and iteration in errors.iteration
            error = float(errors.sel(iteration=iteration, epoch=checkpoint.epoch)) if known else float("nan")
            name = f"{source.label}/iter{iteration:02d}/epoch{checkpoint.epoch:03d}"
            yield PathPoint(name, source.label, (source.label, iteration), iteration, checkpoint, error)


def _layers(source: Source) -> dict[str, list[str]]:
    """Names of the trainable parameters of each layer."""
    layers = {layer: [name for name, _ in own] for layer, own in parameter_layers(source.template)}
    if not layers:
        raise ModelError(f"{source.label}: has no trainable parameters, so there is no trajectory")
    return layers


def _plane_ends(source: Source, points: Sequence[PathPoint]) -> tuple[int, int]:
    """Indices of the two end points that span the plane with the first point."""
    ends = {point.path: i for i, point in enumerate(points)}  # the last point of each path
    first = ends[points[0].path]
    champion = source.run.manifest["champion"] if source.run is not None else None
    second = ends.get((source.label, champion), first) if champion is not None else first
    if second == first:
        second = max(ends.values())
    if second == first:  # a single path: its middle point
        second = max(range(1, len(points)), key=lambda i: min(i, first - i))
    return first, second


def _measure(
    gram: Matrix, points: Sequence[PathPoint], ends: tuple[int, int], projections: Sequence[str], n_components: int
) -> _Variables:
    """Every variable, from the inner products of :func:`pnanalysis.geometry.gram.layer_grams`."""
    n = len(points)
    moved, start, onto = gram[:n, :n], gram[:n, n], gram[:n, n + 1 :]
    variables: _Variables = {}

    def project(name: str, x: Matrix, explained: str, fractions: Matrix) -> None:
        variables[name] = (("checkpoint", "component"), _padded([x], n_components)[0])
        variables[explained] = (("component",), _padded([fractions[None]], n_components)[0, 0])

    if "plane" in projections:
        x = plane_coordinates(moved, moved[:, ends], moved[np.ix_(ends, ends)])
        project("plane", x, "explained_variance_plane", _explained(x, moved))
        residual2 = np.diag(moved) - (x**2).sum(axis=1)
        variables["plane_residual"] = (("checkpoint",), np.sqrt(np.maximum(residual2, 0.0)))
    if "pca" in projections:
        x, fractions = _principal_components(_about(moved, np.full(n, 1 / n)), n_components)
        x *= np.where(x[ends[0]] < 0, -1.0, 1.0)  # the sign is free: let the first end lie on the positive side
        project("pca", x, "explained_variance", fractions)
    if "pca_end" in projections:
        x, fractions = _principal_components(_about(moved, np.eye(n)[ends[0]]), n_components)
        x *= np.where(x[0] < 0, -1.0, 1.0)  # and here the start
        project("pca_end", x, "explained_variance_end", fractions)
    if onto.size:
        among = gram[n + 1 :, n + 1 :]
        planes = [slice(i, i + 2) for i in range(0, onto.shape[1], 2)]
        xs = [plane_coordinates(moved, onto[:, pair], among[pair, pair]) for pair in planes]
        variables["random"] = (("draw", "checkpoint", "component"), _padded(xs, n_components))
        explained = [_explained(x, moved)[None] for x in xs]
        variables["explained_variance_random"] = (("draw", "component"), _padded(explained, n_components)[:, 0])
    last = _path_ends(points)
    seen_from_zero = moved + start + start[:, None] + gram[n, n]
    length = np.sqrt(np.maximum(np.diag(seen_from_zero), 0.0))
    with np.errstate(invalid="ignore", divide="ignore"):  # a layer of zeros has no direction
        cosine = seen_from_zero[:, last] / np.outer(length, length[last])
    squared = np.diag(moved)
    distance2 = squared[:, None] + squared[last] - 2 * moved[:, last]
    return variables | {
        "distance_from_start": (("checkpoint",), np.sqrt(np.maximum(_distance2(moved, points), 0.0))),
        "path_length": (("checkpoint",), _path_length(moved, points)),
        "distance_to_end": (("checkpoint", "end"), np.sqrt(np.maximum(distance2, 0.0))),
        "cosine": (("checkpoint", "end"), np.where(np.isfinite(cosine), np.clip(cosine, -1, 1), np.nan)),
    }


def _about(moved: Matrix, weights: Matrix) -> Matrix:
    """The Gram matrix about a weighted mean of the points."""
    row = moved @ weights
    return moved - row - row[:, None] + weights @ row


def _principal_components(gram: Matrix, n: int) -> tuple[Matrix, Matrix]:
    """Coordinates (T, n) on the principal components, and each one's fraction of the trace."""
    values, vectors = eigh(gram, subset_by_index=(len(gram) - n, len(gram) - 1))
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    total = np.trace(gram)
    return vectors * np.sqrt(values), values / total if total > 0 else np.full(n, np.nan)


def _explained(x: Matrix, moved: Matrix) -> Matrix:
    """Fraction of the squared distances from the start along each axis."""
    total = np.trace(moved)
    return (x**2).sum(axis=0) / total if total > 0 else np.full(x.shape[1], np.nan)


def _padded(parts: list[Matrix], width: int) -> Matrix:
    return np.stack([np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=np.nan) for x in parts])


def _stacked(found: dict[str, _Variables]) -> _Variables:
    """Layers side by side."""
    return {
        name: (("layer", *dims), np.stack([own[name][1] for own in found.values()]))
        for name, (dims, _) in found[WHOLE].items()
    }


def _coordinates(points: Sequence[PathPoint], n_components: int) -> dict[str, object]:
    last = [points[i] for i in _path_ends(points)]
    return {
        "checkpoint": [point.name for point in points],
        "run": ("checkpoint", [point.run for point in points]),
        "iteration": ("checkpoint", [point.iteration for point in points]),
        "epoch": ("checkpoint", [point.checkpoint.epoch for point in points]),
        "component": np.arange(n_components),
        "end": [point.name for point in last],
        "end_run": ("end", [point.run for point in last]),
        "end_iteration": ("end", [point.iteration for point in last]),
    }


def _path_ends(points: Sequence[PathPoint]) -> list[int]:
    """Index of each path's last point, in order of the paths."""
    return list({point.path: i for i, point in enumerate(points)}.values())


def _distance2(gram: Matrix, points: Sequence[PathPoint]) -> Matrix:
    """Squared distance of each point from the start of its own path."""
    diagonal, starts = np.diag(gram), _starts(points)
    return diagonal + diagonal[starts] - 2 * gram[np.arange(len(points)), starts]


def _path_length(gram: Matrix, points: Sequence[PathPoint]) -> Matrix:
    diagonal, starts = np.diag(gram), _starts(points)
    lengths = np.zeros(len(points))
    for i in range(1, len(points)):
        if starts[i] != i:
            step2 = diagonal[i] + diagonal[i - 1] - 2 * gram[i, i - 1]
            lengths[i] = lengths[i - 1] + np.sqrt(max(step2, 0.0))
    return lengths


def _starts(points: Sequence[PathPoint]) -> NDArray[np.intp]:
    first: dict[tuple[str, int], int] = {}
    return np.array([first.setdefault(point.path, i) for i, point in enumerate(points)])

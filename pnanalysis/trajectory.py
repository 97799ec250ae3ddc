"""Trajectories through parameter space, seen on the plane through their end points and on their principal components.

Everything follows from the T x T Gram matrix of the checkpoints' displacements from the starting point, which is
summed over blocks of parameters: however large the network, only a block of each checkpoint is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from pnanalysis import schema
from pnanalysis.errors import ModelError, RunError
from pnanalysis.progress import progress_bar
from pnanalysis.runs import Checkpoint, Run
from pnanalysis.sources import Source, as_source

_BLOCK_BYTES = 256_000_000

Matrix = NDArray[np.float64]


def trajectory(
    *runs: Run | Source,
    iterations: Sequence[int] | None = None,
    n_components: int = 2,
    progress: bool = True,
) -> xr.Dataset:
    """Project the trajectories of one or more runs.

    Parameters
    ----------
    *runs : Run or Source
        Runs of one architecture. A user's own weights count as one path in the order given.
    iterations : sequence of int, optional
        Which iterations of each run; all by default.
    n_components : int
        Principal components to give, at least 2.
    progress : bool

    Returns
    -------
    xarray.Dataset
        Kind ``trajectory``, dim ``checkpoint`` with coordinates run, iteration and epoch. ``plane`` holds
        orthonormal coordinates, in parameter units, on the plane through the start and two end points (the
        plain one and the champion; where they coincide, the last one): the start lies at the origin, the first end
        on the first axis. ``plane_residual`` is the distance from that plane. ``pca`` are coordinates about the mean
        of all checkpoints.

    Raises
    ------
    RunError
        If there are fewer than three checkpoints, or the plane's three points lie on one line.
    ModelError
        If the runs are of different architectures.

    References
    ----------
    H. Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018, arXiv:1712.09913 (PCA directions).
    """
    sources = [as_source(run) for run in runs]
    points = [point for source in sources for point in _points(source, iterations)]
    if len(points) < 3:
        raise RunError(f"a trajectory needs at least three checkpoints, there are {len(points)}")
    names = [name for name, _ in sources[0].make_model().named_parameters()]
    gram = _gram([point.checkpoint for point in points], names, progress)
    ends = _plane_ends(sources[0], points)
    plane, residual = project_plane(gram, *ends)
    pca, explained = _principal_components(gram, max(n_components, 2))
    pca *= np.where(pca[ends[0]] < 0, -1.0, 1.0)  # the sign is free: let the first end lie on the positive side
    ds = xr.Dataset(
        {
            "plane": (("checkpoint", "component"), _padded(plane, pca.shape[1])),
            "pca": (("checkpoint", "component"), pca),
            "explained_variance": (("component",), explained),
            "plane_residual": (("checkpoint",), residual),
            "distance_from_start": (("checkpoint",), np.sqrt(np.maximum(_distance2(gram, points), 0.0))),
            "path_length": (("checkpoint",), _path_length(gram, points)),
            "validation_error": (("checkpoint",), [point.error for point in points]),
        },
        coords={
            "checkpoint": [point.name for point in points],
            "run": ("checkpoint", [point.run for point in points]),
            "iteration": ("checkpoint", [point.iteration for point in points]),
            "epoch": ("checkpoint", [point.checkpoint.epoch for point in points]),
            "component": np.arange(pca.shape[1]),
        },
    )
    first = sources[0]
    return schema.finish(
        ds, "trajectory", **first.attrs, plane_points=[points[0].name, *(points[end].name for end in ends)],
        champion=None if first.run is None else first.run.manifest["champion"], dtype="float64",
    )  # fmt: skip


def plane_points(*sources: Source) -> list[tuple[str, Source, Checkpoint]]:
    """The three checkpoints that span the plane of :func:`trajectory`, and their names: start, two ends."""
    found = [(source, point) for source in sources for point in _points(source, None)]
    if len(found) < 3:
        raise RunError(f"a plane needs three checkpoints, there are {len(found)}")
    ends = _plane_ends(sources[0], [point for _, point in found])
    return [(found[i][1].name, found[i][0], found[i][1].checkpoint) for i in (0, *ends)]


@dataclass(frozen=True)
class _Point:
    """A checkpoint on somebody's path; ``path`` numbers the paths, and their first points are starts."""

    name: str
    run: str
    path: tuple[str, int]
    iteration: int
    checkpoint: Checkpoint
    error: float


def _points(source: Source, iterations: Sequence[int] | None) -> Iterator[_Point]:
    run = source.run
    if run is None:
        for checkpoint in source.checkpoints:
            yield _Point(checkpoint.name, source.label, (source.label, 0), 0, checkpoint, float("nan"))
        return
    errors = run.history.validation_error
    there = sorted({checkpoint.iteration for checkpoint in run.checkpoints})
    for iteration in there if iterations is None else iterations:
        for checkpoint in run.trajectory(iteration):
            known = checkpoint.epoch in errors.epoch and iteration in errors.iteration
            error = float(errors.sel(iteration=iteration, epoch=checkpoint.epoch)) if known else float("nan")
            name = f"{source.label}/iter{iteration:02d}/epoch{checkpoint.epoch:03d}"
            yield _Point(name, source.label, (source.label, iteration), iteration, checkpoint, error)


def _gram(checkpoints: list[Checkpoint], names: list[str], progress: bool) -> Matrix:
    """Inner products of displacements from the first checkpoint, (T, T), in float64."""
    gram = np.zeros((len(checkpoints), len(checkpoints)))
    rows = max(1, _BLOCK_BYTES // (8 * len(checkpoints)))
    with progress_bar("reading checkpoints", len(names), progress) as advance:
        for name in names:
            size = _size(checkpoints[0], name)
            for begin in range(0, size, rows):
                block = torch.stack([_read(c, name, size, begin, begin + rows) for c in checkpoints]).double()
                block -= block[0].clone()
                gram += (block @ block.T).numpy()
            advance(text=name)
    return gram


def _size(checkpoint: Checkpoint, name: str) -> int:
    return _tensor(checkpoint, name).numel()


def _read(checkpoint: Checkpoint, name: str, size: int, begin: int, end: int) -> torch.Tensor:
    tensor = _tensor(checkpoint, name)
    if tensor.numel() != size:
        raise ModelError(f"{checkpoint.path}: {name!r} has {tensor.numel()} entries, the first checkpoint has {size}")
    return tensor.reshape(-1)[begin:end]


def _tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """One tensor of a checkpoint, mapped from its file where the format allows."""
    if checkpoint.path.suffix != ".safetensors":
        state = checkpoint.load()
        if name in state:
            return state[name]
        raise ModelError(f"{checkpoint.path}: has no {name!r}, so it is of another architecture")
    try:
        with safe_open(checkpoint.path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{checkpoint.path}: has no readable {name!r} ({error})") from error


def _plane_ends(source: Source, points: list[_Point]) -> tuple[int, int]:
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


def project_plane(gram: Matrix, first: int, second: int) -> tuple[Matrix, Matrix]:
    """Coordinates (T, 2) on the plane through point 0, ``first`` and ``second``, and distances from it (T,)."""
    a2, ab, b2 = gram[first, first], gram[first, second], gram[second, second]
    height2 = b2 - ab**2 / a2 if a2 > 0 else 0.0
    if height2 <= 1e-10 * max(b2, a2):
        raise RunError("the start and the two end points lie on one line and span no plane; add another iteration")
    x = gram[:, first] / np.sqrt(a2)
    y = (gram[:, second] - ab / a2 * gram[:, first]) / np.sqrt(height2)
    return np.stack([x, y], axis=1), np.sqrt(np.maximum(np.diag(gram) - x**2 - y**2, 0.0))


def _principal_components(gram: Matrix, n_components: int) -> tuple[Matrix, Matrix]:
    """Coordinates (T, n) about the mean of all points, and each component's share of the variance."""
    centred = gram - gram.mean(0) - gram.mean(1, keepdims=True) + gram.mean()
    values, vectors = np.linalg.eigh(centred)
    keep = np.argsort(values)[::-1][: min(n_components, len(gram))]
    values = np.maximum(values[keep], 0.0)
    return vectors[:, keep] * np.sqrt(values), values / np.trace(centred)


def _padded(plane: Matrix, width: int) -> Matrix:
    return np.pad(plane, ((0, 0), (0, width - 2)), constant_values=np.nan)


def _distance2(gram: Matrix, points: list[_Point]) -> Matrix:
    """Squared distance of each point from the start of its own path."""
    diagonal, starts = np.diag(gram), _starts(points)
    return diagonal + diagonal[starts] - 2 * gram[np.arange(len(points)), starts]


def _path_length(gram: Matrix, points: list[_Point]) -> Matrix:
    diagonal, starts = np.diag(gram), _starts(points)
    lengths = np.zeros(len(points))
    for i in range(1, len(points)):
        if starts[i] != i:
            step2 = diagonal[i] + diagonal[i - 1] - 2 * gram[i, i - 1]
            lengths[i] = lengths[i - 1] + np.sqrt(max(step2, 0.0))
    return lengths


def _starts(points: list[_Point]) -> NDArray[np.intp]:
    first: dict[tuple[str, int], int] = {}
    return np.array([first.setdefault(point.path, i) for i, point in enumerate(points)])

"""Worst-case sharpness: the largest rise of the loss around one point, of all examples or of a few at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.errors import DataError, ModelError
from pnanalysis.inputs.batches import batch_size, can_cut, cut
from pnanalysis.inputs.splits import Batches
from pnanalysis.perturbation.ascent import Objective, ascend
from pnanalysis.perturbation.mean_loss import MeanLoss, batch_weight
from pnanalysis.perturbation.neighbourhoods import KINDS, STARTS, Neighbourhoods, scale_of
from pnanalysis.sampling.stacked_gradients import StackedGradients
from pnanalysis.spectra.random_vectors import normal_numbers
from pnanalysis.terminal.progress import Advance

#: Radii of each kind of neighbourhood, ascending, as many of each.
Radii = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class WorstCase:
    """How to look for the worst case; see :func:`pnanalysis.sharpness`."""

    radii: Radii
    method: str = "frank-wolfe"
    n_steps: int = 10
    n_starts: int = 2
    group: int | None = None
    seed: int = 0

    @property
    def n_radii(self) -> int:
        """Of each neighbourhood."""
        return len(next(iter(self.radii.values())))

    @property
    def n_gradients(self) -> int:
        """Gradients over all examples."""
        return len(self.radii) * self.n_radii * self.n_starts * self.n_steps


@dataclass(frozen=True)
class Rises:
    """Rises of the loss, in neighbourhoods of several kinds with several radii.

    Attributes
    ----------
    found, first : ndarray, shape (kind, radius, N)
        Of each example, at the highest point found, and where the linearised loss is largest. Plain means are those
        of the loss.
    start : ndarray, shape (kind, radius, start)
        Mean rise that each ascent found.
    """

    found: Array
    first: Array
    start: Array


def worst_case(
    gradients: StackedGradients, batches: Iterable[Any], how: WorstCase, advance: Advance | None = None
) -> Rises:
    """Look for the largest rises around the state of ``gradients``.

    With ``how.group``, each few examples have a worst case of their own, and the mean over them counts. Which examples
    these are is drawn by ``how.seed``; those of a loader follow each other.

    Raises
    ------
    ModelError
        If the loss is not finite where ascents come to.
    DataError
        If the batches cannot be cut into groups.
    """
    if how.group is None:
        return _of_group(gradients, batches, how, advance)
    n = sum(batch_size(batch) for batch in batches)
    order, batches = _shuffled(batches, n, how.seed)
    found, weights, sizes, which = [], [], [], []
    start = 0
    for group in grouped(batches, how.group):
        weight = sum(batch_weight(gradients.surface.loss, *gradients.surface.cast(batch)) for batch in group)
        size = sum(map(batch_size, group))
        own, start = order[start : start + size], start + size
        part = None if advance is None else _Part(advance, size / n)
        if weight > 0:  # else no example counts
            found.append(_of_group(gradients, group, how, part))
            weights.append(weight)
            sizes.append(size)
            which.append(own)
    share = np.array(weights) / sum(weights)
    # the plain mean over all examples is to be that of groups by their weights
    factors = share / (np.array(sizes) / sum(sizes))
    back = np.argsort(np.concatenate(which))
    return Rises(
        np.concatenate([f * one.found for f, one in zip(factors, found, strict=True)], axis=2)[:, :, back],
        np.concatenate([f * one.first for f, one in zip(factors, found, strict=True)], axis=2)[:, :, back],
        np.tensordot(share, np.stack([one.start for one in found]), 1),
    )


def _shuffled(batches: Iterable[Any], n: int, seed: int) -> tuple[NDArray[np.int64], Iterable[Any]]:
    """The batches with their examples in random order, and this order: data often come class after class.

    Those of a loader keep theirs.
    """
    if not isinstance(batches, Batches):
        return np.arange(n), batches
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order.numpy(), (batches.split.take(index) for index in order.split(batches.batch_size))


def grouped(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """The examples in groups of so many, however the batches divide them; the last group may be smaller.

    Each group is a list of batches and parts of batches. Batches that cannot be cut stay whole: where one does not fit
    into what is left of a group, it begins the next one.

    Raises
    ------
    DataError
        If a batch is larger and cannot be cut.
    """
    group: list[Any] = []
    room = size
    for batch in batches:
        n, is_whole = batch_size(batch), not can_cut(batch)
        if is_whole and n > size:
            raise DataError(f"a batch of {n} examples cannot be cut into groups of {size}; make the loader's as small")
        if is_whole and n > room:
            yield group
            group, room = [], size
        first = 0
        while first < n:
            taken = min(n - first, room)
            group.append(batch if taken == n else cut(batch, slice(first, first + taken)))
            first, room = first + taken, room - taken
            if not room:
                yield group
                group, room = [], size
    if group:
        yield group


def _of_group(gradients: StackedGradients, batches: Iterable[Any], how: WorstCase, advance: Advance | None) -> Rises:
    objective, surface, n_radii = MeanLoss(gradients, batches), gradients.surface, how.n_radii
    (centre,) = example_losses(gradients, gradients.centre[None], batches)
    parts: list[Rises] = []
    for kind in how.radii:
        within = _neighbourhoods(gradients, kind, how.radii[kind])
        starts = _starts(kind, within, how)
        rows = [(radius, start) for radius in range(n_radii) for start in range(how.n_starts)]
        value, u, first = _climbed(objective, within, starts, rows, how, max(surface.at_once, 1), advance)
        best_u = _best(value, u, how.radii[kind])
        points = torch.cat([within.points(best_u), within.points(first)])
        losses = np.stack(example_losses(gradients, points, batches))
        rises = losses - centre
        if not np.isfinite(rises).all() or not np.isfinite(value).all():
            largest = how.radii[kind][-1]
            raise ModelError(
                f"the loss is not finite everywhere in the {kind} of radius {largest:.4g}; choose a smaller radius, or "
                'compute in float64 (dtype="float64")'
            )
        parts.append(Rises(rises[:n_radii][None], rises[n_radii:][None], (value - centre.mean())[None]))
    return Rises(*(np.concatenate([getattr(one, name) for one in parts]) for name in ("found", "first", "start")))


def _neighbourhoods(gradients: StackedGradients, kind: str, radii: Sequence[float]) -> Neighbourhoods:
    centre = gradients.centre
    scale = scale_of(kind, gradients.state, gradients.names)
    rho = torch.tensor(radii, dtype=centre.dtype, device=centre.device)[:, None]
    return Neighbourhoods(centre, rho * scale, torch.full_like(rho, KINDS[kind].is_box, dtype=torch.bool))


def _starts(kind: str, within: Neighbourhoods, how: WorstCase) -> Tensor:
    """The centre, and random points of the border of the unit ball, ``(start, P)``."""
    n, device = len(within.centre), within.centre.device
    starts = torch.zeros(how.n_starts, n, dtype=within.centre.dtype, device=device)
    for i in range(1, how.n_starts):
        normal = normal_numbers(n, i, how.seed, device, stream=STARTS)
        u = normal.sign() if KINDS[kind].is_box else normal / normal.norm()
        starts[i] = u.to(starts.dtype)
    return starts


def _climbed(
    objective: Objective, within: Neighbourhoods, starts: Tensor, rows: Sequence[tuple[int, int]], how: WorstCase,
    at_once: int, advance: Advance | None,
) -> tuple[Array, list[Tensor], Tensor]:  # fmt: skip
    """Of each radius: values of its ascents ``(radius, start)``, where the highest was, and the first step from the
    centre ``(radius, P)``."""
    value = np.zeros((how.n_radii, how.n_starts))
    best: list[Tensor] = [starts[0]] * how.n_radii
    first: list[Tensor] = [starts[0]] * how.n_radii
    for begin in range(0, len(rows), at_once):
        some = rows[begin : begin + at_once]
        radius = torch.tensor([r for r, _ in some], device=starts.device)
        start = torch.tensor([s for _, s in some], device=starts.device)
        found = ascend(objective, within.rows(radius), starts[start], how.n_steps, how.method, advance)
        for i, (r, s) in enumerate(some):
            value[r, s] = float(found.value[i])
            if s == 0:
                first[r] = found.first[i].clone()
            if s == 0 or not value[r, s] <= value[r, :s].max():
                best[r] = found.u[i].clone()
    return value, best, torch.stack(first)


def _best(value: Array, u: Sequence[Tensor], radii: Sequence[float]) -> Tensor:
    """The highest point of each radius, ``(radius, P)``: a larger neighbourhood holds the points of the smaller."""
    best = [u[0]]
    highest = value[0].max()
    for i in range(1, len(radii)):
        if highest > value[i].max():
            best.append(best[-1] * (radii[i - 1] / radii[i]))
        else:
            best.append(u[i])
            highest = value[i].max()
    return torch.stack(best)


def example_losses(gradients: StackedGradients, points: Tensor, batches: Iterable[Any]) -> list[Array]:
    """Losses of all examples at each of some points."""
    surface, found = gradients.surface, []
    at_once = max(surface.at_once, 1)
    for begin in range(0, len(points), at_once):
        some = points[begin : begin + at_once]
        found += [values.loss for values in surface.example_values(gradients.states(some), len(some), batches)]
    return found


class _Part:
    """Progress of a part of the work."""

    def __init__(self, advance: Advance, share: float) -> None:
        self._advance, self._share = advance, share

    def __call__(self, steps: float = 1, text: str = "") -> None:
        self._advance(steps * self._share)

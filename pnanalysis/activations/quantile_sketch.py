"""Quantiles of a stream of numbers: exact for short streams, from a mergeable histogram for long ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_KEPT_BITS = 18  # sign, 8 of exponent, 9 of mantissa
_SHIFT = 32 - _KEPT_BITS
_BUCKETS = 1 << _KEPT_BITS

#: Largest relative distance of a quantile from the histogram to an order statistic (in float32's normal range).
RELATIVE_ERROR = 2.0 ** -(_KEPT_BITS - 9)


class QuantileSketch:
    """Quantiles of all numbers passed to :meth:`add`, in memory that does not grow with their count.

    Up to ``exact_limit`` numbers are kept, and their quantiles are those of numpy. Beyond that, numbers are counted in
    buckets of equal sign, exponent and leading nine bits of the mantissa in float32. Adding is one ``bincount``,
    merging is an addition, and there is no range to choose; a quantile is within a factor
    1 ± :data:`RELATIVE_ERROR` of the order statistic that it estimates.

    Parameters
    ----------
    exact_limit : int
        Largest count of numbers to keep; 0 starts with the histogram.
    """

    def __init__(self, exact_limit: int = 4_000_000) -> None:
        self.exact_limit = exact_limit
        self.count = 0
        self._kept: list[Tensor] = []
        self._buckets: Tensor | None = None
        self._sorted: dict[bool, NDArray[np.float32]] = {}

    @property
    def exact(self) -> bool:
        """Whether quantiles are exact."""
        return self._buckets is None

    def add(self, values: Tensor) -> None:
        """Add the numbers of a tensor of any shape."""
        values = values.detach().reshape(-1).float()
        self.count += values.numel()
        self._sorted.clear()
        if self.exact and self.count <= self.exact_limit:
            self._kept.append(values.clone())  # an in-place operation may overwrite the tensor later
            return
        self._tally_kept()
        self._tally(values)

    def merge(self, other: QuantileSketch) -> None:
        """Add all numbers of ``other``, which is not modified."""
        self.count += other.count
        self._sorted.clear()
        self._kept += other._kept
        if other._buckets is not None:
            self._buckets = other._buckets.clone() if self._buckets is None else self._buckets + other._buckets
        if not self.exact or self.count > self.exact_limit:
            self._tally_kept()

    def quantiles(self, levels: Sequence[float] | NDArray[np.float64], absolute: bool = False) -> NDArray[np.float64]:
        """Quantiles at ``levels`` in [0, 1], linearly interpolated; with ``absolute``, of the absolute values.

        Raises
        ------
        ValueError
            If nothing has been added.
        """
        if not self.count:
            raise ValueError("no numbers have been added")
        if self._buckets is None:
            return _interpolated(self._sorted_values(absolute), levels)
        values, counts = self._bucket_values()
        if absolute:
            order = np.argsort(np.abs(values), kind="stable")
            values, counts = np.abs(values)[order], counts[order]
        ends = np.cumsum(counts)
        ranks = np.asarray(levels, dtype=np.float64) * (self.count - 1)
        return values[np.searchsorted(ends, ranks, side="right").clip(max=len(values) - 1)]

    def histogram(self, edges: NDArray[np.float64]) -> NDArray[np.float64]:
        """Density of the numbers in the bins between ``edges``; numbers outside only count in the total."""
        if self._buckets is None:
            counts, _ = np.histogram(self._sorted_values(), bins=edges)
        else:
            values, weights = self._bucket_values()
            counts, _ = np.histogram(values, bins=edges, weights=weights)
        return counts / (self.count * np.diff(edges))

    def _sorted_values(self, absolute: bool = False) -> NDArray[np.float32]:
        if absolute not in self._sorted:
            kept = torch.cat(self._kept).cpu().numpy()
            self._sorted[absolute] = np.sort(np.abs(kept) if absolute else kept)
        return self._sorted[absolute]

    def _tally_kept(self) -> None:
        for kept in self._kept:
            self._tally(kept)
        self._kept = []

    def _tally(self, values: Tensor) -> None:
        bits = values.contiguous().view(torch.int32)
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # in two's complement: now monotone in the number
        tally = torch.bincount((ordered >> _SHIFT) + _BUCKETS // 2, minlength=_BUCKETS)
        self._buckets = tally if self._buckets is None else self._buckets + tally

    def _bucket_values(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Midpoints and counts of the buckets in use, in ascending order."""
        assert self._buckets is not None
        counts = self._buckets.cpu().numpy()
        used = np.flatnonzero(counts)
        low = (used - _BUCKETS // 2).astype(np.int32) << _SHIFT
        high = low + ((1 << _SHIFT) - 1)
        ends = [(key ^ ((key >> 31) & 0x7FFFFFFF)).astype(np.int32).view(np.float32) for key in (low, high)]
        midpoints = (ends[0].astype(np.float64) + ends[1].astype(np.float64)) / 2
        midpoints[ends[0] == 0] = 0.0  # zeros outnumber the denormals in their bucket
        return midpoints, counts[used]


def _interpolated(ordered: NDArray[np.float32], levels: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """The linear quantiles of numpy, of numbers that are sorted already."""
    ranks = np.asarray(levels, dtype=np.float64) * (len(ordered) - 1)
    below = np.floor(ranks).astype(np.intp)
    low, high = (ordered[index].astype(np.float64) for index in (below, np.minimum(below + 1, len(ordered) - 1)))
    return low + (ranks - below) * (high - low)

r"""How far the spectra of blocks differ from one another, beside what differs for one block by chance.

Every spectrum is there twice: over two halves of the examples, by different probes. Distances between blocks are taken
across the halves, and the distance between the two spectra of one block is what chance alone gives at the same
precision.

With the distance :math:`d_{ij}` of half :math:`i` of block :math:`k` and half :math:`j` of block :math:`l`, the one
that is reported is :math:`(d_{01} + d_{10}) / 2`. How it varies with either half by itself gives the standard error,

.. math:: s^2 = \tfrac{1}{16} \left[ (d_{00} + d_{01} - d_{10} - d_{11})^2 + (d_{00} + d_{10} - d_{01} - d_{11})^2
    \right],

which includes probes and examples. Of its two terms :math:`a` and :math:`b` each has one degree of freedom, so that the
sum has :math:`(a + b)^2 / (a^2 + b^2)` [1]_: two where both blocks scatter alike, one where all is of one of them.
Intervals are Student's, cut off where no distance can be: below zero, and divergences above :math:`\log 2`. Examples
that move both blocks alike leave a distance as it is, and make this error too large rather than too small.

The Jensen-Shannon divergence is that of the distributions of :math:`\mathrm{asinh}(\lambda / \lambda_0)`: eigenvalues
above :math:`\lambda_0` in size differ by their ratio, and those below by their difference. The Wasserstein-1 distance
is in units of eigenvalues.

References
----------
.. [1] F. E. Satterthwaite, "An approximate distribution of estimates of variance components", Biometrics Bulletin 2
   (1946) 110.

Y. Zhang, C. Chen, T. Ding, Z. Li, R. Sun, Z.-Q. Luo, "Why Transformers Need Adam: A Hessian Perspective",
arXiv:2402.16788.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.stats import wasserstein_distance
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.estimates import Estimate
from pnanalysis.spectra.linear_operator import (
    LinearOperator,
    arithmetic,
    contiguous_columns,
    empty_columns,
    round_off,
)

#: What counts as small, relative to the largest eigenvalue of all blocks.
_SMALL = 1e-3
#: Standard deviation of the kernel, in units of asinh: a factor of 1.28 between large eigenvalues.
_WIDTH = 0.25
_POINTS = 800


class DiagonalBlock:
    """A diagonal block of a symmetric operator, by products with vectors that are zero elsewhere.

    Parameters
    ----------
    operator : LinearOperator
    spans : sequence of slice
        The entries of the block.
    """

    def __init__(self, operator: LinearOperator, spans: Sequence[slice]) -> None:
        self.operator, self.spans = operator, list(spans)
        size = sum(span.stop - span.start for span in self.spans)
        self.shape, self.device, self.dtype = (size, size), operator.device, operator.dtype
        self.arithmetic, self.round_off = arithmetic(operator), round_off(operator)
        self.by_differences = bool(getattr(operator, "by_differences", False))

    def matvec(self, v: Tensor) -> Tensor:
        return self.matmat(v[:, None])[:, 0]

    def matmat(self, V: Tensor) -> Tensor:
        whole = empty_columns(self.operator.shape[0], V.shape[1], V.dtype, V.device).zero_()
        begin = 0
        for span in self.spans:
            whole[span] = V[begin : begin + span.stop - span.start]
            begin += span.stop - span.start
        product = self.operator.matmat(whole)
        return contiguous_columns(torch.cat([product[span] for span in self.spans]))


def spectrum_distances(halves: Sequence[Sequence[xr.Dataset]]) -> xr.Dataset:
    """Distances between all pairs of blocks, and between the two spectra of each.

    Parameters
    ----------
    halves : sequence of sequence of xarray.Dataset
        For each of two halves of the examples, the spectral densities of all blocks.

    Returns
    -------
    xarray.Dataset
        ``js_divergence`` and ``wasserstein1`` (block, other), on whose diagonals stands what chance alone gives; their
        standard errors ``NAME_se`` and the ends ``NAME_low`` and ``NAME_high`` of 95 % intervals, NaN on the diagonal;
        ``spectrum_node`` and ``spectrum_weight`` (half, block, quadrature), padded with NaN; and the attribute
        ``small_eigenvalue``.
    """
    measures = [[_measure(ds) for ds in half] for half in halves]
    n = len(measures[0])
    small = _SMALL * max(float(np.abs(node).max()) for half in measures for node, _ in half) or 1.0
    grid, densities = _densities(measures, small)
    dims = ("block", "other")
    ds = xr.Dataset(attrs={"small_eigenvalue": small})
    for name, distance, of, most in (
        ("js_divergence", partial(_divergence, grid=grid), densities, np.log(2)),
        ("wasserstein1", _wasserstein, measures, np.inf),
    ):
        for end, values in zip(("", "_se", "_low", "_high"), _table(distance, of, most), strict=True):
            ds[f"{name}{end}"] = dims, values
    longest = max(len(node) for half in measures for node, _ in half)
    table = np.full((2, 2, n, longest), np.nan)
    for i, half in enumerate(measures):
        for k, parts in enumerate(half):
            for into, own in zip(table, parts, strict=True):
                into[i, k, : len(own)] = own
    for name, values in zip(("spectrum_node", "spectrum_weight"), table, strict=True):
        ds[name] = ("half", "block", "quadrature"), values
    return ds


def _table(distance: Callable[[Any, Any], float], of: Sequence[Sequence[Any]], most: float) -> Array:
    """Distances between the halves of all pairs of blocks, their standard errors, and the ends of their intervals.

    ``(number, block, other)``; no distance is above ``most``.
    """
    n = len(of[0])
    table = np.full((4, n, n), np.nan)
    for k in range(n):
        table[0, k, k] = distance(of[0][k], of[1][k])
        for m in range(k):
            found = np.array([[distance(of[i][k], of[j][m]) for j in (0, 1)] for i in (0, 1)])
            table[:, k, m] = table[:, m, k] = _across_halves(found, most)
    return table


def _across_halves(found: Array, most: float) -> list[float]:
    """Of the distances ``(2, 2)`` between halves of two blocks: value, error, and the ends of the interval."""
    parts = np.array([np.diff(found.sum(axis))[0] for axis in (0, 1)]) ** 2 / 16
    shares = parts / (parts.max() or 1.0)
    dof = shares.sum() ** 2 / ((shares**2).sum() or 1.0)
    estimate = Estimate(float(found[0, 1] + found[1, 0]) / 2, float(np.sqrt(parts.sum())), dof=float(dof))
    low, high = estimate.interval()
    return [estimate.value, estimate.se, max(low, 0.0), min(high, most)]


def _measure(ds: xr.Dataset) -> tuple[Array, Array]:
    node, weight = ds["node"].values, ds["weight"].values
    keep = np.isfinite(node)
    return node[keep], np.maximum(weight[keep], 0) / np.maximum(weight[keep], 0).sum()


def _densities(measures: list[list[tuple[Array, Array]]], small: float) -> tuple[Array, list[list[Array]]]:
    """Smoothed densities in ``asinh(eigenvalue / small)`` on a common grid."""
    ends = [np.arcsinh(end(node) / small) for half in measures for node, _ in half for end in (np.min, np.max)]
    grid = np.linspace(min(ends) - 5 * _WIDTH, max(ends) + 5 * _WIDTH, _POINTS)

    def density(node: Array, weight: Array) -> Array:
        distance = (grid[:, None] - np.arcsinh(node / small)) / _WIDTH
        found = np.exp(-(distance**2) / 2) @ weight
        return np.asarray(found / (found.sum() * (grid[1] - grid[0])))

    return grid, [[density(*measure) for measure in half] for half in measures]


def _divergence(p: Array, q: Array, grid: Array) -> float:
    """Jensen-Shannon divergence of two densities, in nats."""
    middle = (p + q) / 2

    def kullback(one: Array) -> float:
        ratio = np.divide(one, middle, out=np.ones_like(one), where=(one > 0) & (middle > 0))
        return float(one @ np.log(ratio) * (grid[1] - grid[0]))

    return max((kullback(p) + kullback(q)) / 2, 0.0)


def _wasserstein(a: tuple[Array, Array], b: tuple[Array, Array]) -> float:
    return float(wasserstein_distance(a[0], b[0], a[1], b[1]))


__all__ = ["DiagonalBlock", "spectrum_distances"]

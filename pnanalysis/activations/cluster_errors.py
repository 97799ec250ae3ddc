"""Standard errors of statistics of activations, which are clustered by example.

A layer has thousands of activations per image, which are far from independent; the images are. Every standard error
here is therefore one over examples, from sums for each example that accumulate as the data stream by.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pnanalysis.arrays import Array


class ExampleMoments:
    r"""Means over all numbers of a data set, and their covariance over its examples.

    With :math:`s_i` the sum over the :math:`m_i` numbers of example :math:`i`, the mean is the ratio
    :math:`r = \sum s_i / \sum m_i`, and its variance that of a ratio (linearised),
    :math:`\frac{n}{n-1} \sum (s_i - r m_i)^2 / (\sum m_i)^2`.

    Parameters
    ----------
    cross : bool
        Also keep the covariances between the K columns, for :meth:`covariance`.

    References
    ----------
    W. G. Cochran, "Sampling Techniques", 3rd ed., Wiley 1977, section 2.11 and chapter 9A.
    """

    def __init__(self, cross: bool = False) -> None:
        self.cross = cross
        self.n = 0
        self._count, self._count2 = 0, 0  # sums over examples of m_i and m_i^2
        self._sums: Tensor | None = None  # rows: sums of s_i, of m_i s_i, and of the products of s_i

    def add(self, sums: Tensor, count: int) -> None:
        """Add N examples by their ``sums`` (N, K), each over ``count`` numbers."""
        sums = sums.double()
        total = sums.sum(0)
        products = sums.T @ sums if self.cross else sums.square().sum(0)[None]
        n = len(sums)
        self._accumulate(n, n * count, n * count**2, torch.cat([total[None], count * total[None], products]))

    def merge(self, other: ExampleMoments) -> None:
        """Add all examples of ``other``."""
        if other._sums is not None:
            self._accumulate(other.n, other._count, other._count2, other._sums)

    def mean(self) -> Array:
        """Means, (K,)."""
        return self._table()[0] / self._count

    def standard_error(self) -> Array:
        """Standard errors of the means, (K,); NaN for a single example."""
        covariance = self.covariance()
        return np.sqrt(np.maximum(np.diag(covariance) if self.cross else covariance, 0.0))

    def covariance(self) -> Array:
        """Covariance of the means, (K, K); without ``cross`` its diagonal, (K,)."""
        if self.n < 2:
            return np.full((len(self.mean()),) * (1 + self.cross), np.nan)
        mean, weighted = self.mean(), self._table()[1]
        products = self._table()[2:]
        # sum (s_i - r m_i)(s_i - r m_i)^T, multiplied out, since r is known only at the end of the stream
        if self.cross:
            mixed = np.outer(mean, weighted)
            spread = products - mixed - mixed.T + self._count2 * np.outer(mean, mean)
        else:
            spread = products[0] - 2 * mean * weighted + self._count2 * mean**2
        return spread * (self.n / (self.n - 1) / self._count**2)

    def _accumulate(self, n: int, count: int, count2: int, sums: Tensor) -> None:
        self.n, self._count, self._count2 = self.n + n, self._count + count, self._count2 + count2
        self._sums = sums if self._sums is None else self._sums + sums

    def _table(self) -> Array:
        assert self._sums is not None
        return self._sums.cpu().numpy()


# Buckets by the leading bits of a float32: its exponent, and three bits of its mantissa.
_MANTISSA_BITS = 3
_LOWEST, _HIGHEST = -32, 16  # exponents of two; smaller and larger numbers share the outermost buckets
_SHIFT = 23 - _MANTISSA_BITS
_ZERO = (127 + _LOWEST) << _MANTISSA_BITS
_TOP = (_HIGHEST - _LOWEST) << _MANTISSA_BITS  # buckets of magnitudes are 0 to _TOP


class CumulativeFractions:
    r"""Standard errors, over examples, of the fraction of numbers below a quantile.

    At the borders of coarse buckets (eight per octave) the variance of the cumulative fraction :math:`F` over examples
    is known exactly; its ratio to that of independent examples of one number each, :math:`F(1-F)/n`, is the design
    effect. It varies slowly, and is interpolated in :math:`F`.

    Woodruff's standard error of a quantile :math:`Q(p)` is then :math:`(Q(p + e) - Q(p - e))/2`, with :math:`e` the
    standard error of the fraction at :math:`p`. It needs no density, and is zero within an atom (a ReLU's zeros).

    References
    ----------
    R. S. Woodruff, "Confidence intervals for medians and other position measures", JASA 47 (1952) 635-646.
    L. Kish, "Survey Sampling", Wiley 1965 (design effects).
    """

    def __init__(self) -> None:
        self._moments = ExampleMoments()

    def add(self, values: Tensor) -> None:
        """Add the numbers of N examples, (N, M), float32."""
        n, width = len(values), 2 * _TOP + 1
        bits = values.contiguous().view(torch.int32)
        # Of two positive floats the larger one has the larger bits: shifted, they number the buckets.
        magnitude = ((bits & 0x7FFFFFFF) >> _SHIFT).sub_(_ZERO).clamp_(0, _TOP)
        key = torch.where(bits < 0, -magnitude, magnitude).add_(_TOP)
        key += torch.arange(n, dtype=torch.int32, device=values.device)[:, None] * width  # one range per example
        counts = torch.bincount(key.view(-1), minlength=n * width).view(n, width).double()
        absolute = counts[:, _TOP:].clone()
        absolute[:, 1:] += counts[:, :_TOP].flip(1)
        self._moments.add(torch.cat([counts.cumsum(1), absolute.cumsum(1)], dim=1), values.shape[1])

    def merge(self, other: CumulativeFractions) -> None:
        """Add all examples of ``other``."""
        self._moments.merge(other._moments)

    def standard_error(self, levels: Array, absolute: bool = False) -> Array:
        """Standard error of the fraction of numbers, or of absolute numbers, below the quantile at each level."""
        n = self._moments.n
        if n < 2:
            return np.full(len(levels), np.nan)
        columns = slice(2 * _TOP + 1, None) if absolute else slice(2 * _TOP + 1)
        fractions, ses = self._moments.mean()[columns], self._moments.standard_error()[columns]
        inner = (fractions > 1e-12) & (fractions < 1 - 1e-12)  # at 0 and 1 the design effect is 0 / 0
        if not inner.any():  # all numbers in one bucket: as if each example held one number
            return np.sqrt(levels * (1 - levels) / n)
        fractions, first = np.unique(fractions[inner], return_index=True)
        design_effect = n * ses[inner][first] ** 2 / (fractions * (1 - fractions))
        return np.sqrt(np.interp(levels, fractions, design_effect) * levels * (1 - levels) / n)

"""Standard errors over examples when each example contributes many dependent numbers.

A layer gives thousands of activations per image, which are far from independent. Images are independent, so every
standard error here is one over examples, from sums per example that accumulate over batches.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


class ExampleMoments:
    r"""Means over all numbers of a data set, and their covariance over its examples.

    With :math:`s_i` the sum over the :math:`m_i` numbers of example :math:`i`, the mean is the ratio
    :math:`r = \sum s_i / \sum m_i`, and its variance that of a ratio (linearised),
    :math:`\frac{n}{n-1} \sum (s_i - r m_i)^2 / (\sum m_i)^2`.

    Parameters
    ----------
    cross : bool
        Also keep covariances between columns, for :meth:`covariance`.

    References
    ----------
    W. G. Cochran, "Sampling Techniques", 3rd ed., Wiley 1977, section 2.11 and chapter 9A.
    """

    def __init__(self, cross: bool = False) -> None:
        self.cross = cross
        self.n = 0
        self._count, self._count2 = 0, 0
        self._sums: Tensor | None = None

    def add(self, sums: Tensor, count: int) -> None:
        """Add ``sums`` (N, K) over the ``count`` numbers of each of N examples."""
        sums = sums.double()
        total = sums.sum(0)
        products = sums.T @ sums if self.cross else sums.square().sum(0)[None]
        n = len(sums)
        self._take(n, n * count, n * count**2, torch.cat([total[None], count * total[None], products]))

    def merge(self, other: ExampleMoments) -> None:
        """Add all examples of ``other``."""
        if other._sums is not None:
            self._take(other.n, other._count, other._count2, other._sums)

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
        if self.cross:
            mixed = np.outer(mean, weighted)
            spread = products - mixed - mixed.T + self._count2 * np.outer(mean, mean)
        else:
            spread = products[0] - 2 * mean * weighted + self._count2 * mean**2
        return spread * (self.n / (self.n - 1) / self._count**2)

    def _take(self, n: int, count: int, count2: int, sums: Tensor) -> None:
        self.n, self._count, self._count2 = self.n + n, self._count + count, self._count2 + count2
        self._sums = sums if self._sums is None else self._sums + sums

    def _table(self) -> Array:
        assert self._sums is not None
        return self._sums.cpu().numpy()


_MANTISSA_BITS = 3
_LOWEST, _HIGHEST = -32, 16  # exponents of two that have buckets of their own
_SHIFT = 23 - _MANTISSA_BITS
_ZERO = (127 + _LOWEST) << _MANTISSA_BITS
_TOP = (_HIGHEST - _LOWEST) << _MANTISSA_BITS  # buckets of magnitudes 0 ... _TOP


class FractionErrors:
    r"""Standard errors of the fractions of numbers below given quantiles, over examples.

    At the borders of coarse buckets (eight per octave) the variance of the cumulative fraction :math:`F` over examples
    is known exactly; divided by :math:`F(1-F)/n`, its value for independent examples of one number each, it is the
    design effect, which varies slowly and is interpolated in :math:`F`.

    Woodruff's standard error of a quantile :math:`Q(p)` is then :math:`(Q(p + e) - Q(p - e))/2` with :math:`e` the
    standard error of the fraction at :math:`p`: it needs no density, and is zero within an atom (a ReLU's zeros).

    References
    ----------
    R. S. Woodruff, "Confidence intervals for medians and other position measures", JASA 47 (1952) 635-646.
    L. Kish, "Survey Sampling", Wiley 1965 (design effects).
    """

    def __init__(self) -> None:
        self._moments = ExampleMoments()

    def add(self, values: Tensor) -> None:
        """Add numbers of N examples, (N, M), float32."""
        n, width = len(values), 2 * _TOP + 1
        bits = values.contiguous().view(torch.int32)
        magnitude = ((bits & 0x7FFFFFFF) >> _SHIFT).sub_(_ZERO).clamp_(0, _TOP)
        key = torch.where(bits < 0, -magnitude, magnitude).add_(_TOP)
        key += torch.arange(n, dtype=torch.int32, device=values.device)[:, None] * width
        counts = torch.bincount(key.view(-1), minlength=n * width).view(n, width).double()
        absolute = counts[:, _TOP:].clone()
        absolute[:, 1:] += counts[:, :_TOP].flip(1)
        self._moments.add(torch.cat([counts.cumsum(1), absolute.cumsum(1)], dim=1), values.shape[1])

    def merge(self, other: FractionErrors) -> None:
        """Add all examples of ``other``."""
        self._moments.merge(other._moments)

    def at(self, levels: Array, absolute: bool = False) -> Array:
        """Standard error of the fraction of numbers (of absolute numbers) below the quantile at each level."""
        n = self._moments.n
        if n < 2:
            return np.full(len(levels), np.nan)
        own = slice(2 * _TOP + 1, None) if absolute else slice(2 * _TOP + 1)
        fractions, se = self._moments.mean()[own], self._moments.standard_error()[own]
        inner = (fractions > 1e-12) & (fractions < 1 - 1e-12)  # at 0 and 1 the design effect is 0 / 0
        if not inner.any():  # all numbers are in one bucket: as if each example held one number
            return np.sqrt(levels * (1 - levels) / n)
        fractions, se = fractions[inner], se[inner]
        fractions, first = np.unique(fractions, return_index=True)
        effect = n * se[first] ** 2 / (fractions * (1 - fractions))
        return np.sqrt(np.interp(levels, fractions, effect) * levels * (1 - levels) / n)

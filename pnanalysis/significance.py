"""Whether a difference is more than chance: p-values of single ones, and Holm's step-down for many at once."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from pnanalysis.arrays import Array

#: Chance of any false claim that a comparison allows.
LEVEL = 0.05
#: Discordant examples below which McNemar's test is exact, not normal.
FEW_DISCORDANT = 25
_Z95 = 1.959963984540054  # standard errors to either side that make a normal 95 % interval
_CAUCHY = 12.706204736432095  # the same of Student's distribution with one degree of freedom


def p_value(
    value: ArrayLike,
    se: ArrayLike = math.nan,
    low: ArrayLike = math.nan,
    high: ArrayLike = math.nan,
    dof: ArrayLike = math.inf,
    floor: ArrayLike = 0.0,
) -> Array:
    r"""Two-sided p-value of numbers that would be zero but for their errors.

    Parameters
    ----------
    value : array_like
    se : array_like
        Standard errors.
    low, high : array_like
        Ends of 95 % intervals, NaN where there are none.
    dof : array_like
        Degrees of freedom of the standard error, used where there is no interval.
    floor : array_like
        Round-off: values not beyond it are zero, whatever their errors.

    Returns
    -------
    ndarray
        1 for zeros, 0 for others without any error, NaN where neither a standard error nor an interval is known.

    Notes
    -----
    Where there is an interval, the side that faces zero counts. If it is longer than 1.96 standard errors, it is
    taken for that of a Student distribution, whose degrees of freedom follow from its length.
    """
    from scipy.special import ndtr, stdtr, stdtridf  # here, so that command lines start without SciPy

    value, se, low, high, dof, floor = _floats(value, se, low, high, dof, floor)
    size, side = np.abs(value), np.where(value < 0, high - value, value - low)
    with np.errstate(invalid="ignore", divide="ignore"):
        stretch = side / se
        is_student = (stretch > _Z95 * (1 + 1e-9)) & (stretch <= _CAUCHY)
        own_dof = np.where(is_student, stdtridf(0.975, np.where(is_student, stretch, 2.0)), np.inf)
        dof = np.where(np.isnan(side), dof, own_dof)
        scale = np.where(np.isnan(side) | is_student, se, side / _Z95)
        ratio = np.where(scale > 0, size / scale, np.where(scale == 0, np.inf, np.nan))
        p = np.where(np.isinf(dof), 2 * ndtr(-ratio), 2 * stdtr(np.where(np.isinf(dof), 1.0, dof), -ratio))
    return np.where(size <= floor, 1.0, np.where(np.isnan(value), np.nan, p))


def p_value_beyond_bounds(
    low: ArrayLike, high: ArrayLike, data_se: ArrayLike = math.nan, floor: ArrayLike = 0.0
) -> Array:
    """Two-sided p-value of numbers that lie between bounds, to which the choice of examples adds an error.

    Parameters
    ----------
    low, high : array_like
        The bounds, widened by 1.96 ``data_se`` where that is known.
    data_se : array_like
        Standard error for the choice of examples, NaN where there is none.
    floor : array_like
        See :func:`p_value`.

    Returns
    -------
    ndarray
        1 where zero is between the bounds themselves. Elsewhere what lies beyond them counts, which without a
        ``data_se`` has no error.
    """
    low, high, se = _floats(low, high, np.nan_to_num(data_se))
    low, high = low + _Z95 * se, high - _Z95 * se
    nearest = np.where(low > 0, low, np.where(high < 0, high, 0.0 * (low + high)))
    return p_value(nearest, se, floor=floor)


def mcnemar(only_first: ArrayLike, only_second: ArrayLike) -> Array:
    """Exact two-sided p-value of McNemar's test.

    Parameters
    ----------
    only_first, only_second : array_like of int
        Examples that one of two networks gets wrong and the other right.

    Returns
    -------
    ndarray
        The binomial probability of counts as uneven as these, if both kinds are equally likely.

    References
    ----------
    Q. McNemar, Psychometrika 12 (1947) 153.
    """
    from scipy.special import bdtr

    first, second = _floats(only_first, only_second)
    return np.minimum(2 * bdtr(np.minimum(first, second), (first + second).astype(int), 0.5), 1.0)


def holm(p: ArrayLike) -> Array:
    """p-values adjusted for their number by Holm's step-down, NaN for unknown ones (which do not count).

    Claiming those at most :data:`LEVEL` makes any false claim with at most that probability, however they depend on
    each other.

    Parameters
    ----------
    p : array_like, shape (n,)

    Returns
    -------
    ndarray, shape (n,)

    References
    ----------
    S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979) 65.
    """
    (p,) = _floats(p)
    adjusted = np.full(p.shape, np.nan)
    order = np.argsort(p)[: int(np.isfinite(p).sum())]  # NaNs are last
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1.0)
    return adjusted


def share_interval(value: ArrayLike, se: ArrayLike, n: ArrayLike) -> tuple[Array, Array]:
    """Wilson's 95 % interval of a share of examples, which holds where few or none of them count.

    Parameters
    ----------
    value : array_like
        From 0 to 1.
    se : array_like
        Standard errors; 0 or NaN where they say nothing: for shares of 0 and 1.
    n : array_like
        Number of examples. Where the standard error is not the binomial one, as for shares of an example's positions,
        the number of independent examples that has this error takes its place.

    Returns
    -------
    low, high : ndarray
        NaN for values that are no shares.

    References
    ----------
    E. B. Wilson, Journal of the American Statistical Association 22 (1927) 209.
    """
    value, se, n = _floats(value, se, n)
    with np.errstate(invalid="ignore", divide="ignore"):
        n = np.where(se > 0, value * (1 - value) / se**2, n)
        shrunk, z = 1 + _Z95**2 / n, _Z95
        centre = (value + z**2 / (2 * n)) / shrunk
        half = z * np.sqrt(value * (1 - value) / n + z**2 / (4 * n**2)) / shrunk
        is_share = (value >= 0) & (value <= 1) & (n > 0)
    low, high = np.where(value == 0, 0.0, centre - half), np.where(value == 1, 1.0, centre + half)
    return np.where(is_share, low, np.nan), np.where(is_share, high, np.nan)


def _floats(*numbers: ArrayLike) -> tuple[Array, ...]:
    """Arrays of one shape, in double precision."""
    return np.broadcast_arrays(*(np.asarray(one, dtype=np.float64) for one in numbers))

r"""Rank correlations of several numbers with one target over runs: Kendall's tau, by settings, and with errors.

All are sums over pairs of runs of signs of differences. Resampled runs count as often as they are drawn, so that with
counts ``w`` and signs ``A`` and ``B`` of all pairs,

.. math:: \tau_b = w^\top (A \circ B) w \big/ \sqrt{(w^\top A^2 w)(w^\top B^2 w)}.

References
----------
M. G. Kendall, "The treatment of ties in ranking problems", Biometrika 33 (1945): tau-b. Y. Jiang et al., "Fantastic
Generalization Measures and Where to Find Them", ICLR 2020, arXiv:1912.02178: the granulated coefficient and the
normalised conditional mutual information. B. Efron, "Bootstrap methods: another look at the jackknife", Annals of
Statistics 7 (1979). E. C. Fieller, H. O. Hartley and E. S. Pearson, "Tests for rank correlation coefficients I",
Biometrika 44 (1957): intervals on the scale of the inverse hyperbolic tangent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, permutations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pnanalysis.arrays import Array

#: Pairs out of order, as a tie counts half, at the largest tau on the scale of the inverse hyperbolic tangent.
_EDGE = 1.0
#: Variance on that scale times the number of runs less four, of normal numbers: less is never believed, as where all
#: pairs are in order, and stay so however runs are resampled.
_FIELLER = 0.437
_REPLICATES_AT_ONCE = 64
#: With ties: runs whose orders are all gone through, and how many orders are drawn of more.
_MOST_IN_ALL_ORDERS, _N_ORDERS = 7, 9999
#: Of more runs than the former, different values from which on the normal approximation holds whatever the ties are:
#: there are that many runs outside the largest tie.
_MANY_RUNS, _MANY_VALUES = 50, 25
#: Entries of the tables of orders that are gone through together.
_CELLS_AT_ONCE = 2**20


class Tau(NamedTuple):
    """Kendall's tau-b with errors.

    Attributes
    ----------
    value, se, low, high : float
        With the standard error and the ends of the 95 % interval over runs like these.
    p : float
        Two-sided, of no correlation.
    noise_se : float
        The part of the standard error that the errors of the numbers would cause with the runs as they are.
    shift : float
        How much tau would change, on average, if the numbers had these errors once more: about as much as it is
        already too near zero.
    """

    value: float
    se: float
    low: float
    high: float
    p: float
    noise_se: float
    shift: float


class Granulated(NamedTuple):
    """Jiang et al.'s coefficient with errors, and its part of each setting.

    Attributes
    ----------
    value, low, high : float
    of_axis : ndarray, shape (axis,)
    """

    value: float
    low: float
    high: float
    of_axis: Array


def signs(values: Array) -> Array:
    """Signs of differences of all pairs, ``(..., n, n)`` from ``(..., n)``."""
    return np.sign(values[..., :, None] - values[..., None, :])


def kendall_tau(a: Array, b: Array, counts: Array | None = None) -> Array:
    """Tau-b from :func:`signs` ``(..., n, n)``, of runs that count ``counts`` ``(..., n)`` times; NaN of constants."""
    weights = np.ones(a.shape[-1]) if counts is None else counts

    def summed(pairs: Array) -> Array:
        found: Array = ((pairs @ weights[..., :, None])[..., 0] * weights).sum(-1)
        return found

    size = np.sqrt(summed(a * a) * summed(b * b))
    return np.divide(summed(a * b), size, out=np.full(np.shape(size), np.nan), where=size > 0)


def tau_with_errors(
    x: Array, y: Array, x_se: Array | None = None, y_se: Array | None = None, n_bootstrap: int = 2000, seed: int = 0
) -> Tau:
    """Tau-b of two numbers of runs, with errors by resampling runs and drawing from the numbers' own errors.

    Parameters
    ----------
    x, y : ndarray, shape (n,)
    x_se, y_se : ndarray, shape (n,), optional
        Their standard errors, taken as independent; NaN for none.
    n_bootstrap, seed : int
    """
    from scipy.stats import norm  # here, so that command lines start without SciPy

    n, rng = len(x), np.random.default_rng(seed)
    errors = [np.zeros(n) if se is None else np.nan_to_num(se) for se in (x_se, y_se)]
    of_x, of_y = signs(x), signs(y)
    value = float(kendall_tau(of_x, of_y))
    resampled, redrawn = [], []
    has_errors = any(one.any() for one in errors)
    for begin in range(0, n_bootstrap, _REPLICATES_AT_ONCE):
        size = min(_REPLICATES_AT_ONCE, n_bootstrap - begin)
        counts = rng.multinomial(n, np.full(n, 1 / n), size=size).astype(float)
        resampled.append(kendall_tau(of_x, of_y, counts))
        if has_errors:
            drawn = [v + se * rng.standard_normal((size, n)) for v, se in zip((x, y), errors, strict=True)]
            redrawn.append(kendall_tau(signs(drawn[0]), signs(drawn[1])))
    again = np.concatenate(redrawn) if redrawn else np.array([value])
    edge = 1 - _EDGE / math.comb(n, 2)
    spread = max(_spread(np.concatenate(resampled), edge), math.sqrt(_FIELLER / max(n - 4, 1)))
    # numbers that are drawn again scatter about less of a correlation, so that their scatter is added by itself
    spread = math.hypot(spread, _spread(again, edge))
    middle = math.atanh(min(max(value, -edge), edge))
    low, high = (math.tanh(middle + side * float(norm.ppf(0.975)) * spread) for side in (-1, 1))
    se = spread * (1 - math.tanh(middle) ** 2)
    return Tau(value, se, low, high, _p_value(x, y, seed), float(np.nanstd(again)), float(np.nanmean(again)) - value)


def _p_value(x: Array, y: Array, seed: int) -> float:
    """Two-sided p-value of no correlation: how often numbers in a random order agree or disagree as much.

    Without ties, it is SciPy's. With ties, its normal approximation is far too small where few values are different,
    however many runs there are. So orders are gone through: all of few runs, else some that are drawn, unless there
    are many runs and many different values of both numbers.
    """
    from scipy.stats import kendalltau

    n, rng = len(x), np.random.default_rng([seed, 1])
    few, many = sorted((np.unique(v, return_inverse=True)[1] for v in (x, y)), key=np.max)
    has_ties = few.max() < n - 1
    if not has_ties or few.max() == 0 or (n > _MANY_RUNS and few.max() >= _MANY_VALUES):
        return float(kendalltau(x, y).pvalue)
    observed, is_exact = abs(_concordance(few[None], many)[0]), n <= _MOST_IN_ALL_ORDERS
    at_once = max(_CELLS_AT_ONCE // ((few.max() + 1) * (many.max() + 1)), 1)
    n_orders = math.factorial(n) if is_exact else _N_ORDERS
    every = np.array(list(permutations(range(n)))) if is_exact else None
    as_much = 0
    for begin in range(0, n_orders, at_once):
        size = min(at_once, n_orders - begin)
        drawn = few[every[begin : begin + size]] if every is not None else rng.permuted(np.tile(few, (size, 1)), axis=1)
        as_much += int((np.abs(_concordance(drawn, many)) >= observed).sum())
    return as_much / n_orders if is_exact else (1 + as_much) / (1 + n_orders)


def _concordance(x: NDArray[np.intp], y: NDArray[np.intp]) -> NDArray[np.int64]:
    """Pairs in order less pairs out of order, of places ``(orders, n)`` with places ``(n,)``, from their tables."""
    n_x, n_y = int(x.max()) + 1, int(y.max()) + 1
    cell = (np.arange(len(x))[:, None] * n_y + y) * n_x + x
    table = np.bincount(cell.ravel(), minlength=len(x) * n_y * n_x).reshape(len(x), n_y, n_x)
    below = table.cumsum(1) - table  # in y, by the place in x
    lower = below.cumsum(2)
    ahead = 2 * lower - below - lower[:, :, -1:]  # below in both, less below in y and above in x
    found: NDArray[np.int64] = (table * ahead).sum((1, 2))
    return found


def _spread(taus: Array, edge: float) -> float:
    """Standard deviation on the scale of the inverse hyperbolic tangent; 0 for fewer than two numbers."""
    known = taus[np.isfinite(taus)]
    return float(np.arctanh(np.clip(known, -edge, edge)).std(ddof=1)) if len(known) > 1 else 0.0


def granulated(
    x: Array, y: Array, settings: Mapping[str, Sequence[object]], axes: Sequence[str], n_bootstrap: int = 2000,
    seed: int = 0,
) -> Granulated:  # fmt: skip
    """Tau among runs that differ in one setting only, averaged over their groups, then over the settings.

    Pairs of runs that do not differ in it, repetitions, do not count.

    Parameters
    ----------
    x, y : ndarray, shape (n,)
    settings : mapping of str to sequence
        The value of each run. Runs that are compared agree in all but one.
    axes : sequence of str
        The settings that count.
    n_bootstrap, seed : int
        Runs are resampled; the interval is that of percentiles.
    """
    agree = signs(x) * signs(y)
    coded = {name: _codes(values) for name, values in settings.items()}
    groups = [_groups(coded, axis) for axis in axes]
    differ = [np.not_equal.outer(coded[axis], coded[axis]) for axis in axes]
    counts = np.random.default_rng(seed).multinomial(len(x), np.full(len(x), 1 / len(x)), size=n_bootstrap)
    found = list(zip(differ, groups, strict=True))
    of_axis = np.array([_mean_tau(agree, apart, own, np.ones((1, len(x))))[0] for apart, own in found])
    replicates = np.array([_mean_tau(agree, apart, own, counts.astype(float)) for apart, own in found])
    known = np.isfinite(of_axis)
    if not known.any():
        return Granulated(math.nan, math.nan, math.nan, of_axis)
    with np.errstate(invalid="ignore"):
        shares = np.isfinite(replicates)
        means = np.where(shares, replicates, 0.0).sum(0) / np.maximum(shares.sum(0), 1)
    means = means[shares.any(0)]
    low, high = np.quantile(means, [0.025, 0.975]) if len(means) > n_bootstrap / 2 else (math.nan, math.nan)
    return Granulated(float(of_axis[known].mean()), float(low), float(high), of_axis)


def conditional_information(x: Array, y: Array, settings: Mapping[str, Sequence[object]], axes: Sequence[str]) -> float:
    """What the sign of a difference in ``x`` tells about that in ``y``, beyond what up to two settings tell.

    For each set of at most two of the axes, the mutual information of the two signs over pairs of runs, given both
    runs' values of these settings, relative to the entropy of the sign in ``y``; the smallest of these is taken. It is
    between 0 and 1, and an estimate by frequencies, too large where few pairs share their settings.
    """
    first, second = np.nonzero(~np.eye(len(x), dtype=bool))
    of_x, of_y = (np.sign(v[first] - v[second]).astype(int) for v in (x, y))
    coded = {axis: _codes(settings[axis]) for axis in axes}
    found = []
    for size in range(3):
        for chosen in combinations(axes, size):
            keys = [coded[axis][index] for axis in chosen for index in (first, second)]
            given = np.unique(np.stack(keys), axis=1, return_inverse=True)[1].ravel() if keys else np.zeros_like(of_x)
            entropy = _entropy(of_y, given) - _entropy(given)
            if entropy > 1e-12:
                information = entropy - (_entropy(of_y, of_x, given) - _entropy(of_x, given))
                found.append(max(information, 0.0) / entropy)
    return min(found, default=math.nan)


def _groups(coded: Mapping[str, NDArray[np.intp]], axis: str) -> list[NDArray[np.intp]]:
    """Indices of runs that agree in all settings but one, in which they differ."""
    rest = [codes for name, codes in coded.items() if name != axis]
    keys = np.stack(rest) if rest else np.zeros((1, len(coded[axis])), dtype=int)
    group = np.unique(keys, axis=1, return_inverse=True)[1].ravel()
    every = (np.flatnonzero(group == key) for key in range(group.max() + 1))
    return [own for own in every if np.ptp(coded[axis][own]) > 0]


def _codes(values: Sequence[object]) -> NDArray[np.intp]:
    """Equal numbers for equal settings."""
    return np.unique([str(value) for value in values], return_inverse=True)[1]


def _mean_tau(
    agree: Array, differ: NDArray[np.bool_], groups: Sequence[NDArray[np.intp]], counts: Array
) -> Array:  # fmt: skip
    """The mean over groups of the mean agreement of their pairs that differ, for each row of counts; NaN where there is
    no such pair.
    """
    total, n = np.zeros(len(counts)), np.zeros(len(counts))
    for own in groups:
        w, apart = counts[:, own], differ[np.ix_(own, own)].astype(float)
        pairs = apart * agree[np.ix_(own, own)]
        n_pairs = ((w @ apart) * w).sum(1)
        tau = np.divide(((w @ pairs) * w).sum(1), n_pairs, out=np.zeros(len(w)), where=n_pairs > 0)
        total, n = total + tau, n + (n_pairs > 0)
    return np.divide(total, n, out=np.full(len(counts), np.nan), where=n > 0)


def _entropy(*codes: NDArray[np.int_]) -> float:
    """Of the joint frequencies of some numbers, in nats."""
    _, counts = np.unique(np.stack(codes), axis=1, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())

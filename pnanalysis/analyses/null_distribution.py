"""Whether one training lies outside what others reach: numbers of restarts as an empirical null distribution.

A number of one more training, if it were drawn like those of the restarts, lies in their prediction interval. Nothing
here knows of networks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pnanalysis.arrays import Array
from pnanalysis.significance import LEVEL, holm


@dataclass(frozen=True)
class NullDistribution:
    """Where the restarts lie, and where one more training lies among them; an entry for each of ``D`` diagnostics.

    Attributes
    ----------
    n : ndarray
        Restarts that have the number.
    mean, low, high : ndarray
        Their mean (geometric, of numbers on a logarithmic scale), and the 95 % interval of prediction for one more.
    score : ndarray
        The champion's distance from the mean in standard deviations of a prediction; infinite where restarts agree
        exactly, and it does not.
    p_single, p : ndarray
        Two-sided p-value of being drawn like the restarts, by itself and adjusted by Holm's step-down; NaN where there
        are fewer than two restarts.
    rank : ndarray
        One plus the number of restarts with a smaller number; ties count half.
    rank_p : ndarray
        Two-sided p-value by ranks alone, which assumes no distribution, and is never below ``2 / (n + 1)``.
    """

    n: Array
    mean: Array
    low: Array
    high: Array
    score: Array
    p_single: Array
    p: Array
    rank: Array
    rank_p: Array

    @property
    def is_outside(self) -> Array:
        """1 where the adjusted p-value is at most 0.05, else 0."""
        return (self.p <= LEVEL).astype(float)


def null_distribution(
    restarts: Array, own: Array, restarts_se: Array, own_se: Array, is_log: Array, resolution: Array
) -> NullDistribution:
    r"""The champion's numbers among those of the restarts.

    Parameters
    ----------
    restarts : ndarray, shape (D, n)
        NaN for unknown ones.
    own : ndarray, shape (D,)
        The champion's.
    restarts_se, own_se : ndarray, shapes (D, n) and (D,)
        Standard errors, NaN or 0 where there are none.
    is_log : ndarray of bool, shape (D,)
        Scales, such as eigenvalues: compared by their logarithms where all are above zero.
    resolution : ndarray, shape (D,)
        Smallest difference that two numbers can have: 1 for counts, ``1 / N`` for shares of examples, else 0.

    Notes
    -----
    For ``n`` independent normal numbers of mean :math:`\bar x` and standard deviation ``s`` one more lies within
    :math:`\bar x \pm t_{n-1} s \sqrt{1 + 1/n}` in 95 % of cases. The restarts' scatter includes the errors of their own
    estimates. Where that of the champion's is larger, the difference of the squares is added to the variance; and the
    variance is at least that of rounding to the resolution, so that counts that happen to agree do not claim
    certainty.

    Where restarts agree to the last digit and no error is known, there is no scale to measure by, and no normal
    distribution either: equal numbers are a matter of ranks alone, so that ``rank_p`` takes the place of the p-value,
    ``2 / (n + 1)`` for a number that differs from all.
    """
    from scipy.stats import t as student_t  # here, so that command lines start without SciPy

    values = np.column_stack([own, restarts]).astype(float)
    se = np.nan_to_num(np.column_stack([own_se, restarts_se]).astype(float))
    with np.errstate(invalid="ignore", divide="ignore"):
        as_log = is_log & (np.nan_to_num(values, nan=1.0) > 0).all(1)
        se = np.where(as_log[:, None], se / values, se)
        values = np.where(as_log[:, None], np.log(values), values)
    x, others = values[:, 0], values[:, 1:]
    is_known = np.isfinite(others)
    n = is_known.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(is_known, others, 0.0).sum(1) / n
        variance = np.where(is_known, (others - mean[:, None]) ** 2, 0.0).sum(1) / (n - 1.0)
        variance = np.where(n > 1, np.maximum(variance, resolution**2 / 12), np.nan)
        errors = np.where(is_known, se[:, 1:] ** 2, 0.0).sum(1) / n
        scale = np.sqrt(variance * (1 + 1 / n) + np.maximum(se[:, 0] ** 2 - errors, 0.0))
        away = x - mean
        floor = 1e-9 * np.abs(np.nan_to_num(values)).max(1)  # equal up to round-off
        score = np.where(np.abs(away) <= floor, 0.0, away / scale)
        dof = np.maximum(n - 1.0, 1.0)
        half = student_t.ppf(0.5 + (1 - LEVEL) / 2, dof) * scale
        below = (is_known & (others < x[:, None])).sum(1)
        ties = (is_known & (others == x[:, None])).sum(1)
        tail = np.minimum(below + ties, n - below) + 1
        rank_p = np.where(np.isfinite(x) & (n > 0), np.minimum(2 * tail / (n + 1), 1.0), np.nan)
        rank = np.where(np.isfinite(x) & (n > 0), 1 + below + ties / 2, np.nan)
        p = np.where(np.isnan(score), np.nan, 2 * student_t.sf(np.abs(score), dof))
        p = np.where((scale <= floor) & (np.abs(away) > floor), rank_p, p)
        mean, low, high = (np.where(as_log, np.exp(end), end) for end in (mean, mean - half, mean + half))
    return NullDistribution(n.astype(float), mean, low, high, score, p, holm(p), rank, rank_p)


@dataclass(frozen=True)
class SelectedAmong:
    """The test error of the best of ``k`` trainings among that of the best of any ``k``.

    Attributes
    ----------
    p : float
        How often the best of ``k`` trainings, drawn at random from all that there are, has a test error as low.
    least_p : float
        The smallest that this could have been.
    expected : float
        Mean test error of the best of as many others; NaN where there are fewer.
    """

    p: float
    least_p: float
    expected: float


def selected_among(own_scores: Array, own_errors: Array, scores: Array, errors: Array) -> SelectedAmong:
    """Compare the best of ``k`` trainings with the best of ``k`` others, each picked by its score.

    If persistent trainings were no different from restarts, all of them would be draws from one distribution, and which
    ``k`` of them are the persistent ones a matter of chance. The p-value is exact: it counts all choices of ``k``.

    Parameters
    ----------
    own_scores, own_errors : ndarray, shape (k,)
        What the champion is picked by (the lowest), and the test errors.
    scores, errors : ndarray, shape (n,)
        The same of the restarts.
    """
    k, n = len(own_scores), len(scores)
    champion = float(own_errors[int(np.argmin(own_scores))])
    every, all_errors = np.concatenate([own_scores, scores]), np.concatenate([own_errors, errors])
    chance = best_of(every, k)
    p = float(chance[all_errors <= champion].sum())
    expected = float(best_of(scores, k) @ errors) if n >= k else math.nan
    return SelectedAmong(min(p, 1.0), k / (k + n), expected)


def best_of(scores: Array, k: int) -> Array:
    """For each of ``N`` scores, the chance that it is the lowest of ``k`` drawn from them; ties share theirs."""
    size = len(scores)
    order = np.argsort(scores, kind="stable")
    behind = size - 1 - np.arange(size)
    chance = np.empty(size)
    chance[order] = [math.comb(int(b), k - 1) / math.comb(size, k) for b in behind]
    for value in np.unique(scores):
        tied = scores == value
        chance[tied] = chance[tied].mean()
    return chance


def restarts_needed(k: int, level: float = LEVEL) -> int:
    """How many restarts it takes for a best of ``k`` to be able to reach a level, counting its selection."""
    return math.ceil(k * (1 / level - 1) - 1e-9)

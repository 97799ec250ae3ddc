"""Restarts as a null distribution: closed forms, exact counts, and how often equal trainings are called different."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pnanalysis.analyses.null_distribution import (
    NullDistribution,
    best_of,
    null_distribution,
    restarts_needed,
    selected_among,
)


def found(restarts: Any, own: Any, se: float = 0.0, own_se: float = 0.0, log: bool = False, step: float = 0.0) -> Any:
    """One row for each number of ``own``."""
    restarts, own = np.atleast_2d(np.asarray(restarts, dtype=float)), np.atleast_1d(np.asarray(own, dtype=float))
    d = len(own)
    return null_distribution(
        restarts, own, np.full(restarts.shape, se), np.full(d, own_se), np.full(d, log), np.full(d, step)
    )


def test_the_interval_is_students_for_one_more() -> None:
    x = np.array([3.0, 4.0, 6.0, 7.0, 5.0])
    null: NullDistribution = found(x, 9.0)
    spread = x.std(ddof=1) * np.sqrt(1 + 1 / 5)
    half = stats.t.ppf(0.975, 4) * spread
    np.testing.assert_allclose([null.mean[0], null.low[0], null.high[0]], [5.0, 5 - half, 5 + half])
    # a two-sample t test of one against five, with the pooled variance, is the same test
    assert null.p_single[0] == pytest.approx(stats.ttest_ind([9.0], x).pvalue)
    assert null.p[0] == null.p_single[0]
    assert (null.rank[0], null.rank_p[0]) == (6, pytest.approx(2 / 6))
    assert not found(x, 5.0).is_outside[0]
    assert found(x, 20.0).is_outside[0]


def test_scales_are_compared_by_their_logarithms() -> None:
    x = np.array([1.0, 2.0, 4.0, 8.0])
    one, logs = found(x, 16.0, log=True), found(np.log(x), np.log(16.0))
    assert one.p_single[0] == pytest.approx(logs.p_single[0])
    np.testing.assert_allclose([one.low[0], one.high[0]], np.exp([logs.low[0], logs.high[0]]))
    # a number that is not positive has no logarithm: the row is compared as it is
    np.testing.assert_allclose(found([*x, 0.0], 16.0, log=True).p_single, found([*x, 0.0], 16.0).p_single)


def test_an_error_of_the_champions_number_is_no_difference() -> None:
    x = [1.0, 1.1, 0.9, 1.05, 0.95]
    assert found(x, 2.0).is_outside[0]
    assert not found(x, 2.0, own_se=1.0).is_outside[0]
    # errors that the restarts' numbers share are in their scatter already
    np.testing.assert_allclose(found(x, 2.0, se=0.1, own_se=0.1).p_single, found(x, 2.0).p_single)


def test_counts_that_agree_by_chance_do_not_claim_certainty() -> None:
    nines = [9.0, 9.0, 9.0]
    assert 0.02 < found(nines, 10.0, step=1.0).p_single[0] < 0.2
    assert found(nines, 9.0, step=1.0).p_single[0] == 1.0
    assert found([5.0, 5.0, 5.0], 5.0).p_single[0] == 1.0  # equal to the last digit


@pytest.mark.parametrize("log", [False, True])
def test_restarts_that_agree_exactly_are_beyond_measure_but_not_beyond_ranks(log: bool) -> None:
    """One of n + 1 numbers that differs from n equal ones is either end of them with probability 2 / (n + 1)."""
    for n in (3, 99):
        null = found([[5.0] * n, [5.0] * n, [5.0 + 1e-15] * n], [6.0, 4.0, 6.0], log=log)
        np.testing.assert_allclose(null.p_single, 2 / (n + 1))
        np.testing.assert_array_equal(np.sign(null.score), [1, -1, 1])
    assert found([5.0] * 3, 6.0, own_se=0.1).p_single[0] < 0.05  # an error of its own is a scale
    assert null.is_outside.tolist() == [0, 0, 0]  # 0.06, for three of 0.02
    assert found([5.0] * 99, 6.0).is_outside[0]


def test_a_single_restart_tests_nothing() -> None:
    one = found([[3.0]], 4.0)
    assert np.isnan([one.p_single[0], one.low[0], one.p[0]]).all()
    assert one.rank[0] == 2
    none = found(np.zeros((1, 0)), 4.0)
    assert np.isnan([none.p_single[0], none.rank[0]]).all()


def test_equal_trainings_are_rarely_called_different() -> None:
    """In families of twelve, with heavy dependence in one half: any claim in at most 5 %, and intervals that cover."""
    rng, claims, covered, tries = np.random.default_rng(0), 0, [], 1500
    for _ in range(tries):
        values = rng.standard_normal((12, 6))
        values[6:] = 0.3 * values[6:] + rng.standard_normal(6)
        null = found(values[:, 1:], values[:, 0])
        claims += bool(null.is_outside.any())
        covered.append((null.low <= values[:, 0]) & (values[:, 0] <= null.high))
    assert claims / tries <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / tries)
    assert np.mean(covered) == pytest.approx(0.95, abs=3 * np.sqrt(0.05 * 0.95 / (6 * tries)))


def test_the_best_of_k_counts_all_choices() -> None:
    scores = np.array([0.3, 0.1, 0.2, 0.2, 0.5])
    chance = np.zeros(5)
    choices = list(combinations(range(5), 3))
    for choice in choices:
        lowest = min(scores[i] for i in choice)
        winners = [i for i in choice if scores[i] == lowest]
        chance[winners] += 1 / len(winners) / len(choices)
    np.testing.assert_allclose(best_of(scores, 3), chance, atol=1e-12)
    assert best_of(scores, 3).sum() == pytest.approx(1)


def test_selection_has_known_p_values() -> None:
    worse = selected_among(np.array([0.2, 0.3]), np.array([0.4, 0.5]), np.array([0.25, 0.1]), np.array([0.3, 0.2]))
    # of the six pairs, the best of all but {0.2, 0.3}'s own and {0.2, 0.25} and ... have a lower test error than 0.4
    assert worse.p == pytest.approx(1.0)
    best = selected_among(np.array([0.1, 0.3]), np.array([0.1, 0.5]), np.array([0.25, 0.2]), np.array([0.3, 0.2]))
    assert best.p == best.least_p == pytest.approx(0.5)  # half of all pairs contain the best of all
    assert best.expected == pytest.approx(0.2)
    assert np.isnan(selected_among(*np.ones((2, 3)), *np.ones((2, 2))).expected)
    assert restarts_needed(5) == 95
    assert 5 / (5 + restarts_needed(5)) == pytest.approx(0.05)


def test_selection_is_level_where_a_rank_alone_is_not() -> None:
    """Of equal trainings, the best of five looks good among single restarts, but not among bests of five."""
    rng, ranks, chances = np.random.default_rng(1), [], []
    for _ in range(500):
        quality = rng.standard_normal(105)
        validation, test = quality + 0.3 * rng.standard_normal(105), quality + 0.3 * rng.standard_normal(105)
        ranks.append((1 + (test[5:] <= test[np.argmin(validation[:5])]).sum()) / 101)
        chances.append(selected_among(validation[:5], test[:5], validation[5:], test[5:]).p)
    within = 0.1 + 3 * np.sqrt(0.1 * 0.9 / 500)
    assert np.mean(np.array(chances) <= 0.1) <= within < np.mean(np.array(ranks) <= 0.1)

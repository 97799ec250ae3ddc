"""Intervals over seeds, pairing, verdicts and ranks, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from pnanalysis.estimates import Estimate
from pnanalysis.reproduce.statistics import (
    FAILS,
    HOLDS,
    UNKNOWN,
    claim,
    over_seeds,
    paired,
    pooled_rank_p,
    rank,
    share,
    verdict,
)


def test_the_interval_is_students() -> None:
    found = over_seeds([1.0, 2.0, 4.0])
    half = 4.302652729749464 * np.std([1, 2, 4], ddof=1) / math.sqrt(3)  # t of 2 degrees of freedom at 0.975
    assert (found.value, found.low, found.high) == pytest.approx((7 / 3, 7 / 3 - half, 7 / 3 + half))


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = [(it := over_seeds(rng.normal(1.0, 2.0, 3))).low < 1.0 < it.high for _ in range(2000)]
    assert stats.binomtest(sum(covered), len(covered), 0.95).pvalue > 0.01


def test_one_seed_or_equal_numbers_have_no_interval() -> None:
    # errors of 300 examples: 100 (1 - 38/300) - 100 (1 - 34/300), and as much less of others
    same = [100 * (1 - 0.126667) - 100 * (1 - 0.113333), 100 * (1 - 0.13) - 100 * (1 - 0.116666)]
    assert same[0] != same[1]
    for values in ([0.5], [0.5, 0.5, 0.5], [0.5, math.nan], same, [0.0, 1.4e-14]):
        found = over_seeds(values)
        assert found.value == pytest.approx(np.nanmean(values))
        assert math.isnan(found.low)
        assert verdict(found) == UNKNOWN
    assert math.isnan(over_seeds([]).value)


def test_differences_are_paired_by_seed() -> None:
    first, second = {0: 70.0, 1: 80.0, 2: 90.0, 7: 1.0}, {2: 89.0, 0: 69.0, 1: 78.9, 5: 3.0}
    found = paired(first, second)
    expected = over_seeds([1.0, 1.1, 1.0])
    assert found.value == pytest.approx(expected.value)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.high - found.low < 1  # unpaired, the seeds' own differences would make it 40 wide


@pytest.mark.parametrize(
    ("low", "high", "sign", "expected"),
    [
        (0.1, 0.5, 1, HOLDS),
        (-0.5, -0.1, 1, FAILS),
        (-0.1, 0.5, 1, UNKNOWN),
        (0.1, 0.5, -1, FAILS),
        (-0.5, -0.1, -1, HOLDS),
        (0.0, 0.5, 1, UNKNOWN),
        (math.nan, math.nan, 1, UNKNOWN),
    ],
)
def test_verdicts(low: float, high: float, sign: int, expected: str) -> None:
    assert verdict(Estimate((low + high) / 2, low=low, high=high), sign) == expected


def test_two_seeds_decide_nothing() -> None:
    two, three = claim("it is better", [0.9, 1.0]), claim("it is better", [0.9, 0.95, 1.0])
    assert (two.here, two.verdict, math.isnan(two.p)) == ("+0.95 (+0.31 to +1.59)", UNKNOWN, True)
    assert (three.verdict, three.p < 0.05) == (HOLDS, True)


def test_an_end_of_an_interval_is_not_rounded_to_the_zero_that_it_excludes() -> None:
    slopes = [-5e-5, -7e-5, -6e-5]
    assert claim("it falls", slopes, sign=-1, digits=4).here == "-0.00006 (-0.00008 to -0.00004)"
    assert claim("it falls", slopes, sign=-1, digits=4).verdict == HOLDS
    assert claim("it falls", [-5e-5, 7e-5, 6e-5], sign=-1, digits=4).here == "+0.0000 (-0.0001 to +0.0002)"


def test_shares_and_ranks() -> None:
    part = share(93, 100)
    assert (part.low, part.high) == pytest.approx((0.863, 0.966), abs=1e-3)
    assert math.isnan(share(0, 0).value)
    assert rank(2.0, [1.0, 1.5, 2.0, 3.0, math.nan]) == (2, 4)


def test_ranks_of_several_seeds_are_pooled_exactly() -> None:
    assert pooled_rank_p([(0, 10)]) == pytest.approx(1 / 11)
    assert pooled_rank_p([(0, 10)] * 3) == pytest.approx(1 / 11**3)
    # of 3 x 4 equally likely pairs of ranks, (0, 0), (0, 1) and (1, 0) have at most this sum
    assert pooled_rank_p([(1, 2), (0, 3)]) == pytest.approx(3 / 12)
    assert pooled_rank_p([(10, 10), (10, 10)]) == pytest.approx(1)
    assert math.isnan(pooled_rank_p([]))


@pytest.mark.parametrize(
    ("paper", "said"),
    [(1.0, "+1.00, inside"), (1.84, "+1.84, outside"), (math.nan, "–"), ("yes", "yes")],
)
def test_the_papers_number_is_inside_the_interval_or_not(paper: float | str, said: str) -> None:
    found = claim("it is better", [0.9, 1.0, math.nan, 1.2], paper=paper)
    assert (found.paper, found.verdict, found.n) == (said, HOLDS, "3")
    assert found.p == pytest.approx(float(stats.ttest_1samp([0.9, 1.0, 1.2], 0).pvalue), rel=1e-6)
    one = claim("it is better", [0.9], paper=1.0)
    assert (one.paper, one.verdict, math.isnan(one.p)) == ("+1.00", UNKNOWN, True)

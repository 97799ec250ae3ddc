"""Numbers with errors: how they are printed, and when they count as different."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from scipy.stats import norm

from pnanalysis.estimates import Estimate, OutlierCount, proportion


def test_interval_is_students():
    low, high = Estimate(1.0, 2.0, dof=3.0).interval()
    assert (low, high) == pytest.approx((1 - 3.182446 * 2, 1 + 3.182446 * 2), rel=1e-6)
    assert Estimate(5.0, 0.0).interval() == (5.0, 5.0)


def test_few_successes_are_printed_as_an_interval():
    assert proportion(0.0, 500).text() == "0.00 (0.00 to 0.76) %"
    assert proportion(1.0, 500).text() == "100.00 (99.24 to 100.00) %"
    assert proportion(0.02, 500).text() == "2.00 (1.09 to 3.64) %"
    assert proportion(0.1, 500).text() == "10.00 ± 1.34 %"
    assert math.isnan(proportion(math.nan, 500).low)


def test_errors_of_probes_and_of_examples_are_printed_apart():
    trace = Estimate(9.77, math.hypot(0.15, 0.9), data_se=0.9)
    assert trace.text() == "9.77 ± 0.15 (probes) ± 0.9 (examples)"
    assert Estimate(9.77, 0.9, 8.0, 11.5, data_se=0.9).text() == "9.77 ± 0.9 (examples)"
    assert Estimate(9.77, 0.15).text() == "9.77 ± 0.15"


def test_intervals_take_the_place_of_errors_that_say_less():
    assert Estimate(1.0, low=0.5, high=2.0).text() == "1 (0.5 to 2)"
    assert Estimate(1.0, 0.1, low=0.9, high=2.0).text() == "1 (0.9 to 2)"
    assert Estimate(1.0, 0.0, low=0.5, high=1.5).text() == "1 (0.5 to 1.5)"
    assert Estimate(1.0, 0.1, low=0.8, high=1.2).text() == "1 ± 0.1"


def test_a_number_of_outliers_comes_with_the_p_value_of_its_gap():
    assert OutlierCount(0.0, gap_p=0.3).text() == "no gap"
    assert replace(OutlierCount(9.0, gap_p=0.0021), whole=True).text() == "9 (p 0.0021)"


def test_words_claim_what_the_errors_allow() -> None:
    assert Estimate(-1.0, 0.3).tested().direction() == "lower"
    assert not Estimate(-1.0, 0.6).tested().is_significant
    assert not Estimate(-1.0, 0.3).is_significant  # it has not been tested
    assert not Estimate(1.0).tested().is_significant
    assert not Estimate(1.0, 0.1, low=-0.2, high=2.0).tested().is_significant  # the interval knows better
    assert Estimate(1.0, low=0.2, high=2.0).tested().is_significant
    assert not Estimate(1e-7, 0.0).tested(floor=1e-6).is_significant
    assert Estimate(1e-5, 0.0).tested(floor=1e-6).direction() == "higher"


def test_the_difference_of_two_shares_is_not_exact_where_both_are_zero() -> None:
    none = proportion(0.0, 500).minus(proportion(0.0, 500))
    assert none.in_points() == "+0.00 (-0.76 to +0.76) points (no significant difference on this test set)"
    few = proportion(0.01, 500).minus(proportion(0.0, 500))  # 5 mistakes and none
    assert few.low < 0.01 < few.high
    far = proportion(0.5, 500).minus(proportion(0.4, 500))
    # Newcombe's interval is within 1/n of the normal one here
    assert far.low == pytest.approx(0.1 - 1.96 * far.se, abs=2e-3)
    assert far.p == pytest.approx(2 * norm.sf(0.1 / far.se), rel=0.2)
    assert far.in_points().endswith("points (higher)")

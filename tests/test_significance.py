"""p-values and intervals against SciPy's, and the chance of a false claim among many."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pnanalysis.significance import LEVEL, holm, mcnemar, p_value, p_value_beyond_bounds, share_interval


def test_p_values_are_normal_or_students() -> None:
    assert p_value(1.0, 0.5) == pytest.approx(2 * stats.norm.sf(2.0))
    assert p_value(-1.0, 0.3, dof=4) == pytest.approx(2 * stats.t.sf(1 / 0.3, 4))
    assert p_value(1.0, low=0.5, high=9.0) == pytest.approx(2 * stats.norm.sf(2 * stats.norm.ppf(0.975)))
    assert p_value(-1.0, low=-9.0, high=-0.5) == p_value(1.0, low=0.5, high=9.0)
    np.testing.assert_array_equal(p_value([0, 1, 1, np.nan], [0, 0, np.nan, 1]), [1, 0, np.nan, np.nan])


@pytest.mark.parametrize("dof", [1.5, 3, 9, 40, 1e4])
def test_the_degrees_of_freedom_are_read_off_an_interval(dof: float) -> None:
    half = stats.t.ppf(0.975, dof)
    assert p_value(2.5, 1.0, 2.5 - half, 2.5 + half) == pytest.approx(2 * stats.t.sf(2.5, dof), rel=1e-3)


def test_differences_within_round_off_are_none() -> None:
    np.testing.assert_array_equal(p_value([1e-7, 1e-5], 0.0, floor=1e-6), [1, 0])


def test_only_what_lies_beyond_bounds_counts() -> None:
    np.testing.assert_array_equal(p_value_beyond_bounds([-1, 0.5, -2], [1, 1, -0.5]), [1, 0, 0])
    z = stats.norm.ppf(0.975)
    found = p_value_beyond_bounds(0.5 - 0.25 * z, 1 + 0.25 * z, 0.25)  # the bounds 0.5 and 1 with an error of 0.25
    assert found == pytest.approx(2 * stats.norm.sf(2.0))
    assert np.isnan(p_value_beyond_bounds(np.nan, np.nan))


@pytest.mark.parametrize("counts", [(0, 0), (0, 1), (3, 9), (10, 10), (0, 6), (17, 4)])
def test_mcnemars_test_is_the_binomial_one(counts: tuple[int, int]) -> None:
    expected = stats.binomtest(counts[0], sum(counts)).pvalue if sum(counts) else 1.0
    assert mcnemar(*counts) == pytest.approx(expected, rel=1e-12)


def test_holms_claims_are_all_true_in_19_of_20_cases() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(4000, 12))
    noise[:, :3] += 8  # real differences, which leave fewer to be false
    adjusted = np.stack([holm(p) for p in p_value(noise, 1.0)])
    false = (adjusted[:, 3:] <= LEVEL).any(1).mean()
    assert false == pytest.approx(LEVEL, abs=3 * np.sqrt(LEVEL * (1 - LEVEL) / 4000))
    assert (adjusted[:, :3] <= LEVEL).all()


def test_holms_adjustment_steps_down_and_leaves_out_the_unknown() -> None:
    np.testing.assert_allclose(holm([0.04, 0.01, np.nan, 0.03, 0.9]), [0.09, 0.04, np.nan, 0.09, 0.9])
    np.testing.assert_array_equal(holm([np.nan]), [np.nan])


def test_shares_have_wilsons_interval() -> None:
    for successes in (0, 1, 10, 250, 500):
        expected = stats.binomtest(successes, 500).proportion_ci(method="wilson")
        value = successes / 500
        assert share_interval(value, np.sqrt(value * (1 - value) / 500), 500) == pytest.approx(
            (expected.low, expected.high), abs=1e-12
        )
    low, high = share_interval(0.1, 0.03, 10_000)  # as of 100 independent examples
    assert (low, high) == pytest.approx(tuple(stats.binomtest(10, 100).proportion_ci(method="wilson")), abs=1e-12)
    assert np.isnan(share_interval(1.5, 0.1, 10)).all()

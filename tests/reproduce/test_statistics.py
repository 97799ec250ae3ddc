"""Means over seeds, paired differences and verdicts, on numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t

from pnanalysis.reproduce.statistics import FAILS, HOLDS, UNKNOWN, over_seeds, paired, rank, verdict


def test_the_interval_is_that_of_student() -> None:
    values = [1.0, 2.0, 4.0]
    found = over_seeds(values)
    half = t.ppf(0.975, 2) * np.std(values, ddof=1) / math.sqrt(3)
    assert found.value == pytest.approx(7 / 3)
    assert (found.low, found.high) == pytest.approx((7 / 3 - half, 7 / 3 + half))


@pytest.mark.parametrize("values", [[3.0], [3.0, math.nan], [3.0, 3.0, 3.0]])
def test_without_spread_there_is_no_interval(values: list[float]) -> None:
    found = over_seeds(values)
    assert found.value == 3.0
    assert math.isnan(found.low)
    assert verdict(found) == UNKNOWN


def test_differences_are_paired_by_seed() -> None:
    # the seeds differ by far more than the arms do, and seed 3 has no partner
    found = paired({0: 1.0, 1: 11.0, 2: 22.0, 3: 99.0}, {0: 0.0, 1: 10.5, 2: 21.0})
    assert found.value == pytest.approx((1 + 0.5 + 1) / 3)
    assert found.low > 0
    assert verdict(found) == HOLDS
    assert verdict(found, sign=-1) == FAILS


def test_an_interval_around_zero_decides_nothing() -> None:
    assert verdict(over_seeds([-1.0, 0.5, 1.0])) == UNKNOWN


def test_ranks_leave_out_what_failed() -> None:
    assert rank(2.0, [1.0, math.nan, 3.0, 0.5]) == (2, 3)

"""Numbers with errors."""

from __future__ import annotations

import numpy as np
import pytest

from pnanalysis.estimates import Estimate, significance_threshold


def test_many_comparisons_ask_for_more() -> None:
    assert significance_threshold(1) == 2.0
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(20_000, 6))
    false = (np.abs(noise) > significance_threshold(6)).any(1).mean()
    assert false <= 0.0455 + 3 * np.sqrt(0.0455 / 20_000)
    assert significance_threshold(6) > 2.5


def test_interval_is_students():
    low, high = Estimate(1.0, 2.0, dof=3.0).interval()
    assert (low, high) == pytest.approx((1 - 3.182446 * 2, 1 + 3.182446 * 2), rel=1e-6)
    assert Estimate(5.0, 0.0).interval() == (5.0, 5.0)

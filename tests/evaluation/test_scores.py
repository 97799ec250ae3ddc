"""Paired standard errors against resampling and simulation."""

from __future__ import annotations

import numpy as np
import pytest

from pnanalysis.evaluation.scores import paired


def test_paired_errors_agree_with_a_bootstrap() -> None:
    rng = np.random.default_rng(0)
    hard = rng.exponential(size=300)
    values = np.stack([hard + 0.1 * rng.normal(size=300), hard + 0.2 * rng.normal(size=300) + 0.02])
    found = paired(values)
    draws = rng.integers(300, size=(2000, 300))
    boot = values[0][draws].mean(1) - values[1][draws].mean(1)
    # 2,000 resamples know a standard deviation to 1 / sqrt(4000) = 1.6 %
    assert found["_difference_se"][0, 1] == pytest.approx(boot.std(), rel=0.07)
    assert found["_difference_se"][0, 1] < 0.2 * np.hypot(*found["_se"])  # what all find hard does not count
    np.testing.assert_allclose(found["_difference"], -found["_difference"].T)


def test_paired_intervals_cover_the_difference() -> None:
    rng = np.random.default_rng(1)
    trials, n, covered = 1500, 400, 0
    for _ in range(trials):
        hard = rng.random(n) < 0.3  # both fail
        wrong = np.stack([hard | (rng.random(n) < 0.10), hard | (rng.random(n) < 0.06)]).astype(float)
        found = paired(wrong)
        truth = 0.7 * 0.04
        covered += abs(found["_difference"][0, 1] - truth) <= 1.96 * found["_difference_se"][0, 1]
    # binomial with 0.95: standard deviation 0.0056; three of these and one point for the normal approximation
    assert covered / trials == pytest.approx(0.95, abs=0.027)

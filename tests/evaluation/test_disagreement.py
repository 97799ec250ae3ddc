"""Disagreement and divergence of networks' outputs."""

from __future__ import annotations

import numpy as np
import torch

from pnanalysis.evaluation.disagreement import expected_disagreement, js_divergence


def test_independent_networks_disagree_as_the_yardstick_says() -> None:
    rng = np.random.default_rng(0)
    n, classes, accuracy = 40_000, 5, np.array([0.7, 0.4])
    truth = rng.integers(classes, size=n)
    said = [np.where(rng.random(n) < a, truth, (truth + rng.integers(1, classes, size=n)) % classes) for a in accuracy]
    expected = expected_disagreement(accuracy, classes)[0, 1]
    se = np.sqrt(expected * (1 - expected) / n)
    assert abs((said[0] != said[1]).mean() - expected) < 4 * se


def test_divergence_is_bounded_and_knows_zero() -> None:
    sure = torch.log(torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64))
    other = torch.log(torch.tensor([[0.0, 1.0], [0.5, 0.5]], dtype=torch.float64))
    np.testing.assert_allclose(js_divergence(sure, other), [np.log(2), 0.0])

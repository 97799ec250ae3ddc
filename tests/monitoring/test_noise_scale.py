"""The noise scale: unbiased parts, an error that covers, and the formulas of its source for batches of one size."""

from __future__ import annotations

import numpy as np
import pytest

from pnanalysis.monitoring.noise_scale import NoiseScale, noise_scale


def of(gradients: np.ndarray, sizes: np.ndarray) -> NoiseScale:
    """The scale of gradients ``(K, P)``."""
    mean = sizes @ gradients / sizes.sum()
    return noise_scale(sizes, (gradients**2).sum(1), gradients @ mean, float(mean @ mean))


def test_it_is_the_ratio_of_its_source_for_batches_of_one_size() -> None:
    rng = np.random.default_rng(0)
    k, b = 8, 16
    gradients = 1.0 + 0.1 * rng.standard_normal((k, 5))
    small, big = (gradients**2).sum(1).mean(), (gradients.mean(0) ** 2).sum()
    signal = (k * b * big - b * small) / (k * b - b)
    noise = (small - big) / (1 / b - 1 / (k * b))
    assert of(gradients, np.full(k, float(b))).value == pytest.approx(noise / signal)


def test_it_finds_the_scale_of_batches_of_several_sizes_within_its_error() -> None:
    rng = np.random.default_rng(1)
    p, mean = 50, 0.3
    scale = 4.0 * p / (mean**2 * p)  # per-example noise of variance 4 in each coordinate
    sizes = rng.integers(20, 60, 24).astype(float)
    z = []
    for _ in range(200):
        found = of(mean + 2.0 * rng.standard_normal((24, p)) / np.sqrt(sizes)[:, None], sizes)
        z.append((found.value - scale) / found.se)
    assert abs(np.mean(z)) < 0.5
    assert np.mean(np.abs(z) < 1.96) > 0.85
    assert 0.7 < np.std(z) < 1.4


def test_the_error_is_that_of_leaving_batches_out() -> None:
    rng = np.random.default_rng(2)
    sizes = np.array([3.0, 5.0, 4.0, 6.0])
    gradients = 2 + rng.standard_normal((4, 7))
    left = np.array([of(np.delete(gradients, i, 0), np.delete(sizes, i)).value for i in range(4)])
    expected = np.sqrt(3 / 4 * ((left - left.mean()) ** 2).sum())
    assert of(gradients, sizes).se == pytest.approx(expected)


def test_a_gradient_lost_in_noise_has_no_scale() -> None:
    gradients = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    found = of(gradients, np.ones(4))
    assert np.isnan(found.value)
    assert np.isnan(found.se)
    assert np.isnan(of(gradients[:1], np.ones(1)).value)

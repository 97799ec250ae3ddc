"""Outliers are found beyond a gap, and only there."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cases import cases
from tests.spectra.known_spectra import spectrum

N = 600


def wigner(spikes: np.ndarray, seed: int = 0) -> np.ndarray:
    """A semicircle of radius 2 with rank-one spikes; those above 1 leave it (Baik, Ben Arous and Peche)."""
    square = np.random.default_rng(seed).standard_normal((N, N))
    return np.linalg.eigvalsh((square + square.T) / np.sqrt(2 * N) + np.diag(np.pad(spikes, (0, N - len(spikes)))))


RNG = np.random.default_rng(3)
GAPLESS = {
    "uniform": np.linspace(0, 1, N),
    "Wigner": wigner(np.empty(0)),
    "Marchenko-Pastur": np.linalg.svd(RNG.standard_normal((N, N // 2)))[1] ** 2,
    "arcsine": np.cos(np.pi * (np.arange(N) + 0.5) / N),
    "1 / k": 10.0 / np.arange(1, N + 1),
    "k^-1/2": 10.0 / np.arange(1, N + 1) ** 0.5,
    "lognormal": RNG.lognormal(size=N),
    "exponential decay": 10 * 0.8 ** np.arange(N),
    "ties": np.r_[np.ones(100), np.zeros(N - 100)],
}


@pytest.mark.parametrize("eigenvalues", cases(GAPLESS, set(GAPLESS) - {"lognormal"}))
def test_spectra_without_gaps_have_no_outliers(eigenvalues):
    # at most one false claim of 20 on either side is expected; four or more have a probability below 2 %
    found = [spectrum(sign * eigenvalues, seed, n_hvp=120) for seed in range(10) for sign in (1, -1)]
    assert sum(int(ds.n_outliers) > 0 for ds in found) < 4
    assert sum(int(ds.n_outliers_negative) > 0 for ds in found) < 4


@pytest.mark.parametrize(
    ("n_spikes", "strength", "side"),
    [
        (5, 3.0, 1), (10, 10.0, 1), (10, 3.0, -1), (5, 10.0, -1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((10, 3.0, 1), (5, 10.0, 1), (5, 3.0, -1), (10, 10.0, -1))
        ),
    ],
)  # fmt: skip
def test_spikes_are_counted(n_spikes, strength, side):
    eigenvalues = side * wigner(strength * (1 + 0.3 * np.arange(n_spikes) / n_spikes))
    for seed in range(3):
        ds = spectrum(eigenvalues, seed, n_hvp=200)
        assert (int(ds.n_outliers), int(ds.n_outliers_negative)) == ((n_spikes, 0) if side > 0 else (0, n_spikes))
        assert float(ds.outlier_p if side > 0 else ds.outlier_negative_p) < 0.01


def test_zeros_change_nothing():
    spiked = wigner(np.linspace(4, 6, 6))
    alone, padded = (spectrum(values, n_hvp=200) for values in (spiked, np.r_[np.zeros(50_000), spiked]))
    assert int(alone.n_outliers) == int(padded.n_outliers) == 6
    assert float(padded.bulk_edge_high) == pytest.approx(float(alone.bulk_edge_high), rel=0.05)


def test_neither_scale_nor_origin_matter():
    eigenvalues = wigner(np.linspace(4, 6, 6))
    first, *others = (spectrum(values, n_hvp=120) for values in (eigenvalues, 1e6 * eigenvalues, eigenvalues - 100))
    for other in others:
        assert int(other.n_outliers) == int(first.n_outliers) == 6
        assert float(other.outlier_p) == pytest.approx(float(first.outlier_p), rel=1e-3)


@pytest.mark.parametrize("n", [1, 2, 3, 19])
def test_with_few_eigenvalues_nothing_is_tested(n):
    ds = spectrum(np.r_[np.arange(n - 1), 1e6], n_hvp=40)
    assert (int(ds.n_outliers), float(ds.outlier_p)) == (0, 1.0)
    assert float(ds.bulk_edge_high) == pytest.approx(1e6)


def test_a_few_eigenvalues_stand_out_from_a_point():
    ds = spectrum(np.r_[np.zeros(300), 1.0, 2.0, 3.0], n_hvp=40)
    assert int(ds.n_outliers) == 3
    assert float(ds.bulk_edge_high) == pytest.approx(0, abs=1e-9)
    assert np.isnan(ds.gap_ratio)  # of a number that may be zero

"""Stated errors hold as often as they say: a small form of ``benchmarks/coverage.py``.

Seeds are fixed. Limits are those that a count of independent events of the stated probability exceeds once in 10,000.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import binom

from benchmarks.known_spectra import analytic_spectrum, spiked_wigner
from benchmarks.true_values import BOUNDS, Tally, exact_density, exact_edges, exact_statistics, mass_points
from pnanalysis.spectra.density import spectral_density
from pnanalysis.spectra.differences import beyond_noise, compare_spectra
from pnanalysis.spectra.linear_operator import DiagonalOperator
from tests.cases import cases

N_SEEDS, N_PRODUCTS, RARE = 80, 60, 1e-4
SPECTRA = ("Wigner", "Marchenko-Pastur 2", "power law -1", "mostly zeros")
GAPLESS = SPECTRA[:3]


def by_name(names: tuple[str, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", cases({name: name for name in names}, names))


each_spectrum = by_name(SPECTRA)


@dataclass(frozen=True)
class Measured:
    """What many spectra of one matrix say, each from other probes."""

    tally: Tally
    in_band: np.ndarray
    has_outliers: np.ndarray
    distance_over_noise: np.ndarray
    is_beyond_noise: np.ndarray


@cache
def measured(name: str) -> Measured:
    eigenvalues = analytic_spectrum(name, n=600)
    operator, grid = DiagonalOperator(torch.from_numpy(eigenvalues)), mass_points(eigenvalues)
    spectra = [
        spectral_density(operator, n_hvp=N_PRODUCTS, seed=seed, grid=grid, n_classes=10, progress=False)
        for seed in range(N_SEEDS)
    ]
    tally, in_band = Tally(float(np.abs(eigenvalues).max())), []
    for ds in spectra:
        tally.add(ds, exact_statistics(eigenvalues) | exact_edges(eigenvalues, ds))
        error = np.abs(ds.density.values - exact_density(eigenvalues, grid, float(ds.kernel_width)))
        in_band.append(np.mean(error <= 1.96 * ds.density_se.values))
    differences = [compare_spectra(*pair) for pair in zip(spectra[::2], spectra[1::2], strict=True)]
    ends = ("", "_noise", "_se")
    distance, noise, se = np.array([[float(ds[f"wasserstein1{end}"]) for end in ends] for ds in differences]).T
    return Measured(
        tally,
        np.array(in_band),
        np.array([int(ds.n_outliers) + int(ds.n_outliers_negative) > 0 for ds in spectra]),
        distance / noise,
        np.array([beyond_noise(*row) for row in zip(distance, noise, se, strict=True)]),
    )


def fewest(n: int, probability: float = 0.95) -> int:
    """Successes out of ``n`` below which a probability of at least this is not credible."""
    return int(binom.ppf(RARE, n, probability))


@each_spectrum
def test_intervals_hold_the_true_values(name):
    for statistic, rows in measured(name).tally.rows.items():
        held = measured(name).tally.held(statistic)
        assert held.sum() >= fewest(len(rows)), f"{statistic}: {held.sum()} of {len(rows)}"


@each_spectrum
def test_intervals_are_not_much_too_wide(name):
    widest = 3 * (1 + 3.7 / (2 * N_SEEDS) ** 0.5)  # the RMS error has a relative standard error of 1 / sqrt(2 n)
    for statistic, (_, width, _) in measured(name).tally.summary(N_SEEDS).items():
        assert statistic in BOUNDS or width is None or width < widest, f"{statistic}: {width} times too wide"


@each_spectrum
def test_the_density_lies_in_its_band(name):
    # points of one spectrum are not independent; their mean over spectra is normal to good approximation
    in_band = measured(name).in_band
    assert in_band.mean() > 0.95 - 4 * in_band.std() / N_SEEDS**0.5 - 0.02


@by_name(GAPLESS)
def test_gapless_spectra_have_no_outliers(name):
    assert measured(name).has_outliers.sum() <= N_SEEDS - fewest(N_SEEDS)


@each_spectrum
def test_two_estimates_of_one_matrix_are_apart_by_the_noise(name):
    found = measured(name)
    assert found.is_beyond_noise.sum() <= N_SEEDS // 2 - fewest(N_SEEDS // 2)
    # what all probes have in common, the space deflated first, is not in the noise: up to 1.5 times
    assert 0.6 < found.distance_over_noise.mean() < 1.6


@pytest.mark.parametrize("n_spikes", [5, pytest.param(10, marks=pytest.mark.slow)])
def test_spikes_are_counted(n_spikes):
    found = []
    for seed in range(20):
        operator = DiagonalOperator(torch.from_numpy(spiked_wigner(300, n_spikes, 10.0, seed)))
        found.append(int(spectral_density(operator, n_hvp=N_PRODUCTS, seed=seed, progress=False).n_outliers))
    assert found.count(n_spikes) >= fewest(20, 0.9)

"""The comparison of two spectra."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from scipy.stats import wasserstein_distance

from pnanalysis.errors import CurvatureError
from pnanalysis.spectra.density import spectral_density
from pnanalysis.spectra.differences import beyond_noise, compare_spectra
from tests.spectra.averaged_operators import Population
from tests.spectra.known_spectra import QUIET, spectrum, spiked


def test_comparison_of_equal_spectra_finds_nothing_and_of_others_the_difference():
    a = spectrum(spiked(), 0)
    same = compare_spectra(a, spectrum(spiked(), 1))
    assert same.attrs["kind"] == "spectrum_comparison"
    assert same.wasserstein1 < 3 * same.wasserstein1_noise + 1e-3
    assert same.trace_low <= 0 <= same.trace_high
    assert same.lambda_max_low <= 1e-9
    assert same.lambda_max_high >= -1e-9
    other = spiked() + 0.5
    difference = compare_spectra(a, spectrum(other, 1))
    assert difference.trace_low <= 500 <= difference.trace_high
    assert difference.wasserstein1 > 5 * difference.wasserstein1_noise
    assert float(difference.wasserstein1) == pytest.approx(0.5, abs=3 * float(difference.wasserstein1_se) + 0.01)
    assert float(difference.lambda_max) == pytest.approx(0.5, abs=1e-6)
    back = compare_spectra(spectrum(other, 1), a)
    assert float(back.trace_low) == pytest.approx(-float(difference.trace_high))


def large(n: int) -> np.ndarray:
    """A narrow bulk and a tail of 100, as networks have: masses are known well then, the places of nodes are not."""
    return np.r_[1e-3 * np.random.default_rng(1).standard_normal(n - 100), 10.0 / np.arange(1, 101)]


@pytest.mark.parametrize(
    ("eigenvalues", "budget"),
    [
        (spiked(), {"n_lanczos": 20, "n_probes": 3}),
        pytest.param(spiked(), {"n_lanczos": 20, "n_probes": 20}, marks=pytest.mark.slow),
        (spiked(), {"n_lanczos": 20, "n_probes": 3, "deflate": False}),
        pytest.param(spiked(), {"n_lanczos": 20, "n_probes": 20, "deflate": False}, marks=pytest.mark.slow),
        (spiked(), {"n_hvp": 80}),
        pytest.param(np.linspace(0, 1, 1000), {"n_lanczos": 20, "n_probes": 5}, marks=pytest.mark.slow),
        pytest.param(10.0 / np.arange(1, 1501) ** 1.5, {"n_lanczos": 20, "n_probes": 5}, marks=pytest.mark.slow),
        (large(10_000), {"n_lanczos": 20, "n_probes": 3}),
        pytest.param(large(10_000), {"n_lanczos": 20, "n_probes": 6}, marks=pytest.mark.slow),
        pytest.param(large(4_000), {"n_hvp": 200}, marks=pytest.mark.slow),
    ],
    ids=["few", "many", "plain", "many plain", "budget", "uniform", "power", "large", "large, more", "large, budget"],
)
def test_two_estimates_of_one_spectrum_are_their_noise_apart(eigenvalues, budget):
    estimates = [spectrum(eigenvalues, seed, **budget) for seed in range(24)]
    pairs = [compare_spectra(a, b) for a, b in zip(estimates[::2], estimates[1::2], strict=True)]
    distance, noise = (
        np.array([float(pair[name]) for pair in pairs]) for name in ("wasserstein1", "wasserstein1_noise")
    )
    # distances spread by 0.2 to 0.45 of their mean, so that a mean of 12 is known to 0.13 at worst. Sampling of masses
    # alone made the large spectra's ratios 1.8 to 2.1
    assert 0.65 < distance.mean() / noise.mean() < 1.5


def test_comparison_of_exact_spectra_has_no_noise():
    a, b = np.linspace(0, 1, 40), np.linspace(0, 2, 40)
    comparison = compare_spectra(spectrum(a, n_hvp=40), spectrum(b, n_hvp=40))
    assert float(comparison.wasserstein1) == pytest.approx(wasserstein_distance(a, b))
    assert comparison.wasserstein1_noise == 0


def test_stacked_checkpoints_are_refused():
    a = spectrum(spiked())
    stacked = xr.concat([a, a], "checkpoint")
    with pytest.raises(CurvatureError, match="one checkpoint on each side"):
        compare_spectra(stacked, a)


def over_examples(n: int, seed: int, shift: float = 0.0, data_error: str = "examples", probes: int = 0) -> xr.Dataset:
    operator = Population(60, rank=2).draw(n, seed, shift)
    return spectral_density(operator, n_hvp=24, seed=probes, data_error=data_error, **QUIET)


@pytest.mark.parametrize("data_error", ["examples", "groups"])
def test_what_examples_do_to_both_spectra_cancels(data_error):
    a = over_examples(64, 0, data_error=data_error)
    b = over_examples(64, 0, 0.05, data_error, probes=1)
    other = over_examples(64, 1, 0.05, data_error, probes=1)
    paired, independent = compare_spectra(a, b), compare_spectra(a, other)
    assert paired.attrs["examples"] == "same"
    assert "examples" not in independent.attrs
    for name in ("trace", "frobenius_norm", "lambda_max"):
        # the difference scales with the examples as the numbers themselves do, times 0.1 and less
        assert paired[f"{name}_data_se"] < 0.3 * independent[f"{name}_data_se"]
        assert float(independent[f"{name}_data_se"]) == pytest.approx(
            np.hypot(a[f"{name}_data_se"], other[f"{name}_data_se"])
        )
    if data_error == "groups":
        assert paired.attrs["wasserstein1_covers"] == independent.attrs["wasserstein1_covers"] == "probes and examples"
        assert paired.wasserstein1_noise < 0.5 * independent.wasserstein1_noise


@pytest.mark.parametrize("first", ["examples", "none"])
def test_without_the_error_of_one_spectrum_that_of_the_difference_is_of_probes_alone(first):
    second = "none" if first == "examples" else "examples"
    difference = compare_spectra(over_examples(64, 0, data_error=first), over_examples(64, 1, data_error=second))
    assert not any(name.endswith("_data_se") for name in difference)
    assert float(difference.trace_se) > 0


def test_the_error_of_a_difference_is_the_total_of_its_parts():
    difference = compare_spectra(over_examples(64, 0), over_examples(64, 1, probes=1))
    trace, probe, data = (float(difference[f"trace{end}"]) for end in ("", "_probe_se", "_data_se"))
    assert float(difference.trace_se) == pytest.approx(np.hypot(probe, data))
    assert float(difference.trace_high) - trace > 1.96 * float(difference.trace_se)
    # bounds add to the error of the examples
    assert "lambda_max_probe_se" not in difference
    assert float(difference.lambda_max_se) == float(difference.lambda_max_data_se)


def test_without_an_error_of_both_spectra_there_is_none_of_the_difference():
    difference = compare_spectra(over_examples(64, 0), over_examples(64, 0, 0.05, "none"))
    assert "trace_data_se" not in difference
    assert float(difference.trace_se) == float(difference.trace_probe_se)
    assert difference.attrs["wasserstein1_covers"] == "probes"


@pytest.mark.slow
def test_distances_of_fresh_examples_are_their_noise_apart():
    found = [
        compare_spectra(
            over_examples(48, 2 * i, data_error="groups"), over_examples(48, 2 * i + 1, data_error="groups")
        )
        for i in range(12)
    ]
    distance, noise, se = (
        np.array([float(one[f"wasserstein1{end}"]) for one in found]) for end in ("", "_noise", "_se")
    )
    # of a lognormal population, distances spread by half their mean, so that a mean of 12 is known to 0.15; without
    # the examples the ratio is above 5
    assert 0.6 < distance.mean() / noise.mean() < 1.5
    # at most 5 % of single ones are expected beyond it; 4 or more of 12 have probability 0.2 %
    assert sum(map(beyond_noise, distance, noise, se)) <= 3

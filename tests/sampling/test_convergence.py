"""R-hat and effective sample sizes of chains whose autocorrelation is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.signal import lfilter

from pnanalysis.sampling.convergence import effective_sample_size, rank_normalised_rhat


def autoregressive(rho: float, n_chains: int = 4, n: int = 4000, seed: int = 0) -> np.ndarray:
    """Stationary chains ``x' = rho x + sqrt(1 - rho^2) noise`` of variance 1."""
    noise = np.random.default_rng(seed).standard_normal((n_chains, n))
    noise[:, 1:] *= np.sqrt(1 - rho**2)
    return lfilter([1.0], [1.0, -rho], noise, axis=1)


@pytest.mark.parametrize("rho", [-0.5, 0.0, 0.5, 0.9])
def test_effective_sample_size_of_autoregressive_chains(rho):
    exact = 16_000 * (1 - rho) / (1 + rho)
    found = np.mean([effective_sample_size(autoregressive(rho, seed=seed)) for seed in range(8)])
    # the time is known to about sqrt(2 (2 M + 1) / N) of itself for M lags, here below 0.2 for one and 0.07 for eight
    assert found == pytest.approx(exact, rel=0.15)


def test_standard_error_from_the_effective_sample_size_is_that_of_the_mean():
    chains = [autoregressive(0.8, n=1000, seed=seed) for seed in range(200)]
    stated = np.mean([1 / effective_sample_size(each) for each in chains])
    assert np.var([each.mean() for each in chains]) == pytest.approx(stated, rel=0.35)  # 200 variances: 10 % each


def test_chains_of_one_distribution_have_an_rhat_of_one():
    assert rank_normalised_rhat(autoregressive(0.3)) < 1.01


@pytest.mark.parametrize("what", ["place", "width", "drift"])
def test_chains_that_differ_or_drift_have_not(what):
    chains = autoregressive(0.3)
    if what == "place":
        chains[0] += 1.0
    if what == "width":
        chains[0] *= 3.0
    if what == "drift":
        chains += np.linspace(0, 2, chains.shape[1])
    assert rank_normalised_rhat(chains) > 1.05


def test_rhat_does_not_depend_on_heavy_tails():
    chains = np.random.default_rng(0).standard_cauchy((4, 1000))
    assert rank_normalised_rhat(chains) < 1.01
    assert rank_normalised_rhat(chains) == pytest.approx(rank_normalised_rhat(np.arctan(chains)), abs=0.01)


def test_what_has_no_number():
    draws = autoregressive(0.0, n=100)
    draws[1, 7] = np.nan
    assert np.isnan(rank_normalised_rhat(draws))
    assert effective_sample_size(draws) == 0
    constant = np.ones((4, 100))
    assert np.isnan(rank_normalised_rhat(constant))
    assert effective_sample_size(constant) == 400
    with pytest.raises(ValueError, match="four draws"):
        rank_normalised_rhat(np.ones((4, 3)))

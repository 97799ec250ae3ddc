"""Spectral measures from Lanczos coefficients, and the errors of averages over them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from pnanalysis.spectra import deflation
from pnanalysis.spectra.linear_operator import DiagonalOperator
from pnanalysis.spectra.memory import Storage
from pnanalysis.spectra.quadrature import SpectralMeasure, averaged_rule, ritz
from tests.spectra.known_spectra import spectrum, spiked


def test_the_scatter_of_probes_is_that_of_their_own_estimates():
    """Of equal probes without deflation, by hand: the variance of a mean of K."""
    ds = spectrum(spiked(), n_lanczos=8, n_probes=4, deflate=False)
    measure = SpectralMeasure.from_dataset(ds)
    points = np.linspace(-0.5, 20, 30)
    each = [
        [
            measure.weight[(measure.probe == probe) & (measure.node <= x)].sum()
            / measure.weight[measure.probe == probe].sum()
            for x in points
        ]
        for probe in (1, 2, 3, 4)
    ]
    variance, dof = measure.cumulative_variance(points)
    assert dof == 3
    np.testing.assert_allclose(variance, np.var(each, axis=0, ddof=1) / 4, rtol=1e-9, atol=1e-15)
    single, none = SpectralMeasure.from_dataset(
        spectrum(spiked(), n_lanczos=8, n_probes=1, deflate=False)
    ).cumulative_variance(points)
    assert none == 0
    assert (single > 0).any()


def test_error_of_a_mean_is_the_sphere_formula():
    eigenvalues = np.random.default_rng(0).normal(size=50)
    measure = SpectralMeasure(eigenvalues, np.full(50, 1 / 50), np.ones(50, int), np.zeros(50, int), 50)
    vectors = np.random.default_rng(1).standard_normal((200_000, 50))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    seen = (vectors**2 @ eigenvalues).std()
    assert measure.mean(eigenvalues).se == pytest.approx(seen, rel=0.02)  # 0.2 % sampling error of the check itself


def diagonal(eigenvalues: np.ndarray) -> DiagonalOperator:
    return DiagonalOperator(torch.from_numpy(np.asarray(eigenvalues, dtype=np.float64)))


def test_averaged_rule_is_exact_for_polynomials_and_finer_than_gauss():
    eigenvalues = np.linspace(-1, 1, 500)
    probe = deflation.sample_spectrum(
        diagonal(eigenvalues),
        deflation.SamplingSettings(12, 1, None, False, 0, Storage(torch.float64, torch.device("cpu"))),
    ).probes[0]
    value, weight, _ = ritz(probe.alpha, probe.beta)
    node, fraction = averaged_rule(probe.alpha, probe.beta)
    assert len(node) == 23
    assert (fraction > 0).all()
    for power in range(24):
        assert fraction @ node**power == pytest.approx(weight @ value**power, abs=1e-12)
    uniform = np.full(500, 1 / 500)
    assert wasserstein_distance(node, eigenvalues, fraction, uniform) < wasserstein_distance(
        value, eigenvalues, weight, uniform
    )

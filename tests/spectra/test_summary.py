"""The numbers drawn from a spectrum, and their errors."""

from __future__ import annotations

import numpy as np
import pytest

from pnanalysis import schema
from pnanalysis.spectra.summary import summarise
from tests.spectra.known_spectra import BUDGETS, spectrum, spiked


def truths(eigenvalues: np.ndarray) -> dict[str, float]:
    positive = np.maximum(eigenvalues, 0)
    return {
        "trace": eigenvalues.sum(),
        "frobenius_norm": np.linalg.norm(eigenvalues),
        "negative_mass": np.mean(eigenvalues < 0),
        "effective_rank": np.abs(eigenvalues).sum() ** 2 / np.sum(eigenvalues**2),
        "effective_dimension": np.sum(positive / (positive + 1.0)),
    }


def test_full_budget_gives_exact_numbers_without_error():
    eigenvalues = spiked()
    ds = spectrum(eigenvalues, n_hvp=1000)
    assert ds.attrs["method"] == "exact"
    for name, truth in truths(eigenvalues).items():
        assert float(ds[name]) == pytest.approx(truth, rel=1e-10)
        assert float(ds[f"{name}_se"]) == 0
    assert ds.lambda_max_high - ds.lambda_max_low == 0
    assert ds.n_outliers == ds.n_outliers_low == ds.n_outliers_high == 8
    bulk = eigenvalues[:-8]
    assert (float(ds.bulk_edge_low), float(ds.bulk_edge_high)) == pytest.approx((bulk.min(), bulk.max()))
    assert float(ds.gap_ratio) == pytest.approx(40 / bulk.max())
    np.testing.assert_allclose(ds.top_value[:8], eigenvalues[:-9:-1])


@pytest.mark.parametrize("budget", BUDGETS, ids=["budget", "lockstep", "plain"])
def test_intervals_cover_the_truth(budget):
    eigenvalues = spiked()
    truth = truths(eigenvalues)
    covered = dict.fromkeys([*truth, "lambda_max", "lambda_min", "n_outliers"], 0)
    truth |= {"lambda_max": 40.0, "lambda_min": eigenvalues.min(), "n_outliers": 8.0}
    n_seeds = 60
    for seed in range(n_seeds):
        ds = spectrum(eigenvalues, seed, **budget)
        for name, value in truth.items():
            slack = 1e-9 * (1 + abs(value))
            covered[name] += bool(ds[f"{name}_low"] - slack <= value <= ds[f"{name}_high"] + slack)
    # 57 of 60 expected of a 95 % interval; 51 or fewer has probability 0.4 %. The quadrature's own error, not
    # counted, touches the averages of functions with a kink: sum |lambda| and the positive part
    for name, count in covered.items():
        assert count >= (45 if name.startswith("effective") else 52), (name, covered)


@pytest.mark.parametrize("budget", BUDGETS, ids=["budget", "lockstep", "plain"])
def test_outliers_are_counted_and_the_bulk_is_found(budget):
    eigenvalues = spiked()
    bulk = eigenvalues[:-8]
    ds = spectrum(eigenvalues, **budget)
    assert ds.n_outliers_low - 1e-9 <= 8 <= ds.n_outliers_high + 1e-9
    # 20 steps place the edge to a few per cent of the bulk's width
    assert float(ds.bulk_edge_high) == pytest.approx(bulk.max(), abs=0.1 * np.ptp(bulk))
    assert float(ds.bulk_edge_low) == pytest.approx(bulk.min(), abs=0.1 * np.ptp(bulk))
    assert ds.gap_ratio_low <= ds.gap_ratio <= ds.gap_ratio_high
    assert float(ds.gap_ratio) == pytest.approx(40 / float(ds.bulk_edge_high))


@pytest.mark.parametrize("budget", BUDGETS[:2], ids=["budget", "lockstep"])
def test_deflation_counts_outliers_exactly(budget):
    assert float(spectrum(spiked(), **budget).n_outliers) == pytest.approx(8, abs=1e-6)


@pytest.mark.parametrize(
    "eigenvalues",
    [
        np.linspace(0, 1, 400),
        np.linalg.eigvalsh(np.random.default_rng(0).standard_normal((300, 300)) + np.eye(300) * 9),
    ],
    ids=["uniform", "Wigner"],
)
def test_spectra_without_outliers_have_none(eigenvalues):
    ds = spectrum(eigenvalues)
    assert ds.n_outliers == ds.n_outliers_high == 0
    assert 1 <= ds.gap_ratio < 1.02


@pytest.mark.parametrize("eigenvalues", [np.zeros(50), np.full(50, -2.0)], ids=["zero", "constant"])
def test_a_single_level_is_summarised_without_nan(eigenvalues):
    ds = spectrum(eigenvalues, n_hvp=20)
    assert float(ds.trace) == pytest.approx(eigenvalues.sum())
    assert float(ds.n_outliers) == 0
    assert float(ds.negative_mass) == pytest.approx(float(eigenvalues[0] < 0))
    for name in ("trace", "frobenius_norm", "effective_rank", "effective_dimension", "negative_mass"):
        assert np.isfinite(ds[f"{name}_se"])


def test_residuals_of_the_top_eigenvalues_hold_an_eigenvalue():
    eigenvalues = spiked()
    for budget in BUDGETS:
        ds = spectrum(eigenvalues, **budget)
        assert (np.diff(ds.top_value) <= 0).all()
        nearest = np.abs(ds.top_value.values[:, None] - eigenvalues).min(axis=1)
        assert (nearest <= ds.top_residual + 1e-10).all()


def test_roundoff_around_zero_is_not_negative():
    noise = 1e-12 * np.random.default_rng(0).standard_normal(300)
    ds = spectrum(np.r_[noise, np.linspace(1, 5, 20)], n_lanczos=12, n_probes=3)
    assert float(ds.negative_mass) == 0
    assert float(ds.negative_mass_low) == 0


def test_negative_mass_interval_allows_for_the_quadrature():
    eigenvalues = np.linspace(-1, 3, 500)
    ds = spectrum(eigenvalues, n_lanczos=6, n_probes=4)
    assert ds.negative_mass_high - ds.negative_mass_low > 2 * 1.96 * ds.negative_mass_se
    assert ds.negative_mass_low <= 0.25 <= ds.negative_mass_high


def test_every_scalar_has_an_error_and_a_label():
    ds = spectrum(spiked())
    again = summarise(ds)
    assert set(again.data_vars) <= set(schema.SCHEMAS["spectral_density"])
    scalars = [n for n in again.data_vars if again[n].ndim == 0 and not n.endswith(("_se", "_low", "_high"))]
    assert len(scalars) == 9  # bulk_edge_low and bulk_edge_high, whose names end like bounds, are not among them
    for name in scalars:
        assert again[f"{name}_low"] <= again[name] <= again[f"{name}_high"]
    for name in ds.data_vars:
        assert {"long_name", "units"} <= ds[name].attrs.keys()

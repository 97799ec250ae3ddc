"""The numbers drawn from a spectrum, and their errors."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from pnanalysis import schema
from pnanalysis.spectra.summary import summarise
from tests.cases import cases
from tests.spectra.known_spectra import BUDGETS, spectrum, spiked


def truths(eigenvalues: np.ndarray) -> dict[str, float]:
    positive = np.maximum(eigenvalues, 0)
    return {
        "trace": eigenvalues.sum(),
        "frobenius_norm": np.linalg.norm(eigenvalues),
        "negative_mass": np.mean(eigenvalues < -1e-3 * np.abs(eigenvalues).max()),
        "negative_curvature": np.maximum(-eigenvalues, 0).sum() / np.abs(eigenvalues).sum(),
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
    assert ds.lambda_max_high - ds.lambda_max_low == pytest.approx(2 * 1e-14 * 40)  # round-off alone
    assert (int(ds.n_outliers), int(ds.n_outliers_negative)) == (8, 0)
    bulk = eigenvalues[:-8]
    assert (float(ds.bulk_edge_low), float(ds.bulk_edge_high)) == pytest.approx((bulk.min(), bulk.max()))
    assert float(ds.gap_ratio) == pytest.approx(40 / bulk.max())
    np.testing.assert_allclose(ds.top_value[:8], eigenvalues[:-9:-1])


@pytest.mark.parametrize(
    "budget", cases(dict(zip(("budget", "lockstep", "plain"), BUDGETS, strict=True)), ("budget", "lockstep", "plain"))
)
def test_intervals_cover_the_truth(budget):
    eigenvalues = spiked()
    truth = truths(eigenvalues)
    truth |= {"lambda_max": 40.0, "lambda_min": eigenvalues.min()}
    covered = dict.fromkeys(truth, 0)
    n_seeds = 60
    for seed in range(n_seeds):
        ds = spectrum(eigenvalues, seed, **budget)
        for name, value in truth.items():
            covered[name] += bool(ds[f"{name}_low"] <= value <= ds[f"{name}_high"])
    # 57 of 60 expected of a 95 % interval; 51 or fewer has probability 0.4 %
    for name, count in covered.items():
        assert count >= 52, (name, covered)


@pytest.mark.parametrize("eigenvalues", [np.zeros(50), np.full(50, -2.0)], ids=["zero", "constant"])
def test_a_single_level_is_summarised_without_nan(eigenvalues):
    ds = spectrum(eigenvalues, n_hvp=20)
    assert float(ds.trace) == pytest.approx(eigenvalues.sum())
    assert (int(ds.n_outliers), int(ds.n_outliers_negative)) == (0, 0)
    assert float(ds.negative_mass) == float(ds.negative_curvature) == float(eigenvalues[0] < 0)
    for name in truths(spiked()):
        assert float(ds[f"{name}_low"]) <= float(ds[name]) <= float(ds[f"{name}_high"])


def test_residuals_of_the_top_eigenvalues_hold_an_eigenvalue():
    eigenvalues = spiked()
    for budget in BUDGETS:
        ds = spectrum(eigenvalues, **budget)
        assert (np.diff(ds.top_value) <= 0).all()
        nearest = np.abs(ds.top_value.values[:, None] - eigenvalues).min(axis=1)
        assert (nearest <= ds.top_residual + 1e-10).all()


def test_every_scalar_has_a_label_and_all_but_counts_an_interval():
    ds = spectrum(spiked(), n_classes=4)
    again = summarise(ds)
    xr.testing.assert_equal(again.drop_vars("top_value"), ds[list(again.drop_vars("top_value").data_vars)])
    assert set(again.data_vars) <= set(schema.SCHEMAS["spectral_density"])
    for name in (*truths(spiked()), "lambda_max", "lambda_min", "bulk_edge_low", "bulk_edge_high", "gap_ratio"):
        assert again[f"{name}_low"] <= again[name] <= again[f"{name}_high"]
    for name in ("class_ratio", "class_gap", "class_trace"):
        assert again[f"{name}_low"] <= again[name] <= again[f"{name}_high"]
    for name in ("n_outliers", "n_outliers_negative"):
        assert {f"{name}{end}" for end in ("_se", "_low", "_high")}.isdisjoint(again)
    for name in ds.data_vars:
        assert {"long_name", "units"} <= ds[name].attrs.keys()


def test_roundoff_around_zero_is_not_negative():
    noise = 1e-15 * np.random.default_rng(0).standard_normal(300)
    ds = spectrum(np.r_[noise, np.linspace(1, 5, 20)], n_lanczos=12, n_probes=3)
    for name in ("negative_mass", "negative_curvature"):
        assert float(ds[name]) == float(ds[f"{name}_low"]) == 0


def test_semidefinite_operators_have_nothing_negative():
    negative = summarise(spectrum(np.linspace(-1, 3, 300)).assign_attrs(positive_semidefinite=1))
    for name in ("negative_mass", "negative_curvature"):
        assert [float(negative[name + end]) for end in ("", "_se", "_low", "_high")] == [0] * 4

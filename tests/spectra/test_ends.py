"""Bounds of the extreme eigenvalues and of the bulk, and the numbers of as many eigenvalues as there are classes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.spectra.known_spectra import spectrum, spiked


@pytest.mark.parametrize(
    "eigenvalues",
    [
        pytest.param(spiked(600), id="spiked"),
        pytest.param(-spiked(600), id="mirrored", marks=pytest.mark.slow),
        pytest.param(np.linspace(0, 1, 600), id="uniform", marks=pytest.mark.slow),
        pytest.param(10.0 / np.arange(1, 601), id="power law", marks=pytest.mark.slow),
    ],
)
def test_bounds_hold_the_edges(eigenvalues):
    ordered, n_seeds, held, given = np.sort(eigenvalues), 40, 0, 0
    for seed in range(n_seeds):
        ds = spectrum(eigenvalues, seed)
        for name, edge in (
            ("lambda_max", ordered[-1]), ("lambda_min", ordered[0]),
            ("bulk_edge_high", ordered[-1 - int(ds.n_outliers)]),
            ("bulk_edge_low", ordered[int(ds.n_outliers_negative)]),
        ):  # fmt: skip
            given += np.isfinite(float(ds[f"{name}_low"]))
            held += bool(ds[f"{name}_low"] <= edge <= ds[f"{name}_high"])
    assert given > 0.9 * 4 * n_seeds
    assert held >= 0.95 * given


def test_round_off_gives_every_eigenvalue_a_width():
    ds = spectrum(spiked(), n_lanczos=60, n_probes=2)
    assert float(ds.lambda_max_high - ds.lambda_max) > 0.9 * 1e-14 * 40
    assert float(ds.lambda_max - ds.lambda_max_low) > 0.9 * 1e-14 * 40


def test_as_many_eigenvalues_as_classes():
    eigenvalues = spiked()
    ds = spectrum(eigenvalues, n_hvp=200, n_classes=8)
    top = np.sort(eigenvalues)[::-1]
    assert float(ds.class_ratio) == pytest.approx(top[0] / top[7])
    share = top[:8].sum() / eigenvalues.sum()
    assert ds.class_trace_low <= share <= ds.class_trace_high
    assert float(ds.class_trace_se) == pytest.approx(share * float(ds.trace_se / ds.trace), rel=0.1)


@pytest.mark.parametrize("n_classes", [None, 0, 500, 5000])
def test_unknown_or_too_many_classes_have_no_numbers(n_classes):
    ds = spectrum(spiked(), n_hvp=80, n_classes=n_classes)
    assert all(np.isnan(ds[name]) for name in ("class_ratio", "class_gap", "class_trace"))

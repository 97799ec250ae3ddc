"""The negative part of a spectrum and its intervals."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cases import cases
from tests.spectra.known_spectra import spectrum

RNG = np.random.default_rng(0)
SPECTRA = {
    "around zero": np.linspace(-1, 3, 600),
    "cluster": np.r_[-np.geomspace(0.01, 1, 60), 1e-4 * RNG.standard_normal(700), np.geomspace(0.01, 10, 40)],
    "normal": RNG.standard_normal(600),
    "mostly zeros": np.r_[-0.2 * RNG.lognormal(0, 1.5, 30), np.zeros(500), RNG.lognormal(0, 1.5, 60)],
}


@pytest.mark.parametrize("eigenvalues", cases(SPECTRA, ("around zero", "normal", "mostly zeros")))
def test_intervals_hold(eigenvalues):
    size = np.abs(eigenvalues)
    truth = {
        "negative_mass": np.mean(eigenvalues < -1e-3 * size.max()),
        "negative_curvature": size[eigenvalues < 0].sum() / size.sum(),
    }
    n_seeds, held = 50, dict.fromkeys(truth, 0)
    for seed in range(n_seeds):
        ds = spectrum(eigenvalues, seed, n_hvp=60)
        for name, value in truth.items():
            held[name] += bool(ds[f"{name}_low"] <= value <= ds[f"{name}_high"])
            assert 0 <= ds[f"{name}_low"] <= ds[name] <= ds[f"{name}_high"] <= 1
    # of 95 % intervals 41 or fewer of 50 hold with a probability of 0.07 %
    assert min(held.values()) > 41, held


def test_no_negative_eigenvalues_are_found_where_none_are():
    ds = spectrum(RNG.lognormal(size=500))
    assert float(ds.negative_curvature) == float(ds.negative_curvature_low) == 0
    assert float(ds.negative_mass_low) == 0

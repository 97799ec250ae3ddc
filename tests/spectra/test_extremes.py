"""Spectra at the edges of what numbers hold: each is right, or one error says why not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pnanalysis.spectra.density import spectral_density
from pnanalysis.spectra.linear_operator import as_operator

LARGEST = torch.finfo(torch.float32).max
BUDGETS = [{"n_hvp": 6}, {"n_hvp": 40}, {"n_lanczos": 5, "n_probes": 2}, {"n_lanczos": 5, "n_probes": 2, "deflate": 0}]
#: Eigenvalues of which there are at most two different ones: two Lanczos steps find them exactly.
SPECTRA = {
    "zero": np.zeros(60),
    "P = 1, zero": np.zeros(1),
    "P = 1": np.array([3.0]),
    "P = 1, negative": np.array([-3.0]),
    "identity": np.ones(60),
    "repeated": np.repeat([1.0, -2.0], 30),
    "rank one": np.r_[5.0, np.zeros(59)],
    "rank one, negative": np.r_[-5.0, np.zeros(59)],
    "float32's largest": np.full(30, 0.9 * LARGEST),
    "float32's largest, both signs": np.repeat([0.9, -0.9], 15) * LARGEST,
    "float32's smallest": np.full(30, 1e-37),
    "large": np.repeat([1e30, 2e30], 30),
    "small": np.repeat([1e-30, 2e-30], 30),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("eigenvalues", SPECTRA.values(), ids=SPECTRA.keys())
def test_two_eigenvalues_are_found_whatever_their_size(
    eigenvalues: np.ndarray, budget: dict[str, int], dtype: torch.dtype
) -> None:
    budget = {name: min(value, len(eigenvalues)) if name == "n_lanczos" else value for name, value in budget.items()}
    ds = spectral_density(as_operator(torch.diag(torch.tensor(eigenvalues, dtype=dtype))), **budget, progress=False)
    size = np.abs(eigenvalues).max()
    assert float(ds.lambda_max) == pytest.approx(eigenvalues.max(), abs=1e-4 * size)
    assert float(ds.lambda_min) == pytest.approx(eigenvalues.min(), abs=1e-4 * size)
    assert float(ds.weight.sum()) == pytest.approx(1)
    assert np.isfinite(ds.density.values).all()
    # six standard errors, which few probes estimate themselves
    error = 6 * float(ds.trace_se) + 1e-4 * size * len(eigenvalues)
    assert float(ds.trace) == pytest.approx(eigenvalues.sum(), abs=error)

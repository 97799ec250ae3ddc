"""Matrices of known eigenvalues, and their sampled spectra."""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr

from pnanalysis.spectra.density import spectral_density
from pnanalysis.spectra.linear_operator import DiagonalOperator

QUIET = {"progress": False, "grid": np.array([0.0, 1.0])}
BUDGETS = [{"n_hvp": 80}, {"n_lanczos": 20, "n_probes": 4}, {"n_lanczos": 20, "n_probes": 4, "deflate": False}]


def spectrum(eigenvalues: np.ndarray, seed: int = 0, **budget) -> xr.Dataset:
    return spectral_density(
        DiagonalOperator(torch.from_numpy(eigenvalues)), seed=seed, **(budget or BUDGETS[0]), **QUIET
    )


def spiked(n: int = 1000, seed: int = 0) -> np.ndarray:
    """A semicircular bulk of radius 1, shifted to 0.2, and eight outliers."""
    bulk = 0.2 + 2 * (np.random.default_rng(seed).beta(1.5, 1.5, n - 8) - 0.5)
    return np.r_[bulk, 8.0, 9.0, 10.0, 12.0, 15.0, 18.0, 22.0, 40.0]

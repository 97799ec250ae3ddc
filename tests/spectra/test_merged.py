"""Rayleigh-Ritz on several Krylov spaces together, compared with the dense projection."""

import numpy as np
import pytest
import torch

from pnanalysis import spectral_density
from pnanalysis.spectra.lanczos import Lanczos
from pnanalysis.spectra.linear_operator import DenseOperator
from pnanalysis.spectra.merged import Couplings, MergedSpaces
from pnanalysis.spectra.quadrature import merged_ritz_values
from pnanalysis.spectra.random_vectors import random_unit_vectors


def symmetric(n: int, seed: int) -> torch.Tensor:
    square = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (square + square.T) / 2


@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("sizes", [(7,), (9, 6), (5, 4, 6)])
def test_equals_the_dense_projection(sizes, scale):
    n = 40
    matrix = symmetric(n, 0) * scale
    operator = DenseOperator(matrix)
    couplings, spaces, tridiagonal = Couplings(), torch.zeros(n, 0, dtype=torch.float64), []
    for index, size in enumerate(sizes):
        start = random_unit_vectors(operator, range(index, index + 1), 3)
        lanczos = Lanczos(operator, start, size, spaces if index else None).extend(size)
        couplings.add(lanczos)
        alpha, beta = lanczos.coefficients()
        tridiagonal.append((alpha[0], beta[0]))
        spaces = torch.cat([spaces, lanczos.basis[0]], dim=1)
    value, residual, coupling = MergedSpaces(couplings.parts, couplings.overlaps()).eigenvalues(tridiagonal)

    V = spaces.numpy()
    exact, vector = np.linalg.eigh(V.T @ matrix.numpy() @ V)
    np.testing.assert_allclose(value, exact[::-1], atol=1e-12)
    rest = matrix.numpy() @ V @ vector - V @ vector * exact
    np.testing.assert_allclose(residual, np.linalg.norm(rest, axis=0)[::-1], atol=1e-7)  # root of a difference
    assert coupling == pytest.approx(np.linalg.norm(matrix.numpy() @ V - V @ (V.T @ matrix.numpy() @ V)))


def test_merged_values_are_no_further_out_than_the_eigenvalues_of_their_rank():
    matrix = symmetric(200, 1)
    eigenvalues = np.linalg.eigvalsh(matrix.numpy())[::-1]
    ds = spectral_density(matrix, n_hvp=80, progress=False)
    value, residual = merged_ritz_values(ds)
    assert len(value) == int(ds.attrs["n_deflated"])
    assert (np.diff(value) <= 0).all()
    assert (value <= eigenvalues[: len(value)] + 1e-12).all()
    assert (value >= eigenvalues[-len(value) :] - 1e-12).all()
    nearest = np.abs(value[:, None] - eigenvalues).min(axis=1)
    assert (nearest <= residual + 1e-9).all()


def test_an_exhausted_space_is_coupled_to_nothing():
    matrix = np.diag(np.r_[np.zeros(60), 1.0, 2.0, 3.0])
    ds = spectral_density(matrix, n_hvp=30, progress=False)
    value, residual = merged_ritz_values(ds)
    np.testing.assert_allclose(value[:3], [3.0, 2.0, 1.0], atol=1e-12)
    np.testing.assert_allclose(residual[:3], 0.0, atol=1e-7)

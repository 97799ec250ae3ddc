"""Sums over millions of entries in float32, against float64."""

from __future__ import annotations

import pytest
import torch

from pnanalysis.spectra.inner_products import add_combinations, combinations, inner_products, norms, orthogonalised
from pnanalysis.spectra.linear_operator import empty_columns

SINGLE = torch.finfo(torch.float32).eps


def columns(n_parameters: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    V = empty_columns(n_parameters, k, dtype, torch.device("cpu"))
    return V.copy_(torch.randn(k, n_parameters, generator=torch.Generator().manual_seed(seed)).T)


@pytest.mark.parametrize("n_parameters", [1, 1000, 3_000_001])
def test_sums_keep_the_digits_of_their_terms(n_parameters):
    a, b = columns(n_parameters, 2, torch.float32), columns(n_parameters, 2, torch.float32, seed=1)
    b += a
    exact = (a.double() * b.double()).sum(0)
    torch.testing.assert_close(inner_products(a, b), exact, rtol=1e-13, atol=0)
    torch.testing.assert_close(norms(a), a.double().square().sum(0).sqrt(), rtol=1e-13, atol=0)
    if n_parameters > 1e6:  # what they are for: torch's own norm is off by 5e-5 here
        assert (torch.linalg.vector_norm(a, dim=0) / norms(a) - 1).abs().max() > 100 * SINGLE


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_neither_overflow_nor_underflow(scale):
    V = columns(1000, 2, torch.float32) * scale
    torch.testing.assert_close(norms(V), V.double().square().sum(0).sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_parameters", [50, 2 * 2**16 + 7])
def test_what_is_left_is_orthogonal_to_every_space(n_parameters, dtype):
    k, eps = 3, torch.finfo(dtype).eps
    frames = [torch.linalg.qr(columns(n_parameters, 9, torch.float64, seed).to(dtype))[0] for seed in range(k)]
    shared, own = frames[0][:, :4], torch.stack([frame[:, 4:] for frame in frames])
    # spaces of their own orthogonal to the shared one, as the bases of probes in the complement of a deflated space
    own = torch.linalg.qr(own - shared @ (shared.T @ own))[0]
    V = columns(n_parameters, k, dtype, seed=9)
    before = V.clone()
    rest, _ = orthogonalised(V, [shared, own])
    assert torch.equal(V, before)
    assert rest.T.is_contiguous()
    size = norms(V).max()
    assert (shared.T.double() @ rest.double()).abs().max() < 4 * eps * size
    assert torch.einsum("kpn,pk->kn", own.double(), rest.double()).abs().max() < 4 * eps * size
    removed = (V - rest).double()
    for i in range(k):  # and nothing else was taken off
        space = torch.cat([shared, own[i]], 1).double()
        torch.testing.assert_close(space @ (space.T @ removed[:, i]), removed[:, i], rtol=0, atol=20 * eps)


def test_without_a_space_vectors_are_copied():
    V = columns(100, 2, torch.float32)
    rest, _ = orthogonalised(V, [])
    assert torch.equal(rest, V)
    assert rest.data_ptr() != V.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_combinations_are_in_the_precision_of_their_coordinates(dtype):
    basis, coordinates = columns(70_000, 3, dtype), torch.randn(3, 2, dtype=torch.float64)
    found = combinations(basis, coordinates)
    torch.testing.assert_close(found, basis.double() @ coordinates, rtol=1e-13, atol=1e-13)
    add_combinations(found, basis, coordinates)
    torch.testing.assert_close(found, 2 * basis.double() @ coordinates, rtol=1e-13, atol=1e-13)

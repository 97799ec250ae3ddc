"""Extreme eigenpairs in few vectors, against exact ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pnanalysis.errors import CurvatureError
from pnanalysis.spectra.linear_operator import DenseOperator, DiagonalOperator
from pnanalysis.spectra.restarted import extreme_pairs


def random_matrix(n: int = 300) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    values = torch.cat(
        [torch.linspace(-1, 1, n - 8, dtype=torch.float64), torch.tensor([3.0, 3.0, 4, 5, 8, -2, -3, -6])]
    )
    return q * values @ q.T


@pytest.mark.parametrize(
    ("which", "expected"),
    [("largest", [8, 5, 4, 3, 3]), ("smallest", [-6, -3, -2]), ("magnitude", [8, -6, 5, 4])],
)
@pytest.mark.parametrize("extra", [3, 12])
def test_pairs_are_those_of_the_dense_matrix(which: str, expected: list[float], extra: int) -> None:
    matrix = random_matrix()
    k = len(expected)
    pairs = extreme_pairs(matrix, k, which, n_vectors=k + extra, tolerance=1e-9)
    assert pairs.converged
    np.testing.assert_allclose(pairs.value, expected, atol=1e-8)
    vector = pairs.vector
    torch.testing.assert_close(vector.T @ vector, torch.eye(k, dtype=torch.float64), atol=1e-12, rtol=0)
    true = torch.linalg.vector_norm(matrix @ vector - vector * torch.from_numpy(pairs.value), dim=0).numpy()
    np.testing.assert_allclose(true, pairs.residual, atol=1e-10)


def test_residuals_bound_the_error_before_convergence() -> None:
    values = np.sort(np.random.default_rng(0).standard_normal(500))
    pairs = extreme_pairs(DiagonalOperator(torch.from_numpy(values)), 5, n_vectors=12, tolerance=1e-12, max_hvp=40)
    assert not pairs.converged
    assert pairs.n_hvp <= 40
    distance = np.abs(values[:, None] - pairs.value).min(0)
    assert (distance <= pairs.residual + 1e-12).all()


def test_more_vectors_take_fewer_products_and_memory_stays_the_same() -> None:
    op = DiagonalOperator(torch.linspace(0, 1, 2000, dtype=torch.float64) ** 8)
    spent = [extreme_pairs(op, 4, n_vectors=n, tolerance=1e-6, max_hvp=5000).n_hvp for n in (8, 60)]
    assert spent[1] < spent[0]


def test_a_warm_start_takes_fewer_products() -> None:
    matrix = random_matrix()
    cold = extreme_pairs(matrix, 3, tolerance=1e-8)
    warm = extreme_pairs(matrix + 1e-4 * torch.eye(300, dtype=torch.float64), 3, tolerance=1e-8, start=cold.vector)
    assert warm.n_hvp < cold.n_hvp
    np.testing.assert_allclose(warm.value, cold.value + 1e-4, atol=1e-7)


def test_a_small_invariant_space_ends_the_iteration() -> None:
    low_rank = torch.zeros(50, 50, dtype=torch.float64)
    low_rank[0, 0] = 2.0
    pairs = extreme_pairs(low_rank, 4)
    assert pairs.converged
    assert pairs.value[0] == pytest.approx(2)
    np.testing.assert_allclose(pairs.value[1:], 0, atol=1e-12)


def test_single_precision() -> None:
    pairs = extreme_pairs(DenseOperator(random_matrix().float()), 3, tolerance=1e-5)
    np.testing.assert_allclose(pairs.value, [8, 5, 4], rtol=1e-5)


def test_one_sentence_for_what_does_not_fit() -> None:
    with pytest.raises(CurvatureError, match="k is 5 and n_vectors 5"):
        extreme_pairs(torch.eye(20), 5, n_vectors=5)
    with pytest.raises(CurvatureError, match="NaN or infinite"):
        extreme_pairs(torch.full((20, 20), torch.nan), 2)

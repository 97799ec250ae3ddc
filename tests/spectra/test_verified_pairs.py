"""Eigenpairs with bounds, against dense matrices: nothing is left out, and every bound holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, eigsh

from pnanalysis.errors import CurvatureError
from pnanalysis.spectra.linear_operator import DenseOperator, DiagonalOperator
from pnanalysis.spectra.restarted import WHICH, extreme_pairs
from pnanalysis.spectra.verified_pairs import VerifiedPairs, _Found, verified_pairs


def rotated(values: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A dense matrix with these eigenvalues, and its eigenvectors in their order."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))
    return (q * values) @ q.T, q


def wanted(values: np.ndarray, which: str, k: int) -> np.ndarray:
    key = {"largest": -values, "smallest": values, "magnitude": -np.abs(values)}[which]
    return values[np.argsort(key, kind="stable")][:k]


def check_bounds(pairs: VerifiedPairs, values: np.ndarray, q: np.ndarray) -> None:
    """Every statement about values and angles, for a matrix whose eigenvalues and eigenvectors are known."""
    v = pairs.vector.double().numpy()
    away = np.abs(values[:, None] - pairs.value).min(0)
    assert (away <= pairs.bound * (1 + 1e-9)).all()
    for c in np.unique(pairs.angles.cluster):
        inside = pairs.angles.cluster == c
        space = float(pairs.angles.space[inside][0])
        if space < 1:  # as many eigenvectors as vectors, those of the nearest eigenvalues
            nearest = np.argsort(np.abs(values[:, None] - pairs.value[inside]).min(1))[: inside.sum()]
            rest = v[:, inside] - q[:, nearest] @ (q[:, nearest].T @ v[:, inside])
            assert np.linalg.norm(rest, 2) <= space * (1 + 1e-6) + 1e-7
    for i in np.flatnonzero(pairs.angles.vector < 1):
        own = q[:, np.argmin(np.abs(values - pairs.value[i]))]
        assert np.linalg.norm(v[:, i] - own * (own @ v[:, i])) <= pairs.angles.vector[i] * (1 + 1e-6) + 2e-7


SPECTRA = {
    "outliers": np.concatenate([np.linspace(-1, 1, 192), [3.0, 3.0, 3.0, 4, 5, -2, -6, -6]]),
    "clusters": np.concatenate([np.linspace(0, 0.5, 195), [2, 2 + 1e-9, 2 + 2e-9, 7, 7]]),
    "semidefinite": np.concatenate([np.zeros(190), np.linspace(0.1, 9, 10)]),
    "all the same": np.full(40, 2.5),
    "zero": np.zeros(30),
    "rank one": np.concatenate([np.zeros(49), [3.0]]),
    "negative": -(np.linspace(1, 50, 60) ** 2),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_pairs_are_those_of_the_dense_matrix_and_bounds_hold(spectrum: str, which: str, dtype: torch.dtype) -> None:
    values, k = SPECTRA[spectrum], 6
    matrix, q = rotated(values)
    pairs = verified_pairs(torch.from_numpy(matrix).to(dtype), k, which)
    scale = np.abs(values).max()
    assert pairs.converged.all()
    assert pairs.complete
    found = np.sort(pairs.value if which != "magnitude" else np.abs(pairs.value))
    expected = np.sort(wanted(values, which, k) if which != "magnitude" else np.abs(wanted(values, which, k)))
    np.testing.assert_allclose(found, expected, atol=1e-4 * scale)  # the tolerance
    identity = torch.eye(k, dtype=pairs.vector.dtype)
    torch.testing.assert_close(pairs.vector.T @ pairs.vector, identity, atol=2e-6, rtol=0)
    check_bounds(pairs, values, q)


def test_all_copies_of_a_repeated_eigenvalue_are_found() -> None:
    matrix, q = rotated(np.concatenate([np.linspace(-1, 1, 100), [5.0] * 4]))
    pairs = verified_pairs(matrix, 4)
    np.testing.assert_allclose(pairs.value, 5.0, atol=1e-6)
    assert pairs.angles.cluster.tolist() == [0] * 4
    assert (pairs.angles.vector == 1).all()  # none of the vectors is determined,
    assert (pairs.angles.space < 1e-4).all()  # and their space is
    inside = q[:, -4:].T @ pairs.vector.numpy()
    np.testing.assert_allclose(inside.T @ inside, np.eye(4), atol=1e-6)


def test_a_cluster_that_k_cuts_has_no_space() -> None:
    matrix, _ = rotated(np.concatenate([np.linspace(-1, 1, 100), [9.0, 5.0, 5.0]]))
    pairs = verified_pairs(matrix, 2)
    assert pairs.angles.space[0] < 1e-4
    assert pairs.angles.space[1] == 1


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 45), st.sampled_from(WHICH))
@example(19, 24, 22, "smallest")  # a complement of two dims, in which round-off mixes with what was found
@example(35941, 39, 37, "largest")
@settings(max_examples=40, deadline=None)
def test_random_matrices_with_repeated_eigenvalues(seed: int, n: int, k: int, which: str) -> None:
    values = np.random.default_rng(seed).integers(-3, 4, n).astype(float)
    matrix, q = rotated(values, seed)
    pairs = verified_pairs(matrix, k, which, seed=seed)
    assert len(pairs.value) == min(n, k)
    found, expected = pairs.value, wanted(values, which, k)
    if which == "magnitude":
        found, expected = np.abs(found), np.abs(expected)
    np.testing.assert_allclose(np.sort(found), np.sort(expected), atol=1e-3)
    np.testing.assert_allclose(pairs.vector.T @ pairs.vector, np.eye(min(n, k)), atol=1e-8)
    check_bounds(pairs, values, q)


def test_one_parameter_and_more_pairs_than_parameters() -> None:
    pairs = verified_pairs(np.array([[-2.0]]), 10)
    assert pairs.value.tolist() == [-2.0]
    assert pairs.angles.vector.tolist() == [0.0]
    assert pairs.rest is None
    assert pairs.complete
    np.testing.assert_allclose(verified_pairs(np.diag([1.0, 3, 2]), 10).value, [3, 2, 1], atol=1e-12)


def test_what_has_not_converged_is_said_and_bounds_hold() -> None:
    values = np.sort(np.random.default_rng(0).standard_normal(400))
    matrix, _q = rotated(values)
    with pytest.warns(UserWarning, match="have not converged after") as warned:
        pairs = verified_pairs(matrix, 8, max_hvp=30)
    assert any("left out" in str(one.message) for one in warned)
    assert not pairs.converged.all()
    assert not pairs.complete
    away = np.abs(values[:, None] - pairs.value).min(0)
    assert (away <= pairs.bound).all()


def test_values_agree_with_scipy() -> None:
    op = DiagonalOperator(torch.from_numpy(np.random.default_rng(1).standard_normal(800) ** 3))
    scipy = LinearOperator(op.shape, matvec=lambda v: op.matvec(torch.from_numpy(v.ravel())).numpy(), dtype=float)
    for which, theirs in (("largest", "LA"), ("smallest", "SA"), ("magnitude", "LM")):
        expected = eigsh(scipy, 5, which=theirs, return_eigenvectors=False)
        np.testing.assert_allclose(np.sort(verified_pairs(op, 5, which).value), np.sort(expected), rtol=1e-6)


def test_a_skew_operator_is_refused() -> None:
    with pytest.raises(CurvatureError, match="not symmetric"):
        verified_pairs(np.random.default_rng(0).standard_normal((60, 60)), 3)


def test_an_operator_that_changes_is_refused() -> None:
    matrix, _ = rotated(SPECTRA["outliers"])

    class Noisy(DenseOperator):
        def matmat(self, V: torch.Tensor) -> torch.Tensor:
            return super().matmat(V) + 0.5 * torch.randn(V.shape, dtype=V.dtype)

    with pytest.raises(CurvatureError, match="not symmetric"):
        verified_pairs(Noisy(torch.from_numpy(matrix)), 3)


def test_products_are_counted() -> None:
    seen = []
    pairs = verified_pairs(rotated(SPECTRA["outliers"])[0], 4, advance=lambda steps=1, text="": seen.append(steps))
    assert sum(seen) == pairs.n_hvp


def test_an_eigenvalue_that_was_passed_over_is_found_as_precisely_as_the_others() -> None:
    operator = DiagonalOperator(torch.cat([torch.linspace(0, 0.5, 199), torch.tensor([0.51])]).double())
    both = extreme_pairs(operator, 2, "largest", tolerance=1e-9)
    second = replace(both, value=both.value[1:], residual=both.residual[1:], vector=both.vector[:, 1:])
    missed = _Found(operator, second, "largest", None).search(1, 1, 0, tolerance=1e-9, max_hvp=1000)
    assert missed.value[0] == pytest.approx(0.51)
    assert missed.residual[0] <= 1e-9 * 0.51

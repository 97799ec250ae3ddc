"""Operators from matrices of every kind, and random vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pnanalysis.errors import CurvatureError
from pnanalysis.spectra.linear_operator import (
    DiagonalOperator,
    LinearOperator,
    as_operator,
    checked_product,
)
from pnanalysis.spectra.random_vectors import random_unit_vectors
from tests.spectra.test_lanczos import symmetric


def test_start_vectors_depend_on_seed_and_index_alone():
    double, single = as_operator(torch.eye(40).double()), as_operator(torch.eye(40))
    vectors = random_unit_vectors(double, range(4), 7)
    assert torch.equal(vectors[:, 2:], random_unit_vectors(double, [2, 3], 7))
    torch.testing.assert_close(vectors.float(), random_unit_vectors(single, range(4), 7), rtol=3e-7, atol=0)
    assert not torch.equal(vectors, random_unit_vectors(double, range(4), 8))


def test_operators_of_every_kind_agree():
    from scipy.sparse import csr_matrix
    from scipy.sparse.linalg import aslinearoperator

    matrix = symmetric(20)
    vectors = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    array = matrix.numpy()
    for source in (matrix, array, csr_matrix(array), aslinearoperator(array)):
        operator = as_operator(source)
        assert isinstance(operator, LinearOperator)
        assert operator.shape == (20, 20)
        torch.testing.assert_close(operator.matmat(vectors), matrix @ vectors)
        torch.testing.assert_close(operator.matvec(vectors[:, 0]), matrix @ vectors[:, 0])
    diagonal = DiagonalOperator(matrix.diagonal())
    torch.testing.assert_close(diagonal.matmat(vectors), matrix.diagonal()[:, None] * vectors)
    assert as_operator(diagonal) is diagonal
    assert as_operator(np.diag([1, 2])).dtype == torch.float64


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((2, 3)), "square"),
        (np.zeros((0, 0)), "empty"),
        (np.zeros(4), "square"),
        (np.eye(2) * 1j, "complex"),
        ("matrix", "cannot make an operator of a str"),
        (np.eye(2, dtype=np.longdouble), "dtype float128, which torch lacks"),
        (DiagonalOperator(torch.ones(2, dtype=torch.complex64)), "dtype torch.complex64"),
        (DiagonalOperator(torch.ones(2, dtype=torch.int64)), "dtype torch.int64"),
    ],
)
def test_what_is_no_operator_is_refused(source, message):
    with pytest.raises(CurvatureError, match=message):
        as_operator(source)


@pytest.mark.parametrize(
    ("matmat", "message"),
    [
        (lambda V: V * 1j, "complex"),
        (lambda V: V.T, r"has the shape \(2, 20\)"),
        (lambda V: V.numpy(), "returns a ndarray"),
    ],
)
def test_what_is_no_product_is_refused(matmat, message):
    operator = DiagonalOperator(torch.ones(20))
    operator.matmat = matmat
    with pytest.raises(CurvatureError, match=message):
        checked_product(operator, torch.ones(20, 2))


def test_complex_products_of_an_operator_of_scipy_are_refused():
    from scipy.sparse.linalg import LinearOperator as ScipyLinearOperator

    operator = as_operator(ScipyLinearOperator((4, 4), matvec=lambda v: v * 1j, dtype=np.float64))
    with pytest.raises(CurvatureError, match="complex"):
        operator.matvec(torch.ones(4))


def test_vectors_outlive_a_product_in_place():
    operator = DiagonalOperator(torch.arange(1.0, 5))
    operator.matmat = lambda V: V.mul_(operator.eigenvalues[:, None])
    vectors = torch.ones(4, 2)
    assert torch.equal(checked_product(operator, vectors), operator.eigenvalues[:, None].expand(4, 2))
    assert torch.equal(vectors, torch.ones(4, 2))

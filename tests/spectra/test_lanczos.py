"""Lanczos against dense linear algebra in float64."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pnanalysis.errors import CurvatureError
from pnanalysis.spectra.density import spectral_density
from pnanalysis.spectra.lanczos import Lanczos, Saver
from pnanalysis.spectra.linear_operator import (
    DenseOperator,
    DiagonalOperator,
    as_operator,
    contiguous_columns,
    not_symmetric,
)
from pnanalysis.spectra.quadrature import ritz
from pnanalysis.spectra.random_vectors import random_unit_vectors

EPS = np.finfo(np.float64).eps
SINGLE = torch.finfo(torch.float32).eps


def symmetric(n: int, seed: int = 0) -> torch.Tensor:
    matrix = torch.from_numpy(np.random.default_rng(seed).standard_normal((n, n)))
    return (matrix + matrix.T) / 2


def run_on(matrix: torch.Tensor, n_steps: int, n_probes: int = 3, **options) -> Lanczos:
    operator = as_operator(matrix)
    return Lanczos(operator, random_unit_vectors(operator, range(n_probes), 0), n_steps, **options)


class Counting:
    """Counts products and hands out NaN, or stops, at a given one."""

    def __init__(self, matrix: torch.Tensor, nan_at: int = -1, stop_at: int = -1) -> None:
        self.inner, self.nan_at, self.stop_at, self.calls = as_operator(matrix), nan_at, stop_at, 0
        self.shape, self.device, self.dtype = self.inner.shape, self.inner.device, self.inner.dtype

    def matmat(self, V: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return self.inner.matmat(V) * (torch.nan if self.calls == self.nan_at else 1.0)

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return self.matmat(v[:, None])[:, 0]


def test_basis_is_orthonormal_and_tridiagonalises():
    matrix = symmetric(60)
    run = run_on(matrix, 40).extend(40)
    norm = torch.linalg.matrix_norm(matrix, 2)
    for basis, alpha, beta in zip(run.basis, run.alpha, run.beta, strict=True):
        # CGS2 keeps orthogonality to a modest multiple of roundoff
        assert torch.linalg.matrix_norm(basis.T @ basis - torch.eye(40)) < 100 * EPS
        tridiagonal = torch.diag(alpha) + torch.diag(beta[:-1], 1) + torch.diag(beta[:-1], -1)
        assert torch.linalg.matrix_norm(basis.T @ matrix @ basis - tridiagonal) < 1000 * EPS * norm


def test_probes_in_lockstep_equal_probes_alone():
    matrix = symmetric(50)
    operator = as_operator(matrix)
    together = run_on(matrix, 20).extend(20)
    for index in range(3):
        alone = Lanczos(operator, random_unit_vectors(operator, [index], 0), 20).extend(20)
        # the two differ by the order of summation, amplified by 20 steps
        torch.testing.assert_close(alone.alpha[0], together.alpha[index], rtol=1e-9, atol=1e-9)


def test_vectors_are_contiguous_columns():
    matrix = symmetric(30)
    given = []

    class Noting(DenseOperator):
        def matmat(self, V):
            given.append(V)
            return super().matmat(V)

    deflated = contiguous_columns(torch.linalg.eigh(matrix).eigenvectors[:, :4])
    start = random_unit_vectors(as_operator(matrix), range(3), 0)
    lanczos = Lanczos(Noting(matrix), start, 6, deflated).extend(5)
    ritz_vectors = lanczos.ritz_vectors(torch.eye(5)[:, :2])
    assert lanczos.basis.shape == (3, 30, 5)
    assert [tuple(V.shape) for V in (start, ritz_vectors, *given)] == [(30, 3), (30, 2), *[(30, 3)] * 5]
    for V in (start, ritz_vectors, *lanczos.basis, *given):
        assert V.T.is_contiguous()


def test_saved_vectors_are_rows(tmp_path):
    """As in all states that were ever saved: older ones can be resumed."""
    lanczos = run_on(symmetric(30), 6).extend(5)
    lanczos.save(tmp_path / "state.safetensors")
    saved = load_file(tmp_path / "state.safetensors")
    assert torch.equal(saved["basis"], lanczos.basis.mT)
    assert saved["next"].shape == (3, 30)


def test_full_run_finds_every_eigenvalue():
    matrix = symmetric(40)
    run = run_on(matrix, 40, 1).extend(40)
    value, weight, _ = ritz(run.alpha[0].numpy(), run.beta[0].numpy())
    np.testing.assert_allclose(value, np.linalg.eigvalsh(matrix.numpy()), atol=1000 * EPS * 10)
    assert weight.sum() == pytest.approx(1, abs=100 * EPS)


def test_residual_bound_holds_an_eigenvalue_for_every_ritz_value():
    matrix = symmetric(200)
    exact = np.linalg.eigvalsh(matrix.numpy())
    run = run_on(matrix, 30).extend(30)
    for alpha, beta in zip(run.alpha.numpy(), run.beta.numpy(), strict=True):
        value, _, residual = ritz(alpha, beta)
        nearest = np.abs(value[:, None] - exact).min(axis=1)
        assert (nearest <= residual + 100 * EPS * np.abs(exact).max()).all()
        assert residual.min() < 1e-3 * np.abs(exact).max() < residual.max() * 1e3


def test_ritz_vectors_have_the_stated_residuals():
    matrix = symmetric(80)
    run = run_on(matrix, 30, 2).extend(30)
    alpha, beta = run.alpha[1], run.beta[1]
    tridiagonal = torch.diag(alpha) + torch.diag(beta[:-1], 1) + torch.diag(beta[:-1], -1)
    value, coefficients = torch.linalg.eigh(tridiagonal)
    vectors = run.ritz_vectors(coefficients, probe=1)
    actual = torch.linalg.vector_norm(matrix @ vectors - value * vectors, dim=0)
    np.testing.assert_allclose(actual, ritz(alpha.numpy(), beta.numpy())[2], atol=1000 * EPS * 10)


@pytest.mark.parametrize(
    ("eigenvalues", "dimension"),
    [
        (np.zeros(30), 1),
        (np.full(30, 2.5), 1),
        (np.r_[np.zeros(27), 1.0, 2.0, 3.0], 4),
        (np.r_[np.full(15, -1.0), np.full(15, 4.0)], 2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_invariant_subspace_ends_the_run_with_exact_values(eigenvalues, dimension, dtype):
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((30, 30)))[0]
    matrix = torch.from_numpy((rotation * eigenvalues) @ rotation.T).to(dtype)
    run = run_on((matrix + matrix.T) / 2, 12).extend(12)
    assert run.sizes() == [dimension] * 3
    assert torch.isfinite(run.basis).all()
    value, weight, residual = ritz(run.alpha[0, :dimension].double().numpy(), run.beta[0, :dimension].double().numpy())
    np.testing.assert_allclose(value, np.unique(eigenvalues), atol=200 * torch.finfo(dtype).eps)
    assert weight.sum() == pytest.approx(1)
    assert not residual.any()


def test_deflated_run_stays_in_the_complement():
    matrix = symmetric(60)
    vectors = torch.linalg.eigh(matrix).eigenvectors[:, :20]
    run = run_on(matrix, 40, 2, deflated=vectors).extend(40)
    assert (run.basis.mT @ vectors).abs().max() < 100 * EPS
    value, _, _ = ritz(run.alpha[0].numpy(), run.beta[0].numpy())
    np.testing.assert_allclose(value, np.linalg.eigvalsh(matrix.numpy())[20:], atol=1e-11)


def test_float64_basis_for_a_float32_operator():
    matrix = symmetric(300)
    run = run_on(matrix.float(), 60, 1, dtype=torch.float64).extend(60)
    basis = run.basis[0]
    assert basis.dtype == torch.float64
    assert torch.linalg.matrix_norm(basis.T @ basis - torch.eye(60, dtype=basis.dtype)) < 100 * EPS
    value, _, _ = ritz(run.alpha[0].numpy(), run.beta[0].numpy())
    top = torch.linalg.eigvalsh(matrix)[-1].item()
    assert value[-1] == pytest.approx(top, rel=100 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("stop_at", [2, 9, 23])
def test_resumed_run_is_identical(tmp_path, stop_at):
    matrix = symmetric(50)
    whole = run_on(matrix, 24).extend(24)
    operator = Counting(matrix, stop_at=stop_at)
    killed = Lanczos(operator, random_unit_vectors(operator, range(3), 0), 24)
    saver = Saver(tmp_path / "state.safetensors", "this run", every=0)
    with pytest.raises(KeyboardInterrupt):
        killed.extend(24, saver=saver)
    again = saver.resume(run_on(matrix, 24))
    assert again.step == stop_at - 1
    again.extend(24 - again.step)
    assert torch.equal(again.alpha, whole.alpha)
    assert torch.equal(again.basis, whole.basis)
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


def test_foreign_state_is_refused(tmp_path):
    matrix = symmetric(50)
    path = tmp_path / "state.safetensors"
    run_on(matrix, 10).extend(5).save(path, "a")
    with pytest.raises(CurvatureError, match="not the saved state"):
        run_on(matrix, 10).restore(path, "b")
    with pytest.raises(CurvatureError, match="not the saved state"):
        run_on(matrix, 10, 2).restore(path, "a")
    with pytest.raises(CurvatureError, match="another operator"):
        run_on(matrix + torch.eye(50), 10).restore(path, "a")
    path.write_bytes(b"\x08rubbish")
    with pytest.raises(CurvatureError, match="not the saved state"):
        run_on(matrix, 10).restore(path, "a")


def test_a_flipped_bit_of_a_state_is_found(tmp_path):
    path = tmp_path / "state.safetensors"
    run_on(symmetric(50), 10).extend(5).save(path, "until {'trace': 0.1}")
    raw = path.read_bytes()
    for place in np.linspace(8, len(raw) - 1, 30).astype(int):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with pytest.raises(CurvatureError, match=r"damaged.*; delete it to start again$"):
            run_on(symmetric(50), 10).restore(path, "until {'trace': 0.1}")
    path.write_bytes(raw)
    assert run_on(symmetric(50), 10).restore(path, "until {'trace': 0.1}").step == 5


def test_asymmetry_is_reported_with_its_size():
    matrix = symmetric(100)
    matrix = matrix + 0.5 * torch.triu(matrix, 1)
    with pytest.raises(CurvatureError, match=r"not symmetric.*differ by \d+\.\d%"):
        run_on(matrix, 5).extend(5)
    assert run_on(symmetric(100), 5).extend(5).asymmetry() < 1e-12


@pytest.mark.parametrize("nan_at", [1, 4, 19])
def test_nan_in_a_product_is_reported(nan_at):
    operator = Counting(symmetric(60), nan_at=nan_at)
    run = Lanczos(operator, random_unit_vectors(operator, [0], 0), 40)
    with pytest.raises(CurvatureError, match="NaN or infinite"):
        run.extend(40)
    assert operator.calls <= nan_at + 16


@pytest.mark.parametrize(("capacity", "deflated"), [(0, None), (31, None), (26, torch.eye(30)[:, :5].double())])
def test_too_many_steps_are_refused(capacity, deflated):
    with pytest.raises(CurvatureError, match="between 1 and"):
        run_on(symmetric(30), capacity, deflated=deflated)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu():
    matrix = symmetric(200)
    cpu = run_on(matrix, 40).extend(40)
    cuda = run_on(matrix.cuda(), 40).extend(40)
    torch.testing.assert_close(cuda.alpha[:, :10].cpu(), cpu.alpha[:, :10], rtol=1e-9, atol=1e-9)
    host = run_on(matrix.cuda(), 40, device="cpu").extend(40)
    assert host.basis.device.type == "cpu"
    torch.testing.assert_close(host.alpha[:, :10], cpu.alpha[:, :10], rtol=1e-9, atol=1e-9)


def against_double(n_parameters: int, n_steps: int) -> tuple[float, float]:
    """Float32 Lanczos on a diagonal operator: largest relative error of alpha and beta, largest overlap of vectors."""
    generator = torch.Generator().manual_seed(0)
    eigenvalues = torch.rand(n_parameters, generator=generator)
    start = torch.randn(n_parameters, 1, generator=generator)
    single = Lanczos(DiagonalOperator(eigenvalues), start, n_steps).extend(n_steps)
    basis = single.basis[0]
    gram = sum(part.double().T @ part.double() for part in basis.split(2**18))
    found = single.alpha.double(), single.beta.double()
    del single, basis
    double = Lanczos(DiagonalOperator(eigenvalues.double()), start.double(), n_steps).extend(n_steps)
    errors = [float((a / b - 1).abs().max()) for a, b in zip(found, (double.alpha, double.beta), strict=True)]
    return max(errors), float((gram - torch.eye(n_steps, dtype=torch.float64)).abs().max())


def test_digits_do_not_depend_on_the_number_of_parameters():
    """Sums that round as torch's do in float32 are off by 4e-4 here."""
    error, overlap = against_double(4_000_000, 3)
    assert error < 5 * SINGLE
    assert overlap < 5 * SINGLE


@pytest.mark.slow
def test_digits_at_a_hundred_million_parameters():
    """Sums that round as torch's do in float32 are off by 2e-2 here."""
    error, overlap = against_double(100_000_000, 4)
    assert error < 5 * SINGLE
    assert overlap < 5 * SINGLE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_operator_has_a_basis_in_single(dtype):
    eigenvalues = torch.cat([torch.linspace(-1, 1, 299), torch.tensor([4.0])]).to(dtype)
    operator = DiagonalOperator(eigenvalues)
    run = Lanczos(operator, random_unit_vectors(operator, range(2), 0), 20).extend(20)
    assert run.basis.dtype == torch.float32
    assert run.sizes() == [20, 20]
    assert (run.basis.mT @ run.basis - torch.eye(20)).abs().max() < 10 * SINGLE
    # products round their vectors and themselves
    value, _, _ = ritz(run.alpha[0].double().numpy(), run.beta[0].double().numpy())
    assert value[-1] == pytest.approx(4, rel=torch.finfo(dtype).eps)


def test_half_precision_basis_is_refused():
    with pytest.raises(CurvatureError, match="basis_dtype is torch.bfloat16.*float32 or float64"):
        run_on(symmetric(30), 5, dtype=torch.bfloat16)


@pytest.mark.parametrize("in_place", [True, False])
def test_operators_may_return_the_vectors_they_were_given(in_place):
    eigenvalues = torch.linspace(1, 2, 60, dtype=torch.float64)

    class Reusing(DiagonalOperator):
        def matmat(self, V):
            return V.mul_(self.eigenvalues[:, None]) if in_place else V

    truth = eigenvalues if in_place else torch.ones_like(eigenvalues)
    start = random_unit_vectors(Reusing(eigenvalues), range(2), 0)
    reused = Lanczos(Reusing(eigenvalues), start, 6).extend(6)
    plain = Lanczos(DiagonalOperator(truth), start, 6).extend(6)
    torch.testing.assert_close(reused.alpha, plain.alpha)
    torch.testing.assert_close(reused.basis, plain.basis)


class Skewed(DiagonalOperator):
    """Products that are off by a small skew matrix."""

    def __init__(self, size: float, dtype: torch.dtype) -> None:
        super().__init__(torch.linspace(-1, 1, 400, dtype=dtype))
        self.size = size

    def matmat(self, V: torch.Tensor) -> torch.Tensor:
        return super().matmat(V) + self.size * (V.roll(1, 0) - V.roll(-1, 0)) / 2


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 0.5), (torch.float64, 1e-3)])
def test_matrices_that_are_not_symmetric_are_refused(dtype: torch.dtype, size: float) -> None:
    operator = Skewed(size, dtype)
    with pytest.raises(CurvatureError, match="not symmetric.*every product must use the same data"):
        spectral_density(operator, n_hvp=40, progress=False)
    operator.by_differences = True
    assert "finite differences are too coarse" in str(not_symmetric(operator, "of some kind"))


@pytest.mark.parametrize("by_differences", [True, False])
def test_differences_are_as_skew_as_their_own_error_says(by_differences: bool) -> None:
    operator = Skewed(1e-3, torch.float32)
    operator.by_differences, operator.round_off = by_differences, 1e-3
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spectral_density(operator, n_hvp=40, progress=False)
    assert any("not quite symmetric" in str(one.message) for one in caught) == (not by_differences)

"""Vectors of a search for eigenpairs: planned before the first product, as many as there is room for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pnanalysis as pn
from pnanalysis.errors import CurvatureError, PnError
from pnanalysis.spectra.linear_operator import DenseOperator, DiagonalOperator
from pnanalysis.spectra.pairs_plan import WORKING, PairsPlan, plan_pairs
from pnanalysis.spectra.restarted import extreme_pairs
from pnanalysis.spectra.verified_pairs import verified_pairs

P, K = 20_000, 6
UNIT = P * 8
TOP = np.array([3.0, 3.0, 4.0, 5.0, 6.0, 8.0])


def outliers(n: int = P, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.cat([torch.linspace(-1, 1, n - K, dtype=dtype), torch.from_numpy(TOP).to(dtype)])


class Untouched(DiagonalOperator):
    """An operator that must not be asked for a product."""

    def matmat(self, V: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a product was computed before the plan was checked")


@pytest.mark.parametrize(("bound", "n_vectors"), [(1000, 22), (36, 22), (30, 16), (26, 12), (24, 10)])
def test_all_pairs_are_found_within_any_bound(bound: int, n_vectors: int) -> None:
    op = DiagonalOperator(outliers())
    plan = plan_pairs(op, K, 1000, max_memory_bytes=bound * UNIT)
    assert plan.n_vectors == n_vectors
    assert plan.kept + WORKING <= bound
    pairs = verified_pairs(op, K, max_memory_bytes=bound * UNIT)
    assert pairs.complete
    assert pairs.converged.all()
    np.testing.assert_allclose(pairs.value, TOP[::-1], atol=1e-6)


def test_what_does_not_fit_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    op = Untouched(outliers())
    with pytest.raises(CurvatureError, match=r"6 eigenpairs of 20,000 parameters need 3.66 MiB \(24 vectors\)"):
        pn.eigenpairs(op, k=K, max_memory_bytes=22 * UNIT, progress=False)
    with pytest.raises(CurvatureError, match=r"need 2.59 MiB \(17 vectors\), the bound is 2.44 MiB: .*--memory"):
        extreme_pairs(op, K, max_memory_bytes=16 * UNIT)
    monkeypatch.setattr("pnanalysis.spectra.memory.free_bytes", lambda device: 30 * UNIT)
    for bound, limit in ((None, "2.75 MiB"), (10**12, "3.97 MiB")):  # 60 %, and 26 vectors: four are the operator's
        with pytest.raises(CurvatureError, match=f"the bound is {limit}: look for fewer pairs"):
            pn.eigenpairs(op, k=2 * K, max_memory_bytes=bound, progress=False)


def test_a_number_of_vectors_that_is_given_is_the_most() -> None:
    op = DiagonalOperator(outliers())
    assert plan_pairs(op, K, 1000, n_vectors=12).n_vectors == 12
    assert plan_pairs(op, K, 1000, n_vectors=100, max_memory_bytes=30 * UNIT) == PairsPlan(K, 16, 10)
    np.testing.assert_allclose(extreme_pairs(op, 2, n_vectors=40, max_memory_bytes=10 * UNIT).value, [8, 6], atol=1e-2)


def test_the_least_of_a_handful_of_parameters() -> None:
    assert verified_pairs(np.diag([1.0, 3.0, 2.0]), 3, max_memory_bytes=1000).value.round(6).tolist() == [3, 2, 1]


def test_halves_of_the_examples_and_classes_count() -> None:
    torch.manual_seed(0)
    net, data = nn.Linear(400, 10), (torch.randn(40, 400), torch.randint(10, (40,)))
    given = {"data": data, "loss": nn.functional.cross_entropy, "k": 3, "progress": False}
    unit = 4010 * 4
    with pytest.raises(CurvatureError, match=r"\(24 vectors, 6 of them over parts of the examples\), .*--data-error"):
        pn.eigenpairs(net, **given, max_memory_bytes=20 * unit)
    with pytest.raises(CurvatureError, match="the class structure of 10 classes and 4,010 parameters takes .*--no-cl"):
        pn.eigenpairs(net, **given, max_memory_bytes=24 * unit)
    ds = pn.eigenpairs(net, **given, max_memory_bytes=24 * unit, classes=False)
    expected = pn.eigenpairs(net, **given, classes=False)
    np.testing.assert_allclose(ds.value, expected.value, rtol=1e-4)
    np.testing.assert_allclose(ds.value_half, expected.value_half, rtol=2e-3)
    assert ds.attrs["basis_bytes"] == 24 * unit < expected.attrs["basis_bytes"]


def test_unfinished_work_goes_on_in_as_many_vectors(tmp_path: Path) -> None:
    class Stopping(DiagonalOperator):
        left = 40

        def matmat(self, V: torch.Tensor) -> torch.Tensor:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().matmat(V)

    given = {"k": K, "progress": False}
    uninterrupted = pn.eigenpairs(DiagonalOperator(outliers()), **given, max_memory_bytes=26 * UNIT)
    with pytest.raises(KeyboardInterrupt):
        pn.eigenpairs(Stopping(outliers()), **given, max_memory_bytes=26 * UNIT, state=tmp_path)
    resumed = pn.eigenpairs(DiagonalOperator(outliers()), **given, state=tmp_path)
    assert resumed.drop_attrs().identical(uninterrupted.drop_attrs())
    assert resumed.attrs["n_vectors"] == uninterrupted.attrs["n_vectors"] == 12


def test_a_disk_too_small_for_unfinished_work_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, n_bytes: int, what: str, advice: str) -> None:
        raise PnError(f"{n_bytes / UNIT} vectors")

    monkeypatch.setattr("pnanalysis.analyses.network_eigenpairs.check_room", full)
    with pytest.raises(PnError, match="34.0 vectors"):  # the basis, and the pairs twice
        pn.eigenpairs(DiagonalOperator(outliers()), k=K, state=tmp_path, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(("bound", "which"), [(None, "largest"), (20, "smallest")])
def test_ten_million_eigenvalues(bound: int | None, which: str) -> None:
    """Outliers beyond a uniform bulk, one of them twice, in float32."""
    n, top = 10_000_000, [8.0, 6.0, 6.0, 5.0]
    values = torch.linspace(-1, 1, n)
    values[torch.tensor([17, 5_000_001, 7_654_321, n - 1])] = torch.tensor(top)
    op = DiagonalOperator(values if which == "largest" else -values)
    pairs = verified_pairs(op, 4, which, max_memory_bytes=None if bound is None else 4 * n * bound)
    assert pairs.complete
    assert pairs.converged.all()
    np.testing.assert_allclose(np.abs(pairs.value), top, rtol=1e-5)
    assert (np.abs(np.abs(pairs.value) - top) <= pairs.bound).all()
    assert float(pairs.vector[17, 0].abs()) == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dense_matrix_of_four_thousand(dtype: torch.dtype) -> None:
    """A sample covariance and a few more directions, against all of its eigenvalues in float64."""
    rng = np.random.default_rng(0)
    factor = rng.standard_normal((4000, 8000)) / np.sqrt(8000)
    spikes = np.linalg.qr(rng.standard_normal((4000, 5)))[0] * np.sqrt([40.0, 20, 10, 8, 6])
    matrix = factor @ factor.T + spikes @ spikes.T
    expected = np.linalg.eigvalsh(matrix)[::-1]
    unit = 4000 * dtype.itemsize
    op = DenseOperator(torch.from_numpy(matrix).to(dtype))
    for bound in (23, 1000):
        pairs = verified_pairs(op, 5, max_memory_bytes=bound * unit, tolerance=1e-5)
        assert pairs.complete
        np.testing.assert_allclose(pairs.value, expected[:5], rtol=2e-6 if dtype == torch.float32 else 1e-9)
        assert (np.abs(pairs.value - expected[:5]) <= pairs.bound).all()

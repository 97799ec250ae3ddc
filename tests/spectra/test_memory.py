"""Memory for Lanczos bases: counted, bounded, and kept in several ways, all of which give the same spectrum."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

import pnanalysis as pn
from pnanalysis.errors import CurvatureError, PnError
from pnanalysis.spectra.ghosts import without_ghosts
from pnanalysis.spectra.lanczos import Lanczos
from pnanalysis.spectra.linear_operator import DenseOperator, DiagonalOperator
from pnanalysis.spectra.memory import MODES, Storage, probes_at_once, vectors_at_once
from pnanalysis.spectra.quadrature import ritz
from pnanalysis.spectra.random_vectors import random_unit_vectors

CPU = torch.device("cpu")


def test_memory_bound_groups_probes_or_refuses() -> None:
    unit = 1000 * 8
    storage = Storage(torch.float64, CPU)
    assert storage.needed(1000, 20, 3, 5) == (24 * 3 + 5) * unit
    sizes = (storage, 1000, 20, 9)
    assert probes_at_once(*sizes, n_deflated=5, max_memory_bytes=(2 * 24 + 5) * unit) == 2
    assert probes_at_once(*sizes) == 9
    with pytest.raises(
        CurvatureError, match=r"needs 188 KiB, the bound is 187 KiB: lower n_lanczos.*--basis half or --basis disk"
    ):
        probes_at_once(*sizes, max_memory_bytes=24 * unit - 1000)


def test_memory_of_other_ways_to_keep_a_basis() -> None:
    half, disk, none = (Storage(torch.float32, CPU, mode) for mode in ("half", "disk", "none"))
    assert half.needed(1000, 20, 1) == 20 * 2000 + 4 * 4000
    assert disk.needed(1000, 20, 2, 7) == 2 * 4 * 4000
    assert none.needed(1000, 20, 2) == 2 * 5 * 4000
    assert half.columns(10, 3).dtype == torch.float16


def decaying(n: int = 4000) -> np.ndarray:
    """Ten outliers above a bulk that reaches below zero."""
    rng = np.random.default_rng(0)
    return np.r_[rng.standard_normal(n - 10) * 0.1, np.geomspace(2, 30, 10)]


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("options", [{"n_hvp": 120}, {"n_lanczos": 40, "n_probes": 3}])
def test_every_way_gives_the_spectrum(mode: str, options: dict[str, int]) -> None:
    eigenvalues = decaying()
    op = DiagonalOperator(torch.from_numpy(eigenvalues).float())
    plain = {"deflate": False} if mode == "none" else {}
    expected = pn.spectral_density(op, **options, **plain, basis="memory", progress=False)
    found = pn.spectral_density(op, **options, basis=mode, progress=False)
    assert found.attrs["basis"] == mode
    assert found.attrs["deflate"] == expected.attrs["deflate"] == (mode != "none")
    # what is rounded to float16 moves eigenvalues by far less than probes scatter
    tolerance = {"half": 1e-3, "disk": 0.0, "none": 1e-3}[mode]
    scale = float(expected.lambda_max)
    for name in ("trace", "frobenius_norm", "lambda_max", "lambda_min"):
        assert abs(float(found[name]) - float(expected[name])) <= tolerance * scale, name
    assert float(found.lambda_max) == pytest.approx(30, rel=1e-3)
    if mode != "none":  # where plain probes see a gap is a matter of chance
        assert int(found.n_outliers) == int(expected.n_outliers)
    distance = wasserstein_distance(found.node, expected.node, found.weight, expected.weight)
    assert distance <= 2 * tolerance * scale


@cache
def rotated(n: int) -> DenseOperator:
    """A dense matrix with these eigenvalues: two reflections of the diagonal one, which round off in float64 only."""
    matrix = torch.diag(torch.from_numpy(decaying(n)))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        v = torch.randn(n, 1, dtype=torch.float64, generator=generator)
        v /= v.norm()
        w = 2 * matrix @ v
        w -= v * (v.T @ w)
        matrix -= w @ v.T + v @ w.T
    return DenseOperator(matrix.float())


@pytest.mark.parametrize("mode", MODES)
def test_every_way_agrees_with_the_eigenvalues(mode: str) -> None:
    n = 4000
    eigenvalues = decaying(n)
    ds = pn.spectral_density(rotated(n), n_hvp=120, basis=mode, progress=False)
    assert abs(float(ds.trace) - eigenvalues.sum()) <= 4 * float(ds.trace_se)
    assert abs(float(ds.frobenius_norm) - np.linalg.norm(eigenvalues)) <= 4 * float(ds.frobenius_norm_se)
    for name, true in (("lambda_max", eigenvalues.max()), ("lambda_min", eigenvalues.min())):
        assert float(ds[f"{name}_low"]) <= true <= float(ds[f"{name}_high"]), name
    # the largest has converged, up to what rounding of products and of kept vectors changes
    slack = ds.attrs["round_off"] * 30
    assert abs(float(ds.lambda_max) - 30) <= slack
    assert slack <= 30 * {"half": 1e-3}.get(mode, 1e-6)
    # nodes lie closer than a twentieth of the bulk's width apart; what outliers weigh is as uncertain as the trace
    distance = wasserstein_distance(ds.node, eigenvalues, ds.weight)
    assert distance <= 0.7 / 20 / 2 + 4 * float(ds.trace_se) / n


@pytest.mark.parametrize("seed", [0, 1])
def test_the_error_of_a_basis_in_half_precision_is_measured(seed: int) -> None:
    """Against the same steps with a basis in float64: within what is stated, and not far below it."""
    eigenvalues = torch.from_numpy(decaying(1000))
    sparse, spread = DiagonalOperator(eigenvalues.float()), rotated(1000)
    options: dict[str, Any] = {"n_lanczos": 30, "n_probes": 2, "seed": seed, "progress": False}
    for op in (sparse, spread):
        exact = pn.spectral_density(op, **options, basis_dtype=torch.float64, basis="memory")
        ds = pn.spectral_density(op, **options, basis="half")
        off = np.abs(np.sort(ds.ritz_value.values[0]) - np.sort(exact.ritz_value.values[0])).max() / 30
        assert off <= ds.attrs["basis_round_off"] <= min(100 * off, 1e-3)
        assert "basis_round_off" not in exact.attrs


def test_coefficients_are_kept_in_double_precision() -> None:
    """Sums in float64 are not rounded to the precision of the vectors."""
    op = DiagonalOperator(torch.linspace(-1, 1, 3000))
    alpha, beta = Lanczos(op, random_unit_vectors(op, [1], 0), 5).extend(5).coefficients()
    for found in (alpha, beta):
        assert (found != found.astype(np.float32)).all()


@pytest.mark.parametrize("mode", ["half", "disk"])
def test_an_interrupted_spectrum_goes_on_in_the_same_way(mode: str, tmp_path: Path) -> None:
    class Stopping(DiagonalOperator):
        left = 50

        def matmat(self, V: torch.Tensor) -> torch.Tensor:
            self.left -= V.shape[1]
            if self.left < 0:
                raise KeyboardInterrupt
            return super().matmat(V)

    values = torch.from_numpy(decaying()).float()
    options = {"n_hvp": 80, "basis": mode, "progress": False}
    expected = pn.spectral_density(DiagonalOperator(values), **options)
    with pytest.raises(KeyboardInterrupt):
        pn.spectral_density(Stopping(values), **options, state=tmp_path / "state", save_every=0.0)
    resumed = pn.spectral_density(DiagonalOperator(values), **options, state=tmp_path / "state")
    assert np.array_equal(resumed.node, expected.node)
    assert not list(tmp_path.rglob(".basis-*"))


def test_without_reorthogonalisation_ghosts_appear_and_are_merged() -> None:
    eigenvalues = decaying(2000)
    op = DiagonalOperator(torch.from_numpy(eigenvalues).float())
    start = random_unit_vectors(op, [1], 0)
    full = Lanczos(op, start, 120).extend(120)
    short = Lanczos(op, start, 120, reorthogonalise=False).extend(120)
    alpha, beta = (part[0] for part in short.coefficients())
    value, _, _ = ritz(alpha, beta)
    largest = np.sort(value)[::-1]
    assert largest[0] - largest[1] < 1e-4  # 30 is there twice
    merged = without_ghosts(alpha, beta, 1e-6)
    value, weight, residual = ritz(*merged)
    np.testing.assert_allclose(np.sort(value)[:-11:-1], np.sort(eigenvalues)[:-11:-1], rtol=1e-4)
    assert len(value) < 120
    assert residual[-1] < 1e-2
    exact_value, exact_weight, _ = ritz(*(part[0] for part in full.coefficients()))
    assert wasserstein_distance(value, exact_value, weight, exact_weight) < 1e-3 * 30
    # moments are those of the start vector
    assert weight @ value == pytest.approx(float(alpha[0]), rel=1e-5)


@pytest.mark.parametrize("n_steps", [60, *(pytest.param(n, marks=pytest.mark.slow) for n in (40, 90))])
def test_copies_that_share_an_eigenvector_are_merged(n_steps: int) -> None:
    """Each of them has a large residual, and they lie within round-off of one another."""
    spikes = [3.0, 4.0, 6.0, 8.0, 10.0]
    eigenvalues = np.r_[np.linspace(-1, 1, 300_000), spikes].astype(np.float32)
    for seed in range(3):
        ds = pn.spectral_density(
            DiagonalOperator(torch.from_numpy(eigenvalues)), n_lanczos=n_steps, n_probes=1, basis="none", seed=seed,
            progress=False,
        )  # fmt: skip
        ritz_value = ds.ritz_value.values[0]
        np.testing.assert_allclose(np.sort(ritz_value[ritz_value > 1.5]), spikes, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_ten_million_eigenvalues(mode: str) -> None:
    """A semicircle and five outliers, whose sums, ends and number are found in every way to keep the basis."""
    n, x = 10_000_000, np.linspace(-1, 1, 200_001)
    cumulative = 0.5 + (x * np.sqrt(1 - x * x) + np.arcsin(x)) / np.pi
    bulk = np.interp((np.arange(n - 5) + 0.5) / (n - 5), cumulative, x)
    eigenvalues = np.r_[bulk, 3.0, 4.0, 6.0, 8.0, 10.0].astype(np.float32)
    ds = pn.spectral_density(DiagonalOperator(torch.from_numpy(eigenvalues)), n_hvp=60, basis=mode, progress=False)
    double = eigenvalues.astype(np.float64)
    assert abs(float(ds.trace) - double.sum()) < 4 * float(ds.trace_se)
    assert abs(float(ds.frobenius_norm) - np.linalg.norm(double)) < 4 * float(ds.frobenius_norm_se)
    assert float(ds.lambda_max_low) <= 10 <= float(ds.lambda_max_high)
    assert int(ds.n_outliers) == 5
    # nodes of a probe of m steps lie about 2 / m apart
    assert wasserstein_distance(ds.node, double[::1000], ds.weight) < 2 / 40


@pytest.mark.parametrize("mode", ["half", "none"])
def test_a_bulk_far_below_the_outliers_stays_a_bulk(mode: str) -> None:
    rng = np.random.default_rng(0)
    eigenvalues = np.r_[rng.uniform(0, 0.2, 19_990), np.linspace(200, 1000, 10)]
    op = DiagonalOperator(torch.from_numpy(eigenvalues).float())
    ds = pn.spectral_density(op, n_hvp=200, basis=mode, ridge=0.01, progress=False)
    true = float((eigenvalues / (eigenvalues + 0.01)).sum())
    assert abs(float(ds.effective_dimension) - true) < 3 * float(ds.effective_dimension_se)
    bulk = ds.node < 1
    assert float(ds.weight[bulk] @ ds.node[bulk]) == pytest.approx(0.1, rel=0.02)
    assert int(bulk.sum()) > 30


def test_half_precision_of_a_basis_is_no_asymmetry_of_the_operator() -> None:
    op = DiagonalOperator(torch.from_numpy(decaying()))  # float64, whose products are symmetric to 1e-6
    assert int(pn.spectral_density(op, n_hvp=60, basis="half", progress=False).n_outliers) == 10


def test_a_matrix_without_ghosts_is_left_alone() -> None:
    alpha, beta = np.array([1.0, 2.0, 3.0]), np.array([0.5, 0.4, 0.3])
    assert without_ghosts(alpha, beta, 1e-6)[0] is alpha


def test_a_basis_that_is_not_kept_cannot_be_read() -> None:
    lanczos = Lanczos(DiagonalOperator(torch.ones(10)), torch.ones(10, 1), 5, reorthogonalise=False)
    with pytest.raises(CurvatureError, match="no basis is kept"):
        _ = lanczos.basis


def test_the_first_way_that_fits_is_taken() -> None:
    op = DiagonalOperator(torch.from_numpy(decaying()).float())
    for mode, bound in (("memory", 200 * 16000), ("half", 48 * 16000), ("disk", 10 * 16000)):
        ds = pn.spectral_density(op, n_hvp=200, max_memory_bytes=bound, progress=False)
        assert ds.attrs["basis"] == mode
    with pytest.raises(CurvatureError, match="needs"):
        pn.spectral_density(op, n_hvp=200, basis="memory", max_memory_bytes=10 * 16000, progress=False)


def test_no_room_at_all_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, n_bytes: int, what: str, advice: str) -> None:
        raise PnError("the disk is full")

    monkeypatch.setattr("pnanalysis.spectra.plan.check_room", full)
    op = DiagonalOperator(torch.from_numpy(decaying()).float())
    with pytest.warns(UserWarning, match="none is kept and nothing is deflated"):
        ds = pn.spectral_density(op, n_hvp=200, max_memory_bytes=10 * 16000, progress=False)
    assert ds.attrs["basis"] == "none"


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="files are not reserved on this system")
def test_a_full_disk_is_found_before_a_basis_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing into a mapped file without blocks of its own would end in a bus error."""

    def full(handle: int, offset: int, length: int) -> None:
        assert (offset, length) == (0, 4 * 1000 * 8)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CurvatureError, match="no room for a basis on the disk .*No space left.*another folder"):
        Storage(torch.float64, CPU, "disk", tmp_path).columns(1000, 4)
    assert not list(tmp_path.iterdir())


def test_a_basis_on_the_disk_needs_host_memory() -> None:
    op = DiagonalOperator(torch.ones(20, device="meta"))
    with pytest.raises(CurvatureError, match="basis_device='cpu'"):
        pn.spectral_density(op, n_hvp=10, basis="disk", progress=False)


PEAK = """
import json, re, sys, threading, time, torch
import pnanalysis as pn
from pnanalysis.spectra import density, pairs_plan, plan, verified_pairs
from pnanalysis.spectra.linear_operator import DiagonalOperator

def anonymous():
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))

peak, said, over = 0, [], threading.Event()

def watch():
    global peak
    while not over.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.001)

def noted(*arguments):
    work = plan.planned_work(*arguments)
    said.append(work.peak)
    return work

density.planned_work = noted
n, k = 4_000_000, 5
values = torch.linspace(0, 1, n)
values[:k] = torch.arange(k) + 2.0
op = DiagonalOperator(values)
pn.spectral_density(DiagonalOperator(torch.ones(50)), n_hvp=20, progress=False)
before = anonymous()
watching = threading.Thread(target=watch)
watching.start()
if sys.argv[1] == "pairs":
    plan = pairs_plan.plan_pairs(op, k, 1000, max_memory_bytes=4 * n * int(sys.argv[2]))
    said.append(4 * n * (plan.kept + pairs_plan.WORKING))
    assert verified_pairs.verified_pairs(op, k, plan=plan).complete
else:
    pn.spectral_density(op, n_hvp=int(sys.argv[2]), basis=sys.argv[1], progress=False)
over.set()
watching.join()
print(json.dumps({"vectors": (peak - before) / (4 * n), "said": said[-1] / (4 * n)}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("mode", "n_hvp", "n_vectors"),
    [
        pytest.param("memory", 20, 20 + 4, marks=pytest.mark.slow),
        pytest.param("half", 20, 10 + 4, marks=pytest.mark.slow),
        pytest.param("disk", 30, 4, marks=pytest.mark.slow),
        pytest.param("none", 20, 2 + 3, marks=pytest.mark.slow),
    ],
)
def test_peak_memory_is_what_was_said_at_four_million_parameters(mode: str, n_hvp: int, n_vectors: int) -> None:
    found = peak(mode, n_hvp)
    assert found["said"] == pytest.approx(n_vectors + 2**20 / 4e6)  # and pieces of vectors
    assert found["vectors"] == pytest.approx(found["said"], rel=0.1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("bound", "n_vectors"), [(1000, 2 * 5 + 20 + 8), (24, 24)])
def test_peak_memory_of_eigenpairs_is_what_was_said_at_four_million_parameters(bound: int, n_vectors: int) -> None:
    found = peak("pairs", bound)
    assert found["said"] == n_vectors
    assert found["vectors"] == pytest.approx(n_vectors, rel=0.1)


def peak(mode: str, number: int) -> dict[str, float]:
    """Vectors that a process takes, and as many as were said."""
    # arrays of a megabyte and more are given back at once, so that the peak is that of what is in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, mode, str(number)], capture_output=True, text=True, check=True, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("bound", "n"), [(4, 0), (5, 1), (20, 10)])
def test_single_vectors_leave_room_to_work_with(bound: int, n: int) -> None:
    unit = 1000 * 4
    found = [vectors_at_once(Storage(torch.float32, CPU), 1000, 10, bound * unit + spare) for spare in (0, 999)]
    assert found == [n, n]

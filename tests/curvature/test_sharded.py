"""An operator whose vectors several processes divide among them, against one process."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch.nn.functional import cross_entropy

import pnanalysis as pn
from pnanalysis.curvature.distributed import DistributedOperator, OwnExamples, ShardedOperator
from pnanalysis.errors import CurvatureError, Indivisible
from pnanalysis.spectra.finished import saved_or_computed
from pnanalysis.spectra.lanczos import Lanczos, Saver
from pnanalysis.spectra.lanczos_state import save_state
from pnanalysis.spectra.random_vectors import random_unit_vectors
from pnanalysis.spectra.restarted import extreme_pairs
from pnanalysis.spectra.sharing import part_of
from pnanalysis.spectra.trace import trace_estimate
from pnanalysis.spectra.verified_pairs import verified_pairs
from tests.curvature.conftest import NETWORKS, images, relative
from tests.processes import Workers

SIZES = (13, 7, 2)  # no number of processes divides them
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
#: Budgets that are spent on deflation and probes in turn, in lockstep, without deflation, and on bases kept otherwise.
PLANS: dict[str, dict[str, Any]] = {
    "in turn": {"n_hvp": 40},
    "lockstep": {"n_lanczos": 8, "n_probes": 3, "data_error": "none"},
    "plain": {"n_lanczos": 8, "n_probes": 3, "deflate": False},
    "no basis": {"n_lanczos": 8, "n_probes": 2, "basis": "none"},
    "disk": {"n_hvp": 30, "basis": "disk", "data_error": "none"},
}
NAMES = ("trace", "trace_se", "frobenius_norm", "lambda_max", "lambda_min", "trace_data_se")


def make_operator(dtype: torch.dtype, shares: bool = True, kind: Any = ShardedOperator, **options: Any) -> Any:
    batches = OwnExamples(images(SIZES)) if shares else images(SIZES)
    options = {"weight_decay": 0.1, "expected_products": 1, **options}
    local = pn.HessianOperator(NETWORKS["conv"](), cross_entropy, batches, dtype=dtype, is_part=shares, **options)
    return kind(local) if shares else local


def numbers(ds: xr.Dataset) -> dict[str, np.ndarray]:
    return {name: ds[name].values for name in (*NAMES, "node", "weight", "ritz_value") if name in ds}


#: What is computed in each number of processes, for starting many of them takes long enough.
CHOSEN = {1: ["in turn"], 2: ["plain", "no basis"], 3: ["in turn", "lockstep", "disk"], 4: ["in turn"]}


def found_by(op: Any, chosen: list[str], all_else: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"plans": {name: spectrum(op, name) for name in chosen}}
    return found | (numbers_but_spectra(op) if all_else else {})


def spectrum(op: Any, plan: str) -> dict[str, np.ndarray]:
    return numbers(pn.spectral_density(op, **PLANS[plan], progress=False))


def numbers_but_spectra(op: Any) -> dict[str, Any]:
    pairs = extreme_pairs(op, k=2, n_vectors=8, tolerance=1e-9)
    return {
        "exact": numbers(pn.spectral_density(op, n_hvp=op.shape[0], progress=False)),
        "pairs": pairs.value,
        "trace": trace_estimate(op, "hutchinson", n_hvp=12).value,
        "dense": op.to_dense(),
    }


def _spectra(kind: Any) -> tuple[dict[torch.dtype, Any], int, int]:
    n = torch.distributed.get_world_size()
    found = {
        torch.float32: found_by(make_operator(torch.float32, kind=kind), CHOSEN[n], False),
        torch.float64: found_by(make_operator(torch.float64, kind=kind), CHOSEN[n], n == 3),
    }
    op = make_operator(torch.float64, kind=kind)
    return found, op.matmat(random_unit_vectors(op, [3], 0)).numel(), part_of(op).length


def assert_equal(found: Any, expected: Any, tolerance: float, name: str = "") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), name
        for key in found:
            assert_equal(found[key], expected[key], tolerance, f"{name} {key}")
    else:
        expected = np.asarray(expected)
        scale = np.nanmax(np.abs(expected))
        np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=tolerance * scale, err_msg=name)


@cache
def alone(dtype: torch.dtype, what: str) -> dict[str, Any]:
    """In this process, which has all examples and whole vectors: the spectrum of a plan, or all else."""
    op = make_operator(dtype, shares=False)
    return spectrum(op, what) if what in PLANS else numbers_but_spectra(op)


@pytest.mark.parametrize(
    ("n", "kind"),
    [
        (1, ShardedOperator),
        *(
            pytest.param(n, kind, marks=pytest.mark.slow)
            for kind in (DistributedOperator, ShardedOperator)
            for n in (1, 2, 3, 4)
            if (n, kind) != (1, ShardedOperator)
        ),
    ],
)
def test_processes_agree_with_one(workers: Workers, n: int, kind: Any) -> None:
    answers = workers.run(n, _spectra, kind)
    n_parameters = make_operator(torch.float64, shares=False).shape[0]
    assert n == 1 or n_parameters % n or n == 2
    for found, n_entries, length in answers:
        assert n_entries == length <= (-(-n_parameters // n) if kind is ShardedOperator else n_parameters)
        assert set(found[torch.float64]["plans"]) == set(CHOSEN[n])
        for dtype, tolerance in TOLERANCE.items():
            expected = {"plans": {plan: alone(dtype, plan) for plan in CHOSEN[n]}}
            if n == 3 and dtype is torch.float64:
                expected |= alone(dtype, "all else")
            assert_equal(found[dtype], expected, tolerance, f"{n} {dtype}")
    assert sum(length for *_, length in answers) == n_parameters * (1 if kind is ShardedOperator else n)


def _saved_apart(folder: Path, reorthogonalise: bool) -> None:
    """The first process is interrupted one step, or three, before the second."""
    lanczos = _lanczos(make_operator(torch.float64), reorthogonalise).extend(10)
    if torch.distributed.get_rank() == 0:
        save_state(lanczos, folder / "state.safetensors", "apart", alone=True)
    lanczos.extend(3 if reorthogonalise else 1)
    if torch.distributed.get_rank() == 1:
        save_state(lanczos, folder / "state.safetensors", "apart", alone=True)


def _gone_on(folder: Path, reorthogonalise: bool) -> tuple[int, np.ndarray]:
    saver = Saver(folder / "state.safetensors", "apart", every=1e6)
    lanczos = saver.resume(_lanczos(make_operator(torch.float64), reorthogonalise))
    step = lanczos.step
    lanczos.extend(20 - step, saver=saver)
    saver(lanczos, force=True)
    saver(lanczos, force=True)  # the files of other numbers of processes go once all of these are there
    return step, lanczos.coefficients()[0]


def _lanczos(op: Any, reorthogonalise: bool) -> Lanczos:
    return Lanczos(op, random_unit_vectors(op, [0, 1], 0), 24, reorthogonalise=reorthogonalise)


@pytest.mark.parametrize("reorthogonalise", [pytest.param(True, marks=pytest.mark.slow), False])
def test_what_processes_have_saved_goes_on_in_other_numbers_of_them(
    workers: Workers, tmp_path: Path, reorthogonalise: bool
) -> None:
    workers.run(2, _saved_apart, tmp_path, reorthogonalise)
    answers = workers.run(3, _gone_on, tmp_path, reorthogonalise)
    whole = _lanczos(make_operator(torch.float64, shares=False), reorthogonalise).extend(20)
    for step, alpha in answers:
        assert step == 10
        np.testing.assert_allclose(alpha, whole.alpha, rtol=1e-9)
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"state.{i}-of-3.safetensors" for i in range(3)]
    alone = _lanczos(make_operator(torch.float64, shares=False), reorthogonalise)
    alone.restore(tmp_path / "state.safetensors", "apart")
    assert alone.step == 20
    torch.testing.assert_close(alone.following, whole.following, rtol=0, atol=1e-9)
    with pytest.raises(CurvatureError, match="not the saved state"):
        alone.restore(tmp_path / "state.safetensors", "another")
    (tmp_path / "state.1-of-3.safetensors").unlink()  # then what is left is no state
    again = _lanczos(make_operator(torch.float64, shares=False), reorthogonalise)
    assert again.restore(tmp_path / "state.safetensors", "apart").step == 0


def _by_differences(n_examples: int) -> dict[str, Any]:
    model, data = NETWORKS["tanh"](), images((n_examples, 3))
    found: dict[str, Any] = {}
    for kind in (DistributedOperator, ShardedOperator):
        local = pn.HessianOperator(
            model, cross_entropy, OwnExamples(data), method="finite_difference", weight_decay=0.1, is_part=True
        )
        op = kind(local)
        found[kind.__name__] = op.to_dense(), op.round_off, local.differences.step
    exact = DistributedOperator(pn.HessianOperator(model, cross_entropy, OwnExamples(data), expected_products=1))
    return found | {"n": exact.n_examples, "weights": exact.group_weights, "exact": exact.to_dense()}


@pytest.mark.parametrize(
    ("n", "n_examples"), [pytest.param(2, 8, marks=pytest.mark.slow), pytest.param(3, 1, marks=pytest.mark.slow)]
)  # of three, one has no examples
def test_finite_differences_are_those_of_all_data(workers: Workers, n: int, n_examples: int) -> None:
    model, data = NETWORKS["tanh"](), images((n_examples, 3))
    whole = pn.HessianOperator(model, cross_entropy, data, method="finite_difference", weight_decay=0.1)
    dense = pn.HessianOperator(model, cross_entropy, data, weight_decay=0.1).to_dense()
    answers = workers.run(n, _by_differences, n_examples)
    for found in answers:
        for kind in ("DistributedOperator", "ShardedOperator"):
            product, round_off, step = found[kind]
            assert relative(product, dense) < 1e-7
            assert round_off == answers[0][kind][1] < 1e-7
            # the first process has fewer examples to choose it on
            assert 1 / 4 <= step / whole.differences.step <= 4
            assert step == answers[0][kind][2]
        assert found["n"] == n_examples + 3
        assert found["weights"].sum() == pytest.approx(1)
        assert len(found["weights"]) == n_examples + 3
        assert relative(found["exact"], dense - 0.1 * torch.eye(len(dense)).double()) < 1e-10


def _refused(folder: Path) -> str:
    op = make_operator(torch.float64)
    without_basis = 8 * (3 * op.part.largest + 3 * op.shape[0])
    with pytest.raises(CurvatureError) as memory:
        pn.spectral_density(op, n_hvp=40, basis="memory", max_memory_bytes=without_basis, progress=False)
    rank = torch.distributed.get_rank()
    with pytest.raises(CurvatureError, match="whole vectors"):
        verified_pairs(op, 1)
    with pytest.raises(CurvatureError) as raised:
        op.processes.by_all(lambda: op.operator.subset([0], 10**6) if rank == 1 else None)
    assert type(raised.value) is Indivisible
    ds = pn.spectral_density(op, n_hvp=8, progress=False, data_error="none")
    computed = saved_or_computed(folder / "x.nc", op, lambda state: ds.assign_attrs(rank=rank))
    again = saved_or_computed(folder / "x.nc", op, lambda state: ds.assign_attrs(rank=-1))
    assert computed.attrs["rank"] == rank
    assert again.attrs["rank"] == 0  # what the first process has saved counts
    return str(memory.value)


def test_what_one_process_refuses_or_has_saved_counts_for_all(workers: Workers, tmp_path: Path) -> None:
    first, second = workers.run(2, _refused, tmp_path)
    assert "process 0: one probe" in first
    assert first == second

"""An operator whose vectors several processes divide among them, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch.nn.functional import cross_entropy

import pnanalysis as pn
from pnanalysis.curvature.distributed import DistributedOperator, OwnExamples, ShardedOperator
from pnanalysis.spectra.finished import saved_or_computed
from pnanalysis.spectra.lanczos import Lanczos
from pnanalysis.spectra.linear_operator import DiagonalOperator
from pnanalysis.spectra.random_vectors import random_unit_vectors
from pnanalysis.spectra.restarted import extreme_pairs
from pnanalysis.spectra.trace import trace_estimate
from tests.curvature.conftest import NETWORKS, images
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


def make_operator(dtype: torch.dtype, shares: bool = True, **options: Any) -> Any:
    batches = OwnExamples(images(SIZES)) if shares else images(SIZES)
    options = {"weight_decay": 0.1, "expected_products": 1, **options}
    local = pn.HessianOperator(NETWORKS["conv"](), cross_entropy, batches, dtype=dtype, is_part=shares, **options)
    return ShardedOperator(local) if shares else local


def numbers(ds: xr.Dataset) -> dict[str, np.ndarray]:
    return {name: ds[name].values for name in (*NAMES, "node", "weight", "ritz_value") if name in ds}


def found_by(op: Any) -> dict[str, Any]:
    chosen = ["in turn"] if op.dtype == torch.float32 else list(PLANS)
    plans = {name: numbers(pn.spectral_density(op, **PLANS[name], progress=False)) for name in chosen}
    if op.dtype == torch.float32:
        return {"plans": plans}
    pairs = extreme_pairs(op, k=2, n_vectors=8, tolerance=1e-9)
    return {
        "plans": plans,
        "exact": numbers(pn.spectral_density(op, n_hvp=op.shape[0], progress=False)),
        "pairs": pairs.value,
        "trace": trace_estimate(op, "hutchinson", n_hvp=12).value,
        "dense": op.to_dense(),
    }


def _spectra() -> tuple[dict[torch.dtype, Any], int, int]:
    found = {dtype: found_by(make_operator(dtype)) for dtype in TOLERANCE}
    op = make_operator(torch.float64)
    return found, op.matmat(random_unit_vectors(op, [3], 0)).numel(), op.part.length


def assert_equal(found: Any, expected: Any, tolerance: float, name: str = "") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), name
        for key in expected:
            assert_equal(found[key], expected[key], tolerance, f"{name} {key}")
    else:
        expected = np.asarray(expected)
        scale = np.nanmax(np.abs(expected))
        # standard errors are differences of numbers that are larger by far
        np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=10 * tolerance * max(scale, 1), err_msg=name)


@pytest.fixture(scope="module")
def alone() -> dict[torch.dtype, Any]:
    return {dtype: found_by(make_operator(dtype, shares=False)) for dtype in TOLERANCE}


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_processes_agree_with_one(workers: Workers, alone: dict[torch.dtype, Any], n: int) -> None:
    answers = workers.run(n, _spectra)
    n_parameters = make_operator(torch.float64, shares=False).shape[0]
    assert n == 1 or n_parameters % n or n == 2
    for found, n_entries, length in answers:
        assert n_entries == length <= -(-n_parameters // n)
        for dtype, tolerance in TOLERANCE.items():
            assert_equal(found[dtype], alone[dtype], tolerance, f"{n} {dtype}")
    assert sum(length for *_, length in answers) == n_parameters

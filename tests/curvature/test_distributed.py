"""An operator over the data of several processes, against the same data in one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import pnanalysis as pn
from pnanalysis.curvature.distributed import DistributedOperator, OwnExamples, own_share
from pnanalysis.errors import CurvatureError
from tests.curvature.conftest import NETWORKS, images
from tests.processes import Workers

SIZES = (5, 3, 4)  # one process gets nine examples, the other three
SPECTRUM = {"n_lanczos": 12, "n_probes": 3, "progress": False}


def _work() -> dict[str, Any]:
    model = NETWORKS["conv"]()
    local = pn.HessianOperator(model, cross_entropy, own_share(images(SIZES)), weight_decay=0.1, expected_products=1)
    operator = DistributedOperator(local)
    torch.manual_seed(torch.distributed.get_rank())  # the first process's vectors are the ones that count
    V = torch.randn(operator.shape[0], 2).double()
    ds = pn.spectral_density(operator, **SPECTRUM)
    found = {"V": V, "product": operator.matmat(V), "trace": float(ds.trace), "lambda_max": float(ds.lambda_max)}
    broken = images(SIZES)
    for_nan = DistributedOperator(pn.HessianOperator(model, cross_entropy, own_share(broken), expected_products=1))
    broken[1][0][0] = torch.nan  # the second process's only batch, after it was looked at
    try:
        pn.spectral_density(for_nan, **SPECTRUM)
    except CurvatureError as error:
        found["error"] = str(error)
    return found


def test_two_processes_agree_with_one(workers: Workers) -> None:
    first, second = workers.run(2, _work)
    whole = pn.HessianOperator(NETWORKS["conv"](), cross_entropy, images(SIZES), weight_decay=0.1, expected_products=1)
    torch.testing.assert_close(first["product"], whole.matmat(first["V"]), rtol=1e-10, atol=1e-12)
    assert torch.equal(first["product"], second["product"])
    assert first["trace"] == second["trace"]
    alone = pn.spectral_density(whole, **SPECTRUM)
    assert first["trace"] == pytest.approx(float(alone.trace), rel=1e-9)
    assert first["lambda_max"] == pytest.approx(float(alone.lambda_max), rel=1e-9)
    for found in (first, second):
        assert "process 1: the products of batch 0" in found["error"]


def test_without_a_group_it_says_what_to_do() -> None:
    local = pn.HessianOperator(NETWORKS["linear"](), cross_entropy, images(), expected_products=1)
    with pytest.raises(CurvatureError, match="init_process_group"):
        DistributedOperator(local)


def _masked_mean(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    kept = (targets != -100).float()
    each = torch.nn.functional.cross_entropy(outputs, targets.clamp_min(0), reduction="none")
    return (each * kept).sum() / kept.sum()


def _centred(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(outputs - outputs.mean(0), targets)


def _refused() -> dict[str, Any]:
    (inputs, targets) = images((12,))[0]
    targets = targets.clone()
    targets[:5] = -100
    found = {}
    for name, loss, own, weight in (
        ("masked", _masked_mean, targets, None),
        ("centred", _centred, images((12,))[0][1], "examples"),
        ("known", cross_entropy, targets, None),
    ):
        batches = OwnExamples([(inputs, own)])
        local = pn.HessianOperator(NETWORKS["tanh"](), loss, batches, weight=weight, expected_products=1)
        try:
            operator = DistributedOperator(local)
            found[name] = ""
            found["dense"], found["gradient"] = operator.to_dense(), operator.gradient()
            found["loss"] = torch.tensor(operator.loss(), dtype=torch.float64)
        except CurvatureError as error:
            found[name] = str(error)
    return found


def test_losses_that_cannot_be_divided_are_refused_by_all(workers: Workers) -> None:
    for found in workers.run(2, _refused):
        assert "cannot tell what their parts weigh" in found["masked"]
        assert "not made up of the losses of its examples" in found["centred"]
        assert found["known"] == ""
    (inputs, targets) = images((12,))[0]
    targets = targets.clone()
    targets[:5] = -100
    whole = pn.HessianOperator(NETWORKS["tanh"](), cross_entropy, [(inputs, targets)], expected_products=1)
    torch.testing.assert_close(found["dense"], whole.to_dense(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found["gradient"], whole.gradient(), rtol=1e-10, atol=1e-12)
    assert float(found["loss"]) == pytest.approx(whole.loss(), rel=1e-10)

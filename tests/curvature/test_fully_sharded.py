"""The Hessian of a network sharded by FSDP, against the same network in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, mse_loss

import pnanalysis as pn
from pnanalysis.curvature.fully_sharded import FullyShardedHessian
from pnanalysis.errors import CurvatureError
from pnanalysis.spectra.random_vectors import random_unit_vectors
from tests.curvature.conftest import relative
from tests.processes import Workers

SPECTRUM: dict[str, Any] = {"n_hvp": 20, "progress": False, "data_error": "none"}


class Tiny(nn.Module):
    """A language model with one block, embeddings that are sharded with the root, and five tokens."""

    def __init__(self, dtype: torch.dtype = torch.float64, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(5, 2), nn.Parameter(torch.randn(4, 2) / 2)
        self.block = nn.TransformerEncoderLayer(2, 1, 3, dropout=0.5, batch_first=True)
        self.head = nn.Linear(2, 5)
        if tied:
            self.head.weight = self.tokens.weight
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.tokens(tokens) + self.places)).mT


def texts() -> list[tuple[Tensor, Tensor]]:
    """Batches of unequal size, with targets that do not count."""
    torch.manual_seed(1)
    batches = [torch.randint(5, (n, 5)) for n in (4, 2, 1)]
    pairs = [(tokens[:, :-1], tokens[:, 1:].clone()) for tokens in batches]
    pairs[1][1][:, :2] = -100
    return pairs


def sharded(model: nn.Module) -> nn.Module:
    fully_shard(model.block)
    return fully_shard(model)


def whole(dtype: torch.dtype = torch.float64, **options: Any) -> pn.HessianOperator:
    return pn.HessianOperator(Tiny(dtype), cross_entropy, texts(), **options)


def products(op: FullyShardedHessian) -> Tensor:
    """With four vectors, whole ones."""
    return op.part.whole(op.matmat(random_unit_vectors(op, range(4), 1)), op.shape[0])


def exact_products(op: pn.HessianOperator) -> Tensor:
    return op.to_dense() @ random_unit_vectors(op, range(4), 1)


def spectral_error(found: Tensor, op: pn.HessianOperator) -> float:
    """Largest error of products with unit vectors, relative to the norm of the matrix."""
    return float((found - exact_products(op)).norm(dim=0).max() / torch.linalg.matrix_norm(op.to_dense(), 2))


def _in_single_precision() -> tuple[Tensor, float]:
    own = texts()[:2] if torch.distributed.get_rank() == 0 else texts()[2:]
    op = FullyShardedHessian(sharded(Tiny(torch.float32)), cross_entropy, own)
    return products(op).double(), op.round_off


@pytest.mark.slow
def test_in_single_precision_the_error_is_the_stated_one(workers: Workers) -> None:
    for found, error in workers.run(2, _in_single_precision):
        assert spectral_error(found, whole()) < 2 * error < 0.1


def _sharded() -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    own = texts()[:2] if rank == 0 else texts()[2:]  # two batches here, one there
    model = sharded(Tiny())
    before = [parameter.to_local().clone() for parameter in model.parameters()]
    with torch.no_grad():
        model(own[0][0])  # leaves the parameters of the root whole, which must not be used again
    op = FullyShardedHessian(model, cross_entropy, own, weight_decay=0.1)
    part = FullyShardedHessian(model, cross_entropy, own, params="block.linear1")
    found = {
        "products": products(op), "part": products(part),
        "gradient": op.part.whole(op.gradient()[:, None], op.shape[0])[:, 0], "loss": op.loss(),
        "error": op.round_off, "error of part": part.round_off, "n": op.n_examples,
        "lengths": (op.part.length, op.part.largest),
    }  # fmt: skip
    ds = pn.spectral_density(op, **SPECTRUM)
    found |= {name: float(ds[name]) for name in ("trace", "lambda_max", "lambda_min", "frobenius_norm")}
    after = [parameter.to_local() for parameter in model.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, wrong in {
        "plain": lambda: FullyShardedHessian(Tiny(), cross_entropy, own),
        "own loss": lambda: FullyShardedHessian(model, lambda o, t: cross_entropy(o, t), own),
        "copied": lambda: pn.HessianOperator(model, cross_entropy, own),
        "factor": lambda: _with_a_factor(own),
        "float targets": lambda: FullyShardedHessian(model, mse_loss, []),
    }.items():
        with pytest.raises(CurvatureError) as raised:
            wrong()
        found[name] = str(raised.value)
    return found


def _tied(folder: Path, stops: bool) -> dict[str, Any]:
    """Of a network with tied embeddings: products, and a spectrum that is interrupted if it ``stops``."""
    rank, n = torch.distributed.get_rank(), torch.distributed.get_world_size()
    first, *others = texts()
    pieces = [tuple(part[:2] for part in first), tuple(part[2:] for part in first), *others]
    op = FullyShardedHessian(sharded(Tiny(tied=True)), cross_entropy, pieces[rank::n])
    found: dict[str, Any] = {"products": products(op), "error": op.round_off, "length": op.part.length}
    if stops:
        left, matmat = 8, op.matmat

        def stopping(V: Tensor) -> Tensor:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return matmat(V)

        op.matmat = stopping  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            pn.spectral_density(op, state=folder, **SPECTRUM)
        return found
    ds = pn.spectral_density(op, state=folder, **SPECTRUM)
    return found | {"trace": float(ds.trace), "ritz": ds.ritz_value.values, "error": op.round_off}


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 3, 4])
def test_any_number_of_processes_and_tied_weights(workers: Workers, tmp_path: Path, n: int) -> None:
    op = pn.HessianOperator(Tiny(tied=True), cross_entropy, texts())
    exact = exact_products(op)
    workers.run(n, _tied, tmp_path / "state", True)
    assert list((tmp_path / "state").rglob("*.safetensors"))
    resumed = workers.run(n, _tied, tmp_path / "state", False)
    whole = workers.run(n, _tied, tmp_path / "another", False)
    for again, found in zip(resumed, whole, strict=True):
        assert found["error"] < 1e-6
        assert relative(found["products"], exact) < 1e-5
        scale = abs(found["ritz"]).max()
        np.testing.assert_allclose(again["ritz"], found["ritz"], rtol=0, atol=100 * found["error"] * scale)
        assert again["trace"] == pytest.approx(found["trace"], abs=100 * found["error"] * scale)
    assert sum(found["length"] for found in whole) == op.shape[0]


def _with_a_factor(own: list[tuple[Tensor, Tensor]]) -> FullyShardedHessian:
    model = sharded(Tiny())
    for module in (model.block, model):
        module.set_gradient_divide_factor(6.0)  # in place of the number of processes
    return FullyShardedHessian(model, cross_entropy, own)


def test_each_process_has_its_shard_and_together_they_have_the_hessian(workers: Workers) -> None:
    answers = workers.run(2, _sharded)
    op = whole(weight_decay=0.1)
    expected = pn.spectral_density(op, **SPECTRUM)
    for found in answers:
        assert found["error"] < 1e-6
        assert relative(found["products"], exact_products(op)) < 1e-5
        # curvature of 1e-8, where the gradient's round-off, which depends on the processor, leaves few digits
        assert spectral_error(found["part"], whole(params="block.linear1")) < 2 * found["error of part"] < 1e-4
        torch.testing.assert_close(found["gradient"], op.gradient(), rtol=1e-10, atol=1e-12)
        assert found["loss"] == pytest.approx(op.loss(), rel=1e-12)
        assert found["n"] == 7
        scale = float(expected.lambda_max)
        for name in ("trace", "lambda_max", "lambda_min", "frobenius_norm"):
            # the same probes see the same matrix, up to the errors of differences
            assert found[name] == pytest.approx(float(expected[name]), abs=100 * found["error"] * scale), name
        assert found["lengths"][0] <= found["lengths"][1] < 0.6 * op.shape[0]
        assert "not sharded" in found["plain"]
        assert "weight='examples'" in found["own loss"]
        assert "FullyShardedHessian" in found["copied"]
        assert "3.00 times" in found["factor"]
        assert "no batches" in found["float targets"]
    assert sum(found["lengths"][0] for found in answers) == op.shape[0]

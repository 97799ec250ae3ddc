"""Activations that are computed again instead of being kept: the same products, in less memory."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import pnanalysis as pn
from pnanalysis.curvature.base import CurvatureOperator
from pnanalysis.curvature.operators import EmpiricalFisherOperator, GGNOperator, HessianOperator
from pnanalysis.curvature.recomputed import blocks_of
from pnanalysis.errors import CurvatureError
from tests.curvature.conftest import dense_hessian, images, relative

BATCHES = images((5, 3))


class Block(nn.Module):
    """Writes into its argument, takes another by keyword, and returns a nest."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor, *, scale: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        x = x.mul_(scale)
        found = x + self.norm(self.inner(x)).tanh()
        return {"hidden": found, "mask": mask, "n": 3, "largest": found.argmax(1)}


class Blocks(nn.Module):
    """Three blocks, of which the first and the last are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(36, 4), nn.Linear(4, 3)
        block = Block()
        self.blocks = nn.ModuleList([block, Block(), block])
        self.scale = nn.Parameter(torch.tensor(0.9))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        for block in self.blocks:
            x = block(1.0 * x, scale=self.scale)["hidden"]
        return self.last(x)


class SelfCheckpointed(nn.Module):
    """Passes a part of itself, which stands in no container, to torch's checkpointing."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first, self.last = nn.Linear(36, 4), nn.Linear(4, 3)
        self.middle = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        x = self.middle(x) if self.reentrant is None else checkpoint(self.middle, x, use_reentrant=self.reentrant)
        return self.last(x)


def network(make: Any, *arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = make(*arguments).double()
    return model


KINDS: list[type[CurvatureOperator]] = [HessianOperator, GGNOperator, EmpiricalFisherOperator]


@pytest.mark.parametrize("make", [Blocks, lambda: SelfCheckpointed(True), lambda: SelfCheckpointed(False)])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_products_are_those_of_the_dense_matrix(kind: type[CurvatureOperator], make: Any) -> None:
    model = network(make)
    op = kind(model, cross_entropy, BATCHES, checkpoint_activations=True, weight_decay=0.1)
    V = torch.randn(op.shape[0], 3, dtype=torch.float64)
    found = op.matmat(V)
    assert op.method == "recomputed activations"
    assert op.product_check.difference < 1e-10
    kept = kind(model, cross_entropy, BATCHES, weight_decay=0.1, expected_products=3)
    assert relative(found, kept.matmat(V)) < 1e-10
    assert relative(op.gradient(), kept.gradient()) < 1e-10
    if kind is HessianOperator:
        vars(model)["reentrant"] = None  # this form cannot be differentiated twice by itself
        assert relative(found, dense_hessian(model, BATCHES) @ V + 0.1 * V) < 1e-10

"""Weight decay and penalties add their own curvature."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pnanalysis.curvature.base import CurvatureOperator
from pnanalysis.curvature.operators import EmpiricalFisherOperator, GGNOperator, HessianOperator
from tests.curvature.conftest import NETWORKS, dense_hessian, flat, images, relative
from trainers import PersistentPenalty


def test_weight_decay_and_penalty_add_their_own_curvature() -> None:
    model, batches = NETWORKS["tanh"](), images()

    def quartic(network: nn.Module) -> Tensor:
        return sum(p.pow(4).sum() for p in network.parameters())

    op = HessianOperator(model, cross_entropy, batches, weight_decay=0.3, penalty=quartic)
    expected = dense_hessian(model, batches) + torch.diag(0.3 + 12 * flat(model).square())
    assert relative(op.to_dense(), expected) < 1e-10
    persistent = PersistentPenalty(model, lam=1.0)
    persistent.add(NETWORKS["tanh"]())
    flat_penalty = HessianOperator(model, cross_entropy, batches, penalty=persistent)
    assert relative(flat_penalty.to_dense(), dense_hessian(model, batches)) < 1e-10  # |.| is piecewise linear
    assert flat_penalty.loss() > HessianOperator(model, cross_entropy, batches).loss()


@pytest.mark.parametrize("kind", [GGNOperator, EmpiricalFisherOperator])
def test_weight_decay_shifts_the_other_matrices_too(kind: type[CurvatureOperator]) -> None:
    model, batches = NETWORKS["tanh"](), images()
    plain = kind(model, cross_entropy, batches).to_dense()
    shifted = kind(model, cross_entropy, batches, weight_decay=0.3).to_dense()
    assert relative(shifted, plain + 0.3 * torch.eye(len(plain)).double()) < 1e-12

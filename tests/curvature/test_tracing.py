"""Models and losses that can be traced, and those that cannot."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pnanalysis.curvature.operators import HessianOperator
from tests.curvature.conftest import NETWORKS, dense_hessian, images, relative


class Branching(nn.Module):
    """Decides by the values it sees, so that it cannot be traced on shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.fc(x.flatten(1))
        return z.tanh() if float(x.sum()) > -1e9 else z


def test_a_model_that_cannot_be_traced_takes_the_direct_way() -> None:
    model, batches = Branching().double(), images()
    op = HessianOperator(model, cross_entropy, batches)
    assert relative(op.to_dense(), dense_hessian(model, batches)) < 1e-10
    assert op.method == "reverse mode"


class Constant(nn.Module):
    """Holds a tensor that is neither parameter nor buffer, and makes another on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(36, 3)
        self.mask = torch.tensor([1.0, 0.5, 2.0]).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1)).tanh() * self.mask + torch.tensor([1.0, 2.0, 3.0]).double()


def test_a_model_with_constant_tensors_is_traced() -> None:
    torch.manual_seed(0)
    model, batches = Constant().double(), images()
    op = HessianOperator(model, cross_entropy, batches)
    assert relative(op.to_dense(), dense_hessian(model, batches)) < 1e-10
    assert op.method == "traced"


def test_a_loss_with_constant_tensors_takes_the_direct_way() -> None:
    model, batches = NETWORKS["tanh"](), images()
    weights = torch.tensor([1.0, 0.5, 2.0]).double()

    def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
        return (cross_entropy(outputs, targets, reduction="none") * weights[targets]).mean()

    for _ in range(2):  # a trace that fails must leave torch in order
        op = HessianOperator(model, weighted, batches)
        assert relative(op.to_dense(), dense_hessian(model, batches, weighted)) < 1e-10
        assert op.method == "reverse mode"

"""Models and losses that can be traced, and those that cannot."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pnanalysis.curvature.operators import HessianOperator
from pnanalysis.curvature.tracing import Linearisation
from pnanalysis.torch_internals import UNSAFE_VIEW
from tests.curvature.conftest import NETWORKS, dense_hessian, images, relative

trace = Linearisation._trace


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


def test_operators_over_other_examples_share_traced_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    monkeypatch.setattr(Linearisation, "_trace", lambda self, *given: traced.append(self) or trace(self, *given))
    model, batches = NETWORKS["tanh"](), images((6, 6))
    op = HessianOperator(model, cross_entropy, batches)
    halves = [op.subset([half], 2) for half in (0, 1)]  # a batch of six each
    dense = [half.to_dense() for half in halves]
    assert len(traced) == 1
    assert relative(dense[0], dense[1]) > 0.01
    assert relative(sum(dense) / 2, dense_hessian(model, batches)) < 1e-10
    assert relative(op.to_dense(), dense_hessian(model, batches)) < 1e-10
    assert len(traced) == 1
    own = op.restricted(op.names[:1])
    size = own.shape[0]
    assert relative(own.to_dense(), dense_hessian(model, batches)[:size, :size]) < 1e-10
    assert len(traced) == 2  # another function


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


def program_of(function, fixed: Tensor, v: Tensor) -> tuple[Tensor, int]:
    """The result of a traced function, and the number of matrix products for each vector."""
    line = Linearisation(lambda fixed, v: [function(fixed, v[0])], lambda fixed: None)
    result = line.at(fixed, [v])[0]([v])[0]
    ((_, second),) = line._programs.values()
    return result, sum(node.target == torch.ops.aten.mm.default for node in second.program.graph.nodes)


def test_what_is_equal_is_computed_once() -> None:
    a, v = torch.arange(4.0).view(2, 2), torch.ones(2, 2)
    result, n_products = program_of(lambda a, v: (a @ v + v) * (v + a @ v), a, v)
    torch.testing.assert_close(result, (a @ v + v) ** 2)
    assert n_products == 1
    result, n_products = program_of(lambda a, v: (a @ v).sum(0).div_(2) + (a @ v).sum(0).div_(2), a, v)
    torch.testing.assert_close(result, (a @ v).sum(0))
    assert n_products == 1


def test_equal_values_stay_apart_where_one_is_written_into() -> None:
    a, v = torch.arange(4.0).view(2, 2), torch.ones(2, 2)

    def function(a: Tensor, v: Tensor, view) -> Tensor:
        one = view(a @ v)
        before = one + 1
        return before + one.mul_(2) + view(a @ v)

    for view in (lambda x: UNSAFE_VIEW(x, [4]), lambda x: x.view(4)):
        result, _ = program_of(partial(function, view=view), a, v)
        torch.testing.assert_close(result, 4 * (a @ v).flatten() + 1)

"""Products of traced programs: many vectors at a time where that is faster, and compiled."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import cross_entropy

from pnanalysis.curvature.operators import EmpiricalFisherOperator, GGNOperator, HessianOperator
from pnanalysis.curvature.programs import Program, SecondProgram, sharing_calls
from pnanalysis.errors import CurvatureError
from tests.curvature.conftest import NETWORKS, dense_hessian, images, relative

BATCHES = images((5, 5, 3))


def program_of(op: HessianOperator) -> SecondProgram:
    (first, *_) = op._cache.values()
    assert isinstance(first, Program)
    return first._second


@pytest.mark.parametrize("name", ["tanh", "conv", "batchnorm", "layernorm", "maxpool"])
def test_vectors_that_share_a_call_have_the_products_of_single_ones(name: str) -> None:
    model = NETWORKS[name]()
    op = HessianOperator(model, cross_entropy, BATCHES)
    V = torch.randn(op.shape[0], 21, dtype=torch.float64)  # more than share a call, and a rest
    found = op.matmat(V)
    second = program_of(op)
    assert second.at_once == 16
    assert second._verified
    single = torch.stack([op.matvec(v) for v in V.T], dim=1)
    assert relative(found, single) < 1e-12
    assert relative(found, dense_hessian(model, BATCHES) @ V) < 1e-10


@pytest.mark.parametrize("kind", [GGNOperator, EmpiricalFisherOperator])
def test_all_matrices_map_vectors(kind: type[GGNOperator | EmpiricalFisherOperator]) -> None:
    op = kind(NETWORKS["tanh"](), cross_entropy, BATCHES)
    V = torch.randn(op.shape[0], 5, dtype=torch.float64)
    found = op.matmat(V)
    assert program_of(op)._verified
    assert relative(found, torch.stack([op.matvec(v) for v in V.T], dim=1)) < 1e-12


@pytest.mark.parametrize("name", ["tanh", "conv"])
def test_batches_that_share_a_call_have_the_products_of_single_ones(name: str) -> None:
    model, batches = NETWORKS[name](), images((5, 3, *[5] * 17))  # more than share a call, and another shape
    op = HessianOperator(model, cross_entropy, batches)
    v = torch.randn(op.shape[0], dtype=torch.float64)
    found = op.matvec(v)
    assert [len(one._programs) for one in op._sharing] == [16, 2, 1]
    assert program_of(op)._verified == {"batches"}
    one_by_one = sum(product for _, product in op.products_by_batch(v[:, None]))[:, 0]
    assert relative(found, one_by_one) < 1e-12
    assert relative(found, dense_hessian(model, batches) @ v) < 1e-10
    with torch.no_grad():
        model.get_parameter(op.names[0]).mul_(1.5)
    op.take_weights(model)
    assert relative(op.matvec(v), dense_hessian(model, batches) @ v) < 1e-10


def test_what_batches_have_in_common_is_there_once() -> None:
    op = HessianOperator(NETWORKS["tanh"](), cross_entropy, images((5, 5, 5)))
    op.matvec(torch.ones(op.shape[0], dtype=torch.float64))
    (together,) = op._sharing
    shared = {tuple(part.shape) for part, dim in zip(together._kept, together._dims, strict=True) if dim is None}
    assert shared  # weights and their transposes
    assert all(5 not in shape for shape in shared)
    for i, one in op._cache.items():
        for part, whole, dim in zip(one._kept, together._kept, together._dims, strict=True):
            assert part.data_ptr() == (whole if dim is None else whole[i]).data_ptr()


def traced(function: object, *sizes: int) -> fx.GraphModule:
    """A program of a kept tensor and one vector, of these sizes."""
    from pnanalysis.torch_internals import make_fx

    return make_fx(function, tracing_mode="fake")(*(torch.ones(n) for n in sizes))


def test_large_operations_take_one_vector_at_a_time() -> None:
    def times(a: Tensor, v: Tensor) -> list[Tensor]:
        return [(a * v).sin()]

    assert SecondProgram(traced(times, 1000, 1000)).at_once == 16
    assert SecondProgram(traced(times, 2**14 + 1, 2**14 + 1)).at_once == 1  # 64 KiB in float32
    few = traced(lambda a, v: [sum((a * v).sin() * i for i in range(64))], 15_625, 15_625)
    assert SecondProgram(few).at_once == 16  # each result is let go of once it has been added
    many = traced(lambda a, v: [sum([(a * v).sin() * i for i in range(256)])], 15_625, 15_625)
    assert 1 < SecondProgram(many).at_once < 8  # those that are held at a time stay within 64 MiB
    assert SecondProgram(traced(times, 1000, 1000), compile=True).at_once == 1


def test_what_cannot_be_mapped_is_computed_one_by_one() -> None:
    def writing(a: Tensor, v: Tensor) -> list[Tensor]:
        return [a.clone().mul_(v)]  # a copy of a has no room for many vectors

    second = SecondProgram(traced(writing, 4, 4))
    directions = [[torch.randn(4)] for _ in range(40)]
    found = list(second.of_many([torch.arange(4.0)], directions))
    assert second.at_once == 1
    for (product,), (v,) in zip(found, directions, strict=True):
        torch.testing.assert_close(product, torch.arange(4.0) * v)


def test_wrong_rules_of_vmap_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    second = SecondProgram(traced(lambda a, v: [a * v], 4, 4))
    monkeypatch.setattr(torch, "vmap", lambda function, dims: lambda a, v: (2 * a * v,))
    directions = [[torch.randn(4)] for _ in range(40)]
    for (product,), (v,) in zip(second.of_many([torch.arange(4.0)], directions), directions, strict=True):
        torch.testing.assert_close(product, torch.arange(4.0) * v)
    assert second.at_once == 1
    second.at_once = 2
    programs = {i: Program(second, [torch.arange(4.0) + i]) for i in range(2)}
    (together,) = sharing_calls(programs)
    for i, (product,) in together.products(directions[0]):
        torch.testing.assert_close(product, (torch.arange(4.0) + i) * directions[0][0])
    assert sharing_calls(programs) == []  # from now on none


def test_a_batch_that_is_left_over_does_not_end_sharing() -> None:
    second = SecondProgram(traced(lambda a, v: [a * v], 4, 4))
    second.at_once = 2
    programs = {i: Program(second, [torch.arange(4.0) + i]) for i in range(3)}
    groups, v = sharing_calls(programs), torch.randn(4)
    assert len(groups) == 2
    for i, (product,) in (each for group in groups for each in group.products([v])):
        torch.testing.assert_close(product, (torch.arange(4.0) + i) * v)
    assert second.at_once == 2


@pytest.mark.slow
def test_compiled_products_are_one_graph_and_right() -> None:
    import torch._dynamo

    torch._dynamo.reset()
    model = NETWORKS["layernorm"]()
    op = HessianOperator(model, cross_entropy, BATCHES, compile=True, expected_products=3)
    V = torch.randn(op.shape[0], 2, dtype=torch.float64)
    assert relative(op.matmat(V), dense_hessian(model, BATCHES) @ V) < 1e-10
    assert op.method == "traced"
    second, product = program_of(op), next(iter(op._cache.values()))
    v = [torch.ones(shape, dtype=torch.float64) for shape in op.parameter_shapes]
    with torch.no_grad(), torch.compiler.set_stance("default"):
        explained = torch._dynamo.explain(second.program)(*product._kept, *v)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(program: fx.GraphModule, **options: bool) -> object:
        def call(*arguments: Tensor) -> None:
            raise RuntimeError("no C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    op = HessianOperator(NETWORKS["tanh"](), cross_entropy, BATCHES, compile=True)
    with pytest.raises(CurvatureError, match=r"torch.compile fails on the product .*no C\+\+ compiler.*leave out"):
        op.matvec(torch.ones(op.shape[0], dtype=torch.float64))
    with pytest.raises(CurvatureError, match="compile is for traced products"):
        HessianOperator(NETWORKS["tanh"](), cross_entropy, BATCHES, compile=True, method="finite_difference")


def test_compiled_products_of_what_cannot_be_traced_are_computed_as_ever() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(36, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x.flatten(1)).tanh()
            return y if float(y.detach().sum()) > -1e9 else 2 * y

    model = Branching().double()
    op = HessianOperator(model, cross_entropy, BATCHES, compile=True)
    v = torch.ones(op.shape[0], dtype=torch.float64)
    with pytest.warns(UserWarning, match="not compiled, as they cannot be traced"):
        found = op.matvec(v)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative(found, dense_hessian(model, BATCHES) @ v) < 1e-10

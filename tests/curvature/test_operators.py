"""Operators against dense float64 matrices, over networks, losses and options."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap
from torch.nn.functional import cross_entropy

from pnanalysis.curvature.operators import EmpiricalFisherOperator, GGNOperator, HessianOperator
from pnanalysis.errors import CurvatureError
from tests.cases import cases
from tests.curvature.conftest import NETWORKS, Loss, dense_hessian, flat, images, relative, squared_error, unflat


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "layernorm"])
def test_the_dense_reference_agrees_with_torch_func(name: str) -> None:
    model, batches = NETWORKS[name](), images()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))

    def mean_loss(vector: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, unflat(model, vector), (inputs,)), targets)

    assert relative(hessian(mean_loss)(flat(model)), dense_hessian(model, batches)) < 1e-12


#: The squared error on the other networks is left to `make test-slow`.
SOME = ("tanh", "conv", "layernorm")
FEWER = cases({name: name for name in NETWORKS}, set(NETWORKS) - set(SOME))


@pytest.mark.parametrize("traced", [True, False], ids=["traced", "direct"])
@pytest.mark.parametrize("name", NETWORKS)
def test_hessian_equals_the_dense_one(name: str, traced: bool) -> None:
    check_hessian(name, cross_entropy, traced)


@pytest.mark.parametrize("traced", [True, False], ids=["traced", "direct"])
@pytest.mark.parametrize("name", FEWER)
def test_hessian_of_a_squared_error_equals_the_dense_one(name: str, traced: bool) -> None:
    check_hessian(name, squared_error, traced)


def check_hessian(name: str, loss: Loss, traced: bool) -> None:
    model, batches = NETWORKS[name](), images()
    op = HessianOperator(model, loss, batches, expected_products=1000 if traced else 1)
    assert relative(op.to_dense(), dense_hessian(model, batches, loss)) < 1e-10
    assert (op.method == "traced") == traced


@pytest.mark.parametrize("traced", [True, False], ids=["traced", "direct"])
def test_hessian_with_batch_statistics_equals_the_dense_one(traced: bool) -> None:
    model, batches = NETWORKS["batchnorm"](), images()
    op = HessianOperator(model, cross_entropy, batches, bn_mode="train", expected_products=1000 if traced else 1)
    assert relative(op.to_dense(), dense_hessian(model, batches, bn_train=True)) < 1e-10


def test_with_outputs_linear_in_the_parameters_ggn_is_the_hessian() -> None:
    model, batches = NETWORKS["linear"](), images()
    assert relative(GGNOperator(model, cross_entropy, batches).to_dense(), dense_hessian(model, batches)) < 1e-10


@pytest.mark.parametrize("traced", [True, False], ids=["traced", "direct"])
@pytest.mark.parametrize("name", NETWORKS)
def test_ggn_and_fisher_equal_the_dense_ones(name: str, traced: bool) -> None:
    model, batches = NETWORKS[name](), images()
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    frozen = copy.deepcopy(model)
    for module in frozen.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False

    def outputs(vector: Tensor) -> Tensor:
        return functional_call(frozen, unflat(frozen, vector), (inputs,))

    theta = flat(frozen)
    jacobian = jacrev(outputs)(theta)  # (N, 3, P)
    curvature = vmap(hessian(lambda z, y: cross_entropy(z[None], y[None])))(outputs(theta), targets)
    ggn = torch.einsum("nap,nab,nbq->pq", jacobian, curvature, jacobian) / len(targets)
    slopes = vmap(jacrev(lambda z, y: cross_entropy(z[None], y[None])))(outputs(theta), targets)
    gradients = torch.einsum("na,nap->np", slopes, jacobian)
    expected = 1000 if traced else 1
    assert relative(GGNOperator(model, cross_entropy, batches, expected_products=expected).to_dense(), ggn) < 1e-10
    fisher = EmpiricalFisherOperator(model, cross_entropy, batches, expected_products=expected)
    assert relative(fisher.to_dense(), gradients.T @ gradients / len(targets)) < 1e-10


def test_a_sum_over_the_batch_gives_the_matrix_of_the_sum() -> None:
    model, batches = NETWORKS["tanh"](), images()

    def summed(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets, reduction="sum")

    op = HessianOperator(model, summed, batches, reduction="sum", weight_decay=0.5)
    expected = 8 * dense_hessian(model, batches) + 0.5 * torch.eye(op.shape[0]).double()
    assert relative(op.to_dense(), expected) < 1e-10


def test_products_are_linear_and_symmetric_and_lockstep_changes_nothing() -> None:
    op = HessianOperator(NETWORKS["conv"](), cross_entropy, images())
    torch.manual_seed(2)
    V = torch.randn(op.shape[0], 4).double()
    products = op.matmat(V)
    assert op.n_hvp == 4
    for j in range(4):
        torch.testing.assert_close(op.matvec(V[:, j]), products[:, j], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(op.matvec(V @ torch.arange(4.0).double()), products @ torch.arange(4.0).double())
    gram = V.T @ products
    torch.testing.assert_close(gram, gram.T, rtol=1e-10, atol=1e-12)


def test_the_sweep_over_layers_gives_the_diagonal_blocks() -> None:
    model, batches = NETWORKS["conv"](), images()
    dense = dense_hessian(model, batches)
    begin = 0
    for (layer, op), expected in zip(
        HessianOperator(model, cross_entropy, batches).per_layer(), ("0", "2", "4"), strict=True
    ):
        end = begin + op.shape[0]
        assert layer == expected
        assert relative(op.to_dense(), dense[begin:end, begin:end]) < 1e-10
        begin = end


def test_loss_and_gradient_are_those_of_all_examples() -> None:
    model, batches = NETWORKS["batchnorm"](), images()
    op = HessianOperator(model, cross_entropy, batches)
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loss = cross_entropy(model(inputs), targets)
    assert op.loss() == pytest.approx(float(loss.detach()), rel=1e-12)
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
    assert relative(op.gradient(), expected) < 1e-10


def test_float32_agrees_with_float64_to_its_round_off() -> None:
    model, batches = NETWORKS["conv"](), images()
    single = HessianOperator(model, cross_entropy, batches, dtype=torch.float32)
    assert single.dtype == HessianOperator(model, cross_entropy, batches, dtype="float32").dtype == torch.float32
    # 2^-24 per operation, through some 100 of them
    assert relative(single.to_dense().double(), dense_hessian(model, batches)) < 1e-5


def test_bf16_agrees_to_its_round_off() -> None:
    model, batches = NETWORKS["tanh"](), images((64,))
    half = HessianOperator(model, cross_entropy, batches, dtype=torch.float32, amp="bf16").to_dense().double()
    assert 0 < relative(half, dense_hessian(model, batches)) < 0.1  # 2^-9 per operation


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(36, 3)

    def forward(self, image: Tensor, scale: Tensor) -> Tensor:
        return self.fc(image.flatten(1)) * scale


@pytest.mark.parametrize("as_mapping", [True, False])
def test_inputs_may_be_tuples_and_mappings(as_mapping: bool) -> None:
    torch.manual_seed(0)
    model = TwoInputs().double()
    plain = images()
    scale = torch.full((1, 1), 2.0).double()
    nested = [
        ({"image": x, "scale": scale.expand(len(x), 1)} if as_mapping else (x, scale.expand(len(x), 1)), y)
        for x, y in plain
    ]
    op = HessianOperator(model, cross_entropy, nested)
    linear = nn.Sequential(nn.Flatten(), model.fc)
    expected = dense_hessian(linear, plain, lambda z, y: cross_entropy(2 * z, y))
    assert relative(op.to_dense(), expected) < 1e-10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"params": "fc9"}, "the layers are 0, 2, 4"),
        ({"params": []}, "no parameters chosen"),
        ({"bn_mode": "test"}, "eval or train"),
        ({"reduction": "none"}, "mean or sum"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(CurvatureError, match=message):
        HessianOperator(NETWORKS["conv"](), cross_entropy, images(), **options)


def test_vectors_of_the_wrong_shape_are_refused() -> None:
    op = HessianOperator(NETWORKS["linear"](), cross_entropy, images())
    with pytest.raises(CurvatureError, match="111 entries"):
        op.matvec(torch.zeros(2, 2).double())
    with pytest.raises(CurvatureError, match="111 rows"):
        op.matmat(torch.zeros(2, 2).double())


def test_classes_are_counted_where_each_example_has_one() -> None:
    x, y = images((6,))[0]
    assert HessianOperator(NETWORKS["tanh"](), cross_entropy, [(x, y)]).n_classes == 3
    words = torch.nn.Sequential(torch.nn.Embedding(5, 5), torch.nn.Linear(5, 4)).double()
    tokens = torch.randint(4, (9, 5))
    assert HessianOperator(words, cross_entropy, [(tokens, tokens[:, :4])]).n_classes is None


@pytest.mark.parametrize("loss", [lambda o, t: (o - t).square().mean() / 2, lambda o, t: 0.5 * (o - t).square().mean()])
def test_numbers_in_a_loss_of_ones_own_can_be_traced(loss: Loss) -> None:
    torch.manual_seed(0)
    model, batch = nn.Linear(3, 2), (torch.randn(20, 3), torch.randn(20, 2))
    op = EmpiricalFisherOperator(model, loss, [batch], expected_products=1000)
    v = torch.randn(op.shape[0])
    theirs = EmpiricalFisherOperator(model, loss, [batch], expected_products=1).matvec(v)
    torch.testing.assert_close(op.matvec(v), theirs, rtol=1e-5, atol=1e-6)

"""Operators against dense float64 matrices, over networks, batches and options."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap

from pnanalysis.curvature.operators import EmpiricalFisherOperator, GGNOperator, HessianOperator
from pnanalysis.errors import CurvatureError
from tests.curvature.conftest import NETWORKS, images
from trainers import PersistentPenalty

cross_entropy = nn.functional.cross_entropy


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs, torch.eye(3, dtype=outputs.dtype)[targets])


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def unflat(model: nn.Module, vector: Tensor) -> dict[str, Tensor]:
    parts = vector.split([p.numel() for p in model.parameters()])
    return {name: part.view_as(p) for (name, p), part in zip(model.named_parameters(), parts, strict=True)}


def dense_hessian(model: nn.Module, batches, loss=cross_entropy, bn_train: bool = False) -> Tensor:
    """The Hessian of the mean over all examples, a row at a time; with batch statistics, of each batch's own."""
    model = copy.deepcopy(model).train(bn_train)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and bn_train:
            module.track_running_stats = False
        if isinstance(module, nn.ReLU):
            module.inplace = False
    total = sum(len(y) for _, y in batches)

    def mean_loss(vector: Tensor) -> Tensor:
        theta = unflat(model, vector)
        return sum(loss(functional_call(model, theta, (x,)), y) * len(y) for x, y in batches) / total

    dense = torch.autograd.functional.hessian(mean_loss, flat(model))
    # torch.func.hessian is the same without vmap's rules, which are wrong for the normalisations' second derivatives
    if not bn_train and not any(isinstance(module, nn.LayerNorm) for module in model.modules()):
        assert relative(hessian(mean_loss)(flat(model)), dense) < 1e-12
    return dense


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("traced", [True, False], ids=["traced", "direct"])
@pytest.mark.parametrize("loss", [cross_entropy, squared_error], ids=["cross-entropy", "mse"])
@pytest.mark.parametrize("name", NETWORKS)
def test_hessian_equals_the_dense_one(name: str, loss, traced: bool) -> None:
    model, batches = NETWORKS[name](), images()
    op = HessianOperator(model, loss, batches, expected_products=1000 if traced else 1)
    assert relative(op.to_dense(), dense_hessian(model, batches, loss)) < 1e-10
    assert (op._linearisation is not None) == traced


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


@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator, EmpiricalFisherOperator])
def test_batches_and_micro_batches_do_not_change_the_matrix(kind) -> None:
    model, whole = NETWORKS["batchnorm"](), images((16,))
    (inputs, targets) = whole[0]
    reference = kind(model, cross_entropy, whole).to_dense()
    unequal = [(inputs[:7], targets[:7]), (inputs[7:8], targets[7:8]), (inputs[8:], targets[8:])]
    assert relative(kind(model, cross_entropy, unequal).to_dense(), reference) < 1e-12
    assert relative(kind(model, cross_entropy, whole, micro_batch=5).to_dense(), reference) < 1e-12


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


@pytest.mark.parametrize("selection", ["0", "0.weight", ["4"], ["0*", "4.bias"], "*.bias"])
def test_a_selection_is_a_block_of_the_matrix(selection) -> None:
    model, batches = NETWORKS["conv"](), images()
    chosen = {"0": ["0.weight", "0.bias"], "0.weight": ["0.weight"], "4": ["4.weight", "4.bias"],
              "0*": ["0.weight", "0.bias"], "4.bias": ["4.bias"], "*.bias": ["0.bias", "2.bias", "4.bias"]}  # fmt: skip
    names = {n for s in ([selection] if isinstance(selection, str) else selection) for n in chosen[s]}
    mask = torch.cat([torch.full((p.numel(),), name in names) for name, p in model.named_parameters()])
    op = HessianOperator(model, cross_entropy, batches, params=selection)
    assert relative(op.to_dense(), dense_hessian(model, batches)[mask][:, mask]) < 1e-10


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


def test_loss_and_gradient_are_those_of_all_examples() -> None:
    model, batches = NETWORKS["batchnorm"](), images()
    op = HessianOperator(model, cross_entropy, batches)
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loss = cross_entropy(model(inputs), targets)
    assert op.loss() == pytest.approx(float(loss.detach()), rel=1e-12)
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
    assert relative(op.gradient(), expected) < 1e-10


def test_the_users_model_is_left_as_it_was() -> None:
    model, batches = NETWORKS["batchnorm"]().train(), images()
    before = copy.deepcopy(model.state_dict())
    HessianOperator(model, cross_entropy, batches, bn_mode="train").to_dense()
    assert model.training
    assert all(module.training for module in model.modules())
    assert model[1].track_running_stats
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_float32_agrees_with_float64_to_its_round_off() -> None:
    model, batches = NETWORKS["conv"](), images()
    single = HessianOperator(model, cross_entropy, batches, dtype=torch.float32)
    assert single.dtype == torch.float32
    # 2^-24 per operation, through some 100 of them
    assert relative(single.to_dense().double(), dense_hessian(model, batches)) < 1e-5


def test_bf16_agrees_to_its_round_off() -> None:
    model, batches = NETWORKS["tanh"](), images((64,))
    half = HessianOperator(model, cross_entropy, batches, dtype=torch.float32, amp="bf16").to_dense().double()
    assert 0 < relative(half, dense_hessian(model, batches)) < 0.1  # 2^-9 per operation


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
    assert op._linearisation is None


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
    assert op._linearisation is not None


def test_a_loss_with_constant_tensors_takes_the_direct_way() -> None:
    model, batches = NETWORKS["tanh"](), images()
    weights = torch.tensor([1.0, 0.5, 2.0]).double()

    def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
        return (cross_entropy(outputs, targets, reduction="none") * weights[targets]).mean()

    for _ in range(2):  # a trace that fails must leave torch in order
        op = HessianOperator(model, weighted, batches)
        assert relative(op.to_dense(), dense_hessian(model, batches, weighted)) < 1e-10
        assert op._linearisation is None


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
        ({"bn_mode": "train", "micro_batch": 2}, "micro-batches"),
        ({"reduction": "none"}, "mean or sum"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(CurvatureError, match=message):
        HessianOperator(NETWORKS["conv"](), cross_entropy, images(), **options)


def test_frozen_parameters_are_left_out_or_refused() -> None:
    model = NETWORKS["conv"]()
    model[0].requires_grad_(False)
    assert HessianOperator(model, cross_entropy, images()).names[0] == "2.weight"
    with pytest.raises(CurvatureError, match="frozen"):
        HessianOperator(model, cross_entropy, images(), params="0")
    with pytest.raises(CurvatureError, match="none that are trainable"):
        HessianOperator(model.requires_grad_(False), cross_entropy, images())


def test_batches_without_examples_or_statistics_are_refused() -> None:
    model = NETWORKS["batchnorm"]()
    with pytest.raises(CurvatureError, match="no batches"):
        HessianOperator(model, cross_entropy, [])
    with pytest.raises(CurvatureError, match="batch 1 is empty"):
        HessianOperator(model, cross_entropy, images((2, 0)))
    with pytest.raises(CurvatureError, match="batch 1 holds one example"):
        HessianOperator(model, cross_entropy, images((2, 1)), bn_mode="train")
    with pytest.raises(CurvatureError, match="depends on its batch"):
        EmpiricalFisherOperator(model, cross_entropy, images(), bn_mode="train")


def test_a_batch_that_is_not_finite_is_named() -> None:
    batches = images((2, 3, 4))
    batches[1][0][0, 0, 0, 0] = torch.nan
    op = HessianOperator(NETWORKS["tanh"](), cross_entropy, batches)
    op.matvec(torch.ones(op.shape[0]).double())
    with pytest.raises(CurvatureError, match="batch 1"):
        op.check_finite()


def test_vectors_of_the_wrong_shape_are_refused() -> None:
    op = HessianOperator(NETWORKS["linear"](), cross_entropy, images())
    with pytest.raises(CurvatureError, match="111 entries"):
        op.matvec(torch.zeros(2, 2).double())
    with pytest.raises(CurvatureError, match="111 rows"):
        op.matmat(torch.zeros(2, 2).double())


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
@pytest.mark.parametrize("micro_batch", [None, 7])
def test_ignored_targets_and_class_weights_do_not_depend_on_the_batches(operator, micro_batch) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (40,), generator=generator)
    targets[torch.arange(0, 30, 2)] = -100  # unevenly over the batches
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64))
    whole = operator(model, loss, [(inputs, targets)])
    parts = operator(model, loss, list(zip(inputs.split(16), targets.split(16), strict=True)), micro_batch=micro_batch)
    torch.testing.assert_close(parts.to_dense(), whole.to_dense(), rtol=1e-10, atol=1e-12)
    assert parts.loss() == pytest.approx(float(loss(model(inputs), targets).detach()), rel=1e-12)
    torch.testing.assert_close(parts.gradient(), whole.gradient(), rtol=1e-10, atol=1e-12)
    with pytest.raises(CurvatureError, match="batch 1 has no target that counts"):
        operator(model, loss, [(inputs, targets), (inputs[:2], torch.full((2,), -100))])


def test_a_loss_that_needs_more_than_two_examples_has_them() -> None:
    def wide(outputs: Tensor, targets: Tensor) -> Tensor:
        if len(outputs) < 3:
            raise ValueError("too few")
        return cross_entropy(outputs, targets)

    model, batches = NETWORKS["tanh"](), images((4, 3))
    v = torch.ones(sum(p.numel() for p in model.parameters())).double()
    expected = HessianOperator(model, cross_entropy, batches).matvec(v)
    assert relative(HessianOperator(model, wide, batches).matvec(v), expected) < 1e-12
    with pytest.raises(ValueError, match="too few"):
        HessianOperator(model, wide, images((2, 4)))

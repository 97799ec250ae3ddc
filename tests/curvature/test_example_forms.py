"""Forms of single examples against the dense matrices of each, and operators over parts of the examples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.functional import cross_entropy, mse_loss

from pnanalysis.curvature import example_forms, row_forms
from pnanalysis.curvature.base import CurvatureOperator
from pnanalysis.curvature.operators import EmpiricalFisherOperator, GGNOperator, HessianOperator
from pnanalysis.errors import CurvatureError
from tests.cases import cases
from tests.curvature.conftest import NETWORKS, dense_hessian, flat, images, relative, squared_error, unflat

KINDS = [HessianOperator, GGNOperator, EmpiricalFisherOperator]


def directions(n: int, k: int = 4) -> tuple[Tensor, Tensor]:
    """Two times ``k`` vectors, the first of which are equal."""
    generator = torch.Generator().manual_seed(3)
    U, V = torch.randn(2, n, k, generator=generator, dtype=torch.float64)
    V[:, :2] = U[:, :2]
    return U, V


def dense_of_example(kind: type[CurvatureOperator], model: nn.Module, x: Tensor, y: Tensor, loss) -> Tensor:
    """The matrix of one example, (P, P), from dense derivatives."""
    one = [(x[None], y[None])]
    if kind is HessianOperator:
        return dense_hessian(model, one, loss)

    def outputs(vector: Tensor) -> Tensor:
        return functional_call(model, unflat(model, vector), (x[None],))[0]

    theta = flat(model)
    jacobian = jacrev(outputs)(theta)
    of_outputs = lambda z: loss(z[None], y[None])  # noqa: E731
    if kind is GGNOperator:
        return jacobian.T @ hessian(of_outputs)(outputs(theta)) @ jacobian
    slope = jacrev(of_outputs)(outputs(theta)) @ jacobian
    return torch.outer(slope, slope)


@pytest.mark.parametrize("way", ["traced", "mapped", "one by one"])
@pytest.mark.parametrize("loss", cases({"cross-entropy": cross_entropy, "mse": squared_error}, ("mse",)))
@pytest.mark.parametrize("kind", KINDS)
def test_forms_of_examples_are_those_of_their_dense_matrices(
    kind, loss, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = NETWORKS["conv"](), images()
    monkeypatch.setattr(row_forms, "_OPERATIONS_TO_TRACE", torch.inf if way == "mapped" else 0)
    op = kind(model, loss, batches, expected_products=1 if way == "one by one" else 1000)
    U, V = directions(op.shape[0])
    found = op.forms(U, V)
    rows = op.example_forms._of_rows
    if way == "traced":
        assert {one for _, one in rows._verified} == {True, False}
        assert rows.need_no_data([([], [])])
        torch.testing.assert_close(op.forms(U, V), found, rtol=0, atol=0)  # from what is kept
    else:
        assert isinstance(rows, row_forms.MappedForms)
        assert rows._maps == (way == "mapped")
    assert found.dtype == torch.float64
    examples = [(x, y) for inputs, targets in batches for x, y in zip(inputs, targets, strict=True)]
    dense = torch.stack([dense_of_example(kind, model, x, y, loss) for x, y in examples])
    expected = torch.einsum("pk,gpq,qk->kg", U, dense, V)
    assert relative(found, expected) < 1e-10
    np.testing.assert_allclose(op.group_weights, np.full(8, 1 / 8), rtol=1e-12)


def test_forms_that_cannot_be_traced_are_computed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_forms, "_OPERATIONS_TO_TRACE", 0)
    op, untraced = (GGNOperator(NETWORKS["conv"](), cross_entropy, images(), expected_products=n) for n in (1000, 1))
    U, V = directions(op.shape[0])
    rows = row_forms.TracedForms(op)
    n_tried = 0

    def refuse(*_: object) -> None:
        nonlocal n_tried
        n_tried += 1
        raise row_forms.Untraceable("no")

    for linearisation in rows._linearisations.values():
        linearisation.at = refuse
    op.example_forms._of_rows = rows
    assert relative(op.forms(U, V), untraced.forms(U, V)) < 1e-12
    assert n_tried == 1  # the other batches would fail the same way


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", cases({name: name for name in NETWORKS}, ("linear", "relu", "maxpool", "avgpool-gelu"))
)
def test_weighted_forms_add_up_to_products(name: str, kind) -> None:
    op = kind(NETWORKS[name](), cross_entropy, images(), weight_decay=0.3)
    U, V = directions(op.shape[0])
    whole = torch.einsum("pk,pk->k", U, op.matmat(V) - 0.3 * V)
    assert relative(op.forms(U, V) @ torch.from_numpy(op.group_weights), whole) < 1e-10
    assert op.example_forms.unit == "examples"


def test_weights_of_classes_and_ignored_targets_weigh_examples() -> None:
    model, batches = NETWORKS["tanh"](), images()
    batches[0][1][0] = -100
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2]).double())
    op = HessianOperator(model, loss, batches)
    targets = torch.cat([y for _, y in batches])
    weights = torch.where(targets < 0, 0.0, loss.weight[targets.clamp_min(0)]).numpy()
    np.testing.assert_allclose(op.group_weights, weights / weights.sum(), rtol=1e-12)
    U, V = directions(op.shape[0])
    found = op.forms(U, V)
    assert (found[:, 0] == 0).all()
    x, y = batches[1]
    alone = HessianOperator(model, loss, [(x[1:2], y[1:2])])
    assert relative(found[:, 6], torch.einsum("pk,pk->k", U, alone.matmat(V))) < 1e-10


def test_slopes_of_examples_are_those_of_their_losses() -> None:
    model, batches = NETWORKS["tanh"](), images()
    batches[0][1][0] = -100
    op = HessianOperator(model, cross_entropy, batches, weight_decay=0.3)
    V = directions(op.shape[0])[1]
    found = op.slopes(V)
    whole = V.T @ op.gradient_without_regulariser()
    assert relative(found @ torch.from_numpy(op.group_weights), whole) < 1e-10
    assert (found[:, 0] == 0).all()
    x, y = batches[1]
    alone = HessianOperator(model, cross_entropy, [(x[1:2], y[1:2])])
    assert relative(found[:, 6], V.T @ alone.gradient()) < 1e-10
    losses, whole = op.group_losses(V[:, 0]), op.batch_losses(V[:, 0]).sum()
    assert float(losses @ torch.from_numpy(op.group_weights)) == pytest.approx(whole, rel=1e-10)
    assert losses[0] == 0
    assert float(losses[6]) == pytest.approx(alone.loss_at(V[:, 0]), rel=1e-10)
    with pytest.raises(CurvatureError, match="slopes takes"):
        op.slopes(V[1:])


@pytest.mark.parametrize("unit", ["parts of batches", "batches"])
def test_slopes_of_parts_and_batches_add_up_to_the_gradient(unit: str) -> None:
    if unit == "batches":
        op = HessianOperator(NETWORKS["batchnorm"](), cross_entropy, images((4,) * 6), bn_mode="train")
    else:
        op = HessianOperator(NETWORKS["tanh"](), masked_mean, images((12, 12)))
        op.example_forms.unit = unit
        op.example_forms._shares = [example_forms._shares(op, unit, np.ones(12)) for _ in range(2)]
        op.example_forms._ends = np.array([0, 12, 24])
    assert op.example_forms.unit == unit
    V = directions(op.shape[0])[1]
    found = op.slopes(V) @ torch.from_numpy(op.group_weights)
    assert relative(found, V.T @ op.gradient()) < 1e-10
    assert float(op.group_losses() @ torch.from_numpy(op.group_weights)) == pytest.approx(op.loss(), rel=1e-10)


def masked_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    each = cross_entropy(outputs, targets.clamp_min(0), reduction="none")
    return (each * (targets >= 0)).sum() / (targets >= 0).sum()


def test_examples_of_a_mean_over_positions_weigh_by_their_positions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 5, 1), nn.Tanh(), nn.Conv1d(5, 3, 1)).double()
    batches = [(torch.randn(n, 4, 6).double(), torch.randint(3, (n, 6))) for n in (5, 3)]
    for _, targets in batches:
        for i, row in enumerate(targets):
            row[2 + i :] = -100
    op = HessianOperator(model, masked_mean, batches)
    np.testing.assert_allclose(op.group_weights * 29, [2, 3, 4, 5, 6, 2, 3, 4], rtol=1e-12)
    U, V = directions(op.shape[0])
    x, y = batches[0]
    alone = HessianOperator(model, masked_mean, [(x[2:3], y[2:3])])
    assert relative(op.forms(U, V)[:, 2], torch.einsum("pk,pk->k", U, alone.matmat(V))) < 1e-10


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that compares the examples of a batch with each other."""
    return cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))


def hidden(outputs: Tensor, targets: Tensor) -> Tensor:
    with torch.no_grad():
        weights = outputs.softmax(1)[:, 0]
    return (weights * cross_entropy(outputs, targets, reduction="none")).mean()


class OwnGradient(torch.autograd.Function):
    """Has no forward mode."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, slope: Tensor) -> Tensor:
        return slope * ctx.saved_tensors[0].cos()


class WithOwnGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return OwnGradient.apply(self.fc(x.flatten(1)))


@pytest.mark.parametrize(
    ("model", "loss", "options", "unit", "n_groups"),
    [
        (NETWORKS["tanh"], hidden, {}, "examples", 40),
        (WithOwnGradient, cross_entropy, {}, "parts of batches", 31),
        (NETWORKS["tanh"], lambda model, batch: cross_entropy(model(batch[0]), batch[1]), {}, "parts of batches", 31),
        (NETWORKS["tanh"], contrastive, {"weight": "examples"}, "batches", 2),
        (NETWORKS["batchnorm"], cross_entropy, {"bn_mode": "train"}, "batches", 2),
        (lambda: nn.Sequential(NETWORKS["tanh"](), Noise()), cross_entropy, {"draws": 2}, "examples", 40),
    ],
    ids=["hidden weights", "no forward mode", "loss of a network", "contrastive", "batch statistics", "draws"],
)
def test_groups_are_the_smallest_that_have_a_matrix(model, loss, options, unit: str, n_groups: int) -> None:
    op = HessianOperator(model().double(), loss, images((25, 15)), **options)
    U, V = directions(op.shape[0])
    whole = torch.einsum("pk,pk->k", U, op.matmat(V))
    assert relative(op.forms(U, V) @ torch.from_numpy(op.group_weights), whole) < 1e-10
    assert (op.example_forms.unit, len(op.group_weights)) == (unit, n_groups)


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand_like(x)


def test_many_examples_are_put_together_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    single = HessianOperator(NETWORKS["tanh"](), cross_entropy, images((20,)))
    U, V = directions(single.shape[0])
    each = single.forms(U, V)
    monkeypatch.setattr(example_forms, "_MOST_GROUPS", 6)
    op = HessianOperator(NETWORKS["tanh"](), cross_entropy, images((20,)))
    found = op.forms(U, V)
    np.testing.assert_allclose(np.sort(op.group_weights * 20), [3, 3, 3, 3, 4, 4], rtol=1e-12)
    assert relative(found @ torch.from_numpy(op.group_weights), each.mean(1)) < 1e-10
    assert op.group_digest != single.group_digest


def test_the_digest_tells_examples_and_groups_and_not_batches() -> None:
    whole, cut = images((8,)), images((8,))
    x, y = cut[0]
    cut = [(x[:3], y[:3]), (x[3:], y[3:])]
    turned = [(x.flip(0), y.flip(0))]
    digests = [
        HessianOperator(NETWORKS[name](), cross_entropy, batches).group_digest
        for name, batches in (("tanh", whole), ("conv", cut), ("tanh", turned))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_forms_in_lower_precision_agree_to_their_round_off() -> None:
    model, batches = NETWORKS["conv"](), images((64,))
    exact = HessianOperator(model, cross_entropy, batches)
    U, V = directions(exact.shape[0])
    expected = exact.forms(U, V)
    single = HessianOperator(model, cross_entropy, batches, dtype=torch.float32)
    assert relative(single.forms(U, V), expected) < 1e-5  # 2^-24 per operation, through some 100 of them
    half = HessianOperator(NETWORKS["tanh"](), cross_entropy, batches, dtype=torch.float32, amp="bf16")
    W = torch.randn(half.shape[0], 2, generator=torch.Generator().manual_seed(0))
    expected = HessianOperator(NETWORKS["tanh"](), cross_entropy, batches).forms(W.double(), W.double())
    assert 0 < relative(half.forms(W, W), expected) < 0.1  # 2^-9 per operation


def test_bad_forms_are_refused() -> None:
    op = HessianOperator(NETWORKS["linear"](), cross_entropy, images())
    with pytest.raises(CurvatureError, match="111 rows"):
        op.forms(torch.zeros(111, 2).double(), torch.zeros(111, 1).double())
    with pytest.raises(CurvatureError, match="not finite"):
        op.forms(torch.full((111, 1), torch.nan).double(), torch.zeros(111, 1).double())


# -- operators over parts of the examples ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "reduction"),
    [
        (HessianOperator, "sum"), (GGNOperator, "mean"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((HessianOperator, "mean"), (GGNOperator, "sum"))),
    ],
)  # fmt: skip
def test_parts_of_the_examples_make_up_the_whole(kind, reduction: str) -> None:
    loss = nn.CrossEntropyLoss(reduction=reduction)
    op = kind(NETWORKS["conv"](), loss, images((5, 3, 4)), reduction=reduction, weight_decay=0.1)
    parts = [op.subset([part], 3, seed=1) for part in range(3)]
    assert [part.n_examples for part in parts] == [4, 4, 4]
    assert relative(sum(part.to_dense() for part in parts) / 3, op.to_dense()) < 1e-10
    assert relative(op.subset([0, 1, 2], 3).to_dense(), op.to_dense()) < 1e-10


def test_parts_are_the_same_for_every_network_and_batching() -> None:
    x, y = images((12,))[0]
    one = HessianOperator(NETWORKS["tanh"](), cross_entropy, [(x, y)]).subset([1], 2)
    other = HessianOperator(NETWORKS["conv"](), cross_entropy, [(x[:5], y[:5]), (x[5:], y[5:])]).subset([1], 2)
    assert one.group_digest == other.group_digest
    assert other.batches.sizes == [6]  # full batches of one shape


def test_parts_with_ignored_targets_weigh_by_what_counts() -> None:
    batches = images((6, 4))
    batches[0][1][:5] = -100
    op = HessianOperator(NETWORKS["tanh"](), cross_entropy, batches)
    halves = [op.subset([part], 2) for part in (0, 1)]
    weights = torch.tensor([half.divisor for half in halves], dtype=torch.float64) / op.divisor
    assert float(weights.sum()) == pytest.approx(1)
    assert relative(sum(w * half.to_dense() for w, half in zip(weights, halves, strict=True)), op.to_dense()) < 1e-10


def test_a_loader_that_streams_is_read_in_parts() -> None:
    batches = images((5, 3, 4))
    loader = Streamed(batches)
    op = HessianOperator(NETWORKS["tanh"](), cross_entropy, loader)
    half = op.subset([0], 2)
    again = HessianOperator(NETWORKS["tanh"](), cross_entropy, batches).subset([0], 2)
    assert relative(half.to_dense(), again.to_dense()) < 1e-12


class Streamed:
    """Fills the same memory with every batch."""

    def __init__(self, batches) -> None:
        self.batches = batches

    def __iter__(self):
        for x, y in self.batches:
            yield x.clone(), y.clone()


def test_batches_stay_whole_where_examples_depend_on_each_other() -> None:
    op = HessianOperator(NETWORKS["batchnorm"](), cross_entropy, images((4,) * 6), bn_mode="train")
    half = op.subset([0], 2)
    assert half.batches.sizes == [4, 4, 4]
    with pytest.raises(CurvatureError, match="7 parts of 6 batches"):
        op.subset([0], 7)
    with pytest.raises(CurvatureError, match=r"the parts \[2\] of 2"):
        op.subset([2], 2)


def test_forms_and_parts_of_a_regression_in_micro_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    batches = [(torch.randn(10, 4).double(), torch.randn(10, 2).double())]
    op, micro = (HessianOperator(model, mse_loss, batches, micro_batch=size) for size in (None, 4))
    U, V = directions(op.shape[0])
    torch.testing.assert_close(op.forms(U, V), micro.forms(U, V), rtol=1e-10, atol=1e-12)
    assert relative(micro.subset([0], 2).to_dense(), op.subset([0], 2).to_dense()) < 1e-10

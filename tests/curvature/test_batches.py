"""How the data are divided into batches does not matter, and data that cannot be used are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from pnanalysis.curvature.operators import EmpiricalFisherOperator, GGNOperator, HessianOperator
from pnanalysis.errors import CurvatureError
from tests.curvature.conftest import NETWORKS, dense_hessian, images, relative


@pytest.mark.parametrize(
    "kind",
    [HessianOperator, *(pytest.param(k, marks=pytest.mark.slow) for k in (GGNOperator, EmpiricalFisherOperator))],
)
def test_batches_and_micro_batches_do_not_change_the_matrix(kind) -> None:
    model, whole = NETWORKS["batchnorm"](), images((16,))
    (inputs, targets) = whole[0]
    reference = kind(model, cross_entropy, whole).to_dense()
    unequal = [(inputs[:7], targets[:7]), (inputs[7:8], targets[7:8]), (inputs[8:], targets[8:])]
    assert relative(kind(model, cross_entropy, unequal).to_dense(), reference) < 1e-12
    assert relative(kind(model, cross_entropy, whole, micro_batch=5).to_dense(), reference) < 1e-12


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
    more = operator(model, loss, [(inputs, targets), (inputs[:2], torch.full((2,), -100))])
    torch.testing.assert_close(more.to_dense(), whole.to_dense(), rtol=1e-10, atol=1e-12)
    with pytest.raises(CurvatureError, match="no target of the data counts in the loss"):
        operator(model, loss, [(inputs[:2], torch.full((2,), -100))])


def norms(n_frozen: int) -> nn.Module:
    """Two normalisations in train mode, of which the first are frozen."""
    torch.manual_seed(0)
    layers = [nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)]
    model = nn.Sequential(*layers).double()
    model(2 * torch.randn(50, 5, dtype=torch.float64) + 1)
    for layer in (model[1], model[4])[:n_frozen]:
        layer.eval()
    return model


def test_frozen_norms_stay_frozen_in_blocks_and_subsets() -> None:
    model, batch = norms(1), (torch.randn(12, 5, dtype=torch.float64), torch.arange(12) % 3)
    whole = HessianOperator(model, cross_entropy, [batch], bn_mode="train")
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    by_torch = hessian(lambda p: cross_entropy(functional_call(copy.deepcopy(model), p, batch[0]), batch[1]))(
        parameters
    )
    for layer, block in whole.per_layer():
        rows = [
            torch.cat([by_torch[a][b].reshape(parameters[a].numel(), -1) for b in block.names], 1) for a in block.names
        ]
        assert relative(block.to_dense(), torch.cat(rows)) < 1e-10, layer
    some = whole.subset([0], 1)
    assert relative(some.to_dense(), whole.to_dense()) < 1e-12


def test_norms_that_are_all_frozen_allow_what_eval_mode_allows() -> None:
    model, (inputs, targets) = norms(2), (torch.randn(12, 5, dtype=torch.float64), torch.arange(12) % 3)
    for kind in (HessianOperator, EmpiricalFisherOperator):
        in_eval_mode = kind(model, cross_entropy, [(inputs, targets)])
        op = kind(model, cross_entropy, [(inputs, targets)], bn_mode="train", micro_batch=5)
        assert op.bn_mode == "eval"
        assert relative(op.to_dense(), in_eval_mode.to_dense()) < 1e-12
    with pytest.raises(CurvatureError, match="would change the batch statistics"):
        HessianOperator(norms(1), cross_entropy, [(inputs, targets)], bn_mode="train", micro_batch=5)


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


def test_a_loader_that_shuffles_gives_the_same_batches_to_every_product() -> None:
    (inputs, targets) = images((8,))[0]
    loader = DataLoader(list(zip(inputs, targets, strict=True)), batch_size=4, shuffle=True)
    op = HessianOperator(NETWORKS["tanh"](), cross_entropy, loader, bn_mode="train")
    v = torch.ones(op.shape[0]).double()
    assert torch.equal(op.matvec(v), op.matvec(v))
    assert relative(op.to_dense(), dense_hessian(NETWORKS["tanh"](), [(inputs, targets)])) < 1e-10


def test_a_batch_that_is_not_finite_is_named() -> None:
    batches = images((2, 3, 4))
    batches[1][0][0, 0, 0, 0] = torch.nan
    op = HessianOperator(NETWORKS["tanh"](), cross_entropy, batches)
    op.matvec(torch.ones(op.shape[0]).double())
    with pytest.raises(CurvatureError, match="batch 1"):
        op.check_finite()


def test_a_loss_that_needs_more_than_two_examples_has_them() -> None:
    def wide(outputs: Tensor, targets: Tensor) -> Tensor:
        if len(outputs) < 3:
            raise ValueError("too few")
        return cross_entropy(outputs, targets)

    model, batches = NETWORKS["tanh"](), images((4, 3))
    v = torch.ones(sum(p.numel() for p in model.parameters())).double()
    expected = HessianOperator(model, cross_entropy, batches).matvec(v)
    assert relative(HessianOperator(model, wide, batches, weight="examples").matvec(v), expected) < 1e-12
    with pytest.raises(CurvatureError, match="weight="):  # nothing is known of its parts
        HessianOperator(model, wide, batches)
    with pytest.raises(ValueError, match="too few"):
        HessianOperator(model, wide, images((2, 4)))


def test_micro_batches_share_the_weight_of_their_batch() -> None:
    model, (batch,) = NETWORKS["tanh"](), images((12,))
    batches = [tuple(part[:9] for part in batch), tuple(part[9:] for part in batch)]
    whole, cut = (
        HessianOperator(model, cross_entropy, batches, weight="batches", micro_batch=size) for size in (None, 4)
    )
    assert relative(cut.to_dense(), whole.to_dense()) < 1e-12


def test_micro_batches_are_refused_where_examples_see_each_other() -> None:
    class Centred(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    (inputs, targets) = torch.randn(12, 5), torch.randint(3, (12,))
    HessianOperator(Centred(5, 3), cross_entropy, [(inputs, targets)])
    with pytest.raises(CurvatureError, match="not made up of the losses of its examples"):
        HessianOperator(Centred(5, 3), cross_entropy, [(inputs, targets)], micro_batch=4)

"""Examples whose targets do not count change no matrix, wherever they lie: in batches, pieces or processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

import pnanalysis as pn
from pnanalysis.curvature.distributed import DistributedOperator, OwnExamples, ShardedOperator
from pnanalysis.curvature.example_groups import in_groups
from pnanalysis.curvature.fully_sharded import FullyShardedHessian
from pnanalysis.curvature.operators import EmpiricalFisherOperator, GGNOperator, HessianOperator
from pnanalysis.errors import CurvatureError
from tests.curvature.conftest import Hungry, relative
from tests.processes import Workers

N = 20


def network() -> nn.Module:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Sequential(block, block), nn.Linear(4, 3)).double()


def examples(ignored: slice) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(N, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (N,), generator=generator)
    targets[ignored] = -100
    return inputs, targets


def counting(ignored: slice) -> tuple[Tensor, Tensor]:
    inputs, targets = examples(ignored)
    return inputs[targets != -100], targets[targets != -100]


def in_batches(ignored: slice, size: int) -> list[tuple[Tensor, Tensor]]:
    inputs, targets = examples(ignored)
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def masked(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss of one's own, which is 0 / 0 where nothing counts."""
    kept = targets != -100
    return cross_entropy(outputs, targets.clamp_min(0), reduction="none")[kept].sum() / kept.sum()


def products(op: Any) -> Tensor:
    """With three vectors."""
    return op.matmat(torch.randn(op.shape[0], 3, generator=torch.Generator().manual_seed(2)).double())


CUTS: dict[str, tuple[slice, int, dict[str, Any]]] = {
    "the first examples of a batch": (slice(0, 9), N, {}),
    "the first batches": (slice(0, 9), 4, {}),
    "a batch in between": (slice(8, 12), 4, {}),
    "pieces": (slice(4, 8), N, {"micro_batch": 2}),
    "the first pieces": (slice(0, 5), N, {"micro_batch": 2}),
    "recomputed": (slice(0, 5), N, {"checkpoint_activations": True}),
}


@pytest.mark.parametrize(
    ("kind", "expected_products"),
    [(HessianOperator, 1), (HessianOperator, 1000), (GGNOperator, 1), (EmpiricalFisherOperator, 1)],
)
@pytest.mark.parametrize("case", CUTS)
def test_matrix_loss_gradient_and_forms(kind, expected_products, case) -> None:
    ignored, size, options = CUTS[case]
    reference = kind(network(), cross_entropy, [counting(ignored)], expected_products=1)
    op = kind(network(), cross_entropy, in_batches(ignored, size), expected_products=expected_products, **options)
    for _ in range(2):  # the second time from what is kept of batches
        assert relative(products(op), products(reference)) < 1e-12
    assert op.loss() == pytest.approx(reference.loss(), rel=1e-12)
    assert relative(op.gradient(), reference.gradient()) < 1e-12
    assert op.n_examples == N
    op.check_finite()
    U, V = torch.randn(2, op.n_parameters, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    forms, weights = op.forms(U, V), torch.from_numpy(op.group_weights)
    assert relative(forms @ weights, (reference.matmat(V) * U).sum(0)) < 1e-10


@pytest.mark.parametrize("ignored", [slice(0, 9), slice(8, 12)])
def test_finite_differences(ignored) -> None:
    reference = HessianOperator(network(), cross_entropy, [counting(ignored)])
    for options in ({}, {"micro_batch": 2}):
        op = HessianOperator(
            network(), cross_entropy, in_batches(ignored, 4), method="finite_difference", **options
        )  # fmt: skip
        assert relative(products(op), products(reference)) < 1e-7
        assert op.round_off < 1e-6


@pytest.mark.parametrize("weight", [None, lambda inputs, targets: (targets != -100).sum()])
@pytest.mark.parametrize("options", [{}, {"micro_batch": 2}])
def test_losses_of_ones_own(weight, options) -> None:
    ignored = slice(0, 9)
    reference = HessianOperator(network(), cross_entropy, [counting(ignored)], expected_products=1)
    op = HessianOperator(
        network(), masked, in_batches(ignored, 4), weight=weight, expected_products=1, **options
    )  # fmt: skip
    assert relative(products(op), products(reference)) < 1e-12


def test_pieces_of_batches_that_weigh_by_themselves() -> None:
    """Each batch counts as its own mean, whatever the pieces that it is cut into."""
    batches = in_batches(slice(3, 6), 5)
    whole, cut = (
        HessianOperator(network(), cross_entropy, batches, weight="batches", expected_products=1, **options)
        for options in ({}, {"micro_batch": 2})
    )
    assert relative(products(cut), products(whole)) < 1e-12


@pytest.mark.filterwarnings("ignore:.* examples at a time do not fit")
def test_halving() -> None:
    ignored = slice(4, 10)
    reference = HessianOperator(network(), cross_entropy, [counting(ignored)], expected_products=1)
    op = HessianOperator(Hungry(*network()), cross_entropy, [examples(ignored)], expected_products=1)
    Hungry.most = 3
    op._keep_nothing()
    try:
        found = products(op)
    finally:
        Hungry.most = 1000
    assert op.micro_batch == 3
    assert relative(found, products(reference)) < 1e-12


def test_subsets_and_groups() -> None:
    ignored = slice(0, 13)
    op = HessianOperator(network(), cross_entropy, in_batches(ignored, 4), expected_products=1)
    V = torch.randn(op.n_parameters, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = dict(in_groups(op, 10).matmat_by_group(V))
    assert relative(sum(found.values()), op.matmat(V)) < 1e-12
    halves = [op.subset([part], 2, expected_products=1) for part in range(2)]
    assert relative(sum(half.divisor / op.divisor * half.matmat(V) for half in halves), op.matmat(V)) < 1e-12


@pytest.mark.parametrize("data_error", ["examples", "none"])
def test_spectra(data_error) -> None:
    ignored, options = slice(0, 9), {"loss": cross_entropy, "n_hvp": 20, "dtype": "float64", "progress": False}
    alone = pn.hessian(network(), data=counting(ignored), data_error=data_error, **options)
    ds = pn.hessian(network(), data=examples(ignored), data_error=data_error, **options)
    for name in ("trace", "lambda_max", "frobenius_norm"):
        np.testing.assert_allclose(ds[name], alone[name], rtol=1e-9)


def test_data_in_which_nothing_counts_are_refused() -> None:
    everything = slice(0, N)
    for options in ({}, {"micro_batch": 3}, {"weight": lambda inputs, targets: (targets != -100).sum()}):
        with pytest.raises(CurvatureError, match="no target of the data counts in the loss"):
            HessianOperator(network(), cross_entropy, in_batches(everything, 4), **options)
    with pytest.raises(CurvatureError, match="batch 1 has no target that counts"):
        HessianOperator(network(), cross_entropy, in_batches(slice(4, 8), 4), weight="batches")
    with pytest.raises(CurvatureError, match="weight gave -1"):
        HessianOperator(network(), cross_entropy, in_batches(slice(4, 8), 4), weight=lambda inputs, targets: -1)


def _shared() -> dict[str, Any]:
    found: dict[str, Any] = {}
    make: dict[str, Callable[..., Any]] = {
        "exact": partial(HessianOperator, expected_products=1),
        "differences": partial(HessianOperator, method="finite_difference", is_part=True),
    }
    for rank, ignored in enumerate((slice(0, 12), slice(8, N))):  # all that the first, or second, process has
        batches = [examples(ignored)]
        for name, kind in make.items():
            if name == "differences" and rank > 0:
                continue
            for whole in (
                (DistributedOperator, ShardedOperator) if (name, rank) == ("exact", 0) else (DistributedOperator,)
            ):
                local = kind(network(), cross_entropy, OwnExamples(batches))
                op = whole(local)
                V = torch.randn(op.shape[0], 3, generator=torch.Generator().manual_seed(2)).double()
                if isinstance(op, ShardedOperator):
                    found[f"{name} {whole.__name__} {rank}"] = op.part.whole(op.matmat(op.part.of(V)), op.shape[0])
                else:
                    found[f"{name} {whole.__name__} {rank}"] = op.matmat(V)
                assert op.n_examples == N
        if rank > 0:
            continue
        local = HessianOperator(network(), cross_entropy, OwnExamples(batches), expected_products=1)
        distributed = DistributedOperator(local)
        assert distributed.loss() == pytest.approx(whole_loss(ignored), rel=1e-12)
        found[f"weights {rank}"] = torch.tensor(distributed.group_weights.sum())
    return found


def whole_loss(ignored: slice) -> float:
    inputs, targets = examples(ignored)
    return float(cross_entropy(network()(inputs), targets).detach())


def test_processes_without_any_example_that_counts(workers: Workers) -> None:
    reference = [
        products(HessianOperator(network(), cross_entropy, [counting(ignored)], expected_products=1))
        for ignored in (slice(0, 12), slice(8, N))
    ]
    for found in workers.run(2, _shared):
        for name, dense in found.items():
            if name.startswith("weights"):
                assert float(dense) == pytest.approx(1)
                continue
            assert relative(dense, reference[int(name[-1])]) < (1e-7 if "diff" in name else 1e-12), name


def _fully_sharded() -> list[Tensor]:
    found = []
    for ignored in (slice(0, 12), slice(0, 4)):
        own = in_batches(ignored, 4)
        own = own[:3] if torch.distributed.get_rank() == 0 else own[3:]
        op = FullyShardedHessian(fully_shard(network()), cross_entropy, own)
        V = torch.randn(op.shape[0], 3, generator=torch.Generator().manual_seed(2)).double()
        found.append(op.part.whole(op.matmat(op.part.of(V)), op.shape[0]))
        assert op.n_examples == N
    with pytest.raises(CurvatureError, match="no target of the data counts"):
        FullyShardedHessian(fully_shard(network()), cross_entropy, in_batches(slice(0, N), 4))
    return found


def test_fully_sharded(workers: Workers) -> None:
    reference = [
        products(HessianOperator(network(), cross_entropy, [counting(ignored)], expected_products=1))
        for ignored in (slice(0, 12), slice(0, 4))
    ]
    for found in workers.run(2, _fully_sharded):
        for dense, expected in zip(found, reference, strict=True):
            assert relative(dense, expected) < 1e-7

"""What batches weigh, under losses of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pnanalysis.curvature.batch_weights import _counts
from pnanalysis.curvature.operators import EmpiricalFisherOperator, GGNOperator, HessianOperator
from pnanalysis.errors import CurvatureError

Loss = Callable[[Any, Any], Tensor]


def tokens_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """A mean over all tokens that are not ignored."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def next_token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def unpadded_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=0)


def masked_loss(outputs: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
    labels, mask = targets
    each = F.cross_entropy(outputs.movedim(-1, 1), labels, reduction="none")
    return (each * mask).sum() / mask.sum()


def weighted_loss(outputs: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
    labels, weight = targets
    each = F.cross_entropy(outputs.movedim(-1, 1), labels, reduction="none").mean(1)
    return (each * weight).sum() / weight.sum()


def examples_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.movedim(-1, 1), targets, reduction="none").mean(1).mean()


def summed_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 3), nn.Tanh(), nn.Linear(3, 9)).double()


def _data() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(1, 9, (10, 5))
    mask = torch.rand(10, 5) < 0.7
    mask[:, :2] = True
    return tokens, torch.randint(1, 9, (10, 5)), mask


TOKENS, LABELS, MASK = _data()
IGNORED, ZEROS = LABELS.masked_fill(~MASK, -100), LABELS.masked_fill(~MASK, 0)
WEIGHT = torch.linspace(0.5, 2, 10).double()
CASES: dict[str, tuple[Loss, Any]] = {
    "tokens that are not ignored": (tokens_loss, IGNORED),
    "next tokens that are not ignored": (next_token_loss, IGNORED),
    "tokens that are not padding": (unpadded_loss, ZEROS),
    "a mask": (masked_loss, (LABELS, MASK)),
    "weights of examples": (weighted_loss, (LABELS, WEIGHT)),
    "examples": (examples_loss, LABELS),
    "a sum": (summed_loss, IGNORED),
    "torch's own": (lambda o, t: F.cross_entropy(o.movedim(-1, 1), t), IGNORED),
}


def cut(targets: Any, part: slice) -> Any:
    return tuple(t[part] for t in targets) if isinstance(targets, tuple) else targets[part]


@pytest.mark.parametrize("case", CASES)
def test_the_loss_does_not_depend_on_the_batches(case: str) -> None:
    loss, targets = CASES[case]
    model = network()
    whole = HessianOperator(model, loss, [(TOKENS, targets)], expected_products=1)
    v = torch.randn(whole.shape[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for sizes in ((3, 7), (4, 4, 2), (5, 5)):
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        parts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        batches = [(TOKENS[part], cut(targets, part)) for part in parts]
        op = HessianOperator(model, loss, batches, expected_products=1)
        assert op.loss() == pytest.approx(float(loss(model(TOKENS), targets)), rel=1e-12)
        torch.testing.assert_close(op.matvec(v), whole.matvec(v), rtol=1e-10, atol=1e-13)
    assert op.reduction == ("sum" if case == "a sum" else "mean")


def test_graphs_count_one_by_one_and_not_by_their_nodes() -> None:
    class PerGraph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)

        def forward(self, nodes: Tensor, graph: Tensor) -> Tensor:
            hidden = self.first(nodes).tanh()
            pooled = hidden.new_zeros(int(graph.max()) + 1, 4).index_add(0, graph, hidden)
            return self.last(pooled)[:, 0]

    torch.manual_seed(0)
    model = PerGraph().double()
    sizes = ([30, 40], [3, 4, 5, 3])
    batches = [
        ((torch.randn(sum(s), 3).double(), torch.repeat_interleave(torch.tensor(s))), torch.randn(len(s)).double())
        for s in sizes
    ]
    for loss in (F.mse_loss, lambda o, t: ((o - t) ** 2).mean()):
        op = HessianOperator(model, loss, batches)
        assert op.batches.weights == pytest.approx([2 / 6, 4 / 6])
        assert op.n_examples == 6


def test_lengths_that_leave_a_choice_are_refused_until_it_is_made() -> None:
    batches = [(TOKENS, LABELS), (TOKENS[:, :3], LABELS[:, :3])]
    with pytest.raises(CurvatureError, match="by their examples or by their elements .* weight='examples'"):
        HessianOperator(network(), tokens_loss, batches)
    by_examples = HessianOperator(network(), tokens_loss, batches, weight="examples")
    assert by_examples.batches.weights == [0.5, 0.5]
    by_tokens = HessianOperator(network(), tokens_loss, batches, weight=lambda inputs, targets: targets.numel())
    assert by_tokens.batches.weights == [50 / 80, 30 / 80]
    assert [op.batches.weights for _, op in by_tokens.per_layer()] == [[50 / 80, 30 / 80]] * 2


CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 5.0]).double()


def class_weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, weight=CLASS_WEIGHTS)


@pytest.mark.parametrize(
    ("targets", "size"),
    [
        (torch.arange(3).repeat_interleave(8), 8),  # each batch of one class
        (torch.arange(3).repeat_interleave(8), 5),
        (torch.tensor([0] * 21 + [2, 0, 0]), 4),  # a rare class, in the last batch
        (torch.arange(3).repeat(8), 1),
    ],
)
def test_weights_of_classes_are_found_wherever_they_differ(targets: Tensor, size: int) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, 3).double(), torch.randn(24, 4).double()
    batches = list(zip(inputs.split(size), targets.split(size), strict=True))
    for kind in (HessianOperator, EmpiricalFisherOperator):
        with pytest.raises(CurvatureError, match=r"neither a mean nor a sum|not the mean over its examples"):
            kind(model, class_weighted, batches)
    right = HessianOperator(model, nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), batches).to_dense()
    told = HessianOperator(model, class_weighted, batches, weight=lambda _, t: CLASS_WEIGHTS[t].sum())
    torch.testing.assert_close(told.to_dense(), right, rtol=1e-10, atol=1e-14)


def test_batches_alike_weigh_alike_even_where_their_examples_do_not() -> None:
    torch.manual_seed(0)
    model, inputs, targets = nn.Linear(4, 3).double(), torch.randn(24, 4).double(), torch.tensor([0, 1]).repeat(12)
    batches = list(zip(inputs.split(4), targets.split(4), strict=True))
    right = HessianOperator(model, nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), batches).to_dense()
    torch.testing.assert_close(HessianOperator(model, class_weighted, batches).to_dense(), right)
    with pytest.raises(CurvatureError, match="not the mean over its examples"):
        EmpiricalFisherOperator(model, class_weighted, batches)


@pytest.mark.parametrize("reduce", [torch.mean, torch.sum, lambda each: each.sum() / 8])
def test_pairs_of_examples_that_are_compared_stay_together(reduce: Callable[[Tensor], Tensor]) -> None:
    def preferred(outputs: Tensor, targets: Tensor) -> Tensor:
        return reduce(F.softplus(outputs[1::2, 0] - outputs[0::2, 0]))

    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double(), torch.randn(32, 4).double()
    batches = [(part, torch.zeros(len(part))) for part in inputs.split(10)[:-1]]
    op = HessianOperator(model, preferred, batches)
    assert len(set(op.batches.weights)) == 1
    assert op.loss() == pytest.approx(
        (1.0 if reduce is torch.mean else 30.0 if reduce is torch.sum else 30.0 / 8)
        * float(F.softplus(model(inputs[1:30:2]) - model(inputs[0:30:2])).mean())
        / (1 if reduce is torch.mean else 2)
    )


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(reduction="sum"), lambda o, t: F.cross_entropy(o, t) * len(t)])
@pytest.mark.parametrize("size", [1, 5, 24])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sums_are_found_in_batches_of_any_size(loss: Loss, size: int, reduction: str) -> None:
    torch.manual_seed(0)
    model, inputs, targets = nn.Linear(4, 3).double(), torch.randn(24, 4).double(), torch.randint(3, (24,))
    batches = list(zip(inputs.split(size), targets.split(size), strict=True))
    for kind in (HessianOperator, GGNOperator, EmpiricalFisherOperator):
        mean = kind(model, nn.CrossEntropyLoss(), [(inputs, targets)]).to_dense()
        found = kind(model, loss, batches, reduction=reduction)
        assert found.reduction == "sum"
        torch.testing.assert_close(found.to_dense(), 24 * mean, rtol=1e-10, atol=1e-13)


def test_a_loss_that_calls_the_network_is_measured_between_batches_too() -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return class_weighted(model(batch[0]), batch[1])

    torch.manual_seed(0)
    model, inputs, targets = nn.Linear(4, 3).double(), torch.randn(24, 4).double(), torch.arange(3).repeat_interleave(8)
    batches = list(zip(inputs.split(8), targets.split(8), strict=True))
    with pytest.raises(CurvatureError, match="neither a mean nor a sum"):
        HessianOperator(model, loss, batches)


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    rows = F.normalize(outputs)
    return F.cross_entropy(rows @ rows.T, torch.arange(len(rows)))


def test_a_loss_of_whole_batches_is_refused_unless_they_are_weighed() -> None:
    model, inputs = nn.Linear(4, 3).double(), torch.randn(8, 4).double()
    batches = [(inputs[:4], inputs[:4]), (inputs[4:], inputs[4:])]
    with pytest.raises(CurvatureError, match="neither a mean nor a sum"):
        HessianOperator(model, contrastive, batches)
    assert HessianOperator(model, contrastive, batches, weight="batches").batches.weights == [0.5, 0.5]
    assert HessianOperator(model, contrastive, batches[:1]).batches.weights == [1.0]


@pytest.mark.parametrize("weight", ["tokens", lambda inputs, targets: 0.0, lambda inputs, targets: float("nan")])
def test_weights_that_are_none_are_refused(weight: Any) -> None:
    with pytest.raises(CurvatureError, match="weight"):
        HessianOperator(network(), tokens_loss, [(TOKENS, LABELS)] * 2, weight=weight)


def test_any_positive_weight_is_taken() -> None:
    batches = [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(2)]
    weights = {id(targets): weight for (_, targets), weight in zip(batches, (0.25, 0.75), strict=True)}
    model, loss = nn.Linear(3, 2), nn.CrossEntropyLoss()
    op = HessianOperator(model, loss, batches, weight=lambda inputs, targets: weights[id(targets)])
    one, other = (HessianOperator(model, loss, [batch]).to_dense() for batch in batches)
    torch.testing.assert_close(op.to_dense(), 0.25 * one + 0.75 * other)


def test_what_is_counted_in_a_batch() -> None:
    targets = (torch.tensor([1, -100, 0]), torch.tensor([[0.5, 2.0], [0.0, 3.0], [1.0, 4.0]]), torch.tensor(7))
    assert _counts((torch.randn(3, 2), targets)) == {
        "examples": 3,
        "elements of the targets (1)": 3,
        "targets (1) that are not -100": 2,
        "targets (1) that are not 0": 2,
        "shifted targets (1) that are not -100": 0,
        "shifted targets (1) that are not 0": 0,
        "elements of the targets (2)": 6,
        "sum of the targets (2)": 10.5,
        "sum of the shifted targets (2)": 9,
    }


def test_parts_in_which_nothing_counts_say_nothing() -> None:
    """Sums over what a mask keeps, divided by its size but at least by one."""

    def positives(outputs: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        values, mask = targets
        return ((outputs[:, 0] - values).square() * mask).sum() / mask.sum().clamp(min=1)

    torch.manual_seed(0)
    model, inputs, values = nn.Linear(4, 1).double(), torch.randn(40, 4).double(), torch.randn(40).double()
    mask = (torch.rand(40) < 0.3).double()
    mask[:2] = mask[6:12] = 0
    whole = HessianOperator(model, positives, [(inputs, (values, mask))])
    parts = zip(inputs.split(8), values.split(8), mask.split(8), strict=True)
    batches = HessianOperator(model, positives, [(x, (y, kept)) for x, y, kept in parts])
    torch.testing.assert_close(batches.to_dense(), whole.to_dense(), rtol=1e-10, atol=1e-13)


def test_round_off_of_passes_over_few_examples_is_no_weight() -> None:
    """A network that fits its targets nearly exactly, under a loss that calls it."""
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 3)), torch.randn(64, 8)
    targets = model(inputs).detach() + 1e-5 * torch.randn(64, 3)
    batches = list(zip(inputs.split(16), targets.split(16), strict=True))
    op = HessianOperator(model, lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), batches)
    assert op.batches.weights == [0.25] * 4


def test_fisher_matrices_know_that_examples_count_alike() -> None:
    batches = [(TOKENS, LABELS), (TOKENS[:, :3], LABELS[:, :3])]
    op = EmpiricalFisherOperator(network(), tokens_loss, batches)
    assert op.batches.weights == [0.5, 0.5]


def test_batches_of_unlike_labels_are_not_put_together() -> None:
    """Labels that are no tensors may change the loss of a whole batch."""

    def of_task(outputs: Tensor, targets: tuple[Tensor, str]) -> Tensor:
        values, task = targets
        return (outputs - values).square().mean() if task == "squares" else (outputs - values).abs().mean()

    torch.manual_seed(0)
    model, inputs, values = nn.Linear(4, 3).double(), torch.randn(24, 4).double(), torch.randn(24, 3).double()
    tasks = ("squares", "distances", "squares")
    parts = zip(inputs.split(8), values.split(8), tasks, strict=True)
    op = HessianOperator(model, of_task, [(x, (y, task)) for x, y, task in parts])
    assert op.batches.weights == pytest.approx([1 / 3] * 3)


def test_lower_precision_leaves_no_choice_that_there_was_not() -> None:
    batches = list(zip(TOKENS.split((3, 7)), IGNORED.split((3, 7)), strict=True))
    ops = [HessianOperator(network().float(), tokens_loss, batches, amp=amp) for amp in ("no", "bf16")]
    assert ops[0].batches.weights == ops[1].batches.weights

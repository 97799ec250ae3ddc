"""One fit: it equals a loop written by hand, and stops at a loss that is not finite."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pnanalysis.errors import TrainingError
from pnanalysis.inputs.data import Split, load_data
from trainers import PersistentPenalty, fit
from trainers.loop.batched_fit import SingleFit, fit_together
from trainers.loop.fit import (
    augment_batch,
    error_counter,
    error_kind,
    evaluate_error,
    load_optimizer_tensors,
    make_optimizer,
    n_counted,
    optimizer_tensors,
)
from trainers.seeds import derive_seed
from trainers.zoo.models import tanh7


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return tanh7((1, 8, 8), width=16)


@pytest.mark.parametrize("with_penalty", [False, True])
def test_fit_equals_a_loop_written_by_hand(with_penalty: bool) -> None:
    data = load_data("digits")
    ours, theirs = small(), small()
    penalties = [PersistentPenalty(model, lam=0.1) if with_penalty else None for model in (ours, theirs)]
    for penalty in penalties:
        if penalty is not None:
            penalty.add(small(1))
    records = fit(ours, data.train, epochs=2, batch_size=100, penalty=penalties[0], validation=data.validation, seed=5)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-3, fused=True)
    losses = []
    for epoch in (1, 2):
        order = torch.randperm(1197, generator=torch.Generator().manual_seed(derive_seed(5, "order", epoch)))
        for index in order.split(100):
            x, y = data.train.take(index)
            loss = nn.functional.cross_entropy(theirs(x), y)
            optimizer.zero_grad()
            (loss + penalties[1]() if with_penalty else loss).backward()
            optimizer.step()
            losses.append(float(loss) * len(index) / 1197)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    assert records[1].train_loss == pytest.approx(sum(losses[12:]), rel=1e-6)  # a float32 sum of 12 terms
    assert (records[1].penalty > 0) == with_penalty
    x, y = data.validation.take(slice(None))
    assert records[1].validation_error == pytest.approx(float((ours(x).argmax(1) != y).double().mean()))


def test_a_loss_that_is_not_finite_stops_at_its_step() -> None:
    inputs = torch.randn(40, 1, 8, 8)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(derive_seed(0, "order", 1)))
    inputs[order[25]] = torch.nan  # in the third batch of ten
    with pytest.raises(TrainingError, match="nan at epoch 1, step 3"):
        fit(small(), (inputs, torch.zeros(40, dtype=torch.long)), epochs=3, batch_size=10)


@pytest.mark.parametrize(
    "options", [{"optimizer": "lion"}, {"augment": ["mixup"]}, {"amp": "fp8"}, {"batch_size": 0}, {"epochs": 0}]
)
def test_unknown_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(TrainingError):
        fit(small(), (torch.zeros(4, 64), torch.zeros(4, dtype=torch.long)), **{"epochs": 1, **options})


def test_real_targets_give_the_mean_squared_error() -> None:
    x, y = torch.randn(50, 3), torch.randn(50, 2)
    model = nn.Linear(3, 2)
    assert evaluate_error(model, Split(x, y)) == pytest.approx(float((model(x) - y).square().mean()), rel=1e-6)
    assert fit(model, (x, y), epochs=3, loss="mse", optimizer="sgd", lr=0.1)[-1].train_loss < 2


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_an_optimizers_state_survives_saving(name: str) -> None:
    models = [small(), small()]
    optimizers = [make_optimizer(model, name) for model in models]
    for step in range(4):
        if step == 2:  # continue the second from what was saved of the first
            models[1].load_state_dict(models[0].state_dict())
            load_optimizer_tensors(optimizers[1], {k: v.clone() for k, v in optimizer_tensors(optimizers[0]).items()})
        for model, optimizer in zip(models[: 1 if step < 2 else 2], optimizers, strict=False):
            torch.manual_seed(step)
            model(torch.randn(5, 64)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_bf16_stays_close_to_float32() -> None:
    data = load_data("digits")
    losses = [fit(small(), data.train, epochs=3, batch_size=64, amp=amp)[-1].train_loss for amp in ("no", "bf16")]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_the_kind_of_errors_follows_from_loss_and_targets() -> None:
    numbers, classes = torch.zeros(4, 2), torch.zeros(4).long()
    assert error_kind(nn.MSELoss(), classes) == error_kind(lambda o, t: o.sum(), numbers) == "squared error"
    assert error_kind(nn.functional.cross_entropy, numbers) == error_kind(lambda o, t: o.sum(), classes) == "share"
    assert error_kind(nn.BCEWithLogitsLoss(), numbers) == "share"


def test_crops_are_shifts_of_the_reflected_image_and_flips_mirror() -> None:
    images = torch.arange(2 * 1 * 12 * 12.0).reshape(2, 1, 12, 12)
    padded = nn.functional.pad(images, [4] * 4, mode="reflect")
    cropped = augment_batch(images, ["crop"], torch.Generator().manual_seed(3))
    windows = padded.unfold(2, 12, 1).unfold(3, 12, 1)  # (N, C, 9, 9, 12, 12)
    for image, candidates in zip(cropped, windows, strict=True):
        assert (candidates.reshape(-1, 12, 12) == image).all((1, 2)).any()
    flipped = augment_batch(images.repeat(20, 1, 1, 1), ["flip"], torch.Generator())
    originals = images.repeat(20, 1, 1, 1)
    kept = (flipped == originals).all((1, 2, 3))
    assert torch.equal(flipped[~kept], originals[~kept].flip(-1))
    assert 5 < int(kept.sum()) < 35  # of 40 fair coins; either bound is five standard deviations away


def test_errors_are_means_over_the_examples_that_count() -> None:
    """As evaluated by an analysis; in one training, and of several networks together."""
    x, y = torch.randn(100, 4, generator=torch.Generator().manual_seed(0)), torch.arange(100) % 3
    y = torch.where(torch.arange(100) < 60, -100, y)
    splits = [Split(x, y), Split(x[50:], y[50:]), Split(x[40:], y[40:])]
    model, twin = (nn.Linear(4, 3) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    options = {"epochs": 1, "lr": 0.0, "validation": splits[1], "test": splits[2], "batch_size": 30}
    (record,) = fit(model, splits[0], optimizer="sgd", **options)
    ((together,),) = fit_together([SingleFit(twin)], splits[0], optimizer="sgd", **options)
    for found in (record, together):
        for split, error in zip(splits, (found.train_error, found.validation_error, found.test_error), strict=True):
            labelled = split.targets >= 0
            right = float((model(split.inputs[labelled]).argmax(1) != split.targets[labelled]).double().mean())
            assert error == pytest.approx(right, rel=1e-12)


def test_errors_are_counted_as_the_loss_defines_them() -> None:
    outputs = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 2.0]])
    cross_entropy = nn.functional.cross_entropy
    assert float(error_counter(cross_entropy)(outputs, torch.tensor([0, 1, 1, 0]))) == 2
    likely = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]])
    assert float(error_counter(cross_entropy)(outputs, likely)) == 1
    pixels, void = outputs.T[None].expand(3, -1, -1), torch.tensor([[0, 1, 0, -100], [1, 1, 0, -100], [-100] * 4])
    wrong, counted = error_counter(nn.CrossEntropyLoss())(pixels, void), n_counted(nn.CrossEntropyLoss(), void)
    assert (float(wrong), counted) == (1 / 4, 6 / 4)  # one of the six positions that are not ignored, of four each
    assert float(error_counter(nn.MSELoss())(outputs, torch.zeros(4, 2))) == 8
    assert float(error_counter(nn.MSELoss())(outputs[:, 0], torch.tensor([1, 0, 2, 3]))) == 10  # counts
    sides = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert float(error_counter(nn.BCEWithLogitsLoss())(outputs, sides)) == 0.5


def test_errors_under_a_loss_of_ones_own_are_those_of_outputs_like_the_targets() -> None:
    outputs, targets = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 1.0, 1.0])

    def own(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(outputs.squeeze(-1), targets)

    count = error_counter(own)
    assert float(count(outputs, targets)) == float(count(outputs[:, 0], targets)) == 0 + 1 + 9
    assert float(count(torch.eye(3), torch.tensor([0, 1, 0]))) == 1
    for given, wanted in (
        (outputs, targets.long()), (outputs[:, 0], targets.long()), (outputs, targets.long()[:, None]),
        (torch.eye(3), targets), (torch.zeros(3, 2, 4), torch.zeros(3, 4)),
    ):  # fmt: skip
        with pytest.raises(TrainingError, match=r"errors cannot be counted of outputs \(N.* under a loss of one's own"):
            count(given, wanted)
    model = nn.Linear(4, 1)
    data = Split(torch.randn(40, 4), torch.randn(40))
    record = fit(model, data, epochs=3, batch_size=10, loss=own, validation=data)[-1]
    with torch.no_grad():
        assert record.validation_error == pytest.approx(float(own(model(data.inputs), data.targets)), rel=1e-5)

"""Data that network or loss cannot take: an error of one sentence before a run exists, in every way to train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pnanalysis.errors import DataError, PnError
from pnanalysis.io.runs import open_run
from trainers import Config, train
from trainers.runs.strategies import train_together
from trainers.runs.sweep import sweep

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(60) % 3
LATE = torch.where(torch.arange(60) == 57, 3, CLASSES)
DATA = {
    "good": (X, CLASSES),
    "late": (X, LATE),
    "nan": (torch.where(torch.arange(60)[:, None] == 57, torch.nan, X), CLASSES),
    "shape": (torch.randn(60, 5), CLASSES),
    "floats": (X, CLASSES.float()),
    "flat": (X, X[:, 0]),
    "column": (X, X[:, :1]),
    "batches": [(X, CLASSES)],
    "held_out_batches": {"train": (X, CLASSES), "validation": [(X, CLASSES)]},
    "held_out": {"train": (X, CLASSES), "validation": (X, LATE)},
    "ignored": {"train": (X, CLASSES), "validation": (X, torch.full((60,), -100))},
    "one_too_many": {"train": (X[:41], CLASSES[:41])},
}


def net(n_out: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, n_out))


class OnlyEvaluated(nn.Linear):
    """A network with a fault in its training pass alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :3] if self.training else x)


def only_evaluated(n_out: int) -> nn.Module:
    return OnlyEvaluated(4, n_out)


def each(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


def __getattr__(name: str):
    if name in DATA:
        return lambda: DATA[name]
    raise AttributeError(name)


def config(data: str, n_out: int = 3, **settings) -> Config:
    return Config(
        model=settings.pop("model", f"{__name__}:net"), model_options={"n_out": n_out}, data=f"{__name__}:{data}",
        strategy="plain", epochs=1, batch_size=20, **settings,
    )  # fmt: skip


BAD = {
    "no class": (
        config("late"),
        "late: the loss cannot take these data: the target 3 is not a class of a network with 3",
    ),
    "nan": (config("nan"), "nan, example 57: some numbers are not finite"),
    "held-out": (
        config("held_out"),
        "held_out, validation: the loss cannot take these data: the target 3 is not a class",
    ),
    "shape": (config("shape"), r"shape: the network cannot take these data: inputs of shape \(2, 5\)"),
    "floats": (config("floats"), r"the loss cannot take these data: .* targets of shape \(2,\), float32"),
    "single output": (config("column", 1), "cross-entropy over a single output is always zero"),
    "broadcast": (config("flat", 1, loss="mse"), r"targets of shape \(N,\) would be broadcast"),
    "no mean": (config("good", loss=f"{__name__}:each"), r"the loss of a batch is shape \(2,\), not a single number"),
    "nothing counts": (config("ignored"), "ignored, validation: no example counts in the loss"),
    "single example": (
        config("one_too_many"),
        "cannot take the last batch of an epoch, of one example, .*--batch-size",
    ),
    "only evaluated": (config("good", model=f"{__name__}:only_evaluated"), "cannot take these data in train mode"),
    "no images": (config("good", augment=("flip",)), r"flip takes images \(N, C, H, W\), not inputs of shape"),
}


@pytest.mark.parametrize(("bad", "says"), BAD.values(), ids=BAD.keys())
@pytest.mark.filterwarnings("error::UserWarning")
def test_what_cannot_be_trained_leaves_nothing_behind(tmp_path: Path, bad: Config, says: str) -> None:
    out = tmp_path / "run"
    with pytest.raises(PnError, match=says) as raised:
        train(bad, out, device="cpu", progress=False)
    assert "\n" not in str(raised.value)
    (failure,) = train_together([bad], [out], device="cpu", progress=False)
    assert str(failure) == str(raised.value)
    (outcome,) = sweep(bad, {"seed": [0]}, out, device="cpu", progress=False)
    assert outcome.failure == str(raised.value)
    assert not list(tmp_path.rglob("*.json"))
    assert not out.exists()


@pytest.mark.parametrize(("data", "split"), [("batches", "train"), ("held_out_batches", "validation")])
def test_loaders_are_refused(tmp_path: Path, data: str, split: str) -> None:
    for call in (train, lambda bad, out, **options: train_together([bad], [out], **options)):
        with pytest.raises(DataError, match=f"the {split} split is a loader; training needs tensors"):
            call(config(data), tmp_path / "run", device="cpu", progress=False)
    assert not (tmp_path / "run").exists()


def test_the_checks_change_no_training(tmp_path: Path, monkeypatch) -> None:
    checked = train(config("good"), tmp_path / "checked", device="cpu", progress=False)
    monkeypatch.setattr("trainers.runs.session.check_trainable", lambda *_: None)
    unchecked = train(config("good"), tmp_path / "unchecked", device="cpu", progress=False)
    for one, other in zip(checked.checkpoints, unchecked.checkpoints, strict=True):
        a, b = one.load(), other.load()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_refused_run_can_be_trained_with_other_data(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        train(config("late"), tmp_path / "run", device="cpu", progress=False)
    train(config("good"), tmp_path / "run", device="cpu", progress=False)
    assert open_run(tmp_path / "run").manifest["status"] == "finished"

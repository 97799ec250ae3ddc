"""Several fits as one: each network ends where it would have ended alone, even if others fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pnanalysis as pn
from pnanalysis.errors import PnError, TrainingError
from pnanalysis.inputs.data import Split, load_data
from pnanalysis.io.writer import RunWriter
from tests.conftest import TINY
from trainers import Config, PersistentPenalty, fit
from trainers.loop.batched_fit import SingleFit, fit_together
from trainers.loop.fit import optimizer_tensors
from trainers.runs.strategies import train, train_together
from trainers.runs.sweep import sweep

BASE = Config(recipe="together", **TINY, iterations=2, epochs=2, checkpoint_every=1)
QUIET = {"device": "cpu", "progress": False}


def network(seed: int = 0) -> nn.Module:
    """Float64, so that two orders of summing agree to 1e-12: convolution, batch norm and what follows."""
    torch.manual_seed(seed)
    convolution = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*convolution, nn.Linear(108, 10)).double()


def digits():
    data = load_data("digits")
    parts = [part.subset(300) for part in (data.train, data.validation)]
    return [replace(part, offset=part.offset.double(), scale=part.scale.double()) for part in parts]


def repelled(model: nn.Module, form: str, n_ends: int, origin: bool, layers) -> PersistentPenalty:
    penalty = PersistentPenalty(model, 0.3, layers, form=form, origin=network(9) if origin else None)
    for seed in range(n_ends):
        penalty.add(network(20 + seed))
    return penalty


@pytest.mark.filterwarnings("ignore:layer '1' of an end point is all zeros")  # batch norm, measured from the start
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize(("form", "origin"), [("absolute", False), ("squared", True), ("cosine", False)])
def test_networks_end_where_they_would_alone(optimizer: str, form: str, origin: bool) -> None:
    train_part, validation = digits()
    options = {"epochs": 2, "batch_size": 64, "optimizer": optimizer, "validation": validation, "weight_decay": 1e-3}
    ends = [0, 1, 3]
    alone, records = [network(seed) for seed in range(3)], []
    for seed, (model, n_ends) in enumerate(zip(alone, ends, strict=True)):
        penalty = repelled(model, form, n_ends, origin, "4" if seed == 1 else "all") if n_ends else None
        records.append(fit(model, train_part, seed=seed, penalty=penalty, **options))
    models = [network(seed) for seed in range(3)]
    fits = [
        SingleFit(m, seed, repelled(m, form, n, origin, "4" if seed == 1 else "all") if n else None)
        for seed, (m, n) in enumerate(zip(models, ends, strict=True))
    ]
    found = fit_together(fits, train_part, **options)
    for one, other in zip(alone, models, strict=True):
        for name, value in one.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-7, atol=1e-9)
    for mine, theirs in zip(found, records, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.train_loss == pytest.approx(b.train_loss, rel=1e-5)  # float32 sums
            assert a.penalty == pytest.approx(b.penalty, rel=1e-5)
            assert (a.train_error, a.validation_error) == pytest.approx((b.train_error, b.validation_error), abs=1e-6)


def test_each_network_has_its_own_augmentation() -> None:
    train_part, _ = digits()
    options = {"epochs": 1, "batch_size": 100, "augment": ("crop", "flip")}
    alone, models = ([network(seed) for seed in range(2)] for _ in range(2))
    for seed, model in enumerate(alone):
        fit(model, train_part, seed=seed, **options)
    fit_together([SingleFit(model, seed) for seed, model in enumerate(models)], train_part, **options)
    for one, other in zip(alone, models, strict=True):
        torch.testing.assert_close(other[4].weight, one[4].weight, rtol=1e-7, atol=1e-9)


def test_a_fit_resumes_from_the_state_of_a_single_one() -> None:
    train_part, _ = digits()
    whole, models, states = network(0), [network(0), network(1)], []
    fit(whole, train_part, epochs=2, batch_size=64)
    for seed, model in enumerate(models):
        fit(
            model, train_part, epochs=1, batch_size=64, seed=seed,
            on_epoch=lambda record, model, optimizer: states.append(
                {name: value.clone() for name, value in optimizer_tensors(optimizer).items()}
            ),
        )  # fmt: skip
    fits = [
        SingleFit(model, seed, optimizer_state=state)
        for seed, (model, state) in enumerate(zip(models, states, strict=True))
    ]
    fit_together(fits, train_part, epochs=2, batch_size=64, start_epoch=1)
    torch.testing.assert_close(models[0][4].weight, whole[4].weight, rtol=1e-7, atol=1e-9)


def test_a_network_whose_loss_explodes_stops_alone() -> None:
    train_part, _ = digits()
    models = [network(0), network(1)]
    with torch.no_grad():
        models[1][4].weight.fill_(torch.inf)
    found = fit_together([SingleFit(model) for model in models], train_part, epochs=2, batch_size=100)
    assert isinstance(found[1], TrainingError)
    assert [record.epoch for record in found[0]] == [1, 2]
    assert all(torch.isfinite(value).all() for value in models[0].state_dict().values())


def test_runs_trained_together_equal_those_trained_alone(tmp_path: Path) -> None:
    configs = [replace(BASE, seed=seed, strategy=strategy) for seed in (0, 1) for strategy in ("partial", "restart")]
    together = train_together(configs, [tmp_path / f"t{i}" for i in range(4)], **QUIET)
    for i, (config, run) in enumerate(zip(configs, together, strict=True)):
        alone = train(config, tmp_path / f"a{i}", **QUIET)
        assert [c.name for c in run.checkpoints] == [c.name for c in alone.checkpoints]
        # float32 round-off, amplified by some fifty steps of training
        np.testing.assert_allclose(run.history.train_loss, alone.history.train_loss, rtol=1e-3)
        assert run.manifest["status"] == "finished"
        assert run.manifest["layers"] == alone.manifest["layers"]


def test_interrupted_runs_resume_to_the_same_end(tmp_path: Path, monkeypatch) -> None:
    configs, outs = [replace(BASE, seed=seed) for seed in (0, 1)], [tmp_path / "a", tmp_path / "b"]
    whole = train_together(configs, [tmp_path / "c", tmp_path / "d"], **QUIET)
    save, n_saves = RunWriter.save_state, 0

    def interrupted(self, *args, **kwargs):
        nonlocal n_saves
        save(self, *args, **kwargs)
        n_saves += 1
        if n_saves == 3:  # the first run is an epoch ahead of the second
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunWriter, "save_state", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_together(configs, outs, save_interval=0.0, **QUIET)
    again = train_together(configs, outs, resume=True, **QUIET)
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_allclose(one.history.train_loss, other.history.train_loss, rtol=1e-3)


def test_sweeps_train_together_and_refuse_other_learning_rates(tmp_path: Path) -> None:
    outcomes = sweep(BASE, {"lam": [0.001, 0.1]}, tmp_path / "grid", together=True, **QUIET)
    assert [outcome.failure for outcome in outcomes] == [None, None]
    assert pn.open_runs(tmp_path / "grid").lam.values.tolist() == [0.001, 0.1]
    again = sweep(BASE, {"lam": [0.001, 0.1]}, tmp_path / "grid", together=True, **QUIET)
    assert all("exists already" in outcome.failure for outcome in again)
    with pytest.raises(PnError, match="differ in lr"):
        sweep(BASE, {"lr": [0.001, 0.1]}, tmp_path / "lr", together=True, **QUIET)


class Branching(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if float(y.sum()) > 0 else 2 * y


class Late(Branching):
    """Branches on a value in evaluation only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.Linear.forward(self, x) if self.training else super().forward(x)


class InPlace(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shift = torch.zeros(3)
        shift += self.bias
        return x @ self.weight.T + shift


class Choosing(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y + y[y > 0].mean()


def _branching_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss = nn.functional.cross_entropy(outputs, targets)
    return loss if loss.item() < 1e9 else 2 * loss


@pytest.mark.parametrize(
    ("kind", "loss", "reason"),
    [
        (Branching, "cross_entropy", "item"),
        (Late, "cross_entropy", "item"),
        (InPlace, "cross_entropy", "shape"),
        (Choosing, "cross_entropy", "dynamic shape"),
        (nn.Linear, _branching_loss, "item"),
    ],
    ids=["branches", "branches in evaluation", "in place", "chooses", "loss"],
)
def test_networks_without_a_batched_form_are_an_error_of_one_sentence(kind: type[nn.Linear], loss, reason: str) -> None:
    x, y = torch.randn(24, 4), torch.randint(3, (24,))
    fits = [SingleFit(kind(4, 3), seed) for seed in range(2)]
    with pytest.raises(TrainingError, match=rf"cannot be trained together: .*{reason}.*leave out --together") as raised:
        fit_together(fits, (x, y), epochs=1, batch_size=8, loss=loss, validation=Split(x, y))
    assert "\n" not in str(raised.value)
    fit(kind(4, 3), (x, y), epochs=1, batch_size=8, loss=loss, validation=Split(x, y))  # as the message advises


def test_networks_that_are_not_alike_are_an_error() -> None:
    data = torch.randn(8, 4), torch.randint(3, (8,))
    with pytest.raises(TrainingError, match="their parameters are not alike"):
        fit_together([SingleFit(nn.Linear(4, 3)), SingleFit(nn.Linear(4, 5))], data, epochs=1)

"""Trainings whose batches are divided among processes: they follow the curve of one, and end together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pnanalysis.curvature.processes import import_before_joining
from pnanalysis.errors import PnError, ProcessLost, TrainingError
from pnanalysis.inputs.data import Split
from pnanalysis.io.runs import RESUME, open_run
from trainers import Config, PersistentPenalty, fit, train
from trainers.loop.processes import OneProcess, SeveralProcesses, check_divisible
from trainers.zoo import models

#: Sums of some thousand terms in another order, a few times eps each, which fifty steps amplify a hundredfold or less.
TOLERANCE = 1e-10


class Everything(nn.Module):
    """Batch normalisation with and without parameters and momentum, kinds of dropout, and a layer that is not used."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(shape[0], 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout2d(0.2),
            nn.Conv2d(4, 4, 3, stride=2, padding=1),
            nn.BatchNorm2d(4, momentum=None, affine=False),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.LazyLinear(10),
        )
        self.unused = nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layers(inputs)
        return outputs


#: network: image size, examples, batch size. Last batches are smaller, down to one example, except ResNet-18's: where
#: batch normalisation sees two values of a channel only, it amplifies round-off a millionfold, in one process, too.
CASES: dict[str, tuple[Callable[..., nn.Module], int, int, int]] = {
    "everything": (Everything, 8, 41, 10),
    "tanh7": (models.tanh7, 8, 43, 8),
    "lenet5": (models.lenet5, 16, 43, 8),
    "resnet18": (models.resnet18, 8, 21, 7),
    "alexnet": (models.alexnet, 16, 23, 7),
}
FAST = ("everything", "tanh7")


def examples(size: int, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(10, (n,), generator=generator)
    means = torch.randn(10, 3, size, size, generator=generator, dtype=torch.float64)
    return means[targets] + torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64), targets


def curve(name: str, distributed: bool) -> dict[str, Any]:
    """At least fifty steps with everything that a training may have."""
    make, size, n, batch_size = CASES[name]
    torch.manual_seed(0)
    model, other = (make((3, size, size)).double() for _ in range(2))
    inputs, targets = examples(size, n)
    for network in (model, other):
        network.eval()(inputs[:2])  # lazy layers
    penalty = PersistentPenalty(model, lam=0.1)
    penalty.add(other)
    records = fit(
        model, (inputs, targets), epochs=-(-50 // -(-n // batch_size)), batch_size=batch_size, optimizer="sgd", lr=1e-3,
        weight_decay=0.01, penalty=penalty, validation=Split(inputs[:20], targets[:20]), augment=("crop", "flip"),
        distributed=distributed,
    )  # fmt: skip
    assert not any("forward" in vars(module) for module in model.modules())
    series = [
        [getattr(r, key) for r in records] for key in ("train_loss", "penalty", "train_error", "validation_error")
    ]
    return {"state": model.state_dict(), "series": torch.tensor(series, dtype=torch.float64)}


def curves(folder: str, names: tuple[str, ...]) -> None:
    torch.save({name: curve(name, distributed=True) for name in names}, f"{folder}/{dist.get_rank()}.pt")


def in_group(rank: int, n: int, folder: str, function: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    import_before_joining()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=n)
    try:
        function(folder, *arguments)
    finally:
        dist.destroy_process_group()  # its threads must not outlive Python


def check_curves(n: int, folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        alone = curve(name, distributed=False)
        assert alone["series"][0, -1] < alone["series"][0, 0]
        for rank in range(n):
            found = torch.load(folder / f"{rank}.pt", weights_only=True)[name]
            for key, value in alone["state"].items():
                torch.testing.assert_close(found["state"][key], value, rtol=TOLERANCE, atol=TOLERANCE)
            # losses are recorded in float32
            torch.testing.assert_close(found["series"], alone["series"], rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 4])
def test_processes_follow_the_curve_of_one_for_all_networks(n: int, tmp_path: Path) -> None:
    mp.spawn(in_group, (n, str(tmp_path), curves, tuple(CASES)), nprocs=n)
    check_curves(n, tmp_path, tuple(CASES))


calls, last_call = 0, 10**9


def stopping_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy that is interrupted at a certain step, in all processes."""
    global calls
    calls += outputs.requires_grad
    if calls == last_call and outputs.requires_grad:
        raise KeyboardInterrupt
    return cross_entropy(outputs, targets)


def runs(folder: str, config: Config) -> None:
    """One run at a stretch, and one that is interrupted in its second iteration and resumed."""
    global calls, last_call
    options: dict[str, Any] = {"device": "cpu", "progress": False, "save_interval": 0.0, "distributed": True}
    train(config, f"{folder}/whole", **options)
    steps, calls = calls, 0
    last_call = steps * 3 // 4
    try:
        train(config, f"{folder}/parts", **options)
    except KeyboardInterrupt:
        dist.barrier()
        assert open_run(f"{folder}/parts").status == "interrupted"
        assert (Path(folder) / "parts" / RESUME).is_file()
    last_call = 10**9
    train(config, f"{folder}/parts", resume=True, **options)


def failures(folder: str, config: Config) -> None:
    """What each process is told where the loss is not finite, a folder is taken, or the other one has gone."""
    rank = dist.get_rank()
    inputs, targets = examples(8, 20)
    inputs[3] = torch.nan
    for name, call in {
        "nan": lambda: fit(models.tanh7((3, 8, 8)).double(), (inputs, targets), epochs=1, distributed=True),
        "taken": lambda: train(config, f"{folder}/whole", device="cpu", progress=False, distributed=True),
    }.items():
        try:
            call()
        except PnError as error:
            torch.save((type(error).__name__, str(error)), f"{folder}/{name}{rank}.pt")
    if rank == 1:
        return  # without a word
    try:
        while True:  # the connection may take a moment to close
            SeveralProcesses(torch.device("cpu")).add_up(torch.zeros(3))
    except ProcessLost as error:
        torch.save(str(error), f"{folder}/lost.pt")


def work(folder: str, config: Config) -> None:
    curves(folder, FAST)
    runs(folder, config)
    failures(folder, config)


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    return replace(
        tiny_config, strategy="persistent", layers="all", iterations=2, epochs=3, batch_size=400,
        loss=f"{__name__}:stopping_loss",
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have left; they are started once, since that takes longest."""
    path = tmp_path_factory.mktemp("processes")
    mp.spawn(in_group, (2, str(path), work, config), nprocs=2)
    return path


def test_two_processes_follow_the_curve_of_one(folder: Path) -> None:
    check_curves(2, folder, FAST)


def test_runs_of_two_processes_are_written_once_and_resume(config: Config, folder: Path) -> None:
    whole, parts = open_run(folder / "whole"), open_run(folder / "parts")
    assert whole.status == parts.status == "finished"
    assert whole.manifest["n_processes"] == parts.manifest["n_processes"] == 2
    assert [c.name for c in whole.checkpoints] == [c.name for c in parts.checkpoints]
    for a, b in zip(whole.checkpoints, parts.checkpoints, strict=True):
        own, other = a.load(), b.load()
        assert all(torch.equal(own[name], other[name]) for name in own)
    assert whole.history.drop_vars("seconds").equals(parts.history.drop_vars("seconds"))


def test_a_run_of_two_processes_is_that_of_one(config: Config, folder: Path, tmp_path: Path) -> None:
    whole, alone = open_run(folder / "whole"), train(config, tmp_path / "alone", device="cpu", progress=False)
    for a, b in zip(whole.ends, alone.ends, strict=True):
        own, other = a.load(), b.load()
        # Adam divides by the root of a mean square: where a gradient is round-off, so is the sign of its first steps
        assert all(torch.allclose(own[name], other[name], rtol=1e-3, atol=1e-5) for name in own)


@pytest.mark.parametrize(("name", "kind", "text"), [
    ("nan", "DivergenceError", "nan at epoch 1, step 1"), ("taken", "RunError", "exists already"),
])  # fmt: skip
def test_errors_of_all_processes_are_said_by_one(folder: Path, name: str, kind: str, text: str) -> None:
    first, second = (torch.load(folder / f"{name}{rank}.pt", weights_only=True) for rank in range(2))
    assert first[0] == kind
    assert text in first[1]
    assert second == ("FailedElsewhere", first[1])


def test_a_process_that_is_gone_is_told_of_in_a_sentence(folder: Path) -> None:
    text = torch.load(folder / "lost.pt", weights_only=True)
    assert "another process has ended" in text
    assert "--resume" in text


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs[:, 0] * targets).sum() / targets.sum()


@pytest.mark.parametrize(
    ("loss", "refused"),
    [
        (cross_entropy, False),
        (nn.MSELoss(), False),
        (nn.CrossEntropyLoss(weight=torch.linspace(1, 2, 10).double()), True),
        (nn.CrossEntropyLoss(ignore_index=int(examples(8, 30)[1][0])), True),
        (nn.CrossEntropyLoss(reduction="sum"), True),
        (lambda outputs, targets: cross_entropy(outputs - outputs.mean(0), targets), True),
        (weighted, True),
    ],
)
def test_losses_that_are_no_means_over_examples_are_refused(loss: Any, refused: bool) -> None:
    inputs, targets = examples(8, 30)
    if isinstance(loss, nn.MSELoss):
        targets = torch.eye(10, dtype=torch.float64)[targets]
    model = models.tanh7((3, 8, 8), width=8).double()
    if not refused:
        check_divisible(model, Split(inputs, targets), loss, 10, 4)
        return
    with pytest.raises(TrainingError, match="cannot be divided"):
        check_divisible(model, Split(inputs, targets), loss, 10, 4)


def test_a_network_that_compares_examples_is_refused() -> None:
    class Centred(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            outputs = inputs.flatten(1)[:, :10]
            return outputs - outputs.mean(0)

    with pytest.raises(TrainingError, match="cannot be divided"):
        check_divisible(Centred(), Split(*examples(8, 30)), cross_entropy, 10, 2)


def test_batches_smaller_than_the_number_of_processes_are_refused() -> None:
    with pytest.raises(TrainingError, match="a batch of 3 cannot be divided among 4 processes"):
        check_divisible(models.tanh7((3, 8, 8)).double(), Split(*examples(8, 30)), cross_entropy, 3, 4)


def test_without_a_group_it_says_what_to_do() -> None:
    with pytest.raises(TrainingError, match="init_process_group"):
        fit(models.tanh7((3, 8, 8)).double(), examples(8, 10), epochs=1, distributed=True)


def test_parts_cover_every_batch_once() -> None:
    part = OneProcess().part_of(7)
    assert (part.rows, part.is_whole, part.counts) == (slice(0, 7), True, True)

"""Runs: what each strategy does, and that a kill at any moment loses nothing but unsaved epochs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pnanalysis.errors import DivergenceError, PnError, RunError, TrainingError
from pnanalysis.io.runs import Run, best_iteration, open_run
from pnanalysis.io.writer import RunWriter
from trainers import Config, train
from trainers.runs.session import draw_layers
from trainers.runs.strategies import train_together

_SECONDS = "seconds"


def same(a: Run, b: Run) -> bool:
    """Whether two runs hold bit-identical checkpoints and histories."""
    if [c.name for c in a.checkpoints] != [c.name for c in b.checkpoints]:
        return False
    for one, other in zip(a.checkpoints, b.checkpoints, strict=True):
        states = one.load(), other.load()
        if any(not torch.equal(states[0][name], states[1][name]) for name in states[0]):
            return False
    return (
        a.history.drop_vars(_SECONDS).equals(b.history.drop_vars(_SECONDS)) and a.manifest["ends"] == b.manifest["ends"]
    )


def test_the_same_seed_gives_the_same_run(short_run: Run, short_config: Config, tmp_path: Path) -> None:
    assert same(short_run, train(short_config, tmp_path / "again", device="cpu", progress=False))
    other = train(replace(short_config, seed=1), tmp_path / "other", device="cpu", progress=False)
    assert not same(short_run, other)


def test_without_strength_persistent_iterations_repeat_the_plain_one(tiny_config: Config, tmp_path: Path) -> None:
    run = train(replace(tiny_config, lam=0.0, iterations=2), tmp_path / "run", device="cpu", progress=False)
    ends = [end.load() for end in run.ends]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_penalty_lowers_the_repelled_layers_overlap_with_earlier_ends(tiny_config: Config, tmp_path: Path) -> None:
    run = train(replace(tiny_config, lam=1.0, layers="fc3"), tmp_path / "run", device="cpu", progress=False)
    ends = [torch.cat([s["fc3.weight"].flatten(), s["fc3.bias"]]) for s in (end.load() for end in run.ends)]
    overlap = [float(end @ ends[0] / ends[0].square().sum()) for end in ends]
    assert overlap[0] > overlap[1] > overlap[2]  # each repelled once more
    assert (run.history.penalty[0] == 0).all()
    assert (run.history.penalty[1:] > 0).all()


def test_restarts_have_the_same_plain_model_and_new_starts(tiny_run: Run, tiny_config: Config, tmp_path: Path) -> None:
    run = train(replace(tiny_config, strategy="restart"), tmp_path / "run", device="cpu", progress=False)
    plain = tiny_run.plain.load()
    assert all(torch.equal(plain[name], value) for name, value in run.plain.load().items())
    starts = [run.trajectory(i)[0].load()["fc1.weight"] for i in range(3)]
    assert not torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[1], starts[2])
    assert (run.history.penalty == 0).all()


def test_random_layers_are_drawn_once_or_each_time(tiny_config: Config) -> None:
    names = [f"fc{i}" for i in range(1, 8)]
    once = [draw_layers(replace(tiny_config, layers="random"), i, names) for i in range(20)]
    each = [draw_layers(replace(tiny_config, layers="random-each"), i, names) for i in range(20)]
    assert len({tuple(layers) for layers in once}) == 1
    assert len({tuple(layers) for layers in each}) > 2
    assert draw_layers(replace(tiny_config, layers="fc2,fc5"), 1, names) == ["fc2", "fc5"]


class _Killed(BaseException):
    """Stands for a kill: nothing in the trainer may catch it."""


@pytest.fixture(scope="module")
def short_config(tiny_config: Config) -> Config:
    """Two iterations of two epochs: every kind of write that a run makes."""
    return replace(tiny_config, iterations=2, epochs=2)


@pytest.fixture(scope="module")
def short_run(short_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of that configuration that was never interrupted."""
    return train(short_config, tmp_path_factory.mktemp("runs") / "short", device="cpu", progress=False)


#: Manifest and start; per iteration two checkpoints, history and state, then history, manifest and history; manifest.
_N_WRITES = 17


@pytest.mark.parametrize(
    "moment",
    [pytest.param(moment, marks=[pytest.mark.slow] if moment % 3 == 0 else []) for moment in range(1, _N_WRITES + 1)],
)
def test_a_run_killed_at_any_write_resumes_to_the_same_end(
    short_run: Run, short_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Every file is written through one rename: die before the ``moment``-th, then resume."""
    writes = 0
    rename = os.replace

    def replace_or_die(source: Path, target: Path) -> None:
        nonlocal writes
        writes += 1
        if writes == moment:
            raise _Killed
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_or_die)
        with pytest.raises(_Killed):
            train(short_config, tmp_path / "run", device="cpu", progress=False, save_interval=0.0)
    run = train(short_config, tmp_path / "run", device="cpu", progress=False, save_interval=0.0, resume=True)
    assert same(run, short_run)
    assert run.manifest["status"] == "finished"
    assert not (run.path / "resume.safetensors").exists()


_KILLED_BY_ITSELF = """
import json, os, signal, sys
import torch
from pnanalysis.io.writer import RunWriter
from trainers import Config, train

settings, out, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
save_state, states = RunWriter.save_state, []

def save_and_die(self, tensors, **position):
    save_state(self, tensors, **position)
    if position == {"iteration": 1, "epoch": 2}:
        os.kill(os.getpid(), signal.SIGKILL)

RunWriter.save_state = save_and_die
train(Config.from_dict(json.loads(settings)), out, device="cpu", progress=False, save_interval=0.0)
"""


@pytest.mark.slow
def test_a_process_killed_hard_resumes_bit_identically(tiny_run: Run, tiny_config: Config, tmp_path: Path) -> None:
    out, threads = tmp_path / "killed", torch.get_num_threads()
    command = [sys.executable, "-c", _KILLED_BY_ITSELF, json.dumps(tiny_config.to_dict()), str(out), str(threads)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    killed = open_run(out)
    assert (killed.manifest["status"], killed.manifest["ends"]) == ("running", [4])
    resumed = train(tiny_config, out, device="cpu", progress=False, resume=True)
    assert same(tiny_run, resumed)


def test_a_run_that_is_being_trained_is_not_resumed_by_another(tiny_config: Config, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(replace(tiny_config, iterations=1), out, device="cpu", progress=False)
    assert not list(out.glob(".*"))  # no lock is left
    other = RunWriter(out, open_run(out).manifest)
    other.lock()
    before = (out / "run.json").read_bytes()
    with pytest.raises(RunError, match=f"being written by process {os.getpid()}"):
        train(replace(tiny_config, iterations=2), out, device="cpu", progress=False, resume=True)
    assert (out / "run.json").read_bytes() == before
    other.release()
    assert len(train(replace(tiny_config, iterations=2), out, device="cpu", progress=False, resume=True).ends) == 2


def test_a_finished_run_can_be_made_longer(tiny_run: Run, tiny_config: Config, tmp_path: Path) -> None:
    train(replace(tiny_config, iterations=2), tmp_path / "run", device="cpu", progress=False)
    longer = train(tiny_config, tmp_path / "run", device="cpu", progress=False, resume=True)
    assert same(longer, tiny_run)


def test_resuming_with_other_settings_is_refused(own_run: Run, tiny_config: Config) -> None:
    with pytest.raises(RunError, match=r"lr=0\.001, not 0\.5"):
        train(replace(tiny_config, iterations=2, epochs=1, lr=0.5), own_run.path, resume=True, progress=False)


def test_a_damaged_resume_state_says_what_to_delete(own_run: Run) -> None:
    (own_run.path / "resume.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    with pytest.raises(RunError, match="delete it"):
        RunWriter(own_run.path, own_run.manifest).load_state()


def test_a_nan_loss_keeps_the_last_good_state_and_marks_the_run(tiny_config: Config, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="epoch 1, step"):
        train(replace(tiny_config, lr=1e38), tmp_path / "run", device="cpu", progress=False)
    run = open_run(tmp_path / "run")
    assert run.manifest["status"] == "diverged"
    assert "epoch 1" in run.manifest["failure"]
    assert all(value.isfinite().all() for value in run.start.load().values())


def test_weights_that_diverge_in_the_last_step_are_not_saved(tiny_config: Config, tmp_path: Path) -> None:
    """One step an epoch: its loss is finite, and so is the error that NaN weights make."""
    config = replace(tiny_config, lr=1e38, batch_size=10_000, epochs=1)
    for name, attempt in (("alone", train), ("together", None)):
        out = tmp_path / name
        if attempt is None:
            assert isinstance(train_together([config], [out], device="cpu", progress=False)[0], DivergenceError)
        else:
            with pytest.raises(DivergenceError, match=r"after epoch 1; try a smaller --lr"):
                attempt(config, out, device="cpu", progress=False)
        run = open_run(out)
        assert (run.manifest["status"], run.ends) == ("diverged", [])
        assert [checkpoint.epoch for checkpoint in run.checkpoints] == [0]


def test_a_diverged_iteration_is_never_the_champion(tiny_run: Run) -> None:
    history = tiny_run.history.copy(deep=True)
    history.validation_error[1, -1] = 0.0
    assert best_iteration(history) == 1
    history.train_loss[1, -1] = np.inf
    assert best_iteration(history) != 1
    with pytest.raises(RunError, match="no iteration ended with finite numbers"):
        best_iteration(history.isel(iteration=[1]))


def test_a_signal_marks_its_run_as_interrupted(tiny_run: Run, tiny_config: Config, tmp_path: Path, monkeypatch) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have their background jobs ignore it
    try:
        with monkeypatch.context() as patch:
            patch.setattr(RunWriter, "save_state", lambda *_, **__: signal.raise_signal(signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                train(tiny_config, tmp_path / "run", device="cpu", progress=False, save_interval=0.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert open_run(tmp_path / "run").manifest["status"] == "interrupted"
    assert same(tiny_run, train(tiny_config, tmp_path / "run", device="cpu", progress=False, resume=True))


def test_a_run_whose_folder_is_removed_does_not_begin_another(tiny_config: Config, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(RunWriter, "save_state", lambda self, *_, **__: shutil.rmtree(self.path))
        with pytest.raises(RunError, match="is gone"):
            train(tiny_config, tmp_path / "run", device="cpu", progress=False, save_interval=0.0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings", [{"lam": -1.0}, {"layers": "fc99"}, {"data": "no-such-data"}, {"model": "lenet6"}])
def test_bad_settings_are_refused_before_anything_is_written(
    tiny_config: Config, tmp_path: Path, settings: dict[str, object]
) -> None:
    with pytest.raises(PnError):
        train(replace(tiny_config, **settings), tmp_path / "run", device="cpu", progress=False)
    assert not (tmp_path / "run").exists()


def test_an_error_marks_its_runs_as_failed(tiny_config: Config, tmp_path: Path, monkeypatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("trainers.runs.session.fit", fails)
    monkeypatch.setattr("trainers.runs.strategies.fit_together", fails)
    with pytest.raises(ZeroDivisionError):
        train(tiny_config, tmp_path / "alone", device="cpu", progress=False)
    with pytest.raises(ZeroDivisionError):
        train_together([tiny_config, tiny_config], [tmp_path / "a", tmp_path / "b"], device="cpu", progress=False)
    for name in ("alone", "a", "b"):
        manifest = open_run(tmp_path / name).manifest
        assert (manifest["status"], manifest["failure"]) == ("failed", "ZeroDivisionError: by nothing")


def test_init_std_draws_every_parameter_normally(tiny_config: Config, tmp_path: Path) -> None:
    config = replace(tiny_config, init_std=0.2, strategy="plain", epochs=1)
    weights = train(config, tmp_path / "run", device="cpu", progress=False).start.load()
    values = torch.cat([value.flatten() for value in weights.values()])
    # standard error of a standard deviation: sigma / sqrt(2 n)
    assert float(values.std()) == pytest.approx(0.2, abs=5 * 0.2 / np.sqrt(2 * len(values)))


def test_a_run_too_large_for_the_disk_does_not_begin(tiny_config: Config, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(RunError, match=r"checkpoints need .*, the disk has .* free"):
        train(replace(tiny_config, iterations=50), tmp_path / "huge", device="cpu", progress=False)
    assert not (tmp_path / "huge").exists()

"""``pntrain``: recipes, custom models, sweeps, failures and interrupts."""

from __future__ import annotations

import os
import shlex
import signal
from pathlib import Path

import pytest

import pnanalysis as pn
from pnanalysis.io.runs import Run, open_run
from tests.cli.conftest import TINY

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_pntrain_trains_a_recipe_and_its_control(run, tmp_path: Path) -> None:
    options = ("--iterations", 2, "--epochs", 2, "--control", "--out", tmp_path / "net")
    done = run("pntrain", "tanh7", *TINY, *options)
    assert done.status == 0, done.err
    assert "champion" in done.out
    assert open_run(tmp_path / "net").manifest["strategy"] == "partial"
    assert open_run(tmp_path / "net-restart").manifest["strategy"] == "restart"
    again = run("pntrain", "tanh7", *TINY, *options)
    assert again.status == 2
    assert "--resume" in again.err
    assert run("pntrain", "tanh7", *TINY, *options, "--resume").status == 0


def test_pntrain_measures_curvature(run, tmp_path: Path) -> None:
    options = ("--iterations", 1, "--epochs", 1, "--device", "cpu", "--quiet")
    done = run("pntrain", "tanh7", *TINY, *options, "--curvature", "--out", tmp_path / "one")
    assert done.status == 0, done.err
    assert "curvature_monitor" in open_run(tmp_path / "one").files
    done = run("pntrain", "tanh7", *TINY, *options, "--curvature-every", 3, "--out", tmp_path / "two")
    assert done.status == 0, done.err
    assert pn.load(tmp_path / "two" / "analysis" / "curvature_monitor.nc").attrs["every"] == 3


def test_pntrain_trains_a_custom_model_and_data(run, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def net():\n    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))\n"
        "def data():\n"
        "    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))\n"
        "    y = x[:, :1].sin()\n"
        "    return {'train': (x[:150], y[:150]), 'validation': (x[150:], y[150:])}\n"
    )
    monkeypatch.chdir(tmp_path)
    own = ("--model", "mine:net", "--data", "mine:data", "--loss", "mse")
    done = run("pntrain", "custom", *own, "--epochs", 3, "--iterations", 2, "--out", "net", "--lam", 0.1)
    assert done.status == 0, done.err
    refused = run("pnanalysis", "saturation", "net")
    assert refused.status == 2
    assert "to run that code, give it again" in refused.err
    done = run("pnanalysis", "saturation", "net", "--model", "mine:net", "--data", "mine:data")
    assert done.status == 0, done.err


REGRESSION = """
import torch
def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
def examples(n):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(n))
    return x, 5 * x[:, :1].sin()
def data():
    return {"train": examples(150), "validation": examples(50)}
def unvalidated():
    return {"train": examples(150)}
"""


def test_squared_errors_are_never_printed_in_per_cent(run, own_run: Run, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "numbers_.py").write_text(REGRESSION)
    monkeypatch.chdir(tmp_path)
    own = ("custom", "--model", "numbers_:net", "--data", "numbers_:data", "--loss", "mse", "--layers", "0")
    done = run("pntrain", *own, "--epochs", 2, "--iterations", 2, "--out", "net")
    assert done.status == 0, done.err
    history = open_run("net").history
    assert history.attrs["error"] == "squared error"
    assert history.validation_error.attrs["long_name"] == "validation squared error"
    value = f"{float(history.validation_error[1, -1]):.4g}"
    lines = [line for line in done.err.splitlines() if line.startswith("custom partial")]
    assert lines[1].startswith("custom partial iteration 1 (2 of 2): loss ")
    assert f"validation squared error {value}, test squared error –, " in lines[1]
    alone = run("pnanalysis", "history", "net").out
    together = run("pnanalysis", "history", "net", own_run.path)
    assert together.status == 0, together.err
    drawn = run("pnanalysis", "history", "net", "--plot", "net.png")
    assert drawn.status == 0, drawn.err
    for table in (done.out, alone):
        assert "validation squared error" in table
        assert value in table
        assert "%" not in table
    assert "nan" not in done.out + done.err + alone
    assert value in together.out
    assert f"{float(own_run.history.validation_error[1, -1]):.2%}" in together.out
    assert "validation error" in together.out
    assert "no validation split" not in done.out


def test_a_champion_chosen_without_validation_is_reported(run, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "numbers_.py").write_text(REGRESSION)
    monkeypatch.chdir(tmp_path)
    own = ("custom", "--model", "numbers_:net", "--data", "numbers_:unvalidated", "--loss", "mse", "--layers", "0")
    note = "there is no validation split: the champion is the iteration with the lowest training loss"
    assert note in run("pntrain", *own, "--epochs", 2, "--iterations", 2, "--out", "net").out
    grid = ("--sweep", "seed=0,1", "--jobs", 1, "--out", "grid", "--epochs", 1)
    assert note in run("pntrain", *own, *grid, "--iterations", 2).out
    assert note not in run("pntrain", *own, "--strategy", "plain", "--epochs", 1, "--out", "plain").out


def test_nan_in_training_is_located_and_loses_nothing(run, tmp_path: Path) -> None:
    done = run("pntrain", "tanh7", *TINY, "--lr", 1e38, "--epochs", 2, "--out", tmp_path / "net", "--quiet")
    assert done.status == 2
    assert "epoch 1, step" in done.err
    assert open_run(tmp_path / "net").manifest["status"] == "diverged"


def test_a_sweep_ends_with_a_table_and_reports_failures(run, tmp_path: Path) -> None:
    small = [
        "--model",
        "tanh7",
        "--model-option",
        "input_shape=[1,8,8]",
        "--model-option",
        "width=8",
        "--data",
        "digits",
    ]
    sweep = ["--epochs", 1, "--iterations", 2, "--sweep", "layers=fc1,nowhere", "--jobs", 1, "--out", tmp_path / "grid"]
    outcome = run("pntrain", "custom", *small, *sweep, "--device", "cpu")
    assert outcome.status == 2
    assert "1 of 2 runs failed" in outcome.err
    assert "layers=fc1" in outcome.out
    assert run("pntrain", "S9", "--sweep", "nothing=1", "--out", tmp_path / "no").status == 2


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_prints_how_to_resume_and_training_does(run, tmp_path, monkeypatch, number, status) -> None:
    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)

    out = tmp_path / "a net"
    command = ("pntrain", "tanh7", *TINY, "--iterations", 2, "--epochs", 1, "--strategy", "persistent", "--out", out)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr("trainers.runs.session.PersistentPenalty", interrupted)
        stopped = run(*command)
    assert signal.getsignal(number) is before
    assert stopped.status == status
    assert stopped.err.splitlines()[-1] == f"interrupted; resume with: {shlex.join(map(str, command))} --resume"
    assert len(open_run(out).ends) == 1
    resumed = run(*command, "--resume")
    assert resumed.status == 0
    assert f"{out}: resuming iteration 1 (2 of 2)" in resumed.err
    again = run(*command, "--resume")
    assert again.status == 0
    assert f"{out}: is complete" in again.err

"""``pnanalysis champion``: what it saves, draws, prints and refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from pnanalysis.cli.options import further
from pnanalysis.io import netcdf
from pnanalysis.io.runs import Run
from pnanalysis.report import write_report
from trainers import Config, train

FAST = ("--no-hessian", "--no-saturation", "--quick", "--device", "cpu")


@pytest.fixture(scope="module")
def study(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A persistent run with its control."""
    folder = tmp_path_factory.mktemp("champion")
    config = replace(tiny_config, strategy="persistent", layers="all", epochs=1)
    train(replace(config, strategy="restart"), folder / "run-restart", device="cpu", progress=False)
    return train(config, folder / "run", device="cpu", progress=False)


def test_the_answers_are_printed_saved_drawn_and_reported(run, study: Run, tmp_path: Path) -> None:
    done = run("pnanalysis", "champion", study.path, *FAST, "--plot", tmp_path / "c.png")
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert any(line.startswith("Another minimum? ") for line in lines)
    assert any(line.startswith("Better? ") for line in lines)
    assert "2 restarts (95 % for one more)" in done.out
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    saved = study.path / "analysis" / "champion.nc"
    assert netcdf.load(saved).attrs["kind"] == "champion"
    assert "null_low" in run("pnanalysis", "info", saved).out
    assert run("pnanalysis", "plot", saved, "-o", tmp_path / "again.svg").status == 0
    page = write_report([study], tmp_path / "report.html").read_text()
    assert "Champion and restarts" in page
    assert "Another minimum? " in page


def test_an_interrupted_command_continues_with_what_all_options_measure(
    run, study: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    champion, given = import_module("pnanalysis.analyses.champion"), []
    inner = champion.compare_selected

    def compared(selection, wanted, *options):
        given.append(wanted)
        if len(given) == 1:
            raise KeyboardInterrupt
        return inner(selection, replace(wanted, eigenpairs=None, blocks=None), *options)

    monkeypatch.setattr(champion, "compare_selected", compared)
    command = ("pnanalysis", "champion", study.path, *FAST, "--all", "--no-sharpness", "--no-learning-coefficient",
               "--n-hessian", 50, "-o", tmp_path / "c.nc")  # fmt: skip
    done = run(*command)
    assert done.status == 130
    lines = list((tmp_path / "c.unfinished" / "lines").glob("*.nc"))
    assert lines
    monkeypatch.setattr(champion, "network_landscape", None)  # no line is needed any more
    done = run(*command)
    assert done.status == 0, done.err
    assert "continuing from what is saved" in done.err
    assert not (tmp_path / "c.unfinished").exists()
    assert [(one.eigenpairs.n, one.blocks.n, one.sharpness) for one in given] == [(50, 50, None)] * 2
    assert {one.learning_coefficient for one in given} == {None}


def test_what_is_measured_besides_is_asked_for_one_by_one_or_all_at_once() -> None:
    nothing = dict.fromkeys(("eigenpairs", "blocks"))
    assert further(False, 9, None, **nothing) == {"eigenpairs": False, "blocks": False}
    assert further(True, 9, 40, **nothing) == {"eigenpairs": {"n": 9}, "blocks": {"n": 9, "n_hvp": 40}}
    assert further(True, 9, 40, eigenpairs=True, blocks=False) == {"eigenpairs": {"n": 9}, "blocks": False}
    assert further(False, 9, None, eigenpairs=None, blocks=True) == {"eigenpairs": False, "blocks": {"n": 9}}


def test_weights_are_plain_champion_and_restarts(run, study: Run, tmp_path: Path) -> None:
    control = study.path.with_name("run-restart")
    ends = [study.path / "checkpoints" / f"iter0{i}" / "epoch001.safetensors" for i in (0, 1)]
    ends.append(control / "checkpoints" / "iter01" / "epoch001.safetensors")
    own = ("--model", "tests.cli.test_champion:network", "--data", "digits", "-o", tmp_path / "w.nc")
    done = run("pnanalysis", "champion", *own, "--weights", *ends, *FAST, "--json")
    assert done.status == 0, done.err
    (table,) = json.loads(done.out)["tables"]
    assert table["rows"][0]["diagnostic"] == "distance of weights"
    assert len(netcdf.load(tmp_path / "w.nc").checkpoint) == 3


def network():
    """The network of the tiny run."""
    from trainers.zoo.models import tanh7

    return tanh7(input_shape=(1, 8, 8), width=16)


def test_without_restarts_it_says_how_to_get_them(run, own_run: Run) -> None:
    done = run("pnanalysis", "champion", own_run.path, *FAST)
    assert done.status == 0, done.err
    assert "--control" in done.out
    assert "restarts (95" not in done.out


def test_what_has_no_champion_is_one_clear_line(run, study: Run) -> None:
    for path, words in ((study.path.with_name("run-restart"), "holds restarts"), (study.path / "no", "no such run")):
        done = run("pnanalysis", "champion", path, *FAST)
        assert done.status == 2
        assert words in done.err
        assert len(done.err.strip().splitlines()) == 1

"""Making cells: order, budget, failures, resuming; and a whole study of digits."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import xarray as xr
from PIL import Image

from pnanalysis.checks import duration
from pnanalysis.errors import DataError, PnError, RunError
from pnanalysis.io.lock import Lock
from pnanalysis.io.runs import open_run
from pnanalysis.reproduce.cells import Cell
from pnanalysis.reproduce.data import prepare
from pnanalysis.reproduce.finish import is_of_setting
from pnanalysis.reproduce.plan import Forecast, Plan, chosen_cells, make_plan
from pnanalysis.reproduce.running import (
    Worker,
    is_trained,
    run_cells,
    set_aside_if_other,
    set_aside_if_other_study,
    study_command,
    training_command,
)
from pnanalysis.reproduce.settings import SCALES
from pnanalysis.reproduce.study import reproduce
from tests.reproduce.handmade import put


class Instant(Worker):
    """Makes cells at once, except those that it is told to fail or to wait for."""

    def __init__(self, plan: Plan, fails: str = "", slow: str = "") -> None:
        super().__init__(plan, "digits", plan.store.out / "work", "cpu")
        self.made: list[str] = []
        self.preload = ()
        self.fails, self.slow = fails, slow

    def make(self, cell: Cell) -> float:
        if cell.id == self.fails:
            raise RunError(f"{cell.id}: no memory")
        if cell.id == self.slow:
            self._run("timeit", "-n1", "-r1", "-s", "import time", "time.sleep(60)")
        put(self.plan, cell, [(0.3, 0.3), (0.2, 0.2)])
        self.made.append(cell.id)
        return 60.0


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return make_plan(["S4", "S3", "S6"], "smoke", 2, tmp_path)


def test_seeds_are_breadth_first_and_costly_experiments_last(plan: Plan) -> None:
    seeds = [cell.seed for cell in plan.cells if cell.experiment != "S6"]
    assert seeds == sorted(seeds)
    assert [cell.id for cell in plan.cells[-2:]] == ["S6-seed0-persistent", "S6-seed0-restart"]


def test_a_cell_that_is_there_is_never_made_again(plan: Plan) -> None:
    first, lines = Instant(plan), list[str]()
    assert run_cells(plan, plan.cells[:3], first, jobs=1, log=lines.append)
    assert first.made == [cell.id for cell in plan.cells[:3]]
    assert lines[0] == "3 of 3 cells to do: 3 cells of unknown length"
    assert lines[-1].endswith("3 of 3 cells, all done")
    second = Instant(plan)
    assert run_cells(plan, plan.cells, second, jobs=2, log=lines.append)
    assert sorted(second.made) == sorted(cell.id for cell in plan.cells[3:])
    assert run_cells(plan, plan.cells, third := Instant(plan), jobs=2)
    assert third.made == []


def test_a_failure_does_not_stop_the_others(plan: Plan) -> None:
    worker = Instant(plan, fails=plan.cells[1].id)
    with pytest.raises(RunError, match=r"1 of 10 cells could not be made \(S\S+: no memory\); the others are done"):
        run_cells(plan, plan.cells, worker, jobs=2, log=lambda line: None)
    assert len(worker.made) == len(plan.cells) - 1


def test_the_budget_ends_what_is_running(plan: Plan) -> None:
    worker = Instant(plan, slow=plan.cells[1].id)
    started = time.monotonic()
    lines: list[str] = []
    assert not run_cells(plan, plan.cells, worker, jobs=1, minutes=0.05, log=lines.append)
    assert time.monotonic() - started < 30
    assert worker.made == [plan.cells[0].id]
    assert lines[-1].startswith("stopped after 0.05 minutes with 9 of 10 cells to do: about 4 s left, and 6 cells of")
    assert lines[-1].endswith("run the same command again to continue")
    assert run_cells(plan, plan.cells, Instant(plan), jobs=1, log=lambda line: None)


def test_two_commands_do_not_share_a_folder(plan: Plan) -> None:
    worker = Instant(plan)
    worker.work.mkdir(parents=True)
    lock = Lock(worker.work)
    lock.acquire()
    with pytest.raises(RunError, match="is being written"):
        run_cells(plan, plan.cells, worker, jobs=1)
    lock.release()


def test_forecasts_follow_the_cells_that_are_done(plan: Plan, tmp_path: Path) -> None:
    put(plan, Cell("S4", "", 0, "restart"), [(0.3, 0.3)], seconds=119.5)
    forecast = Forecast(plan, tmp_path / "work")
    assert forecast.left([Cell("S4", "", 1, "restart"), Cell("S4", "", 1, "persistent")], 2) == "about 2 min left"
    both = [Cell("S4", "", 1, "restart"), Cell("S6", "", 0, "restart")]
    assert forecast.left(both, 1) == "about 2 min left, and 1 cells of unknown length"
    assert [duration(seconds) for seconds in (5, 90, 3700)] == ["5 s", "2 min", "1 h 02 min"]


def test_a_training_that_was_not_timed_tells_nothing_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of S1, interrupted before its cell was saved."""
    plan = make_plan(["S1", "S4"], "smoke", 1, tmp_path)
    for cell in (Cell("S1", "", 0, "persistent"), Cell("S4", "", 0, "restart")):
        (tmp_path / cell.id).mkdir()
        (tmp_path / cell.id / "history.nc").touch()

    def begun(path: Path) -> SimpleNamespace:
        timed = {} if path.name.startswith("S1") else {"seconds": (("iteration", "epoch"), [[20.0, 40.0]])}
        manifest = {"config": {"iterations": 3, "epochs": 2}}
        return SimpleNamespace(history=xr.Dataset(timed), manifest=manifest)

    monkeypatch.setattr("pnanalysis.reproduce.plan.open_run", begun)
    forecast = Forecast(plan, tmp_path)
    # each of S4 takes three minutes, and of one of them a minute is done
    assert forecast.left(plan.cells, 1) == "about 5 min left, and 2 cells of unknown length"
    assert forecast.progress(Cell("S4", "", 0, "restart")) == "S4-seed0-restart 33 %"
    assert forecast.progress(plan.cells[0]) == "S1-seed0-persistent"


def test_commands_are_those_of_the_trainer(tmp_path: Path) -> None:
    import typer

    import trainers.cli

    command = typer.main.get_command(trainers.cli.app)
    for scale, chosen in SCALES.items():
        for cell in make_plan(["all"], scale, 1, tmp_path).cells:
            setting = chosen.settings[cell.experiment]
            if setting.recipe == "kink":
                assert study_command(cell, setting, tmp_path, "cpu")[0] == "trainers.runs.kink_study"
                continue
            arguments = training_command(cell, setting, tmp_path / "run", "digits", "cpu")[1:]
            command.make_context("pntrain", list(arguments))
            assert ("--strategy" in arguments) == (cell.arm == "restart")


def test_a_training_of_earlier_settings_makes_way(tmp_path: Path) -> None:
    plan = make_plan(["S5", "S4"], "cpu", 1, tmp_path)
    s5, s4 = Cell("S5", "", 0, "restart"), Cell("S4", "", 0, "persistent")

    def begin(cell: Cell, n_train: int, **changed: Any) -> Path:
        setting, run = plan.setting(cell.experiment), tmp_path / cell.id
        run.mkdir()
        config = {"recipe": setting.recipe, **setting.training(cell.variant, cell.arm), **changed}
        manifest = {"format": "pnanalysis-run", "schema_version": 1, "id": "a", "recipe": setting.recipe,
                    "config": config, "model": {"name": "lenet5"}, "data": {"name": "x", "n_train": n_train},
                    "ends": [], "champion": None}  # fmt: skip
        (run / "run.json").write_text(json.dumps(manifest))
        set_aside_if_other(cell, setting, run)
        return run

    aside = []
    for n_train, changed in ((10_000, {"epochs": 6}), (10_000, {"model_options": {}}), (5_000, {})):
        assert not begin(s5, n_train, **changed).exists()
        aside.append(f"{s5.id}.other{len(aside) or ''}")
    assert sorted(folder.name for folder in tmp_path.iterdir()) == aside
    for cell, n_train, changed in ((s5, 9_999, {"iterations": 3}), (s4, 50_000, {})):  # these go on
        assert begin(cell, n_train, **changed).is_dir()
    begun: dict[str, Any] = {
        "config": {"recipe": "alexnet", **plan.setting("S5").training("", "restart")},
        "data": {"n_train": 10_000},
    }
    assert is_of_setting(begun, s5, plan.setting("S5"))
    begun["config"]["iterations"] = 3  # may go on, but is no result
    assert not is_of_setting(begun, s5, plan.setting("S5"))


def test_a_finished_training_with_fewer_iterations_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(["S4"], "smoke", 1, tmp_path)
    cell, setting = Cell("S4", "", 0, "persistent"), plan.setting("S4")
    short = replace(setting, options={**setting.options, "iterations": 1, "epochs": 1})
    worker = Worker(plan, "digits", tmp_path / "work", "cpu")
    run = tmp_path / "work" / cell.id
    commands: list[str] = []
    train = worker._run

    def noted(module: str, *arguments: str) -> str:
        commands.append(module)
        return train(module, *arguments)

    monkeypatch.setattr(worker, "_run", noted)
    try:
        for iterations in (1, 2, 2):
            wanted = replace(short, options={**short.options, "iterations": iterations})
            worker._train(cell, wanted, run, "digits")
            assert is_trained(cell, wanted, run)
        assert len(commands) == 2
        assert open_run(run).history.sizes["iteration"] == 2
    finally:
        worker.close()


def test_a_study_of_other_settings_makes_way(tmp_path: Path) -> None:
    plan = make_plan(["S2"], "smoke", 1, tmp_path)
    setting = plan.setting("S2")
    chain, restart = (Cell("S2", "kink6", 0, arm) for arm in ("persistent", "restart"))
    more, longer = (replace(setting, options={**setting.options, name: 5000}) for name in ("iterations", "epochs"))
    aside = {chain.id: 1, restart.id: 2}  # a chain goes on with more iterations, its restarts do not
    for cell in (chain, restart):
        for wanted in (setting, setting, more, replace(longer, options={**longer.options, "iterations": 5000})):
            set_aside_if_other_study(cell, wanted, tmp_path / cell.id)
            (tmp_path / cell.id / "study.nc").touch()
        assert len(list(tmp_path.glob(f"{cell.id}.other*"))) == aside[cell.id]


def test_controls_of_the_sweep_are_trained_once_for_all_strengths(tmp_path: Path) -> None:
    cells = make_plan(["S9-sweep"], "cpu", 1, tmp_path).cells
    assert sum(cell.arm == "persistent" for cell in cells) == 32
    controls = {cell.variant for cell in cells if cell.arm == "restart"}
    assert len(controls) == 8
    assert {cell.variant.rpartition("-lam")[0] for cell in cells if cell.arm == "persistent"} == controls
    setting = SCALES["cpu"].settings["S9-sweep"]
    assert setting.training("width64-std0.3", "restart")["init_std"] == 0.3


def test_names_that_do_not_exist_are_refused(tmp_path: Path, plan: Plan) -> None:
    with pytest.raises(PnError, match="no experiment 'S10'; there are S1"):
        make_plan(["S10"], "smoke", 1, tmp_path)
    with pytest.raises(PnError, match="unknown scale"):
        make_plan(["S1"], "huge", 1, tmp_path)
    with pytest.raises(PnError, match=r"no cell 'S4'; there are 10"):
        chosen_cells(plan, ["S4"])
    assert make_plan(["s9"], "smoke", 1, tmp_path).experiments == ("S9", "S9-sweep")
    assert make_plan(["S4", "all"], "smoke", 1, tmp_path).experiments == tuple(SCALES["smoke"].settings)


def test_a_smaller_training_set_has_the_first_images_of_each_class(tmp_path: Path) -> None:
    for split, n in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "all" / split / name).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (2, 2)).save(tmp_path / "all" / split / name / f"{i}.png")
    spec = prepare(f"imagefolder:{tmp_path / 'all'}", 4, tmp_path / "work")
    files = {str(f.relative_to(spec.removeprefix("imagefolder:"))) for f in Path(spec[12:]).rglob("*.png")}
    assert files == {f"train/{c}/{i}.png" for c in ("cat", "dog") for i in (0, 1)} | {
        f"test/{c}/{i}.png" for c in ("cat", "dog") for i in (0, 1)
    }  # fmt: skip
    assert prepare(f"imagefolder:{tmp_path / 'all'}", 4, tmp_path / "work") == spec
    (tmp_path / "all" / "train" / "cat" / "0.png").write_bytes(b"changed")
    (tmp_path / "all").rename(tmp_path / "moved")
    moved = prepare(f"imagefolder:{tmp_path / 'moved'}", 4, tmp_path / "work")
    assert moved != spec
    assert Path(moved[12:], "train/cat/0.png").read_bytes() == b"changed"
    (tmp_path / "moved").rename(tmp_path / "all")
    assert prepare("digits", None, tmp_path) == "digits"
    with pytest.raises(DataError, match="needs --data imagefolder:PATH"):
        prepare("cifar10", 10, tmp_path)
    with pytest.raises(DataError, match="has 4 images, 50 are needed"):
        prepare(f"imagefolder:{tmp_path / 'all'}", 100, tmp_path / "other")


@pytest.mark.slow
def test_the_command_makes_a_cell_and_a_page_which_another_folder_gets_again(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    """A training and its measures, in processes of their own; what is kept is the same text again, but for its cost."""
    name, made = "S9-sweep-width32-xavier-lam1-seed0-persistent", []
    for out in (tmp_path / "first", tmp_path / "second"):
        done = run("pnanalysis", "reproduce", "S9", "--out", out, "--seeds", 1, "--only", name, "--device", "cpu")
        assert done.status == 0, done.err
        assert [cell.name for cell in (out / "cells").iterdir()] == [name]
        record = json.loads((out / "cells" / name / "cell.json").read_text())
        assert record["status"] == "finished"
        assert record["config"]["lam"] == 1.0
        assert record.pop("cost")["epochs"] == 4
        assert not list((out / "work").glob("S9*"))  # weights go once their numbers are saved
        lines = (out / "cells" / name / "history.json").read_text().splitlines()
        history = [line for line in lines if not line.startswith('  "seconds"')]
        assert len(history) == len(lines) - 1
        activity = (out / "cells" / name / "saturation.json").read_bytes()
        made.append((record, history, activity, (out / "RESULTS.md").read_bytes()))
    assert made[0] == made[1]
    text = made[0][-1]
    assert b"1 of 2 points have a cell" in text
    assert b"| 32 | Xavier (0.177) | 1 | 0." in text
    # the next call only writes the page
    assert run("pnanalysis", "reproduce", "S9", "--out", tmp_path / "first", "--seeds", 1, "--tables").status == 0
    assert (tmp_path / "first" / "RESULTS.md").read_bytes() == text
    assert run("pnanalysis", "reproduce", "S12", "--out", tmp_path).status == 2


@pytest.mark.slow
def test_all_of_the_smoke_scale_twice(tmp_path: Path) -> None:
    made = []
    for name in ("first", "second"):
        page = reproduce(["all"], "smoke", tmp_path / name, device="cpu", log=lambda line: None)
        figures = {file.name: file.read_bytes() for file in (tmp_path / name / "figures").iterdir()}
        made.append((page.read_bytes(), figures))
    assert made[0] == made[1]
    assert b"no cell is done" not in made[0][0]
    assert b"Trainings that failed" not in made[0][0]

"""Run directories: what is written is read again, and damage is reported in one clear error."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pnanalysis import schema
from pnanalysis.analyses.history import history
from pnanalysis.errors import ModelError, RunError
from pnanalysis.io import netcdf
from pnanalysis.io.runs import MANIFEST, Run, open_run
from pnanalysis.io.weights import read_weights
from pnanalysis.io.writer import RunWriter
from pnanalysis.schema import error_kind


@pytest.fixture
def own_run(tiny_run: Run, tmp_path: Path) -> Run:
    """A copy of the finished run, to be damaged at will."""
    shutil.copytree(tiny_run.path, tmp_path / "own")
    return open_run(tmp_path / "own")


def test_a_finished_run_names_start_plain_champion_and_ends(tiny_run: Run) -> None:
    assert tiny_run.start.name == "iter00/epoch000"
    assert tiny_run.plain.name == "iter00/epoch004"
    assert [end.name for end in tiny_run.ends] == [f"iter0{i}/epoch004" for i in range(3)]
    last = tiny_run.history.validation_error.isel(epoch=-1)
    assert tiny_run.champion.iteration == int(last.values.argmin())


def with_champion(run: Run, champion: int | None) -> Run:
    """The run as if this iteration had the lowest validation error."""
    return Run(run.path, run.manifest | {"champion": champion})


def test_the_challenger_is_the_best_iteration_after_the_plain_one(tiny_run: Run) -> None:
    errors = tiny_run.history.validation_error.isel(epoch=-1).values
    assert tiny_run.challenger.iteration == 1 + int(errors[1:].argmin())
    assert tiny_run.select(["challenger"]) == {"challenger": tiny_run.challenger}
    changed = with_champion(tiny_run, 0)
    changed.history.validation_error[:, -1] = [0.1, 0.3, 0.2]
    assert (changed.champion, changed.challenger.iteration) == (changed.plain, 2)
    changed.history.validation_error[:] = np.nan  # no validation split: the training loss decides
    changed.history.train_loss[:, -1] = [0.1, 0.2, 0.3]
    assert changed.challenger.iteration == 1


def test_a_run_of_the_plain_model_alone_has_no_challenger(tiny_run: Run) -> None:
    alone = Run(tiny_run.path, tiny_run.manifest | {"champion": 0, "ends": tiny_run.manifest["ends"][:1]})
    assert alone.contenders == ("plain", "champion")
    with pytest.raises(RunError, match="no iteration after the plain model"):
        alone.select(["challenger"])


@pytest.mark.parametrize(("champion", "second"), [(None, "champion"), (0, "challenger"), (2, "champion")])
def test_contenders_are_two_different_end_points(tiny_run: Run, champion: int | None, second: str) -> None:
    assert with_champion(tiny_run, champion).contenders == ("plain", second)


def test_a_run_says_which_it_is(tiny_run: Run) -> None:
    assert repr(tiny_run) == f"Run('{tiny_run.path}': tiny, {len(tiny_run.checkpoints)} checkpoints)"


@pytest.mark.parametrize(("champion", "other", "name"), [(0, 0, "challenger"), (0, 1, "champion"), (1, 0, "champion")])
def test_a_plain_champion_gives_way_beside_the_same_network(
    tiny_run: Run, champion: int, other: int, name: str
) -> None:
    run = with_champion(tiny_run, champion)
    assert run.champion_beside([with_champion(tiny_run, other)]) == name
    assert run.champion_beside([]) == "champion"
    run.manifest["strategy"] = "restart"
    assert run.champion_beside([with_champion(tiny_run, other)]) == "champion"


def test_checkpoints_are_equal_to_the_last_bit_or_not_at_all(own_run: Run) -> None:
    assert own_run.plain.equals(own_run.plain)
    assert not own_run.plain.equals(own_run.challenger)
    state = own_run.plain.load()
    name, values = next((name, values) for name, values in state.items() if values.is_floating_point())
    nudged = values.clone()
    nudged.view(-1)[0] = torch.nextafter(nudged.view(-1)[0], torch.tensor(torch.inf))
    RunWriter(own_run.path, own_run.manifest).save_checkpoint(0, 99, state | {name: nudged})
    (other,) = open_run(own_run.path).select(["iter00/epoch099"]).values()
    assert not own_run.plain.equals(other)


def test_every_trajectory_starts_at_the_shared_initial_point(tiny_run: Run) -> None:
    for iteration in range(3):
        path = tiny_run.trajectory(iteration)
        assert path[0] == tiny_run.start
        assert [checkpoint.epoch for checkpoint in path] == [0, 1, 2, 3, 4]


def test_a_trajectory_whose_end_or_start_is_missing_is_refused(own_run: Run) -> None:
    (end,) = own_run.select(["iter01"]).values()
    end.path.unlink()
    with pytest.raises(RunError, match=rf"no checkpoint iter01/epoch{end.epoch:03d}"):
        open_run(own_run.path).trajectory(1)
    run = open_run(own_run.path)
    assert run.trajectory(0)[0] == run.start
    run.manifest["strategy"] = "restart"  # whose iterations have starting points of their own
    with pytest.raises(RunError, match="no checkpoint iter02/epoch000"):
        run.trajectory(2)


def test_select_gives_checkpoints_under_the_requested_names(tiny_run: Run) -> None:
    chosen = tiny_run.select(["plain", "iter02", "iter01/epoch003"])
    assert list(chosen) == ["plain", "iter02", "iter01/epoch003"]
    assert chosen["iter02"].epoch == 4
    assert len(tiny_run.select(["all"])) == 13


@pytest.mark.parametrize("name", ["best", "iter09", "iter00/epoch077"])
def test_an_error_about_an_unknown_checkpoint_names_those_that_exist(tiny_run: Run, name: str) -> None:
    with pytest.raises(RunError, match="iter"):
        tiny_run.select([name])


def test_results_gather_history_and_saved_analyses(own_run: Run) -> None:
    assert list(own_run.results.children) == ["history"]


def test_the_manifest_records_what_is_needed_to_repeat_the_run(tiny_run: Run) -> None:
    manifest = tiny_run.manifest
    assert manifest["status"] == "finished"
    assert manifest["config"]["lam"] == 0.1
    assert len(manifest["data"]["fingerprint"]) == len(manifest["data"]["split_hash"]) == 16
    assert {"torch", "numpy", "python"} <= manifest["versions"].keys()
    assert all(layers == manifest["layers"][0] and len(layers) == 1 for layers in manifest["layers"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / MANIFEST).unlink(), "no run.json"),
        (lambda path: (path / MANIFEST).write_text("{"), "unreadable"),
        (lambda path: (path / MANIFEST).write_text('{"name": "something else"}'), "not a manifest"),
        (lambda path: (path / MANIFEST).write_text('{"format": "pnanalysis-run", "id": "x"}'), "lacks"),
        (lambda path: (path / MANIFEST).write_text('{"format": "pnanalysis-run", "schema_version": 99}'), "newer"),
    ],
)
def test_a_damaged_run_gives_one_clear_error(own_run: Run, damage, message: str) -> None:
    damage(own_run.path)
    with pytest.raises(RunError, match=message):
        open_run(own_run.path)


def test_the_error_about_a_missing_run_tells_how_to_train_one(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="pntrain"):
        open_run(tmp_path / "nowhere")


def test_a_damaged_history_is_an_error_not_a_crash(own_run: Run) -> None:
    (own_run.path / "history.nc").write_bytes(b"not NetCDF")
    with pytest.raises(schema.SchemaError, match="not a readable"):
        _ = open_run(own_run.path).history


def test_a_new_run_never_overwrites_an_old_one(own_run: Run) -> None:
    with pytest.raises(RunError, match="exists already"):
        RunWriter.create(own_run.path, {})


def test_tied_and_strided_tensors_come_back_equal(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", {})
    base = torch.arange(12.0).reshape(3, 4)
    writer.save_checkpoint(0, 0, {"a": base, "tied": base, "turned": base.T})
    loaded = read_weights(tmp_path / "run/checkpoints/iter00/epoch000.safetensors")
    assert torch.equal(loaded["tied"], base)
    assert torch.equal(loaded["turned"], base.T)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-4], lambda raw: b"not weights"])
def test_damaged_resume_state_is_one_clear_error(own_run: Run, damage) -> None:
    writer = RunWriter(own_run.path, own_run.manifest)
    assert writer.load_state() is None
    writer.save_state({"a": torch.arange(3)}, iteration=1, epoch=2)
    tensors, position = writer.load_state()
    assert torch.equal(tensors["a"], torch.arange(3))
    assert position == {"iteration": 1, "epoch": 2}
    file = own_run.path / "resume.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(RunError, match="damaged .*; delete it to repeat the iteration"):
        writer.load_state()


def test_a_full_disk_keeps_the_old_file_and_advises_to_make_room(own_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (own_run.path / MANIFEST).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    writer = RunWriter(own_run.path, own_run.manifest)
    with pytest.raises(RunError, match="disk is full.*intact"):
        writer.update(status="changed")
    assert (own_run.path / MANIFEST).read_bytes() == before
    assert not list(own_run.path.glob(".*"))


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("run-by-the-pickle",)


@pytest.mark.parametrize(
    ("suffix", "message"), [(".safetensors", "refused.*a pickle"), (".pt", "more than plain tensors or is damaged")]
)
def test_a_pickle_posing_as_weights_is_refused_and_never_run(
    tmp_path: Path, suffix: str, message: str, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(ModelError, match=message):
        read_weights(file)
    assert not (tmp_path / "run-by-the-pickle").exists()


def test_a_state_dict_saved_by_torch_is_read(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 3)
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "nested.pt")
    assert torch.equal(read_weights(tmp_path / "nested.pt")["weight"], model.weight)


def test_the_manifest_is_plain_json(tiny_run: Run) -> None:
    written = json.loads((tiny_run.path / MANIFEST).read_text())
    assert len(written.pop("sha256")) == 64
    assert written == tiny_run.manifest


def test_each_run_keeps_its_own_kind_of_error(own_run: Run, tmp_path: Path) -> None:
    assert own_run.history.attrs["error"] == "share"
    other = tmp_path / "other"
    shutil.copytree(own_run.path, other)
    numbers = own_run.history.assign_attrs(error="squared error")
    netcdf.save(numbers, other / "history.nc")
    old = own_run.history
    del old.attrs["error"]
    netcdf.save(old, own_run.path / "history.nc")
    joined = history(open_run(own_run.path), open_run(other))
    assert [error_kind(joined.sel(run=name)) for name in joined.run.values] == ["share", "squared error"]
    assert "error" not in joined.attrs
    assert error_kind(history(open_run(own_run.path))) == "share"
    assert error_kind(history(open_run(other))) == "squared error"

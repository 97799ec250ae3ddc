"""Cells are stored whole, portable, and only for the settings that they were made with."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from pnanalysis import schema
from pnanalysis.errors import RunError, SchemaError
from pnanalysis.reproduce import numbers
from pnanalysis.reproduce.cells import RECORD, Cell, Store, planned
from pnanalysis.reproduce.plan import make_plan
from pnanalysis.reproduce.settings import SCALES
from tests.reproduce.handmade import put, put_failed

CELL = Cell("S4", "", 0, "persistent")


def test_ids_are_legible_and_distinct() -> None:
    assert Cell("S3", "init1", 2, "restart").id == "S3-init1-seed2-restart"
    for scale in SCALES:
        ids = [cell.id for cell in make_plan(["all"], scale, 3, Path("x")).cells]
        assert len(set(ids)) == len(ids)


def test_a_cell_comes_back_as_it_was(tmp_path: Path) -> None:
    plan = make_plan(["S4"], "smoke", 1, tmp_path)
    put(plan, CELL, [(0.3, 0.31), (0.2, 0.25)])
    (result,) = plan.results("S4", "", "persistent")
    assert result.is_finished
    assert result.champion == 1
    np.testing.assert_array_equal(result.final_errors("test"), [0.31, 0.25])
    put_failed(plan, Cell("S4", "", 0, "restart"), "the loss is not finite")
    (failed,) = plan.results("S4", "", "restart")
    assert not failed.is_finished
    assert failed.failure == "the loss is not finite"


def test_datasets_are_kept_to_six_digits_with_their_labels(tmp_path: Path) -> None:
    values = np.array([[np.pi * 1e-7, np.nan, np.inf], [-np.inf, 0.0, 1234567.8]])
    ds = xr.Dataset({"value": (("a", "b"), values, {"long_name": "value", "units": "1"})}, {"a": ["x", "y"]})
    ds["count"] = ("a", [1, 2])
    (tmp_path / "ds.json").write_text(numbers.as_text(ds.assign_attrs(n=np.int64(3), share=0.1)))
    found = numbers.load(tmp_path / "ds.json")
    np.testing.assert_allclose(found.value.values, values, rtol=1e-5)
    assert found["count"].dtype == np.int64
    assert found.a.values.tolist() == ["x", "y"]
    assert found.value.attrs == {"long_name": "value", "units": "1"}
    assert found.attrs == {"n": 3, "share": 0.1}
    empty = xr.Dataset({"value": (("a", "b"), np.empty((0, 2)))})
    (tmp_path / "empty.json").write_text(numbers.as_text(empty))
    assert numbers.load(tmp_path / "empty.json").value.size == 0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"attrs": {}, "coords": {}}', '{"variables": {"a": 1}}'])
def test_damaged_datasets_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(SchemaError, match="restore it"):
        numbers.load(tmp_path / "ds.json")


def test_nothing_tells_of_a_machine(tmp_path: Path) -> None:
    variables = {name: (v.dims, np.zeros([1] * len(v.dims))) for name, v in schema.SCHEMAS["end_points"].items()}
    ds = schema.finish(xr.Dataset(variables), "end_points", data="imagefolder:/home/me/cifar", run="work", data_n=3)
    store = Store(tmp_path)
    path = store.save(CELL, planned(CELL, "smoke", SCALES["smoke"].settings["S4"]), {"end_points": ds})
    text = (path / "end_points.json").read_text()
    assert "/home" not in text
    assert "command" not in text
    assert '"data_n": 3' in text


def test_cells_of_other_settings_are_refused(tmp_path: Path) -> None:
    plan = make_plan(["S4"], "smoke", 1, tmp_path)
    put(plan, CELL, [(0.3, 0.3)])
    setting = plan.setting("S4")
    changed = replace(setting, options={**setting.options, "epochs": 3})
    with pytest.raises(RunError, match="was made with options .*'epochs': 2.* not .*'epochs': 3.*another --out"):
        plan.store.load(CELL, "smoke", changed)
    with pytest.raises(RunError, match="scale 'smoke', not 'cpu'"):
        plan.store.load(CELL, "cpu", setting)
    (plan.store.path(CELL) / RECORD).write_text("{}")
    with pytest.raises(RunError, match="not the record of a cell"):
        plan.store.load(CELL, "smoke", setting)


def test_cells_of_other_defaults_or_data_are_not_compared(tmp_path: Path) -> None:
    plan = make_plan(["S4"], "smoke", 2, tmp_path)

    def put_with(seed: int, data: dict[str, str], **config: object) -> None:
        cell = Cell("S4", "", seed, "persistent")
        record = {**planned(cell, "smoke", plan.setting("S4")), "status": "failed", "data": data}
        plan.store.save(cell, {**record, "config": {"epochs": 7 + seed, "seed": seed, **config}}, {})

    put_with(0, {"name": "imagefolder", "fingerprint": "a"}, lr=0.001, old=1)
    put_with(1, {"name": "cifar10", "fingerprint": "a"}, lr=0.001, new=2)
    plan.check()  # epochs are an option, which has been checked, and a setting that one version lacks is none
    shutil.rmtree(tmp_path / "cells" / "S4-seed1-persistent")
    put_with(1, {"name": "imagefolder", "fingerprint": "b"}, lr=0.001)
    with pytest.raises(
        RunError, match="S4-seed1-persistent: was made with 'b' for the fingerprint of the data, and S4"
    ):
        plan.check()
    shutil.rmtree(tmp_path / "cells" / "S4-seed1-persistent")
    put_with(1, {"name": "imagefolder", "fingerprint": "a"}, lr=0.01)
    with pytest.raises(
        RunError, match="with 0.01 for the recipe's lr, and S4-seed0-persistent with 0.001; .*another --out"
    ):
        plan.check()

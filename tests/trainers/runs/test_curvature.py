"""Curvature along the trainings of a run: the trainings stay the same, and interrupted ones leave no gap."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import pnanalysis as pn
from pnanalysis.errors import TrainingError
from pnanalysis.io.writer import RunWriter
from tests.trainers.runs.test_strategies import same
from trainers import Config, train
from trainers.recipes import configure, find_recipe
from trainers.runs.sweep import sweep


class _Killed(BaseException):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    return replace(tiny_config, iterations=2, epochs=2, batch_size=400)


def test_an_interrupted_run_resumes_with_the_measurements_of_an_uninterrupted_one(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cheap = {"expected_products": 10, "trace_probes": 0, "n": 100, "tolerance": 0.05, "data_error": "none"}
    few = partial(pn.CurvatureMonitor, **cheap)
    monkeypatch.setattr("trainers.runs.curvature.CurvatureMonitor", few)
    plain = train(config, tmp_path / "plain", device="cpu", progress=False)
    run = train(config, tmp_path / "watched", device="cpu", progress=False, curvature=3)
    assert same(run, plain)
    ds = pn.load(run.path / "analysis" / "curvature_monitor.nc")
    steps = -(-run.manifest["data"]["n_train"] // config.batch_size)
    assert ds.iteration.values.tolist() == [0, 1]
    assert ds.step.values.tolist() == list(range(0, 2 * steps + 1, 3))
    assert ds.attrs["run_id"] == run.manifest["id"]
    save_state = RunWriter.save_state

    def save_and_die(self: RunWriter, *given: object, **position: int) -> None:
        save_state(self, *given, **position)
        if position == {"iteration": 1, "epoch": 1}:
            raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunWriter, "save_state", save_and_die)
        with pytest.raises(_Killed):
            train(config, tmp_path / "net", device="cpu", progress=False, save_interval=0.0, curvature=3)
    again = train(config, tmp_path / "net", device="cpu", progress=False, resume=True, curvature=3)
    assert same(again, plain)
    found = pn.load(again.path / "analysis" / "curvature_monitor.nc")
    assert set(ds.step.values.tolist()) <= set(found.step.values.tolist())  # and the one at which it was resumed
    common = found.sel(step=ds.step)
    for name in ("loss", "gradient_norm", "threshold"):
        np.testing.assert_allclose(common[name], ds[name], rtol=1e-5)
    np.testing.assert_allclose(common.lambda_max, ds.lambda_max, rtol=0.1)  # from another start
    assert found.attrs["training_seconds"] > 0
    assert len(pn.plots.plot(found).axes) == 4
    assert again.files["curvature_monitor"].name == "curvature_monitor.nc"
    done = train(config, tmp_path / "net", device="cpu", progress=False, resume=True, curvature=3)
    assert pn.load(done.path / "analysis" / "curvature_monitor.nc").sizes == found.sizes


def test_where_curvature_cannot_be_measured_that_is_said(config: Config, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="leave out --curvature"):
        train(configure(find_recipe("S1")), tmp_path / "a", device="cpu", progress=False, curvature="auto")
    with pytest.raises(TrainingError, match="leave out --together"):
        sweep(config, {"seed": [0, 1]}, tmp_path / "b", together=True, curvature="auto", progress=False)
    with pytest.raises(pn.PnError, match="curvature is 0"):
        train(config, tmp_path / "c", device="cpu", progress=False, curvature=0)
    assert not any((tmp_path / name).exists() for name in "abc")

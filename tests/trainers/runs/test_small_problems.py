"""S1 and S2 as runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import pnanalysis as pn
from pnanalysis.errors import RunError, TrainingError
from pnanalysis.inputs.data import load_data
from pnanalysis.inputs.sources import as_source
from pnanalysis.io import netcdf
from trainers import configure, find_recipe, train


def test_s1_reproduces_both_end_points(tmp_path: Path) -> None:
    run = train(find_recipe("S1").config, tmp_path / "s1", progress=False)
    ends = [end.load()["w"].numpy() for end in run.ends]
    np.testing.assert_allclose(ends[0], [2.0, -2.0], atol=1e-2)
    np.testing.assert_allclose(ends[1], [-1.973, -1.013], atol=1e-2)
    assert run.champion.iteration == 1
    np.testing.assert_allclose(run.history.train_loss[:, -1], [-1.0, -1.534], atol=1e-2)
    assert set(run.results.children) == {"history", "descent", "surface", "basin"}
    ds = pn.trajectory(run, progress=False)
    assert float(ds.plane_residual.max()) < 1e-6  # two parameters lie in a plane


def test_s1_restarts_begin_elsewhere(tmp_path: Path) -> None:
    config = replace(find_recipe("S1").config, strategy="restart", iterations=4, epochs=2000)
    run = train(config, tmp_path / "s1", progress=False)
    starts = {tuple(run.trajectory(i)[0].load()["w"].tolist()) for i in range(4)}
    assert len(starts) == 4


@pytest.mark.parametrize("strategy", ["persistent", "restart"])
def test_s2_checkpoints_are_the_networks_that_it_trained(tmp_path: Path, strategy: str) -> None:
    config = configure(find_recipe("S2"), strategy=strategy, iterations=3, epochs=300)
    run = train(config, tmp_path / "run", device="cpu", progress=False)
    assert len(run.ends) == 3
    x, y = load_data("kink6").train.take(slice(None))
    for iteration, end in enumerate(run.ends):
        model = as_source(run).model(end)
        loss = float((model(x) - y).square().mean().detach())
        # float32 sums over 6 points and 32 units, in another order
        assert loss == pytest.approx(float(run.history.train_loss[iteration, -1]), rel=1e-4)
    spectrum = pn.hessian(run, checkpoints=["plain"], n=None, n_lanczos=10, n_probes=2, progress=False)
    assert np.isfinite(float(spectrum.lambda_max[0]))


def test_s2_resumes_to_the_same_end(tmp_path: Path) -> None:
    config = configure(find_recipe("S2"), iterations=3, epochs=300)
    whole = train(config, tmp_path / "whole", device="cpu", progress=False)
    train(replace(config, iterations=2), tmp_path / "parts", device="cpu", progress=False)
    parts = train(config, tmp_path / "parts", device="cpu", progress=False, resume=True)
    np.testing.assert_array_equal(parts.history.train_loss, whole.history.train_loss)


def test_other_strategies_and_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no layers to choose"):
        train(configure(find_recipe("S1"), strategy="partial"), tmp_path / "run", progress=False)
    config = configure(find_recipe("S1"), epochs=100)
    train(config, tmp_path / "run", progress=False)
    with pytest.raises(RunError, match="lam"):
        train(replace(config, lam=0.3), tmp_path / "run", progress=False, resume=True)
    assert netcdf.load(tmp_path / "run" / "analysis" / "descent.nc").sizes["iteration"] == 2


def test_an_error_marks_its_run_as_failed(tmp_path: Path, monkeypatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("trainers.problems.two_well.descend", fails)
    with pytest.raises(ZeroDivisionError):
        train(find_recipe("S1").config, tmp_path / "s1", progress=False)
    manifest = pn.open_run(tmp_path / "s1").manifest
    assert (manifest["status"], manifest["failure"]) == ("failed", "ZeroDivisionError: by nothing")

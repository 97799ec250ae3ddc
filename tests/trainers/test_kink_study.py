"""A study of the kink regression goes on where it was interrupted, and with nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from pnanalysis.errors import TrainingError
from pnanalysis.io import netcdf
from trainers.runs.kink_study import study

SMALL: dict[str, Any] = {"chains": 3, "iterations": 2, "steps": 20}


class Interrupted(Exception):
    """Raised in place of an interruption."""


@pytest.mark.parametrize("strategy", ["persistent", "restart"])
def test_an_interrupted_study_is_the_uninterrupted_one(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = study(tmp_path / "whole.nc", strategy=strategy, **SMALL)
    assert whole.final_loss.shape == (2, 3)
    path, saves, save = tmp_path / "parts.nc", 0, netcdf.save

    def saved(ds: xr.Dataset, target: Path) -> None:
        nonlocal saves
        saves += 1
        save(ds, target)
        raise Interrupted

    monkeypatch.setattr("trainers.runs.kink_study.netcdf.save", saved)
    for _ in range(whole.sizes["iteration" if strategy == "persistent" else "member"]):
        with pytest.raises(Interrupted):
            study(path, strategy=strategy, **SMALL)
    parts = study(path, strategy=strategy, **SMALL)
    assert saves == (2 if strategy == "persistent" else 3)
    np.testing.assert_array_equal(parts.final_loss, whole.final_loss)
    assert (parts.attrs["steps"], parts.attrs["lr"], parts.attrs["strategy"]) == (20, 1e-3, strategy)


@pytest.mark.parametrize("strategy", ["persistent", "restart"])
@pytest.mark.parametrize("changed", [{"data": "kink20"}, {"steps": 50}, {"seed": 1}], ids=["data", "steps", "seed"])
def test_other_settings_are_refused(strategy: str, changed: dict[str, Any], tmp_path: Path) -> None:
    study(tmp_path / "study.nc", strategy=strategy, **SMALL)
    with pytest.raises(TrainingError, match="cannot resume from a dataset with another"):
        study(tmp_path / "study.nc", strategy=strategy, **SMALL | changed)


def test_restarts_of_another_number_or_kind_are_refused(tmp_path: Path) -> None:
    study(tmp_path / "study.nc", strategy="restart", **SMALL)
    with pytest.raises(TrainingError, match="another number of iterations"):
        study(tmp_path / "study.nc", strategy="restart", **SMALL | {"iterations": 3})
    with pytest.raises(TrainingError, match="cannot resume"):
        study(tmp_path / "study.nc", strategy="persistent", **SMALL)


def test_the_first_restart_starts_where_the_chain_does(tmp_path: Path) -> None:
    chains = study(tmp_path / "chains.nc", **SMALL)
    restarts = study(tmp_path / "restarts.nc", strategy="restart", **SMALL)
    np.testing.assert_allclose(restarts.final_loss[0], chains.final_loss[0], rtol=1e-4)
    assert chains.seed.values.tolist() == restarts.seed.values.tolist()

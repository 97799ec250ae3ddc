"""Histories of one run and of several."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from pnanalysis.analyses.history import history
from pnanalysis.errors import RunError
from pnanalysis.inputs.selection import as_sources
from pnanalysis.io.runs import Run, open_run


def test_histories_of_runs_are_joined_along_run(tiny_run: Run, own_run: Run) -> None:
    ds = history(tiny_run, own_run)
    assert ds.train_loss.dims == ("run", "iteration", "epoch")
    np.testing.assert_array_equal(ds.train_loss.sel(run="tiny"), tiny_run.history.train_loss)
    assert ds.train_loss.sel(run="own").isnull().sum() == 10
    with pytest.raises(RunError):
        history()


def test_histories_of_equal_names_are_numbered_as_everywhere(tiny_run: Run, tmp_path: Path) -> None:
    copy = tmp_path / tiny_run.path.name
    shutil.copytree(tiny_run.path, copy)
    ds = history(tiny_run, open_run(copy))
    assert ds.run.values.tolist() == [source.label for source in as_sources([tiny_run, copy])] == ["tiny#1", "tiny#2"]

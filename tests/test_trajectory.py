"""Trajectories: projections against dense linear algebra, and histories."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pnanalysis.schema as schema
from pnanalysis.errors import ModelError, RunError
from pnanalysis.history import history
from pnanalysis.runs import Run
from pnanalysis.sources import open_files
from pnanalysis.trajectory import trajectory
from trainers import Config, train


def stacked(run: Run) -> np.ndarray:
    """All points of all paths as rows, in float64."""
    paths = [c for i in range(3) for c in run.trajectory(i)]
    return np.stack([np.concatenate([t.double().numpy().ravel() for _, t in sorted(c.load().items())]) for c in paths])


def test_components_agree_with_a_singular_value_decomposition(tiny_run: Run) -> None:
    ds = trajectory(tiny_run, n_components=4, progress=False)
    points = stacked(tiny_run)
    centred = points - points.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    # the Gram matrix squares the condition number: 2^-53 * (s_1 / s_4)^2 relative
    np.testing.assert_allclose(np.abs(ds.pca), np.abs(u[:, :4] * s[:4]), atol=1e-8 * s[0])
    np.testing.assert_allclose(ds.explained_variance, s[:4] ** 2 / (s**2).sum(), rtol=1e-8)
    assert float(ds.pca.sel(component=0)[4]) >= 0


def test_the_plane_passes_through_start_and_ends(tiny_run: Run) -> None:
    ds = trajectory(tiny_run, progress=False)
    points = stacked(tiny_run)
    second = ds.checkpoint.values.tolist().index(json.loads(ds.plane_points)[2])
    a, b = points[4] - points[0], points[second] - points[0]
    e1 = a / np.linalg.norm(a)
    e2 = b - (b @ e1) * e1
    e2 /= np.linalg.norm(e2)
    moved = points - points[0]
    expected = np.stack([moved @ e1, moved @ e2], axis=1)
    np.testing.assert_allclose(ds.plane, expected, atol=1e-9 * np.abs(expected).max())
    residual = np.linalg.norm(moved - expected[:, :1] * e1 - expected[:, 1:] * e2, axis=1)
    # a difference of squares: absolute error sqrt(2^-53) of the distance
    np.testing.assert_allclose(ds.plane_residual, residual, atol=1e-7 * np.linalg.norm(moved, axis=1).max())
    assert float(ds.plane_residual[0]) == 0
    np.testing.assert_allclose(ds.distance_from_start, np.linalg.norm(moved, axis=1), rtol=1e-9)


def test_path_lengths_add_up_along_each_path(tiny_run: Run) -> None:
    ds = trajectory(tiny_run, iterations=[1], progress=False)
    points = stacked(tiny_run)[5:10]
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    np.testing.assert_allclose(ds.path_length, [0, *np.cumsum(steps)], rtol=1e-9)
    assert ds.validation_error.isnull().values.tolist() == [True, False, False, False, False]


def test_small_blocks_give_the_same_projection(tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trajectory(tiny_run, progress=False)
    monkeypatch.setattr("pnanalysis.gram._BLOCK_BYTES", 8 * 16 * 7)  # seven parameters at a time
    np.testing.assert_allclose(trajectory(tiny_run, progress=False).plane, whole.plane, atol=1e-10)


def test_restarts_start_elsewhere(tiny_run: Run, tiny_config: Config, tmp_path: Path) -> None:
    control = train(replace(tiny_config, strategy="restart", iterations=2), tmp_path / "restart", progress=False)
    ds = trajectory(tiny_run, control, progress=False)
    starts = ds.sel(checkpoint=ds.epoch == 0)
    norms = np.linalg.norm(starts.plane.values, axis=1) + starts.plane_residual.values
    assert (norms == 0).sum() == 4  # three persistent iterations and the restart run's plain model
    assert norms[-1] > 1
    np.testing.assert_array_equal(starts.distance_from_start, 0)


def test_points_on_one_line_span_no_plane(tmp_path: Path) -> None:
    files = []
    for i in range(4):
        model = nn.Linear(2, 2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float(i))
        torch.save(model.state_dict(), tmp_path / f"{i}.pt")
        files.append(tmp_path / f"{i}.pt")
    with pytest.raises(RunError, match="one line"):
        trajectory(open_files(nn.Linear(2, 2), files), progress=False)
    with pytest.raises(RunError, match="at least three"):
        trajectory(open_files(nn.Linear(2, 2), files[:2]), progress=False)


def test_checkpoints_of_another_architecture_are_refused(tiny_run: Run, tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ModelError, match="architecture"):
        trajectory(tiny_run, open_files(nn.Linear(2, 2), [tmp_path / "other.pt"]), progress=False)


def test_histories_of_runs_are_joined_along_run(tiny_run: Run, own_run: Run) -> None:
    ds = history(tiny_run, own_run)
    assert ds.train_loss.dims == ("run", "iteration", "epoch")
    np.testing.assert_array_equal(ds.train_loss.sel(run="tiny"), tiny_run.history.train_loss)
    assert ds.train_loss.sel(run="own").isnull().sum() == 10
    with pytest.raises(RunError):
        history()


def test_every_dataset_survives_saving(tiny_run: Run, tmp_path: Path) -> None:
    ds = trajectory(tiny_run, progress=False)
    loaded = schema.load(schema.save(ds, tmp_path / "trajectory.nc"))
    assert loaded.identical(ds)

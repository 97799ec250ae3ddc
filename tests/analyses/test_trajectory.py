"""Trajectories: projections against dense linear algebra, and histories."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from pnanalysis import plots
from pnanalysis.analyses.trajectory import trajectory
from pnanalysis.cli import app
from pnanalysis.errors import ModelError, PnError, RunError
from pnanalysis.geometry.planes import random_directions
from pnanalysis.inputs.networks import open_files
from pnanalysis.inputs.sources import as_source
from pnanalysis.io import netcdf
from pnanalysis.io.runs import Run
from pnanalysis.spectra.random_vectors import normal_numbers
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
    monkeypatch.setattr("pnanalysis.geometry.gram._BLOCK_BYTES", 8 * 16 * 7)  # seven parameters at a time
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


def test_every_dataset_survives_saving(tiny_run: Run, tmp_path: Path) -> None:
    ds = trajectory(tiny_run, progress=False)
    loaded = netcdf.load(netcdf.save(ds, tmp_path / "trajectory.nc"))
    assert loaded.identical(ds)


def end_index(ds: xr.Dataset) -> list[int]:
    return [ds.checkpoint.values.tolist().index(name) for name in ds.end.values]


def test_components_about_the_end_agree_with_a_singular_value_decomposition(tiny_run: Run) -> None:
    ds = trajectory(tiny_run, n_components=4, progress=False)
    moved = stacked(tiny_run) - stacked(tiny_run)[4]  # the plain end
    u, s, _ = np.linalg.svd(moved, full_matrices=False)
    np.testing.assert_allclose(np.abs(ds.pca_end), np.abs(u[:, :4] * s[:4]), atol=1e-8 * s[0])
    np.testing.assert_allclose(ds.explained_variance_end, s[:4] ** 2 / (s**2).sum(), rtol=1e-8)
    # zero of the Gram matrix up to round-off of its entries: the square root of 2^-53
    np.testing.assert_allclose(ds.pca_end[4], 0.0, atol=1e-7 * s[0])
    assert float(ds.pca_end[0, 0]) >= 0


def test_distances_and_cosines_agree_with_dense_vectors(tiny_run: Run) -> None:
    ds = trajectory(tiny_run, progress=False)
    points = stacked(tiny_run)
    ends = points[[4, 9, 14]]
    assert ds.end_iteration.values.tolist() == [0, 1, 2]
    assert end_index(ds) == [4, 9, 14]
    far = np.linalg.norm(points[:, None] - ends, axis=2)
    np.testing.assert_allclose(ds.distance_to_end, far, atol=1e-7 * far.max())
    norms = np.linalg.norm(points, axis=1)
    np.testing.assert_allclose(ds.cosine, points @ ends.T / np.outer(norms, norms[[4, 9, 14]]), rtol=1e-10)


def test_layers_agree_with_their_own_vectors_and_add_up(tiny_run: Run) -> None:
    whole = trajectory(tiny_run, projections=["plane", "pca", "pca_end", "random"], progress=False)
    ds = trajectory(tiny_run, projections=["plane", "pca", "pca_end", "random"], per_layer=True, progress=False)
    assert ds.layer.values.tolist() == ["all", *(f"fc{i}" for i in range(1, 8))]
    for name in whole.data_vars:
        np.testing.assert_array_equal(ds[name].sel(layer="all") if "layer" in ds[name].dims else ds[name], whole[name])
    squares = ds.distance_from_start**2
    np.testing.assert_allclose(squares.isel(layer=slice(1, None)).sum("layer"), squares.sel(layer="all"), rtol=1e-12)
    points = []
    for i in range(3):
        for checkpoint in tiny_run.trajectory(i):
            state = checkpoint.load()
            points.append(torch.cat([state["fc3.weight"].ravel(), state["fc3.bias"]]).double().numpy())
    points = np.stack(points)
    at = ds.sel(layer="fc3")
    _, s, _ = np.linalg.svd(points - points.mean(0), full_matrices=False)
    np.testing.assert_allclose(at.explained_variance, s[:2] ** 2 / (s**2).sum(), rtol=1e-8)
    far = np.linalg.norm(points[:, None] - points[end_index(ds)], axis=2)
    np.testing.assert_allclose(at.distance_to_end, far, atol=1e-7 * far.max())
    norms = np.linalg.norm(points, axis=1)
    expected = points @ points[end_index(ds)].T / np.outer(norms, norms[end_index(ds)])
    np.testing.assert_allclose(at.cosine, expected, rtol=1e-10)


def test_random_planes_are_filter_normalised_and_seeded(tiny_run: Run) -> None:
    options = {"projections": ["random"], "n_random": 2, "progress": False}
    ds = trajectory(tiny_run, seed=3, **options)
    assert ds.random.dims == ("draw", "checkpoint", "component")
    np.testing.assert_array_equal(ds.random, trajectory(tiny_run, seed=3, **options).random)
    assert not np.allclose(ds.random, trajectory(tiny_run, seed=4, **options).random)
    # drawn anew by hand: a normal vector for each row of a weight matrix, as long as the row; vectors stay
    end = tiny_run.plain.load()
    names = [f"fc{i}.{kind}" for i in range(1, 8) for kind in ("weight", "bias")]
    parts, place = [], 0
    for name in names:
        own = end[name].double()
        if own.ndim == 1:
            parts.append(torch.zeros(4, len(own), dtype=torch.float64))
            continue
        numbers = [normal_numbers(own.numel(), i, 3, own.device, first=place) for i in range(4)]
        drawn, place = torch.stack(numbers).view(4, *own.shape), place + (own.numel() + 1) // 2
        drawn *= own.norm(dim=1, keepdim=True) / drawn.norm(dim=2, keepdim=True)
        parts.append(drawn.flatten(1))
    directions = torch.cat(parts, dim=1).numpy()
    paths = [c.load() for i in range(3) for c in tiny_run.trajectory(i)]
    points = np.stack([np.concatenate([state[name].double().numpy().ravel() for name in names]) for state in paths])
    for i in range(2):
        axes, _ = np.linalg.qr(directions[2 * i : 2 * i + 2].T)
        axes *= np.sign((axes * directions[2 * i : 2 * i + 2].T).sum(0))
        expected = (points - points[0]) @ axes
        np.testing.assert_allclose(ds.random[i], expected, atol=1e-10)
        share = (expected**2).sum(0) / ((points - points[0]) ** 2).sum()
        np.testing.assert_allclose(ds.explained_variance_random[i], share, rtol=1e-8)


def test_every_parameter_is_read_once(tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[str] = Counter()
    original = np.fromfile

    def counting(path: Path, dtype: type, count: int, offset: int) -> np.ndarray:
        read[str(path)] += count
        return original(path, dtype, count, offset=offset)

    monkeypatch.setattr(np, "fromfile", counting)
    monkeypatch.setattr("pnanalysis.geometry.gram._BLOCK_BYTES", 8 * 16 * 100)
    trajectory(tiny_run, iterations=[0], progress=False)
    n_bytes = 4 * sum(tensor.numel() for tensor in tiny_run.plain.load().values())
    assert set(read.values()) == {n_bytes}
    assert len(read) == 5


def test_what_the_plane_cannot_show_other_projections_can(tmp_path: Path) -> None:
    files = []
    for i in range(4):
        files.append(tmp_path / f"{i}.safetensors")
        save_file({"weight": torch.full((2, 2), float(i)), "bias": torch.zeros(2)}, files[-1])
    source = open_files(nn.Linear(2, 2), files)
    ds = trajectory(source, projections=["pca", "random"], progress=False)
    np.testing.assert_allclose(ds.explained_variance, [1, 0], atol=1e-12)
    np.testing.assert_allclose(ds.path_length, [0, 2, 4, 6], rtol=1e-12)
    assert np.isnan(ds.cosine[0, 0])  # zero has no direction
    with pytest.raises(RunError, match="one line"):
        trajectory(source, progress=False)
    with pytest.raises(PnError, match="unknown projection 'tsne'"):
        trajectory(source, projections=["tsne"], progress=False)
    save_file({"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}, files[2])
    with pytest.raises(ModelError, match=r"'weight' has shape \(3, 2\), this Linear has"):
        trajectory(source, projections=["pca"], progress=False)


def test_figures_of_trajectories(tiny_run: Run) -> None:
    every = ["plane", "pca", "pca_end", "random"]
    ds = trajectory(tiny_run, projections=every, per_layer=True, progress=False)
    figure = plots.plot(ds, "trajectories")
    assert len(figure.axes) == 4
    assert f"({float(ds.explained_variance.sel(layer='all')[0]):.1%})" in figure.axes[1].get_xlabel()
    assert len(plots.plot(ds, "trajectory_layers").axes) == 8
    panels = plots.plot(ds, "cosines").axes
    assert len(panels) == 8
    drawn = [line.get_ydata() for line in panels[0].lines]
    expected = ds.cosine.sel(layer="all")[5:10, 0]
    assert any(np.array_equal(y, expected) for y in drawn if len(y) == len(expected))
    flat = trajectory(tiny_run, iterations=[0], projections=["pca"], progress=False)
    assert len(plots.plot(flat, "trajectory").axes) == 1
    for name, message in (("trajectory_layers", "no layers"), ("cosines", "no earlier end|no iteration has earlier")):
        with pytest.raises(PnError, match=message):
            plots.plot(flat, name)
    with pytest.raises(PnError, match="no projection 'plane'"):
        plots.trajectory(flat, projection="plane")


def test_the_command_gives_layers_and_projections(tiny_run: Run, tmp_path: Path) -> None:
    command = ["trajectory", str(tiny_run.path), "--per-layer", "--projection", "pca", "--projection", "random",
               "-o", str(tmp_path / "t.nc"), "--plot", str(tmp_path / "t.svg")]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "fc3" in result.output
    ds = netcdf.load(tmp_path / "t.nc")
    assert {"pca", "random"} <= set(ds.data_vars)
    assert "plane" not in ds


def test_random_planes_are_those_of_landscapes(tiny_run: Run) -> None:
    """One seed, one pair of directions: coordinates from the files equal those from states in memory."""
    ds = trajectory(tiny_run, projections=["random"], seed=5, progress=False)
    states = [checkpoint.load() for checkpoint in tiny_run.trajectory(0)]
    model = as_source(tiny_run).make_model()
    names = [name for name, _ in model.named_parameters()]
    first, second = random_directions(tiny_run.plain.load(), names, seed=5)
    flat = [torch.cat([s[n].double().reshape(-1) for n in names]).numpy() for s in (*states, first, second)]
    moved, (u, v) = np.stack(flat[:-2]) - flat[0], flat[-2:]
    e1 = u / np.linalg.norm(u)
    e2 = v - (v @ e1) * e1
    e2 /= np.linalg.norm(e2)
    # the directions in memory are rounded to float32
    np.testing.assert_allclose(ds.random[0, : len(states)], np.stack([moved @ e1, moved @ e2], 1), atol=1e-5)

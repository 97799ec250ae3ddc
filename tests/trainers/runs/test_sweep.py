"""Grids of runs: all of them are trained, one failure stops no other, and killed sweeps resume."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import dask
import distributed
import numpy as np
import pytest
import torch

import pnanalysis as pn
import trainers.runs.cluster
import trainers.runs.sweep
from pnanalysis.errors import RunError, TrainingError
from tests.conftest import TINY
from trainers import Config
from trainers.runs.cluster import on_cluster
from trainers.runs.sweep import parse_sweep, sweep

BASE = Config(recipe="grid", **TINY, iterations=2, epochs=1, checkpoint_every=1)
QUIET = {"jobs": 1, "device": "cpu", "progress": False}


def test_a_grid_becomes_one_dataset_along_its_settings(tmp_path: Path) -> None:
    outcomes = sweep(BASE, {"lam": [0.001, 0.1], "seed": [0, 3]}, tmp_path, **QUIET)
    assert [outcome.failure for outcome in outcomes] == [None] * 4
    assert [outcome.path.name for outcome in outcomes][:2] == ["lam=0.001,seed=0", "lam=0.001,seed=3"]
    ds = pn.open_runs(tmp_path)
    assert (ds.lam.values.tolist(), ds.seed.values.tolist()) == ([0.001, 0.1], [0, 3])
    for outcome in outcomes:
        own = pn.open_run(outcome.path).history
        np.testing.assert_array_equal(ds.train_loss.sel(**outcome.settings), own.train_loss)


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep over two seeds; analyses may be added to it."""
    out = tmp_path_factory.mktemp("sweeps")
    assert [outcome.failure for outcome in sweep(BASE, {"seed": [0, 1]}, out, **QUIET)] == [None, None]
    return out


def test_analyses_of_a_grid_keep_what_differs_between_runs(two_seeds: Path) -> None:
    paths = [two_seeds / f"seed={seed}" for seed in (0, 1)]
    for path, champion in zip(paths, (0, 1), strict=True):
        run = pn.open_run(path)
        checkpoints = ("plain", f"iter{champion:02d}")
        ds = pn.hessian(run, checkpoints=checkpoints, n=16, n_hvp=4, progress=False)
        pn.save(ds.assign_coords(checkpoint=["plain", "champion"]), path / "analysis" / "hessian.nc")
    joined = pn.open_runs(two_seeds, "hessian")
    assert joined.iteration.sel(checkpoint="champion").values.tolist() == [0, 1]
    assert "iteration" in joined.coords
    np.testing.assert_array_equal(joined.lambda_max.sel(seed=1), pn.load(paths[1] / "analysis/hessian.nc").lambda_max)


def test_one_failed_run_stops_no_other_and_the_sweep_resumes(tmp_path: Path) -> None:
    outcomes = sweep(BASE, {"layers": ["fc1", "nowhere"]}, tmp_path, **QUIET)
    assert outcomes[0].failure is None
    assert "nowhere" in str(outcomes[1].failure)
    again = sweep(BASE, {"layers": ["fc1", "fc2"]}, tmp_path, **QUIET)
    assert "--resume" in str(again[0].failure)
    assert again[1].failure is None
    assert [o.failure for o in sweep(BASE, {"layers": ["fc1", "fc2"]}, tmp_path, resume=True, **QUIET)] == [None, None]


@pytest.mark.slow
def test_several_processes_give_the_same_runs(two_seeds: Path, tmp_path: Path) -> None:
    sweep(BASE, {"seed": [0, 1]}, tmp_path, **{**QUIET, "jobs": 2})
    one, two = pn.open_runs(two_seeds), pn.open_runs(tmp_path)
    np.testing.assert_allclose(one.train_loss, two.train_loss, rtol=1e-4)  # thread counts differ


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a Dask cluster on this machine, with two workers that have more threads than they should."""
    options = {"n_workers": 2, "threads_per_worker": 2, "dashboard_address": None, "silence_logs": logging.CRITICAL}
    once_more = dask.config.set(
        {"distributed.scheduler.allowed-failures": 1}
    )  # and not three times: a worker takes seconds
    with once_more, distributed.LocalCluster(**options) as local:
        yield f"dask:{local.scheduler_address}"


@pytest.mark.slow
def test_a_cluster_gives_the_same_runs(two_seeds: Path, cluster: str, tmp_path: Path) -> None:
    options = {**QUIET, "jobs": None, "engine": cluster}
    outcomes = sweep(BASE, {"seed": [0, 1, 2, 3]}, tmp_path, **options)
    assert [(outcome.path, outcome.failure) for outcome in outcomes] == [
        (tmp_path / f"seed={seed}", None) for seed in range(4)
    ]
    for seed in (0, 1):
        losses = [pn.open_run(folder / f"seed={seed}").history.train_loss for folder in (two_seeds, tmp_path)]
        np.testing.assert_array_equal(*losses)
    again, longer = sweep(BASE, {"seed": [0, 4]}, tmp_path, **options)
    assert again.failure == "exists already; continue it with --resume"
    assert longer.failure is None
    assert [outcome.failure for outcome in sweep(BASE, {"seed": [0]}, tmp_path, **options, resume=True)] == [None]


def _dies_at_first(marker: Path) -> str:
    """Dies, but not where there is a marker, which it leaves if there is a folder for it."""
    if not marker.exists():
        if marker.parent.is_dir():
            marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def test_a_call_whose_worker_dies_is_made_again(cluster: str, tmp_path: Path) -> None:
    address = cluster.partition(":")[2]
    assert list(on_cluster(address, _dies_at_first, [(tmp_path / "marker",)])) == ["done"]


def test_waiting_for_workers_is_said(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed.Client, "scheduler_info", lambda self: {"workers": {}})
    with pytest.warns(UserWarning, match="has no workers; runs wait until there are some"):
        assert list(on_cluster(cluster.partition(":")[2], int, [("1",)])) == [1]


def test_what_fails_on_a_worker_is_one_error(cluster: str) -> None:
    with pytest.raises(TrainingError, match=r"the cluster has failed .*invalid literal.*--resume"):
        list(on_cluster(cluster.partition(":")[2], int, [("x",)]))


@pytest.mark.slow
def test_a_call_that_kills_every_worker_ends_the_sweep(cluster: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="has killed several workers of the cluster"):
        list(on_cluster(cluster.partition(":")[2], _dies_at_first, [(tmp_path / "no folder" / "marker",)]))


def test_no_two_runs_share_a_folder(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="several runs of the sweep would be trained in .*data=a-b"):
        sweep(BASE, {"data": ["a/b", "a-b"]}, tmp_path, **QUIET)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("engine", "options", "says"),
    [
        ("slurm", {}, "--engine 'slurm': give local, or dask:ADDRESS"),
        ("dask", {}, "--engine 'dask': give local, or dask:ADDRESS"),
        ("dask:tcp://127.0.0.1:1", {}, "there is no Dask scheduler at tcp://127.0.0.1:1"),
        ("dask:tcp://127.0.0.1:1", {"jobs": 2}, "leave out --jobs"),
        ("dask:nonsense://here", {}, "there is no Dask scheduler at nonsense://here"),
        ("dask:nowhere.json", {}, "nowhere.json: no such file"),
    ],
)
def test_engines_that_there_are_not(
    engine: str, options: dict[str, int], says: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(trainers.runs.cluster, "_TIMEOUT", 1)
    with pytest.raises(TrainingError, match=says):
        sweep(BASE, {"seed": [0]}, tmp_path, device="cpu", progress=False, engine=engine, **options)


def test_runs_use_no_more_threads_than_the_process_may(tmp_path: Path, monkeypatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr("trainers.runs.sweep.train", lambda *_, **__: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sweep(BASE, {"seed": [0, 1]}, tmp_path, **QUIET)
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1]


def test_runs_are_distributed_over_the_gpus(tmp_path: Path, monkeypatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("trainers.runs.sweep.train", lambda *_, device, **__: seen.append(device))
    monkeypatch.setattr("trainers.runs.sweep.resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cuda", "cuda:1"):
        sweep(BASE, {"seed": [0, 1, 2]}, tmp_path, **{**QUIET, "device": device})
    assert seen == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:1", "cuda:1"]


def _killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_ends_the_sweep_and_names_resume(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trainers.runs.sweep, "_train_one", _killed)
    with pytest.raises(TrainingError, match="killed.*--resume"):
        sweep(BASE, {"seed": [0, 1]}, tmp_path, **{**QUIET, "jobs": 2})


def test_values_have_the_type_of_their_setting() -> None:
    grid = parse_sweep(["lam=1e-3,1e-2", "seed=0:3", "layers=all,random", "batch-size=32"], Config())
    assert grid == {"lam": [1e-3, 1e-2], "seed": [0, 1, 2], "layers": ["all", "random"], "batch_size": [32]}


@pytest.mark.parametrize(
    ("entry", "says"),
    [("lam", "NAME=A,B,C"), ("lamda=1", "there are"), ("seed=a", "not an integer"), ("lam=x", "not a number")],
)
def test_bad_entries_are_errors(entry: str, says: str) -> None:
    with pytest.raises(TrainingError, match=says):
        parse_sweep([entry], Config())


def test_a_folder_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no runs"):
        pn.open_runs(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("seed=0:1000000000000", "more than 10,000 runs"),
        ("seed=5:5", "names no values"),
        (f"seed={'1' * 5000}", "is not an integer"),
    ],
)
def test_grids_have_bounds(entry: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message) as refused:
        parse_sweep([entry], BASE)
    assert len(str(refused.value)) < 200


def test_settings_together_have_a_bound() -> None:
    parse_sweep(["seed=0:100", "lam=" + ",".join(map(str, range(100)))], BASE)
    with pytest.raises(TrainingError, match="more than 10,000 runs"):
        parse_sweep(["seed=0:101", "lam=" + ",".join(map(str, range(100)))], BASE)

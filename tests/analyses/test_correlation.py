"""Rank correlations: exact values, errors that cover, coefficients by hand, and tables from runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from inspect import signature
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from scipy.stats import kendalltau

import pnanalysis as pn
from pnanalysis import schema as pn_schema
from pnanalysis.analyses import correlation
from pnanalysis.analyses.monitored_curvature import monitored
from pnanalysis.analyses.rank_correlation import (
    conditional_information,
    granulated,
    kendall_tau,
    signs,
    tau_with_errors,
)
from pnanalysis.analyses.run_diagnostics import run_diagnostics
from pnanalysis.errors import PnError, RunError
from pnanalysis.io.runs import Run
from tests.conftest import TINY
from tests.plots.synthetic import barrier, curvature_along_training
from trainers import Config
from trainers.runs.sweep import sweep

QUIET = {"progress": False, "n_bootstrap": 200}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [4, 9, 30])
def test_tau_is_that_of_scipy_ties_included(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 6, n).astype(float), rng.normal(size=n).round(1)
    assert float(kendall_tau(signs(x), signs(y))) == pytest.approx(kendalltau(x, y).statistic, rel=1e-12)
    distinct = rng.permutation(n).astype(float), rng.permutation(n).astype(float)
    assert tau_with_errors(*distinct, n_bootstrap=50).p == kendalltau(*distinct).pvalue
    index = rng.integers(0, n, n)
    counts = np.bincount(index, minlength=n).astype(float)
    expected = kendalltau(x[index], y[index]).statistic
    np.testing.assert_allclose(kendall_tau(signs(x), signs(y), counts), expected, rtol=1e-12)


def test_p_values_with_ties_are_those_of_random_orders() -> None:
    """The normal approximation has 0.046, 0.083 and 1.3e-5 here."""
    one_apart = np.eye(5)[0]
    assert tau_with_errors(one_apart, one_apart, n_bootstrap=50).p == pytest.approx(1 / 5)
    halves = np.array([0.0, 0.0, 1.0, 1.0])
    assert tau_with_errors(halves, halves, n_bootstrap=50).p == pytest.approx(2 / 6)
    one_apart = np.eye(20)[0]
    drawn = tau_with_errors(one_apart, one_apart, n_bootstrap=50).p
    assert drawn == pytest.approx(1 / 20, abs=4 * (0.05 * 0.95 / 9999) ** 0.5)
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 20, (2, 30)).astype(float)  # few ties: the approximation holds
    assert tau_with_errors(x, y, n_bootstrap=50).p == pytest.approx(kendalltau(x, y).pvalue, abs=0.03)


@pytest.mark.parametrize("is_tied", [False, True])
def test_p_values_of_many_runs_with_heavy_ties_count_all_orders(is_tied: bool) -> None:
    """Of 60 runs all but two are equal: all 1,770 places of the two are gone through. The approximation has 0.017."""
    x = (np.arange(60) < 2).astype(float)
    y = -np.floor(np.arange(60.0) / 3) if is_tied else -np.arange(60.0)
    concordance = [abs((signs(np.isin(np.arange(60), pair).astype(float)) * signs(y)).sum())
                   for pair in combinations(range(60), 2)]  # fmt: skip
    exact = float(np.mean(np.array(concordance) >= concordance[0]))
    assert exact < 0.004 < 0.01 < kendalltau(x, y).pvalue
    found = tau_with_errors(x, y, n_bootstrap=50).p
    assert found == pytest.approx(exact, abs=4 * (exact / 9999) ** 0.5 + 1e-4)
    assert tau_with_errors(y, x, n_bootstrap=50).p == found
    assert tau_with_errors(x, y, n_bootstrap=50, seed=1).p == pytest.approx(exact, abs=4 * (exact / 9999) ** 0.5 + 1e-4)


@pytest.mark.parametrize(("n", "r"), [(8, 0.0), (12, 0.8), (30, 0.5)])
def test_intervals_cover_the_tau_of_a_gaussian_copula(n: int, r: float) -> None:
    rng, tau, trials = np.random.default_rng(0), 2 / np.pi * np.arcsin(r), 150
    inside = 0
    for seed in range(trials):
        x, e = rng.normal(size=(2, n))
        found = tau_with_errors(x, r * x + (1 - r * r) ** 0.5 * e, n_bootstrap=150, seed=seed)
        inside += found.low <= tau <= found.high
    assert inside >= 0.91 * trials  # the binomial error of 0.95 is 0.018


def test_errors_of_the_numbers_widen_the_interval_and_their_shift_points_to_zero() -> None:
    rng = np.random.default_rng(0)
    x = np.arange(15.0)
    y = x + rng.normal(size=15)
    exact = tau_with_errors(x, y)
    noisy = tau_with_errors(x, y, np.full(15, 4.0), np.full(15, np.nan))
    assert noisy.value == exact.value > 0.7
    assert (exact.noise_se, exact.shift) == (0.0, 0.0)
    assert noisy.noise_se > 0.05
    assert -0.5 < noisy.shift < -0.1
    assert noisy.high - noisy.low > exact.high - exact.low
    assert noisy.low < noisy.value < noisy.high


def test_a_perfect_order_of_few_runs_still_has_an_interval() -> None:
    found = tau_with_errors(np.arange(5.0), np.arange(5.0))
    assert found.value == 1
    assert 0 < found.low < 0.9
    assert found.se > 0


#: A grid in which the target follows lr, and the diagnostic follows the target within lr but not across it.
GRID = {"lr": [1, 1, 2, 2], "width": [8, 16, 8, 16]}
X, Y = np.array([3.0, 4.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0, 4.0])


def test_tau_of_one_setting_at_a_time_by_hand() -> None:
    assert float(kendall_tau(signs(X), signs(Y))) == pytest.approx(-1 / 3)
    found = granulated(X, Y, GRID, ["lr", "width"], n_bootstrap=100)
    np.testing.assert_allclose(found.of_axis, [-1.0, 1.0])
    assert found.value == 0
    assert granulated(X, Y, GRID, ["width"], n_bootstrap=100).value == 1
    repeated = {**GRID, "seed": [0, 0, 0, 1]}  # the last run differs from each other in two settings
    np.testing.assert_allclose(granulated(X, Y, repeated, ["lr", "width"], n_bootstrap=100).of_axis, [-1.0, 1.0])
    assert np.isnan(granulated(X, Y, {}, [], n_bootstrap=100).value)


def test_repetitions_are_no_pairs_of_a_setting() -> None:
    rng = np.random.default_rng(0)
    lr, seed = np.repeat([0.1, 0.2], 8), np.tile(np.arange(8), 2)
    x, y = (10 * (lr > 0.15) + rng.normal(size=16) for _ in "xy")
    found = granulated(x, y, {"lr": lr.tolist()}, ["lr"], n_bootstrap=100)
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)
    # repetitions drive both numbers, and the setting moves them apart: runs of one seed tell
    noise = rng.normal(size=8)
    table = pd.DataFrame(
        {"lr": lr, "sharpness": [*noise, *(noise + 1e-3)], "test_error": [*noise, *(noise - 1e-3)], "seed": seed}
    )
    ds = pn.correlate(table, axes=["lr"], n_bootstrap=100, progress=False)
    assert ds.diagnostic.values.tolist() == ["sharpness"]
    assert float(ds.psi.item()) == -1.0
    assert float(ds.tau.item()) > 0.5


def test_columns_may_be_numbers() -> None:
    table = pd.DataFrame({0: np.arange(6.0), "test_error": np.arange(6.0) ** 2})
    ds = pn.correlate(table, n_bootstrap=100, progress=False)
    assert ds.diagnostic.values.tolist() == ["0"]


def test_information_is_all_nothing_or_what_a_setting_knows() -> None:
    rng = np.random.default_rng(0)
    settings = {"lr": [1, 1, 1, 1, 2, 2, 2, 2] * 4}
    y = np.array(settings["lr"]) * 10 + rng.normal(size=32)
    assert conditional_information(y**3, y, settings, ["lr"]) == pytest.approx(1.0)
    assert conditional_information(rng.normal(size=32), y, settings, ["lr"]) < 0.05
    by_setting = np.array(settings["lr"]) * 10 + rng.normal(size=32)  # goes with the target by the setting alone
    assert conditional_information(by_setting, y, {}, []) > 0.1
    assert conditional_information(by_setting, y, settings, ["lr"]) < 0.05


def test_a_table_of_networks_in_memory() -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"lr": np.repeat([0.1, 0.2, 0.3, 0.4], 3), "width": [8, 16, 32] * 4})
    frame["test_error"] = frame.lr + rng.normal(scale=0.01, size=12)
    frame["sharpness"] = frame.test_error + rng.normal(scale=0.02, size=12)
    frame["sharpness_se"] = 0.01
    frame["noise"] = rng.normal(size=12)
    frame.loc[3, "noise"] = np.nan
    frame["constant"] = 1.0
    ds = pn.correlate(frame, axes=["lr", "width"], **QUIET)
    assert ds.diagnostic.values.tolist() == ["sharpness", "noise"]
    assert ds.n_runs.values.tolist() == [12, 11]
    expected = kendalltau(frame.sharpness, frame.test_error).statistic
    assert float(ds.tau.sel(diagnostic="sharpness")) == pytest.approx(expected, rel=1e-12)
    assert float(ds.tau_p.sel(diagnostic="sharpness")) == 2 * float(ds.tau_p_single.sel(diagnostic="sharpness"))
    assert float(ds.tau_noise_se.sel(diagnostic="sharpness")) > 0
    assert ds.axis.values.tolist() == ["lr", "width"]
    assert ds.lr_setting.values.tolist() == frame.lr.tolist()


BASE = Config(recipe="grid", **TINY, iterations=1, epochs=1, checkpoint_every=1)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs over two learning rates and two seeds, with a dataset of two of them."""
    out = tmp_path_factory.mktemp("correlated")
    options = {"jobs": 1, "device": "cpu", "progress": False}
    assert not any(one.failure for one in sweep(BASE, {"lr": [0.003, 0.03], "seed": [0, 1]}, out, **options))
    return out


def test_runs_of_a_folder_with_what_is_stored_and_what_is_asked_for(grid: Path) -> None:
    ds = pn.correlate(grid, **QUIET)
    assert ds.diagnostic.values.tolist() == ["train_loss", "train_error"]
    assert ds.run.values.tolist() == sorted(path.name for path in grid.iterdir() if path.is_dir())
    assert ds.axis.values.tolist() == ["lr"]
    histories = [pn.open_run(grid / name).history for name in ds.run.values]
    np.testing.assert_array_equal(ds.target, [float(one.test_error[0, -1]) for one in histories])
    assert (ds.target_se > 0).all()
    with pytest.raises(RunError, match="have different values of 'saturation'"):
        pn.correlate(grid, diagnostics=["saturation"], **QUIET)
    more = pn.correlate(grid, compute=["saturation"], diagnostics=["saturation"], target="train_loss", **QUIET)
    assert set(more.source.values) == {"saturation"}
    one = pn.open_run(grid / more.run.values[2]).results["saturation"].saturation_measure
    expected = float(one.sel(iteration=0, epoch=1).mean("layer"))
    assert float(more.value.sel(diagnostic="saturation_measure")[2]) == pytest.approx(expected, rel=1e-12)
    gap = pn.correlate(grid, target="generalization_gap", **QUIET)
    last = histories[0].isel(iteration=0, epoch=-1)
    assert float(gap.target[0]) == pytest.approx(float(last.test_error - last.train_error))


@pytest.mark.slow
def test_what_is_saved_of_other_checkpoints_is_named_and_computed(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "runs"
    shutil.copytree(grid, out)
    shutil.rmtree(next(out.iterdir()) / "analysis", ignore_errors=True)  # one has nothing
    template, done = None, 0

    def small(run: Run, checkpoints: tuple[str], **options: Any) -> xr.Dataset:
        """As the analysis would give it, with numbers of its own for each call."""
        nonlocal template, done
        if template is None:
            template = pn.hessian(run, checkpoints=checkpoints, n=16, n_hvp=4, data_error="none", progress=False)
        (at,) = run.select(checkpoints).values()
        done += 1
        place = {"iteration": ("checkpoint", [at.iteration]), "epoch": ("checkpoint", [at.epoch])}
        return template.assign(trace=(template.trace + done).assign_attrs(template.trace.attrs)).assign_coords(place)

    monkeypatch.setattr(correlation, "_analyses", lambda: {"hessian": small})
    files = {}
    for path in sorted(out.iterdir())[:2]:
        run = pn.open_run(path)
        files[path.name] = pn.save(small(run, ("start",)), path / "analysis" / "hessian.nc")
    before = {name: file.read_bytes() for name, file in files.items()}
    with pytest.warns(UserWarning, match=r"the saved hessian of 2 of 4 runs is not of the champion .*--compute hess"):
        assert "trace" not in pn.correlate(out, **QUIET).diagnostic.values
    damaged = files[max(files)]
    damaged.write_bytes(before[max(files)][:100])
    with pytest.warns(UserWarning, match="counts without its hessian"):
        pn.correlate(out, **QUIET)
    damaged.write_bytes(before[max(files)])
    found = pn.correlate(out, compute=["hessian"], diagnostics=["trace"], **QUIET)
    assert found.n_runs == 4
    assert {name: file.read_bytes() for name, file in files.items()} == before  # what was there is still there
    for name, value in zip(found.run.values, found.value[0].values, strict=True):
        run = pn.open_run(out / name)
        stem = "hessian-iter00-epoch001" if name in files else "hessian"
        assert float(pn.load(run.files[stem]).trace[0]) == pytest.approx(value, rel=1e-12)
    times = {file: file.stat().st_mtime_ns for file in out.glob("*/analysis/*")}
    pn.correlate(out, compute=["hessian"], diagnostics=["trace"], **QUIET)
    assert done == 6
    assert {file: file.stat().st_mtime_ns for file in out.glob("*/analysis/*")} == times  # nothing is done twice


def test_rises_count_at_one_radius_unless_they_are_asked_for(grid: Path) -> None:
    for path in sorted(grid.glob("*/run.json")):
        run = pn.open_run(path.parent)
        ds = pn.sharpness(run, checkpoints=["plain"], n=64, n_steps=2, n_directions=2, second_order=False,
                          radii={"ball": [0.1, 0.2, 0.4]}, progress=False)  # fmt: skip
        pn.save(ds, run.path / "analysis" / "sharpness.nc")
    ds = pn.correlate(grid, **QUIET)
    assert {"rise ball 0.2", "average ball 0.01", "relative_flatness"} <= set(ds.diagnostic.values)
    assert "rise ball 0.1" not in ds.diagnostic
    chosen = pn.correlate(grid, diagnostics=["rise ball"], **QUIET)
    assert chosen.diagnostic.values.tolist() == ["rise ball 0.1", "rise ball 0.2", "rise ball 0.4"]
    assert (chosen.value_se > 0).all()


def saved_with_each(grid: Path, tmp_path: Path, make: Callable[[Run, int], xr.Dataset]) -> Path:
    """A copy of the runs, each with a dataset of its own."""
    out = tmp_path / "runs"
    shutil.copytree(grid, out)
    for i, path in enumerate(sorted(file.parent for file in out.glob("*/run.json"))):
        shutil.rmtree(path / "analysis", ignore_errors=True)
        ds = make(pn.open_run(path), i)
        pn.save(ds, path / "analysis" / f"{ds.attrs['kind']}.nc")
    return out


def of_checkpoint(ds: xr.Dataset) -> xr.Dataset:
    """A dataset of one matrix as that of the end of a run's first iteration."""
    place = {"checkpoint": ["champion"], "iteration": ("checkpoint", [0]), "epoch": ("checkpoint", [1])}
    return ds.expand_dims("checkpoint").assign_coords(place)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"operator": "ggn"}, "operator hessian, that of .* ggn: they are numbers of different quantities"),
     ({"params": "fc1"}, "params none, that of .* fc1"), ({"split": "test"}, "split train, that of .* test")],
)  # fmt: skip
def test_spectra_of_different_matrices_are_not_ranked(
    changed: dict[str, str], message: str, grid: Path, tmp_path: Path
) -> None:
    def spectrum(run: Run, i: int) -> xr.Dataset:
        ds = of_checkpoint(pn.spectral_density(np.diag([1.0, 2.0 + i]), progress=False))
        ds.attrs |= {"kind": "hessian", "operator": "hessian", "split": "train", "bn_mode": "eval", "n": 16 + (i == 2)}
        return ds.assign_attrs(changed if i == 1 else {})

    out = saved_with_each(grid, tmp_path, spectrum)
    with pytest.raises(RunError, match=message):
        pn.correlate(out, diagnostics=["trace"], **QUIET)
    for path in out.glob("*/analysis/hessian.nc"):
        ds = pn.load(path)
        del ds.attrs["operator"], ds.attrs["split"]
        ds.attrs.pop("params", None)
        pn.save(ds, path)
    with pytest.warns(UserWarning, match=r"has n 16, that of .* 17: differences between runs may be due to that"):
        assert pn.correlate(out, diagnostics=["trace"], **QUIET).n_runs == 4


def test_the_error_of_a_mean_over_layers_takes_them_for_dependent(grid: Path, tmp_path: Path) -> None:
    """The same images pass through all layers."""

    def saturated(run: Run, i: int) -> xr.Dataset:
        return pn.saturation(run, n=32, progress=False)

    path = min(saved_with_each(grid, tmp_path, saturated).glob("*/run.json")).parent
    run = pn.open_run(path)
    (checkpoint,) = run.select(["champion"]).values()
    found = run_diagnostics(run, checkpoint).numbers["saturation_measure"]
    saved = pn.load(run.files["saturation"]).sel(iteration=0, epoch=1)
    assert found.value == pytest.approx(float(saved.saturation_measure.mean("layer")))
    assert found.se == pytest.approx(float(saved.saturation_measure_se.mean("layer")))


def test_blocks_count_by_what_they_say_of_the_whole_network(grid: Path, tmp_path: Path) -> None:
    rng, matrices = np.random.default_rng(0), []

    def blocks(run: Run, i: int) -> xr.Dataset:
        half = rng.normal(size=(6, 6))
        matrices.append(half @ half.T)
        return of_checkpoint(pn.blocks(matrices[-1], blocks={"a": 2, "b": 4}, progress=False))

    ds = pn.correlate(saved_with_each(grid, tmp_path, blocks), diagnostics=["blocks"], **QUIET)
    assert ds.diagnostic.values.tolist() == ["network_trace", "network_off_diagonal_share", "trace_concentration"]
    for H, values in zip(matrices, ds.value.values.T, strict=True):
        traces = np.array([np.trace(H[:2, :2]), np.trace(H[2:, 2:])])
        between = 2 * np.square(H[:2, 2:]).sum() / np.square(H).sum()
        expected = [traces.sum(), between, np.square(traces).sum() / traces.sum() ** 2]
        np.testing.assert_allclose(values, expected, rtol=1e-12)


def test_lines_count_where_they_end_in_the_checkpoint_and_stay_in_the_run(grid: Path, tmp_path: Path) -> None:
    def line(run: Run, i: int) -> xr.Dataset:
        start, end = ((run.path.name, 0, epoch) for epoch in (0, 1))
        if i == 3:
            start = ("another run", 0, 1)
        ds = barrier()
        one = ds.barrier.isel(split=0, drop=True)
        ds = ds.assign(excess=ds.loss, excess_se=ds.loss_se, barrier_position=ds.barrier, distance=one, length=one)
        return ds.assign(barrier=ds.barrier + i).pipe(pn_schema.finish, "barrier", places=[start, end])

    out = saved_with_each(grid, tmp_path, line)
    last = sorted(out.glob("*/run.json"))[3].parent
    with pytest.warns(UserWarning, match=r"saved barrier of 1 of 4 runs is not of the champion .* with pn\.landscape"):
        pn.correlate(out, **QUIET)
    ds = pn.load(last / "analysis" / "barrier.nc")
    places = json.loads(ds.attrs["places"])
    pn.save(ds.assign_attrs(places=json.dumps([[last.name, 0, 0], places[1]])), last / "analysis" / "barrier.nc")
    found = pn.correlate(out, diagnostics=["barrier"], **QUIET)
    first = pn.load(sorted(out.glob("*/analysis/barrier.nc"))[0])
    for name, split in (("barrier line train", "train"), ("barrier line test", "test")):
        own = found.sel(diagnostic=name)
        np.testing.assert_allclose(own.value, float(first.barrier.sel(path="line", split=split)) + np.arange(4))
        np.testing.assert_allclose(own.value_se, float(first.barrier_se.sel(path="line", split=split)))
    chosen = pn.correlate(out, **QUIET).diagnostic.values.tolist()
    assert "barrier line train" in chosen
    assert "barrier line test" not in chosen  # unless it is asked for


@pytest.mark.parametrize("is_stacked", [True, False])
def test_curvature_along_training_counts_up_to_the_checkpoint(grid: Path, tmp_path: Path, is_stacked: bool) -> None:
    def monitor(run: Run, i: int) -> xr.Dataset:
        steps = -(-run.manifest["data"]["n_train"] // run.manifest["config"]["batch_size"])
        top = np.array([1.0, 5.0 + i, 3.0 - i / 8, np.nan])
        ds = curvature_along_training().isel(step=slice(4)).assign_coords(step=[0, 3, steps, steps + 1])
        numbers = {"lambda_max": top, "lambda_max_se": top / 10, "preconditioned_lambda_max": 2 * top,
                   "preconditioned_lambda_max_se": top / 5, "threshold": np.full(4, 20.0)}  # fmt: skip
        numbers |= dict.fromkeys(("n_hvp", "seconds"), np.ones(4))
        ds = ds.assign({name: ("step", one) for name, one in numbers.items()}).assign(residual=ds.eigenvalue)
        return pn_schema.finish(ds.expand_dims(iteration=[0]) if is_stacked else ds, "curvature_monitor")

    out = saved_with_each(grid, tmp_path, monitor)
    ds = pn.correlate(out, diagnostics=["curvature_monitor"], **QUIET)
    expected = {
        "last_lambda_max": 3.0 - np.arange(4) / 8, "highest_lambda_max": 5.0 + np.arange(4),
        "last_threshold_ratio": (3.0 - np.arange(4) / 8) / 10, "highest_threshold_ratio": (5.0 + np.arange(4)) / 10,
    }  # fmt: skip
    assert ds.diagnostic.values.tolist() == list(expected)
    np.testing.assert_allclose(ds.value, list(expected.values()))
    np.testing.assert_allclose(ds.value_se, ds.value / 10)
    run = pn.open_run(next(out.glob("*/run.json")).parent)
    at_start = monitored(pn.load(run.files["curvature_monitor"]), run, run.start)
    assert float(at_start.highest_lambda_max) == 1.0  # what comes later has no part in it


def test_interrupted_computations_go_on_where_they_were(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "runs"
    shutil.copytree(grid, out, ignore=shutil.ignore_patterns("analysis"))
    seen: list[tuple[str, bool]] = []

    def small(run: Run, checkpoints: tuple[str], state: Path, vectors: bool, **options: Any) -> xr.Dataset:
        assert (checkpoints, vectors) == (("champion",), False)
        seen.append((run.path.name, (state / "begun").is_file()))
        state.mkdir(parents=True, exist_ok=True)
        (state / "begun").touch()
        if len(seen) == 2:
            raise KeyboardInterrupt
        ds = of_checkpoint(pn.eigenpairs(np.eye(2), vectors=False, progress=False))
        return pn_schema.finish(ds.assign(gradient_norm=("checkpoint", [float(len(seen))])), "eigenpairs")

    monkeypatch.setattr(correlation, "_analyses", lambda: {"eigenpairs": small})
    with pytest.raises(KeyboardInterrupt):
        pn.correlate(out, compute=["eigenpairs"], **QUIET)
    pn.correlate(out, compute=["eigenpairs"], **QUIET)
    names = sorted(path.parent.name for path in out.glob("*/run.json"))
    assert seen == [(names[0], False), (names[1], False), (names[1], True), (names[2], False), (names[3], False)]
    assert not list(out.glob("*/analysis/*unfinished"))


def test_analyses_that_can_be_computed_can_be_resumed() -> None:
    for kind, analyse in correlation._analyses().items():
        assert {"checkpoints", "device", "seed", "data", "progress"} <= signature(analyse).parameters.keys()
        assert ("state" in signature(analyse).parameters) == (kind != "saturation"), kind


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "beauty"}, "no run has stored beauty"),
        ({"axes": ["depth"]}, "do not differ in 'depth'"),
        ({"compute": ["landscape"]}, "unknown compute"),
        ({"n_bootstrap": 2}, "n_bootstrap is 2"),
        ({"checkpoint": "middle"}, "no checkpoint 'middle'"),
    ],
)
def test_bad_options_are_one_sentence(grid: Path, change: dict, message: str) -> None:
    with pytest.raises(PnError, match=message):
        pn.correlate(grid, **{**QUIET, **change})


def test_too_few_runs_or_a_constant_target_are_refused(grid: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there are 2 runs that have finished, and fewer than 4"):
        pn.correlate(*sorted(grid.glob("lr=0.003*")), **QUIET)
    with pytest.raises(RunError, match="holds no runs"):
        pn.correlate(tmp_path, **QUIET)
    frame = pd.DataFrame({"test_error": [0.1] * 5, "a": [1.0, 2.0, 3.0, 4.0, 5.0]})
    with pytest.raises(RunError, match="test_error is 0.1 in all 5 runs"):
        pn.correlate(frame, **QUIET)
    with pytest.raises(RunError, match="no diagnostics to correlate"):
        pn.correlate(pd.DataFrame({"test_error": [0.1, 0.2, 0.3, 0.4]}), **QUIET)
    with pytest.raises(RunError, match="a Linear is no run"):
        pn.correlate(torch.nn.Linear(2, 2), **QUIET)

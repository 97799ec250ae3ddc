"""The demonstration: two networks on handwritten digits are trained, analysed and reported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import xarray as xr

from pnanalysis.analyses.comparison import compare
from pnanalysis.analyses.hessian import hessian
from pnanalysis.analyses.landscape import landscape
from pnanalysis.analyses.saturation import saturation
from pnanalysis.analyses.trajectory import trajectory
from pnanalysis.errors import RunError
from pnanalysis.io import netcdf
from pnanalysis.io.runs import ANALYSIS, Run, open_run
from pnanalysis.report import write_report
from pnanalysis.terminal.progress import progress_bar

#: Options of each network's training. Both are small enough for two CPU cores and learn the digits well.
NETWORKS = {
    "tanh7": [
        "--model-option", "input_shape=[1,8,8]", "--model-option", "width=64", "--iterations", "6", "--epochs", "20",
        "--lam", "0.1", "--batch-size", "64", "--checkpoint-every", "1",
    ],
    "lenet5": [
        "--iterations", "6", "--epochs", "15", "--lam", "0.1", "--batch-size", "64", "--checkpoint-every", "1",
    ],
}  # fmt: skip

#: Examples and products of each spectrum.
SPECTRUM: dict[str, Any] = {"n": 512, "n_hvp": 200}


def demo(
    out: str | os.PathLike[str],
    device: str = "auto",
    seed: int = 0,
    log: Callable[[str], None] = print,
    progress: bool = True,
) -> tuple[Path, list[Run]]:
    """Train plain, persistent and restart runs of two networks on digits, analyse them and write a report.

    Parameters
    ----------
    out : path
        Folder for the runs (``tanh7``, ``lenet5`` and their ``-restart`` controls) and ``report.html``. Runs that are
        there already are resumed, or used as they are if they are complete.
    device : str
    seed : int
    log : callable
        Receives one line about each stage.
    progress : bool
        Show bars on a terminal.

    Returns
    -------
    (Path, list of Run)
        The report and the runs.
    """
    out = Path(out)
    jobs = [(network, strategy) for network in NETWORKS for strategy in ("persistent", "restart")]
    log(f"training {', '.join(NETWORKS)} on digits: plain, persistent and restart")
    workers = min(len(jobs), os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool, progress_bar("training", len(jobs), progress) as advance:
        for _ in pool.map(lambda job: _train(out, *job, device=device, seed=seed, threads=1), jobs):
            advance()
    runs = [open_run(out / _name(*job)) for job in jobs]
    log("analysing Hessian spectra, saturation, trajectories and the loss between the minima")
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    with (
        ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool,
        progress_bar("analysing", len(runs) + len(pairs), progress) as advance,
    ):
        for _ in pool.map(_analyse, runs, repeat(device), repeat(seed)):
            advance()
        for _ in pool.map(_compare, *zip(*pairs, strict=True), repeat(device), repeat(seed)):
            advance()
    report = write_report(runs, out / "report.html", title="pnanalysis demo: handwritten digits")
    return report, runs


def _name(network: str, strategy: str) -> str:
    return f"{network}-restart" if strategy == "restart" else network


def _train(out: Path, network: str, strategy: str, *, device: str, seed: int, threads: int) -> None:
    """Train in a process of its own, so that several trainings use several cores."""
    command = [
        sys.executable, "-m", "trainers.cli", network, "--strategy", strategy, "--data", "digits", "--out",
        str(out / _name(network, strategy)), "--device", device, "--seed", str(seed), "--resume", "--quiet",
        *NETWORKS[network],
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RunError(f"training {network} ({strategy}) failed: {lines[-1].removeprefix('error: ')}")


def _analyse(run: Run, device: str, seed: int) -> None:
    results = {
        "hessian": hessian(run, checkpoints=run.contenders, **SPECTRUM, device=device, seed=seed, progress=False),
        "saturation": saturation(run, n=300, device=device, seed=seed, progress=False),
        "trajectory": trajectory(run, progress=False),
    }
    _save(run, results)


def _compare(run: Run, control: Run, device: str, seed: int) -> None:
    """Compare champion and best restart, with the spectra saved before; and the line from plain to champion."""
    options: dict[str, Any] = {"device": device, "seed": seed, "progress": False}
    results = {
        "comparison": compare(run, control, hessian=SPECTRUM, **options),
        "barrier": landscape(run, view="line", align=True, **options),
    }
    _save(run, results)


def _save(run: Run, results: dict[str, xr.Dataset]) -> None:
    for kind, ds in results.items():
        netcdf.save(ds, run.path / ANALYSIS / f"{kind}.nc")

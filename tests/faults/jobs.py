"""What the faults strike: jobs that run in a process of their own, forked from one that has imported everything."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

import pnanalysis.analyses.hessian
import pnanalysis.cli
import trainers.cli
from pnanalysis import schema
from pnanalysis.io import netcdf, zarr_store
from pnanalysis.io.runs import Run, open_run
from pnanalysis.spectra import density
from trainers.runs import strategies

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([__name__])
YEAR = 365 * 24 * 3600.0
NETWORK = ("tanh7", "--data", "digits", "--model", "tanh7", "--model-option", "input_shape=[1,8,8]",
           "--model-option", "width=16", "--epochs", "3", "--iterations", "2", "--checkpoint-every", "1")  # fmt: skip


#: What a job's own process does before its work.
Condition = Callable[[], None]


def nothing(*_: Any) -> None:
    pass


def full_disk(file_bytes: int) -> None:
    """Have this process refused whatever makes a file larger than that."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))


def bound_by_permissions() -> None:
    """Give up the superuser's right to write where nobody may."""
    version, itself = 0x20080522, 0
    header, none = (ctypes.c_uint32 * 2)(version, itself), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None, use_errno=True).capset(header, none) == 0, os.strerror(ctypes.get_errno())


def jumping_clock(seed: int) -> None:
    """Have the time of day jump by up to a year, forwards and backwards, whenever it is asked for."""
    jumps, clock = random.Random(seed), time.time

    def now() -> float:
        return clock() + jumps.uniform(-YEAR, YEAR)

    time.time = now
    time.time_ns = lambda: int(now() * 1e9)


@dataclass(frozen=True)
class Job:
    """Work in a folder that may be ended at any moment and begun again.

    Attributes
    ----------
    prepare : callable
        ``prepare(folder)`` makes what the work needs.
    work : callable
        ``work(folder)``, in a process of its own; the same call continues what an ended one left.
    result : callable
        ``result(folder)``: what the finished work is compared by.
    """

    name: str
    prepare: Callable[[Path], None]
    work: Callable[[Path], None]
    result: Callable[[Path], Any]


class Running:
    """A job at work in a process of its own."""

    def __init__(self, job: Job, folder: Path, condition: Condition = nothing, name: str = "") -> None:
        self.output = folder.with_name(f"{folder.name}{name}.err")
        begun = _FORKS.Event()
        self.process: ForkServerProcess = _FORKS.Process(
            target=_work, args=(job.name, folder, begun, self.output, condition)
        )
        self.process.start()
        assert begun.wait(300)
        self.begun = time.monotonic()

    def send(self, signal: int) -> bool:
        """Send a signal; whether the job was still at work."""
        at_work = self.process.exitcode is None
        if at_work and self.process.pid is not None:
            os.kill(self.process.pid, signal)
        return at_work

    def end(self, timeout: float = 300) -> int:
        """Wait for the end and return the exit status, negative for a signal."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, "the job hangs"
        return self.process.exitcode

    @property
    def message(self) -> str:
        """What it wrote to standard error."""
        return self.output.read_text()


def _work(name: str, folder: Path, begun: Any, output: Path, condition: Condition) -> None:
    # As on a terminal's command line, but for the intervals between saves: every epoch, and every product.
    strategies.train.__kwdefaults__["save_interval"] = 0.0  # type: ignore[index]
    density.spectral_density.__kwdefaults__["save_every"] = 0.0  # type: ignore[index]
    torch.set_num_threads(1)
    os.chdir(folder)
    tempfile.tempdir = str(folder.parent)
    errors = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, 2)
    os.dup2(errors, 1)
    condition()
    begun.set()
    BY_NAME[name].work(folder)


def command(main: Callable[[], None], *arguments: str) -> Callable[[Path], None]:
    """Work that is a command line, in the folder."""

    def work(folder: Path) -> None:
        sys.argv = [main.__module__, *arguments]
        main()

    return work


def prepared_run(folder: Path) -> None:
    """A finished run, trained once."""
    if not _FINISHED:
        kept = folder.parent / "finished"
        kept.mkdir()
        assert Running(BY_NAME["training"], kept).end() == 0
        _FINISHED.append(kept / "run")
    shutil.copytree(_FINISHED[0], folder / "run")


_FINISHED: list[Path] = []


def contents(run: Run) -> dict[str, Any]:
    """All that two runs of the same settings must agree in."""
    weights = {c.name: {k: v.numpy().tobytes() for k, v in c.load().items()} for c in run.checkpoints}
    history = run.history.drop_vars("seconds")
    return {
        "weights": weights,
        "history": {name: array.values.tobytes() for name, array in history.data_vars.items()},
        "manifest": [run.manifest.get(name) for name in ("ends", "champion", "status", "failure")],
    }


def _of_runs(folder: Path) -> dict[str, Any]:
    return {str(path.relative_to(folder)): contents(open_run(path.parent)) for path in folder.rglob("run.json")}


def _of_spectrum(folder: Path) -> dict[str, bytes]:
    ds = netcdf.load(folder / "run/analysis/hessian.nc")
    return {str(name): array.values.tobytes() for name, array in ds.data_vars.items()}


def _of_report(folder: Path) -> bool:
    return (folder / "report.html").read_text().rstrip().endswith("</html>")


def numbered(k: int, n: int = 20_000) -> xr.Dataset:
    """A dataset that says when it was saved, in every number."""
    history = xr.Dataset(
        {
            name: (("iteration", "epoch"), np.full((1, n), float(k)))
            for name in ("train_loss", "penalty", "train_error", "validation_error", "test_error", "seconds")
        },
        {"iteration": [k], "epoch": np.arange(n)},
    )
    return schema.finish(history, "history")


def _save_repeatedly(folder: Path) -> None:
    before = int((folder / "saved.json").read_text() or 0) if (folder / "saved.json").is_file() else 0
    for k in range(before + 1, before + 11):
        netcdf.save(numbered(k), folder / "data.nc")
        with open(folder / "saved.json", "w") as file:  # in place: the job tells what it has been told is safe
            file.write(f"{k:6d}")


def _of_saving(folder: Path) -> bool:
    """Whether the file holds one dataset as a whole, not older than what was reported as saved."""
    saved = int((folder / "saved.json").read_text() or 0)
    values = netcdf.load(folder / "data.nc").train_loss.values
    return bool((values == values[0, 0]).all() and values[0, 0] >= saved)


def _append_rows(folder: Path) -> None:
    store, told = folder / "rows.zarr", folder / "appended.json"
    begin = len(_of_appending(folder)) if store.exists() else 0
    assert begin >= (json.loads(told.read_text() or "0") if told.is_file() else 0), "what was appended is lost"
    for k in range(begin, 8):
        zarr_store.append(numbered(k, 500), store, "iteration")
        with open(told, "w") as file:
            file.write(f"{k + 1:6d}")


def _of_appending(folder: Path) -> list[float]:
    """What is stored, a number for each row."""
    values = zarr_store.load(folder / "rows.zarr").train_loss.values
    assert (values == values[:, :1]).all()
    return [float(value) for value in values[:, 0]]


JOBS = (
    Job("training", nothing, command(trainers.cli.main, *NETWORK, "--out", "run", "--resume"), _of_runs),
    Job(
        "sweep", nothing,
        command(trainers.cli.main, *NETWORK, "--sweep", "seed=0:2", "--jobs", "1", "--out", "sweep", "--resume"),
        _of_runs,
    ),
    Job(
        "spectrum", prepared_run,
        command(pnanalysis.cli.main, "hessian", "run", "-c", "plain", "--n-hvp", "24", "--n", "50"),
        _of_spectrum,
    ),
    Job("saving", nothing, _save_repeatedly, _of_saving),
    Job("appending", nothing, _append_rows, _of_appending),
    Job("report", prepared_run, command(pnanalysis.cli.main, "report", "run", "-o", "report.html"), _of_report),
)  # fmt: skip
#: What reads a run, while another process may be writing it.
READERS = (
    Job("info", nothing, command(pnanalysis.cli.main, "info", "run"), nothing),
    Job("verify", nothing, command(pnanalysis.cli.main, "info", "run", "--verify"), nothing),
    Job("history", nothing, command(pnanalysis.cli.main, "history", "run", "-o", "history.nc"), nothing),
    Job(
        "saturation", nothing,
        command(pnanalysis.cli.main, "saturation", "run", "--n", "50", "-o", "saturation.nc"), nothing,
    ),
    Job("page", nothing, command(pnanalysis.cli.main, "report", "run", "-o", "page.html"), nothing),
)  # fmt: skip
BY_NAME = {job.name: job for job in (*JOBS, *READERS)}

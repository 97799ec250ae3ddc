"""Train and measure cells, several at a time, each in processes of its own that can be stopped and resumed."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pnanalysis.checks import duration
from pnanalysis.errors import PnError, RunError
from pnanalysis.inputs.sources import resolve_device
from pnanalysis.io.lock import Lock
from pnanalysis.io.manifest import read_manifest
from pnanalysis.io.runs import MANIFEST
from pnanalysis.reproduce.cells import FINISHED, SECONDS, Cell
from pnanalysis.reproduce.data import prepare
from pnanalysis.reproduce.finish import STUDY, ended, is_of_setting
from pnanalysis.reproduce.forks import Fork
from pnanalysis.reproduce.plan import Forecast, Plan, noted_seconds
from pnanalysis.reproduce.settings import PERSISTENT, Setting

#: What trainings and measures import, some of it only when they use it: ten seconds of a cell, however small it is.
_PRELOAD = (
    "torch._dynamo", "torchvision", "sklearn.datasets", "h5netcdf", "scipy.stats", "trainers.runs.strategies",
    "trainers.problems.kink_ensemble", "pnanalysis.reproduce.measures",
)  # fmt: skip


#: In the folder of a training of S2, what it was begun with.
_STUDY_OPTIONS = "options.json"
#: How often a line says how far cells that take hours have come.
_REPORT_SECONDS = 600.0


class Stopped(Exception):
    """The time is over, or the user has interrupted: what was trained is saved."""


class Worker:
    """Makes cells in processes, and stops those that run when asked to.

    Parameters
    ----------
    plan : Plan
    data : str
        The data of image experiments.
    work : Path
        Folder of the trainings.
    device : str
    keep : bool
        Keep trainings whose cell is done.
    """

    def __init__(self, plan: Plan, data: str, work: Path, device: str, keep: bool = False) -> None:
        self.plan, self.data, self.work, self.device, self.keep = plan, data, work, device, keep
        #: On a GPU trainings are long, and libraries that have seen one do not survive a fork; nor do all of macOS.
        is_safe = sys.platform == "linux" and resolve_device(device).type == "cpu"
        self.preload: Sequence[str] = _PRELOAD if is_safe else ()
        self._idle: list[Fork] = []
        self._running: set[Fork] = set()
        self._guard = threading.Lock()
        self._stopping = False

    def make(self, cell: Cell) -> float:
        """Train and measure a cell; returns the seconds it took.

        Raises
        ------
        RunError
            If it could not be made; the message says why.
        Stopped
            If the worker was stopped meanwhile.
        """
        started = time.monotonic()
        setting, run = self.plan.setting(cell.experiment), self.work / cell.id
        data = prepare(self.data, setting.n_train, self.work)
        if setting.recipe == "kink":
            self._train_study(cell, setting, run)
        else:
            self._train(cell, setting, run, data)
        job = {
            "cell": cell.__dict__, "scale": self.plan.scale, "setting": asdict(setting), "run": str(run),
            "out": str(self.plan.store.out), "data": data, "device": self.device,
        }  # fmt: skip
        failure = self._run("pnanalysis.reproduce.finish", json.dumps(job))
        if failure:
            raise RunError(f"{cell.id}: {failure}")
        if not self.keep:
            shutil.rmtree(run, ignore_errors=True)
        return time.monotonic() - started

    def _train(self, cell: Cell, setting: Setting, run: Path, data: str) -> None:
        set_aside_if_other(cell, setting, run)
        for _ in range(2):  # what fails twice is a result, as is what diverges; a full disk does not fail for ever
            if is_trained(cell, setting, run):
                return
            command = training_command(cell, setting, run, data, self.device)
            failure = self._timed(run, command) if setting.recipe == "two-well" else self._run(*command)
            if failure and not ended(run):
                raise RunError(f"{cell.id}: {failure}")

    def _train_study(self, cell: Cell, setting: Setting, run: Path) -> None:
        set_aside_if_other_study(cell, setting, run)
        failure = self._timed(run, study_command(cell, setting, run, self.device))
        if failure:
            raise RunError(f"{cell.id}: {failure}")

    def _timed(self, run: Path, command: Sequence[str]) -> str:
        """Run the command of a training that does not time its steps, and note its seconds, of all calls together."""
        started, before = time.monotonic(), noted_seconds(run)
        try:
            return self._run(*command)
        finally:
            if run.is_dir():
                seconds = round(before + time.monotonic() - started, 2)
                (run / SECONDS).write_text(json.dumps({"training_seconds": seconds}))

    def _run(self, module: str, *arguments: str) -> str:
        """Run a module in a process of its own; returns the last line of its errors, empty for success."""
        with self._guard:
            if self._stopping:
                raise Stopped
            fork = self._idle.pop() if self._idle else Fork(self.preload, {"OMP_NUM_THREADS": "1", **os.environ})
            self._running.add(fork)
        try:
            failure = fork.run(module, arguments)
        finally:
            with self._guard:
                self._running.discard(fork)
            if fork.is_alive:
                self._idle.append(fork)
            else:
                fork.close()
        if self._stopping:
            raise Stopped
        return failure.removeprefix("error: ")

    def stop(self) -> None:
        """Ask all processes to save and end."""
        with self._guard:
            self._stopping = True
            for fork in self._running:
                with suppress(ProcessLookupError):
                    fork.process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """End the processes that wait for work; those that run must have ended."""
        while self._idle:
            self._idle.pop().close()


def run_cells(
    plan: Plan,
    cells: Sequence[Cell],
    worker: Worker,
    *,
    jobs: int,
    minutes: float | None = None,
    log: Callable[[str], None] = print,
) -> bool:
    """Make the cells that are not done, in their order.

    Parameters
    ----------
    plan : Plan
    cells : sequence of Cell
    worker : Worker
    jobs : int
        How many at a time.
    minutes : float or None
        Stop after so long; everything is saved.
    log : callable
        Receives a line about each cell.

    Returns
    -------
    bool
        Whether all are done.

    Raises
    ------
    RunError
        At the end, if some could not be made; or at once if another process works in the same folder.
    """
    worker.work.mkdir(parents=True, exist_ok=True)
    lock = Lock(worker.work)
    lock.acquire()
    try:
        return _Queue(plan, cells, worker, jobs, log).run(minutes)
    finally:
        worker.close()
        lock.release()


class _Queue:
    """The cells that are left, and those that are being made."""

    def __init__(
        self, plan: Plan, cells: Sequence[Cell], worker: Worker, jobs: int, log: Callable[[str], None]
    ) -> None:
        self.worker, self.jobs, self.log = worker, jobs, log
        self.total = len(cells)
        self.plan = plan
        self.left = [cell for cell in cells if not plan.store.has(cell)]
        self.forecast = Forecast(plan, worker.work)
        self.failures: list[str] = []

    def run(self, minutes: float | None) -> bool:
        if not self.left:
            return True
        deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.log(f"{len(self.left)} of {self.total} cells to do: {self.forecast.left(self.left, self.jobs)}")
        waiting, begun = list(self.left), dict[Future[float], Cell]()
        report = time.monotonic() + _REPORT_SECONDS
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                while (waiting or begun) and not (deadline and time.monotonic() > deadline):
                    while waiting and len(begun) < self.jobs:
                        cell = waiting.pop(0)
                        begun[pool.submit(self.worker.make, cell)] = cell
                    for future in wait(begun, timeout=1.0, return_when=FIRST_COMPLETED).done:
                        self._finished(begun.pop(future), future)
                    if time.monotonic() > report and begun:
                        report = time.monotonic() + _REPORT_SECONDS
                        self.log(f"running: {', '.join(map(self.forecast.progress, begun.values()))}; {self._rest()}")
            finally:  # also of an interruption
                if begun:
                    self.worker.stop()
            for future, cell in begun.items():
                with suppress(Stopped):
                    wait([future])
                    self._finished(cell, future)
        if self.left and not self.failures and minutes is not None:
            self.log(
                f"stopped after {minutes:g} minutes with {len(self.left)} of {self.total} cells to do: {self._rest()}; "
                "run the same command again to continue"
            )
        if self.failures:
            raise RunError(
                f"{len(self.failures)} of {self.total} cells could not be made ({self.failures[0]}); "
                "the others are done or saved; fix the cause and run the same command again"
            )
        return not self.left

    def _finished(self, cell: Cell, future: Future[float]) -> None:
        try:
            seconds = future.result()
        except Stopped:
            raise
        except PnError as error:
            self.failures.append(str(error))
            self.log(f"not made: {error}")
            return
        self.left.remove(cell)
        seconds = self.forecast.add(cell, seconds)
        done = f"{self.total - len(self.left)} of {self.total} cells"
        self.log(f"{cell.id} in {duration(seconds)}; {done}, {self._rest()}")

    def _rest(self) -> str:
        return self.forecast.left(self.left, self.jobs) if self.left else "all done"


def set_aside_if_other(cell: Cell, setting: Setting, run: Path) -> None:
    """Rename the folder of a training that was begun with other settings, of an earlier version: it cannot go on.

    More iterations than it was begun with are no other settings.
    """
    if not (run / MANIFEST).is_file():
        return
    if not is_of_setting(read_manifest(run / MANIFEST), cell, setting, goes_on=True):
        _set_aside(run)


def is_trained(cell: Cell, setting: Setting, run: Path) -> bool:
    """Whether a training has come to its end: one with fewer iterations, which goes on, has not."""
    if ended(run) not in (FINISHED, "diverged"):
        return False
    return is_of_setting(read_manifest(run / MANIFEST), cell, setting)


def set_aside_if_other_study(cell: Cell, setting: Setting, run: Path) -> None:
    """The same for S2, whose trainings have no manifest: settings are noted in a file of their own."""
    wanted = json.loads(json.dumps({"seed": cell.seed, "arm": cell.arm, **setting.training(cell.variant, cell.arm)}))
    noted = run / _STUDY_OPTIONS
    if noted.is_file():
        begun = json.loads(noted.read_text())
        if cell.arm == PERSISTENT and begun.get("iterations", 0) < wanted["iterations"]:
            begun["iterations"] = wanted["iterations"]  # chains go on
        if begun != wanted:
            _set_aside(run)
    run.mkdir(parents=True, exist_ok=True)
    noted.write_text(json.dumps(wanted))


def _set_aside(run: Path) -> None:
    names = (run.with_name(f"{run.name}.other{i or ''}") for i in itertools.count())
    run.rename(next(name for name in names if not name.exists()))


def training_command(cell: Cell, setting: Setting, run: Path, data: str, device: str) -> list[str]:
    """The module for the training of a cell, and its arguments; it goes on where it was interrupted."""
    command = ["trainers.cli", setting.recipe, "--out", str(run), "--resume", "--quiet", "--device", device,
               "--seed", str(cell.seed)]  # fmt: skip
    if cell.arm != PERSISTENT:
        command += ["--strategy", cell.arm]
    if setting.recipe != "two-well":
        command += ["--data", data]
    for name, value in setting.training(cell.variant, cell.arm).items():
        if name == "model_options":
            for option, content in value.items():
                command += ["--model-option", f"{option}={json.dumps(content)}"]
        else:
            command += [f"--{name.replace('_', '-')}", str(value)]
    return command


def study_command(cell: Cell, setting: Setting, run: Path, device: str) -> list[str]:
    """The same for S2, whose chains are trained together."""
    options: dict[str, Any] = {"seed": cell.seed, "device": device, **setting.training(cell.variant, cell.arm)}
    named = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return ["trainers.runs.kink_study", "--out", str(run / STUDY), "--strategy", cell.arm, *named]

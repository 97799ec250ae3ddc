"""Jobs whose folder, clock or company changes while they are at work."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from pnanalysis.io.runs import open_run
from tests.faults.counts import Counts, add
from tests.faults.jobs import BY_NAME, READERS, YEAR, Job, Running, bound_by_permissions, jumping_clock
from tests.faults.test_faults import attempts, commands, continued, leftovers, prepared, strike


def explained(running: Running) -> bool:
    """Whether a job that has ended did so with status 2 and one sentence, and not 0."""
    status = running.end()
    assert status in (0, 2), running.message
    assert "Traceback" not in running.message
    if status == 2:
        assert running.message.splitlines()[-1].startswith("error: "), running.message
    return status == 2


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Let nobody write in a folder and below."""
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for each in folders:
        each.chmod(0o555)
    try:
        yield
    finally:
        for each in folders:
            each.chmod(0o755)


@pytest.mark.parametrize(("job", "n"), commands(10, "training"))
def test_a_folder_that_becomes_read_only(job: Job, n: int, tmp_path: Path, counts: Counts) -> None:
    for _, folder, seconds, expected, chance in attempts(job, n, tmp_path):
        running = Running(job, folder, bound_by_permissions)
        time.sleep(chance.uniform(0, seconds))
        with read_only(folder):
            struck = explained(running)
        add(counts, f"{job.name}, read-only folder", struck=struck, **continued(job, folder, expected))


@pytest.mark.parametrize(("job", "n"), commands(10))
def test_a_folder_that_vanishes(job: Job, n: int, tmp_path: Path, counts: Counts) -> None:
    name = "sweep" if job.name == "sweep" else "run"
    for _, folder, seconds, expected, chance in attempts(job, n, tmp_path):
        running = Running(job, folder)
        time.sleep(chance.uniform(0, seconds))
        is_there = (folder / name).is_dir()
        if is_there:
            (folder / name).rename(folder / "elsewhere")
        struck = explained(running)
        if is_there:
            if job.name in ("training", "sweep"):  # an analysis makes the folder of its result where there is none
                assert not (folder / name).exists(), [*(folder / name).rglob("*")]
            shutil.copytree(folder / "elsewhere", folder / name, dirs_exist_ok=True)
            shutil.rmtree(folder / "elsewhere")
        add(counts, f"{job.name}, vanished folder", struck=struck, **continued(job, folder, expected))


@pytest.mark.parametrize(("job", "n"), [each for each in commands(10) if each.values[0].name != "report"])
def test_a_second_writer(job: Job, n: int, tmp_path: Path, counts: Counts) -> None:
    for _, folder, seconds, expected, chance in attempts(job, n, tmp_path):
        first = Running(job, folder)
        time.sleep(chance.uniform(0, seconds))
        second = Running(job, folder, name="-second")
        refused = explained(second)
        if refused:
            assert "being written by process" in second.message
        if job.name != "sweep":  # two sweeps share the runs
            assert not explained(first), first.message
            assert job.result(folder) == expected
        elif explained(first):
            assert "being written by process" in first.message
        add(counts, f"{job.name}, second writer", struck=refused, **continued(job, folder, expected))


@pytest.mark.parametrize(("job", "n"), [each for each in commands(10) if each.values[0].name != "sweep"])
def test_readers_while_it_is_written(job: Job, n: int, tmp_path: Path, counts: Counts) -> None:
    for k, folder, _, expected, _ in attempts(job, n, tmp_path):
        writer, n_read = Running(job, folder), 0
        while writer.process.exitcode is None:
            reader = Running(READERS[(k + n_read) % len(READERS)], folder, name="-reader")
            explained(reader)
            n_read += 1
        assert writer.end() == 0, writer.message
        assert job.result(folder) == expected
        add(counts, f"{job.name}, readers", struck=n_read > 0, **continued(job, folder, expected))


@pytest.mark.parametrize(("job", "n"), commands(10))
def test_a_clock_that_jumps(job: Job, n: int, tmp_path: Path, counts: Counts) -> None:
    """Killed, continued after all times of files have changed, with another time of day at each look."""
    for k, folder, seconds, expected, chance in attempts(job, n, tmp_path):
        clock = partial(jumping_clock, k)
        struck, _ = strike(job, folder, signal.SIGKILL, chance.uniform(0, seconds), clock)
        for path in folder.rglob("*"):
            moved = time.time() + chance.uniform(-YEAR, YEAR)
            os.utime(path, (moved, moved))
        add(counts, f"{job.name}, clock jumps", struck=struck, **continued(job, folder, expected, clock))


def test_a_killed_run_is_interrupted(tmp_path: Path) -> None:
    job = BY_NAME["training"]
    folder = prepared(job, tmp_path, "killed")
    running = Running(job, folder)
    while not (folder / "run/history.nc").is_file():
        time.sleep(0.01)
    assert open_run(folder / "run").status == "running"
    assert running.send(signal.SIGKILL)
    running.end()
    before = sorted(folder.rglob("*"))
    info = Running(BY_NAME["info"], folder, name="-info")
    assert info.end() == 0
    assert "interrupted, " in info.message
    assert sorted(folder.rglob("*")) == before
    assert leftovers(folder)

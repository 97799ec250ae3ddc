"""Jobs ended at random moments: nothing that was saved is lost, and the same command continues to the same end."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pnanalysis.io.runs import open_run
from tests.faults.counts import Counts, add
from tests.faults.jobs import JOBS, Condition, Job, Running, full_disk, nothing

COMMANDS = ("training", "sweep", "spectrum", "report")


def tries(many: int, *quick: str) -> Any:
    """Each job with one try, if it belongs to the quick tests, and with many (or as TRIES says)."""
    many = int(os.environ.get("TRIES", many))
    slow = [pytest.param(job, many, id=f"{job.name}-{many}", marks=pytest.mark.faults) for job in JOBS]
    return [*(pytest.param(job, 1, id=f"{job.name}-1") for job in JOBS if job.name in quick), *slow]


def commands(many: int, *quick: str) -> list[Any]:
    """Those tries whose job is a command line."""
    return [each for each in tries(many, *quick) if each.values[0].name in COMMANDS]


_REFERENCES: dict[str, tuple[float, Any]] = {}


def reference(job: Job, tmp_path: Path) -> tuple[float, Any]:
    """How long the job takes when nothing strikes it, and its result."""
    if job.name not in _REFERENCES:
        running = Running(job, prepared(job, tmp_path, "reference"))
        assert running.end() == 0, running.message
        _REFERENCES[job.name] = time.monotonic() - running.begun, job.result(tmp_path / "reference")
    return _REFERENCES[job.name]


def prepared(job: Job, tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    job.prepare(folder)
    return folder


def leftovers(folder: Path) -> list[str]:
    """Temporary files and unfinished work."""
    own = (".zgroup", ".zattrs", ".zarray", ".zmetadata")  # of Zarr
    return [
        str(path)
        for path in folder.rglob("*")
        if (path.name.startswith(".") and path.name not in own) or path.name.endswith((".unfinished", ".partial"))
    ]


def continued(job: Job, folder: Path, expected: Any, condition: Condition = nothing) -> dict[str, bool]:
    """Run the same job again, and say how that went."""
    again = Running(job, folder, condition)
    assert again.end() == 0, again.message
    found = {"resumed": True, "identical": job.result(folder) == expected, "clean": not leftovers(folder)}
    assert found["identical"], folder
    assert found["clean"], leftovers(folder)
    return found


def strike(job: Job, folder: Path, number: int, seconds: float, condition: Condition = nothing) -> tuple[bool, Running]:
    running = Running(job, folder, condition)
    time.sleep(seconds)
    struck = running.send(number)
    running.end()
    return struck, running


class Attempt(NamedTuple):
    """A folder in which a job is to be struck, how long the job takes, what its result must be, and chance."""

    number: int
    folder: Path
    seconds: float
    expected: Any
    chance: random.Random


def attempts(job: Job, n: int, tmp_path: Path, what: object = "") -> Iterator[Attempt]:
    """``n`` of them; chance is the same in every call for the same job, ``n`` and ``what``."""
    seconds, expected = reference(job, tmp_path)
    chance = random.Random(" ".join(filter(None, (job.name, str(what), str(n)))))
    for k in range(n):
        yield Attempt(k, prepared(job, tmp_path, f"{k}"), seconds, expected, chance)


@pytest.mark.parametrize(("job", "n"), tries(50, "training"))
def test_killed_at_random_moments(job: Job, n: int, tmp_path: Path, counts: Counts) -> None:
    for _, folder, seconds, expected, chance in attempts(job, n, tmp_path):
        struck, _ = strike(job, folder, signal.SIGKILL, chance.uniform(0, seconds))
        if job.name == "saving" and (folder / "saved.json").is_file():
            assert job.result(folder), "what was saved is lost"
        add(counts, f"{job.name}, kill -9", struck=struck, **continued(job, folder, expected))


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, id=number.name, marks=[] if number == signal.SIGINT else [pytest.mark.slow])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    ],
)
@pytest.mark.parametrize(("job", "n"), commands(10, "training"))
def test_interrupted_at_random_moments(job: Job, number: int, n: int, tmp_path: Path, counts: Counts) -> None:
    for _, folder, seconds, expected, chance in attempts(job, n, tmp_path, number):
        struck, running = strike(job, folder, number, chance.uniform(0.1, 0.9) * seconds)
        status = running.end()
        assert status in (0, 128 + number, -number), running.message  # -number: before or after the command itself
        if status == 128 + number:
            assert "interrupted; " in running.message.splitlines()[-1]
            assert not [name for name in leftovers(folder) if not name.endswith(".unfinished")]
            if job.name == "training" and (folder / "run/run.json").is_file():
                assert open_run(folder / "run").manifest["status"] in ("interrupted", "finished")
        add(counts, f"{job.name}, {signal.Signals(number).name}", struck=struck, **continued(job, folder, expected))


@pytest.mark.parametrize(("job", "n"), tries(20, "training"))
def test_a_disk_that_fills_up(job: Job, n: int, tmp_path: Path, counts: Counts) -> None:
    """No file may grow beyond a random size: some are written, the next one is refused half way."""
    for _, folder, _, expected, chance in attempts(job, n, tmp_path):
        running = Running(job, folder, partial(full_disk, chance.randrange(2_000, 200_000)))
        status = running.end()
        assert status >= 0, f"ended by signal {-status}"
        if job.name in COMMANDS:
            assert status in (0, 2), running.message
            assert "Traceback" not in running.message
        assert not [name for name in leftovers(folder) if not name.endswith(".unfinished")]
        add(counts, f"{job.name}, full disk", struck=status != 0, **continued(job, folder, expected))

"""Modules that run in forks: as they would by themselves, one after the other, and until they are told to end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pnanalysis.reproduce.forks import Fork

#: A module that says what it was given, fails as it is told to, or waits to be ended.
MODULE = """
import os, signal, sys, time
import colorsys

kind, *rest = sys.argv[1:]
if kind == "write":
    colorsys.touched = getattr(colorsys, "touched", 0) + 1
    open(rest[0], "w").write(f"{__name__} {os.getpid()} {colorsys.touched} {sys.stdin.read()!r}")
    print("not to be seen by the one who reads answers")
elif kind == "exit":
    print("a first line", "error: no such thing  ", "", sep="\\n", file=sys.stderr)
    sys.exit(2)
elif kind == "text":
    sys.exit("in words")
elif kind == "raise":
    raise ValueError("wrong")
elif kind == "die":
    os.kill(os.getpid(), signal.SIGKILL)
elif kind == "wait":
    def end(*_):
        open(rest[0], "w").write("ended")
        sys.exit(3)
    signal.signal(signal.SIGTERM, end)
    open(rest[0], "w").write("waits")
    time.sleep(60)
"""


@pytest.fixture
def fork(tmp_path: Path) -> Iterator[Fork]:
    (tmp_path / "told.py").write_text(MODULE)
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    made = Fork(["colorsys", "no_such_module"], {**os.environ, "PYTHONPATH": path})
    yield made
    made.close()
    assert not made.is_alive


def test_each_module_runs_as_if_it_were_alone(fork: Fork, tmp_path: Path) -> None:
    seen = []
    for i in range(2):
        assert fork.run("told", ["write", str(tmp_path / f"{i}")]) == ""
        seen.append((tmp_path / f"{i}").read_text().split())
    assert [(name, touched, read) for name, _, touched, read in seen] == [("__main__", "1", "''")] * 2
    assert len({process for _, process, _, _ in seen} | {str(fork.process.pid)}) == 3


@pytest.mark.parametrize(
    ("kind", "failure"),
    [
        ("exit", "error: no such thing"),
        ("text", "in words"),
        ("raise", "ValueError: wrong"),
        ("die", "exit status -9"),
    ],
)
def test_failures_are_told_and_stop_nothing(kind: str, failure: str, fork: Fork, tmp_path: Path) -> None:
    assert fork.run("told", [kind]) == failure
    assert fork.run("absent", []).endswith("No module named absent")
    assert fork.run("told", ["write", str(tmp_path / "next")]) == ""


def test_sigterm_reaches_what_runs(fork: Fork, tmp_path: Path) -> None:
    file, answers = tmp_path / "waits", list[str]()
    thread = threading.Thread(target=lambda: answers.append(fork.run("told", ["wait", str(file)])))
    thread.start()
    deadline = time.monotonic() + 30
    while not (file.is_file() and file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    fork.process.send_signal(signal.SIGTERM)
    thread.join(30)
    assert answers == ["exit status 3"]
    assert file.read_text() == "ended"
    assert fork.is_alive  # and runs more


def test_without_anything_to_run_sigterm_ends_it(fork: Fork) -> None:
    assert fork.run("timeit", ["-n1", "-r1", "pass"]) == ""
    fork.process.send_signal(signal.SIGTERM)
    assert fork.process.wait(30) == 128 + signal.SIGTERM
    assert fork.run("timeit", ["-n1", "-r1", "pass"]) == f"exit status {128 + signal.SIGTERM}"
    assert not fork.is_alive

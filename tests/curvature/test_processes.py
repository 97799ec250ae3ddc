"""Joining the group of processes that torchrun has started."""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pnanalysis.curvature import processes
from pnanalysis.curvature.heartbeat import PeerSilent
from pnanalysis.curvature.processes import complete, join, leave
from pnanalysis.errors import CurvatureError


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1000")
    with pytest.raises(CurvatureError, match="CUDA devices for more processes; lower --nproc-per-node"):
        join(torch.device("cuda"))


@pytest.mark.parametrize("has_group", [False, True])
def test_a_group_is_made_where_there_is_none(has_group: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: has_group)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: made.append(backend))
    monkeypatch.setattr(processes, "_begin_to_beat", lambda: made.append("signs of life"))
    monkeypatch.setattr(atexit, "register", lambda function: made.append(function.__name__))
    assert join(torch.device("cpu")) == torch.device("cpu")
    assert made == ([] if has_group else ["gloo", "leave", "signs of life"])


class Exchange:
    """One that the other process does not answer, or that has failed since it has ended."""

    def __init__(self, has_failed: bool) -> None:
        self.has_failed = has_failed

    def wait(self, *_: object) -> None:
        raise RuntimeError("connection closed" if self.has_failed else "timed out")

    def is_completed(self) -> bool:
        return self.has_failed


class Silent:
    def check(self) -> None:
        raise PeerSilent("process 1 gives no sign of life")


@pytest.mark.parametrize("has_failed", [False, True])
def test_the_group_is_left_at_the_end_unless_an_exchange_is_open(
    has_failed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[bool] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append(True))
    monkeypatch.setattr(processes, "_heartbeat", Silent())
    monkeypatch.setattr(processes, "_given_up", [])
    with pytest.raises(RuntimeError, match="connection closed" if has_failed else "no sign of life"):
        complete(Exchange(has_failed), torch.zeros(1))
    leave()
    assert left == [True] * has_failed


_JOIN_AND_LEAVE = """
import os
from pathlib import Path
import torch
from pnanalysis.curvature.processes import Processes, join, leave

join(torch.device("cpu"))
import torch.distributed.nn  # as compilers of torch do, whenever they are first needed
Processes().add(torch.zeros(3))
leave()
print(sorted(name for task in Path("/proc/self/task").iterdir() if "gloo" in (name := (task / "comm").read_text())))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks at the threads of a process on Linux")
def test_no_thread_of_a_group_outlives_it() -> None:
    """It may abort the process while Python ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _JOIN_AND_LEAVE], env={**os.environ, **group, "PNANALYSIS_PATIENCE": "0"},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"

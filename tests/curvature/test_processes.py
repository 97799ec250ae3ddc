"""Joining the group of processes that torchrun has started."""

from __future__ import annotations

import atexit

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

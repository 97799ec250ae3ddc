"""Processes that hang are told from those that are slow."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from pnanalysis.curvature import heartbeat, processes
from pnanalysis.curvature.heartbeat import Heartbeat, PeerSilent
from pnanalysis.errors import CurvatureError, ProcessLost

BEATS = heartbeat._BEATS


def pair() -> tuple[Heartbeat, Heartbeat]:
    """Two processes that beat when they are told to."""
    store = dist.HashStore()
    return Heartbeat(store, 0, 2), Heartbeat(store, 1, 2)


def pass_time(one: Heartbeat, *beating: Heartbeat, beats: int = BEATS) -> None:
    """So many beats of ``one``, which looks at the others, and of those that are alive."""
    for _ in range(beats):
        for each in (*beating, one):
            each.beat()
        one.look()


def test_a_slow_process_is_waited_for_and_a_silent_one_is_lost() -> None:
    one, other = pair()
    pass_time(one, other, beats=20 * BEATS)  # its main thread may do whatever it likes meanwhile
    assert one.lost is None
    pass_time(one, beats=BEATS - 1)
    one.check()
    pass_time(one, other, beats=1)  # just in time
    pass_time(one, beats=BEATS)
    with pytest.raises(PeerSilent, match="process 1 gives no sign of life"):
        one.check()
    assert other.lost is None


def test_a_process_that_is_suspended_itself_loses_nobody() -> None:
    one, other = pair()
    pass_time(one, other)
    pass_time(other, beats=BEATS)  # both suspended, and one goes on later
    pass_time(one, other)
    one.check()


def test_a_process_that_never_began_is_lost_too() -> None:
    one, _ = pair()
    pass_time(one, beats=BEATS + 1)
    assert one.lost == 1


def test_a_process_that_has_ended_is_not_silent() -> None:
    one, other = pair()
    pass_time(one, other)
    other.patience = 0.01
    other.start()
    other.stop()
    pass_time(one, beats=3 * BEATS)
    assert one.lost is None


class Gone:
    """A store whose process has ended."""

    def set(self, *_: str) -> None:
        raise RuntimeError("Connection reset by peer")


def test_a_store_that_is_gone_is_no_silence() -> None:
    one = Heartbeat(Gone(), 0, 2, patience=0.01)
    one.start()
    for thread in one._threads:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in one._threads)
    assert one.lost is None


def test_what_nothing_wakes_up_is_ended(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    one, other = pair()
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    pass_time(one, other)
    pass_time(one, beats=heartbeat._GRACE * BEATS)  # time to save what there is
    assert not ended
    pass_time(one, beats=BEATS)
    assert ended[0] == 2
    assert "process 1 gives no sign of life" in capfd.readouterr().err


class Waiting:
    """An exchange that another process takes part in at the third glance, or never, or that fails."""

    def __init__(self, glances: float, failure: str = "") -> None:
        self.left, self.failure = glances, failure

    def wait(self, timeout: object = None) -> None:
        self.left -= 1
        if self.failure and self.is_completed():
            raise RuntimeError(self.failure)
        if not self.is_completed():
            raise RuntimeError("Operation timed out!")

    def is_completed(self) -> bool:
        return self.left <= 0


def test_waits_end_where_a_process_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = pair()
    monkeypatch.setattr(processes, "_heartbeat", one)
    pass_time(one, other)
    processes.complete(Waiting(3), torch.zeros(1))
    with pytest.raises(ProcessLost, match="closed by peer"), processes.clear_errors():
        processes.complete(Waiting(3, "Connection closed by peer"), torch.zeros(1))
    pass_time(one)
    silence = r"process 1 gives no sign of life.*run the same command again"
    with pytest.raises(ProcessLost, match=silence), processes.clear_errors():
        processes.complete(Waiting(float("inf")), torch.zeros(1))


def test_the_patience_is_a_number_of_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("soon", "-1", "inf", "nan"):
        monkeypatch.setenv("PNANALYSIS_PATIENCE", text)
        with pytest.raises(CurvatureError, match="PNANALYSIS_PATIENCE is .*it must be the seconds"):
            heartbeat.started(0, 2)
    monkeypatch.setenv("PNANALYSIS_PATIENCE", "0")
    assert heartbeat.started(0, 2) is None

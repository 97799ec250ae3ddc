"""Signs of life between processes, by which one that hangs, or whose machine is gone, is told from one that is slow.

A process that ends closes its connections, which the others notice at once. One that is stopped, or on a machine that
has lost power or its network, closes nothing, and its peers would wait until the timeout of the group. Here a thread of
each process counts up a number in a store that all reach, however long the main thread computes or waits. A process
whose number stands still for as long as :data:`PATIENCE` is lost.
"""

from __future__ import annotations

import atexit
import os
import threading
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pnanalysis.checks import shown
from pnanalysis.errors import CurvatureError
from pnanalysis.terminal.console import print_status

#: Seconds without a sign of life after which a process is lost; this variable of the environment sets another number.
PATIENCE, _VARIABLE = 60.0, "PNANALYSIS_PATIENCE"
#: Beats in that time.
_BEATS = 12
#: So many times as long the main thread may go on computing until it waits for the others, and saves what it has. Waits
#: within a device, or within a library, do not come back: then the process is ended.
_GRACE = 5
_GONE = "gone"


class PeerSilent(RuntimeError):
    """Another process gives no sign of life."""


class Heartbeat:
    """The signs of life of this process and of the others.

    Time is counted in beats of this process, so that jobs whose processes are all suspended, and go on, lose nobody.

    Parameters
    ----------
    store : torch.distributed.Store
        Used by this object alone: whoever waits for something in a store keeps others waiting for the store.
    rank, n : int
        Of this process, and how many there are.
    patience : float
        Seconds.
    """

    def __init__(self, store: Any, rank: int, n: int, patience: float = PATIENCE) -> None:
        self.store, self.rank, self.patience = store, rank, patience
        self._own = 0
        self._heard: dict[int, bytes] = {other: b"" for other in range(n) if other != rank}
        self._seen = dict(self._heard)
        self._silent = dict.fromkeys(self._heard, 0)
        self._lost_for = 0
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Beat until the process ends."""
        # a store on a machine that is gone does not answer: who looks must not be the one who asks
        for repeat in (self.beat, self.look):
            thread = threading.Thread(target=self._repeat, args=(repeat,), daemon=True, name="heartbeat")
            thread.start()
            self._threads.append(thread)
        atexit.register(self.stop)

    def stop(self) -> None:
        """End both threads, and let the others know that this process is not silent but done."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=1)

    def check(self) -> None:
        """Raise if a process is lost.

        Raises
        ------
        PeerSilent
        """
        if (lost := self.lost) is not None:
            raise PeerSilent(f"process {lost} gives no sign of life")

    @property
    def lost(self) -> int | None:
        """The first process that has been silent for too long."""
        return next((rank for rank, n in self._silent.items() if n >= _BEATS), None)

    def beat(self) -> None:
        """Give a sign of life, and take those of the others."""
        self._own += 1
        self.store.set(f"{self.rank}", str(self._own))
        for rank in self._heard:
            if self.store.check([f"{rank}"]):
                self._heard[rank] = self.store.get(f"{rank}")

    def look(self) -> None:
        """Count for how many beats each of the others has been silent."""
        for rank, heard in self._heard.items():
            is_silent = heard == self._seen[rank] != _GONE.encode()
            self._silent[rank] = self._silent[rank] + 1 if is_silent else 0
            self._seen[rank] = heard
        self._lost_for = 0 if self.lost is None else self._lost_for + 1
        if self._lost_for >= _GRACE * _BEATS:
            self.end()

    def end(self) -> None:
        """End this process, whose main thread waits for one that is lost where nothing can wake it up."""
        print_status(
            f"error: process {self.lost} gives no sign of life, and this one waits for it; the same command goes on "
            "from what was saved last"
        )
        os._exit(2)

    def _repeat(self, once: Any) -> None:
        while not self._stopped.wait(self.patience / _BEATS):
            try:
                once()
            except RuntimeError:  # the process that had the store has ended, which is no silence
                self._stopped.set()
        if once == self.beat:
            with suppress(RuntimeError):
                self.store.set(f"{self.rank}", _GONE)


def started(rank: int, n: int) -> Heartbeat | None:
    """The heartbeat of a process that ``torchrun`` has started; none where the environment says 0 seconds.

    Raises
    ------
    CurvatureError
        If the environment says anything but a number of seconds.
    """
    text = os.environ.get(_VARIABLE, str(PATIENCE))
    try:
        patience = float(text)
        if not 0 <= patience < float("inf"):
            raise ValueError(text)
    except ValueError as error:
        raise CurvatureError(
            f"{_VARIABLE} is {shown(text)}; it must be the seconds after which a silent process is lost, or 0"
        ) from error
    if not patience or "MASTER_ADDR" not in os.environ:
        return None
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*place, is_master=False, timeout=timedelta(seconds=max(patience, 1)))
    # after a restart by torchrun, the store has the numbers of those before
    name = f"pnanalysis/heartbeat/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    found = Heartbeat(dist.PrefixStore(name, store), rank, n, patience)
    found.start()
    return found


__all__ = ["PATIENCE", "Heartbeat", "PeerSilent", "started"]

"""How much memory this process takes on a device, and the most it takes while something is computed."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

_STATM = Path("/proc/self/statm")
#: Seconds between two looks at the memory of the process: large tensors live longer than that.
_INTERVAL = 0.001


def used_bytes(device: torch.device) -> int | None:
    """Memory that tensors take on a CUDA device, or this process on the host, files apart; ``None`` if nobody tells."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    if device.type == "cpu":
        with suppress(OSError, ValueError, IndexError):
            _, resident, of_files = _STATM.read_text().split()[:3]
            return (int(resident) - int(of_files)) * os.sysconf("SC_PAGE_SIZE")
    return None


class PeakMemory:
    """Within the body, the most memory that this process takes on a device.

    On the host a thread looks a thousand times a second; on CUDA the allocator knows, whose peak statistics begin anew
    here.

    Attributes
    ----------
    before, peak, after : int or None
        Bytes, known after the body; see :func:`used_bytes`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before: int | None = None
        self.peak: int | None = None
        self.after: int | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.before = self.peak = used_bytes(self.device)
        if self.before is not None and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.before is not None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self.after = used_bytes(self.device)
        if self.before is not None and self.device.type == "cuda":
            self.peak = int(torch.cuda.max_memory_allocated(self.device))
        self._look()

    def _watch(self) -> None:
        while not self._over.wait(_INTERVAL):
            self._look()

    def _look(self) -> None:
        self.peak = max((size for size in (self.peak, used_bytes(self.device)) if size is not None), default=None)


__all__ = ["PeakMemory", "used_bytes"]

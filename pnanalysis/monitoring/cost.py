"""The time that measurements take, kept to a part of that of the training they watch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

#: A measurement may take longer than the last one, which was taken for its length.
_SLACK = 1.1


class CostCap:
    """Says when the next measurement can be afforded.

    A measurement may begin once all so far and this one, taken to be as long as the last one, are within ``share`` of
    the training's own time. One before any training is paid for before the next. All time between :meth:`start` and
    :meth:`stop` that is not a measurement counts as training.

    Parameters
    ----------
    share : float or None
        Time of measurements relative to that of training; no cap if ``None``.
    device : torch.device
        Its queue is waited for before and after a measurement, whose time it would count as otherwise.
    clock : callable
        Returns seconds.
    """

    def __init__(
        self, share: float | None, device: torch.device, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.share, self.device, self.clock = share, device, clock
        self.measuring = 0.0
        self.last = 0.0
        self._begun: float | None = None
        self._total = 0.0

    def resume(self, training: float, measuring: float) -> None:
        """Count the seconds of an earlier part of the training, too."""
        self.measuring += measuring
        self._total += training + measuring

    def start(self) -> None:
        """Training goes on from here."""
        self._begun = self.clock()

    def stop(self) -> None:
        """Training pauses or has ended."""
        if self._begun is not None:
            self._total += self.clock() - self._begun
            self._begun = None

    @property
    def training(self) -> float:
        """Seconds of training so far, without those of measurements."""
        running = 0.0 if self._begun is None else self.clock() - self._begun
        return max(self._total + running - self.measuring, 0.0)

    @property
    def cost(self) -> float:
        """Time of all measurements relative to that of training so far."""
        training = self.training
        return self.measuring / training if training else float("inf")

    @property
    def spare(self) -> float:
        """Seconds that measurements may still take."""
        return float("inf") if self.share is None else self.share * self.training - self.measuring

    @property
    def is_exceeded(self) -> bool:
        """Whether measurements took more than their part of a training, if there was any."""
        return self.share is not None and self.training > 0 and self.cost > _SLACK * self.share

    def affordable(self) -> bool:
        """Whether a measurement may begin now."""
        return self.last <= self.spare

    @contextmanager
    def measured(self, continued: bool = False) -> Iterator[None]:
        """The body is a measurement, or belongs to the last one if it is ``continued``."""
        self._wait()
        begin = self.clock()
        try:
            yield
        finally:
            self._wait()
            seconds = self.clock() - begin
            self.last = seconds + (self.last if continued else 0.0)
            self.measuring += seconds
            if self._begun is None:  # before or after training, it takes no time from it
                self._total += seconds

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

"""What work on an operator takes in time and memory, said as soon as its first products have been measured.

How many products there are, and how much memory the vectors take that are kept, is known from the plan. What a product
takes is measured on the first two, which are computed in any case. The first may be slower than all others, because it
is checked and traced; the second tells the time, and both the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeVar

import torch

from pnanalysis.checks import duration, human
from pnanalysis.spectra.inner_products import orthogonalised
from pnanalysis.spectra.linear_operator import LinearOperator, empty_columns
from pnanalysis.spectra.memory import Storage
from pnanalysis.spectra.used_memory import PeakMemory, used_bytes
from pnanalysis.terminal.progress import Advance
from pnanalysis.terminal.streams import write_line

T = TypeVar("T")
#: Steps whose products are measured.
_MEASURED = 2
#: Vectors alive while a product is computed, of those that are counted as working space: the one that is multiplied and
#: the operator's copy.
_ALIVE = 2
#: Entries and vectors of the basis that Gram-Schmidt is timed on: more than fits into caches, and soon done.
_ENTRIES, _VECTORS = 2**20, 8
#: Where forecasts are noted that are said.
_NOTES: list[list[Forecast]] = []


@dataclass(frozen=True)
class Work:
    """What is planned.

    Attributes
    ----------
    n_parameters, n_products : int
    storage : Storage
        How the vectors are kept.
    kept, working : int
        Bytes of memory for vectors that are kept, and for those to work with.
    on_disk : int
        Bytes there.
    at_once : int
        Vectors that are multiplied at a time where most memory is taken.
    n_read : int
        How often Gram-Schmidt takes a vector that is kept, altogether.
    products : str
        How many, in words, where that is not ``n_products``.
    beside : int
        Bytes of further vectors that are kept meanwhile, in the same place.
    afterwards : int
        Bytes that are taken later on, when all these vectors are free again, by what checks another operator as this
        one has been.
    """

    n_parameters: int
    n_products: int
    storage: Storage
    kept: int
    working: int
    on_disk: int = 0
    at_once: int = 1
    n_read: int = 0
    products: str = ""
    beside: int = 0
    afterwards: int = 0

    @property
    def peak(self) -> int:
        """Bytes of memory that vectors take at most."""
        return self.kept + self.working

    @property
    def vector(self) -> int:
        """Bytes of a vector that is worked with, or of the part of it that this process holds."""
        part = self.storage.part
        return (self.n_parameters if part is None else part.largest) * self.storage.dtype.itemsize


class Forecast:
    """Measures the first products of an operator, and then says on standard error what all of them take.

    Parameters
    ----------
    device : torch.device
        Of the operator.
    title : str
        What is computed, in a few words.
    enabled : bool
        ``False`` measures and says nothing.
    """

    def __init__(self, device: torch.device, title: str, enabled: bool = True) -> None:
        self.device, self.title, self.enabled = device, title, enabled
        self.before = used_bytes(device) if enabled else None
        self._work: Work
        self._bar: Advance
        self._done, self._restored = 0.0, 0.0  # products, and those of an interrupted call among them
        self._pending = 0  # vectors that have been multiplied since the last step
        self._steps: list[tuple[float, float]] = []  # seconds of the products of a step, and for each vector
        self._last, self._end, self._rest = 0.0, 0.0, 0.0  # of the last product, when it ended, and of the step beside
        self._early = 0  # peak until the first product is done, for which ways to compute it are compared
        self._extra: int | None = None  # bytes that later products take beyond the vectors that are counted
        self._prepared = 0  # bytes that stay of what was computed before them
        self._stays = 0  # and those that products keep

    def prepared(self, compute: Callable[[], T]) -> T:
        """What is computed before the first product, and counts for the peak."""
        if not self.enabled:
            return compute()
        with PeakMemory(self.device) as memory:
            found = compute()
        self._early = max(self._early, memory.peak or 0)
        if memory.before is not None and memory.after is not None:
            self._prepared += max(memory.after - memory.before, 0)
        return found

    def watch(self, operator: LinearOperator, advance: Advance, work: Work) -> tuple[LinearOperator, Advance]:
        """The operator and the progress bar to work with in place of the given ones.

        Parameters
        ----------
        operator : LinearOperator
        advance : callable
            To be called with the products of each step; see :func:`pnanalysis.terminal.progress.progress_bar`.
        work : Work
        """
        if not self.enabled:
            return operator, advance
        self._work, self._bar = work, advance
        return _Watched(operator, self), self._advance

    @property
    def peak(self) -> int | None:
        """The most bytes on the operator's device, those in use before included; ``None`` where that is not known."""
        if self.before is None or self._extra is None:
            return None
        later = self.before + self._prepared + self._extra + self._vectors + self._beside
        return max(later, self._early + self._work.afterwards)

    @property
    def seconds(self) -> float:
        """What all products take, with Gram-Schmidt."""
        work = self._work
        left = max(work.n_products - self._done, 0)
        each = _seconds_per_vector(work) if work.n_read else 0.0
        n_new = max(work.n_products - self._restored, 0)
        n_read = work.n_read * (1 - (self._restored / work.n_products) ** 2)  # later products take more
        beside = each * n_read + n_new * max(self._rest - each * self._done, 0.0)
        return sum(seconds for seconds, _ in self._steps) + left * self._steps[-1][1] + beside

    def product(self, operator: LinearOperator, V: torch.Tensor) -> torch.Tensor:
        """A product, measured as long as nothing has been said."""
        if not self.enabled:
            return operator.matmat(V)
        self._wait()
        with PeakMemory(self.device) as memory:
            begin = perf_counter()
            found = operator.matmat(V)
            self._wait()
            self._end = perf_counter()
        self._last = self._end - begin
        self._pending += V.shape[1]
        if memory.before is not None and memory.peak is not None and memory.after is not None:
            self._note_memory(memory.before, memory.peak, memory.after, V)
        return found

    def _note_memory(self, before: int, peak: int, after: int, V: torch.Tensor) -> None:
        work, k = self._work, V.shape[1]
        at_once, vector = max(work.at_once, k), V.shape[0] * V.element_size()
        stays = max(self._stays + after - before - k * vector, 0)
        if self._extra is None:
            self._early, self._extra = max(self._early, peak), stays
        else:
            # what Gram-Schmidt needs later on is free while a product is computed
            free = work.working - _ALIVE * at_once * work.vector if self._vectors else 0
            rise = self._stays + peak - before + (at_once - k) * vector
            self._extra = max(self._extra, rise - free, stays)
        self._stays = stays

    def _advance(self, steps: float = 1, text: str = "") -> None:
        self._bar(steps, text)
        self._done += steps
        if not self.enabled or not steps:
            return
        if steps == self._pending:
            self._steps.append((self._last, self._last / steps))
            self._rest = perf_counter() - self._end
            if len(self._steps) == _MEASURED or self._done >= self._work.n_products:
                self.enabled = False
                write_line(self._line())
                for notes in _NOTES:
                    notes.append(self)
        else:  # an interrupted call had done them, and a product has told that the operator is the same
            self._restored += steps
        self._pending = 0

    def _line(self) -> str:
        work = self._work
        products = work.products or f"{work.n_products:,} product{'s' * (work.n_products != 1)}"
        restored = f" ({self._restored:,.0f} done before)" if self._restored else ""
        what = f"{products} of {_count(work.n_parameters)} parameters{restored}"
        return f"{self.title}: {what}, about {duration(max(self.seconds, 1.0))}; {self._memory()}"

    def _memory(self) -> str:
        work, storage = self._work, self._work.storage
        kept = {"half": " (half)", "none": " (none kept)"}.get(storage.mode, "")
        disk = f" and {human(work.on_disk)} on the disk" if work.on_disk else ""
        basis = f"basis{kept} {human(work.peak)}{disk}"
        if self.peak is None or self.before is None:
            return f"memory: {basis}; what products take is not known here"
        own = f"products {human(self.peak - self._vectors - self.before)}, in use before {human(self.before)}"
        if not self._vectors:
            return f"memory on {self.device} {human(self.peak)}: {own}; on {storage.device}: {basis}"
        return f"memory {human(self.peak)}: {basis}, {own}"

    @property
    def _vectors(self) -> int:
        """Bytes of the vectors that are on the operator's device."""
        return self._work.peak if self._is_there else 0

    @property
    def _beside(self) -> int:
        return self._work.beside if self._is_there else 0

    @property
    def _is_there(self) -> bool:
        """Whether vectors are kept on the operator's device."""
        return self._work.storage.device.type == self.device.type

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Watched:
    """An operator whose first products are measured; in all else the same."""

    def __init__(self, operator: LinearOperator, forecast: Forecast) -> None:
        self._operator, self._forecast = operator, forecast

    @property
    def shape(self) -> tuple[int, int]:
        return self._operator.shape

    @property
    def device(self) -> torch.device:
        return self._operator.device

    @property
    def dtype(self) -> torch.dtype:
        return self._operator.dtype

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return self.matmat(v[:, None])[:, 0]

    def matmat(self, V: torch.Tensor) -> torch.Tensor:
        return self._forecast.product(self._operator, V)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operator, name)


@contextmanager
def forecasts() -> Iterator[list[Forecast]]:
    """Those that are said within the body, to be compared with what came."""
    notes: list[Forecast] = []
    _NOTES.append(notes)
    try:
        yield notes
    finally:
        _NOTES[:] = [one for one in _NOTES if one is not notes]  # equal ones may be those of another use


def _seconds_per_vector(work: Work) -> float:
    """What Gram-Schmidt takes for each vector that it projects off, timed on a piece."""
    storage = work.storage
    n_entries = work.vector // storage.dtype.itemsize
    n = min(n_entries, _ENTRIES)
    basis = empty_columns(n, _VECTORS, storage.stored_dtype, storage.device).zero_()
    vector = empty_columns(n, 1, storage.dtype, storage.device).zero_()
    times = []
    for _ in range(2):
        begin = perf_counter()
        rest, _ = orthogonalised(vector, [basis])
        float(rest[0, 0])  # waits for the device
        times.append(perf_counter() - begin)
    return min(times) / _VECTORS * n_entries / n


def _count(n: int) -> str:
    """A number of parameters in words: ``124.4M``."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if n >= size:
            return f"{n / (1e3 if unit == 'k' else size):.1f}{unit}"
    return f"{n:,}"


__all__ = ["Forecast", "Work", "forecasts"]

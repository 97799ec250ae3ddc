"""The processes of a ``torch.distributed`` group, as ``torchrun`` starts them: joining, agreeing, sums.

What is decided and computed on the host goes through gloo, which waits for no device.
"""

from __future__ import annotations

import atexit
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pnanalysis.curvature import heartbeat
from pnanalysis.errors import CurvatureError, PnError, ProcessLost, is_out_of_memory, reason
from pnanalysis.spectra.sharing import Alone

T = TypeVar("T")
#: A process that shows signs of life but does not answer for so long hangs.
TIMEOUT = timedelta(minutes=30)
#: How long a wait for the others lasts before it is asked whether they are alive.
_GLANCE = timedelta(seconds=1)
_heartbeat: heartbeat.Heartbeat | None = None
#: Exchanges that this process has given up waiting for.
_given_up: list[Any] = []


class Processes(Alone):
    """What the processes of a group agree on; every method is called by all of them, in the same order.

    Parameters
    ----------
    group : ProcessGroup, optional
        The default group if omitted.

    Raises
    ------
    CurvatureError
        If there is no process group.
    """

    def __init__(self, group: Any = None) -> None:
        if not dist.is_initialized():
            raise CurvatureError("there is no process group; call torch.distributed.init_process_group first")
        self.group = group
        self.rank, self.n = dist.get_rank(group), dist.get_world_size(group)

    def gathered(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.n
        with clear_errors():
            meet(self.group)
            dist.all_gather_object(found, value, self.group)
        return found

    def decided(self, value: T) -> T:
        found = [value if self.is_first else None]
        with clear_errors():
            meet(self.group)
            dist.broadcast_object_list(found, group=self.group, group_src=0)
        return found[0]  # type: ignore[return-value]

    def by_first(self, compute: Callable[[], T]) -> T:
        found = self.decided(_outcome(compute) if self.is_first else None)
        assert found is not None
        result: T = _without_error(found)
        return result

    def by_all(self, compute: Callable[[], T]) -> T:
        own = _outcome(compute)
        errors = self.gathered(own[1])
        for rank, error in enumerate(errors):
            if error is not None:
                kind, text = error
                raise kind(f"process {rank}: {text}")
        result: T = _without_error(own)
        return result

    def least(self, number: float) -> float:
        return min(self.gathered(number))

    def add(self, sums: Tensor) -> Tensor:
        if sums.numel():
            sums = sums.contiguous()
            with clear_errors():
                complete(dist.all_reduce(sums, group=self.group, async_op=True), sums)
        return sums

    def send(self, tensor: Tensor) -> None:
        if self.n > 1:
            whole = tensor if tensor.is_contiguous() else tensor.contiguous()
            with clear_errors():
                complete(dist.broadcast(whole, group=self.group, group_src=0, async_op=True), whole)
            if whole is not tensor:
                tensor.copy_(whole)


def join(device: torch.device) -> torch.device:
    """Join the group of the processes that ``torchrun`` has started; returns the device of this one.

    Raises
    ------
    CurvatureError
        If there are more processes than CUDA devices on this machine.
    """
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise CurvatureError(
                f"there are {torch.cuda.device_count()} CUDA devices for more processes; lower --nproc-per-node"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        import_before_joining()
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        atexit.register(leave)
        _begin_to_beat()
    return device


def import_before_joining() -> None:
    """Import the module of torch that keeps the group which there is when it is imported, as other parts of torch do.

    Its functions have that group as the default of an argument. It would outlive being left, and so would its threads,
    which may abort the process while Python ends.
    """
    importlib.import_module("torch.distributed.nn")


def leave() -> None:
    """Leave the group that :func:`join` has made, at the end of the process.

    A thread of gloo that lets go of the last tensors while Python shuts down aborts the process; leaving ends it first.
    It would wait, though, for an exchange that nobody finishes.
    """
    if dist.is_initialized() and not _given_up:
        dist.destroy_process_group()


def _begin_to_beat() -> None:
    """Give signs of life, unless one of the processes is told to give none, which the others must not wait for."""
    global _heartbeat
    found = heartbeat.started(dist.get_rank(), dist.get_world_size())
    _heartbeat = found if all(Processes().gathered(found is not None)) else None


def complete(work: Any, tensor: Tensor) -> None:
    """Wait for an exchange of a tensor with the others for as long as they are alive.

    Raises
    ------
    PeerSilent
        If one of them is not.
    RuntimeError
        If one of them has ended.
    """
    try:
        _wait(work, tensor)
    except BaseException:
        if not work.is_completed():
            _given_up.append(work)
        raise


def _wait(work: Any, tensor: Tensor) -> None:
    if tensor.device.type != "cpu" or _heartbeat is None:  # a device waits by itself, and lets the host go on
        work.wait()
        return
    while True:
        try:
            work.wait(_GLANCE)
            return
        except RuntimeError:
            if work.is_completed():
                work.wait()  # raises what has gone wrong, if it was not that the end came a moment later
                return
            _heartbeat.check()


def meet(group: Any = None) -> None:
    """Wait until all are there, for exchanges that cannot be interrupted; does nothing without signs of life."""
    if _heartbeat is not None:
        here = torch.zeros(1)
        complete(dist.all_reduce(here, group=group, async_op=True), here)


def lost(error: RuntimeError, advice: str) -> ProcessLost:
    """The sentence about another process that has ended or is silent, with what to do to go on.

    What this one does from now on is its end, which nothing needs to enforce.
    """
    if _heartbeat is not None:
        _heartbeat.stop()
    cause = (str(error).splitlines() or [""])[0][:100]
    return ProcessLost(
        f"another process has ended, or does not answer ({cause}); its own message says why; {advice} to go on from "
        "what is saved"
    )


def is_first_process() -> bool:
    """Whether this process is the first one of the default group, or there is no group."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


@contextmanager
def first_process_first() -> Iterator[None]:
    """Run the body in the first process of the group before it runs in the others; at once where there is no group."""
    together = dist.is_available() and dist.is_initialized()
    if together and dist.get_rank() > 0:
        meet()
        dist.barrier()
    try:
        yield
    finally:
        if together and dist.get_rank() == 0:
            meet()
            dist.barrier()


@contextmanager
def clear_errors() -> Iterator[None]:
    """One sentence where another process has died."""
    try:
        yield
    except RuntimeError as error:
        raise lost(error, "run the same command again") from error


_Outcome = tuple[Any, tuple[type[PnError], str] | None]


def _outcome(compute: Callable[[], Any]) -> _Outcome:
    """What is computed and ``None``, or ``None`` and the error; those that are none of the user's end the process."""
    try:
        return compute(), None
    except ProcessLost:
        raise
    except PnError as error:
        return None, (type(error), str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None, (CurvatureError, reason(error))


def _without_error(outcome: _Outcome) -> Any:
    value, error = outcome
    if error is not None:
        kind, text = error
        raise kind(text)
    return value


__all__ = [
    "TIMEOUT",
    "Processes",
    "clear_errors",
    "complete",
    "first_process_first",
    "import_before_joining",
    "is_first_process",
    "join",
    "lost",
    "meet",
]

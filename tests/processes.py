"""Worker processes that tests start once and use for several groups: starting takes longer than what they compute."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any


class Workers:
    """Processes that run functions as the ranks of a new group each time; they start when they are first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._n_groups = folder, 0
        self._ends: list[Connection] = []
        self._processes: list[SpawnProcess] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(len(self._ends), theirs), daemon=True)
        process.start()
        self._ends.append(ours)
        self._processes.append(process)

    def run(self, n: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What a function (of a module, for it is found by its name) returns in each of ``n`` ranks."""
        while len(self._ends) < n:
            self._start()
        self._n_groups += 1
        meeting = self.folder / f"meeting-{self._n_groups}"
        for end in self._ends[:n]:
            end.send((n, meeting, function, arguments))
        answers = [end.recv() for end in self._ends[:n]]
        failed = [text for text, _ in answers if text]
        assert not failed, "\n".join(failed)
        return [result for _, result in answers]

    def stop(self) -> None:
        for end, process in zip(self._ends, self._processes, strict=True):
            end.send(None)
            process.join(timeout=20)


def _serve(rank: int, end: Connection) -> None:
    import torch
    import torch.distributed as dist

    from pnanalysis.curvature.processes import import_before_joining

    torch.set_num_threads(1)
    import_before_joining()
    while (job := end.recv()) is not None:
        n, meeting, function, arguments = job
        try:
            # a mistake in a test must not wait for half an hour
            dist.init_process_group(
                "gloo", init_method=f"file://{meeting}", rank=rank, world_size=n, timeout=timedelta(seconds=100)
            )
            answer = "", function(*arguments)
        except BaseException:
            answer = f"process {rank}: {traceback.format_exc()}", None
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        end.send(answer)

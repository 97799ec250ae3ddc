"""The part of the data that one of several processes computes with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from pnanalysis.curvature.batches import Batch
from pnanalysis.curvature.processes import Processes
from pnanalysis.inputs.batches import as_pair, batch_size, can_cut, cut

T = TypeVar("T")


def own_share(batches: Sequence[T], group: Any = None) -> Sequence[T]:
    """This process's part of the batches: every ``world_size``-th one, from its rank on."""
    return batches[dist.get_rank(group) :: dist.get_world_size(group)]


class OwnExamples:
    """This process's part of the examples of each batch; of batches that cannot be cut, every ``world_size``-th.

    Parameters
    ----------
    batches : re-iterable of batches
        The same in every process.
    whole : bool
        Cut none.
    group : ProcessGroup, optional

    Attributes
    ----------
    counts : callable
        ``counts(batch)``: whether anything in a batch counts in the loss; set by the operator, which knows the loss.
    is_idle : bool
        Whether this process has no examples that count. It then also gets the first batch that does, to have something
        to compute with, but not to add.
    n_own : int
        Examples of this process.

    Raises
    ------
    CurvatureError
        If there is no process group.
    """

    def __init__(self, batches: Iterable[Batch], whole: bool = False, group: Any = None) -> None:
        self.batches, self.whole = batches, whole
        processes = Processes(group)
        self.rank, self.n = processes.rank, processes.n
        self.counts: Callable[[Batch], bool] = _always
        self.is_idle, self.n_own = False, 0

    def __iter__(self) -> Iterator[Batch]:
        first, is_idle, n_own = None, True, 0
        for i, each in enumerate(self.batches):
            batch = as_pair(each)
            if first is None and self.counts(batch):
                first = batch
            own = self._own(i, batch)
            if own is not None:
                n_own += batch_size(own)
                is_idle = is_idle and not self.counts(own)
                yield own
        self.is_idle, self.n_own = is_idle, n_own
        if is_idle and first is not None:
            yield first

    def _own(self, i: int, batch: Batch) -> Batch | None:
        """This process's part of one batch."""
        size = batch_size(batch)
        if self.whole or size < self.n or not can_cut(batch):
            return batch if i % self.n == self.rank else None
        # the first processes of one batch are the last of the next, so that all have equally many
        place = self.rank if i % 2 == 0 else self.n - 1 - self.rank
        return cut(batch, slice(place * size // self.n, (place + 1) * size // self.n))


def _always(batch: Batch) -> bool:
    return True


__all__ = ["OwnExamples", "own_share"]

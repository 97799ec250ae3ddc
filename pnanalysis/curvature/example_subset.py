"""Some of the examples of batches, as batches again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pnanalysis.inputs.batches import batch_size, map_tensors, rows, tensors
from pnanalysis.torch_internals import tree_flatten, tree_unflatten


class ExampleSubset:
    """Batches of the chosen examples, made when they are needed and the same on every pass.

    Parameters
    ----------
    pairs : re-iterable of (inputs, targets)
        The same on every pass.
    chosen : ndarray of bool, shape (N,)
        Which of all examples to take. All or none of those of a batch that cannot be cut.
    size : int, optional
        Examples per batch, where those that are left of several batches can be put together: few shapes, full batches.
        By default what is left of each batch is one of its own.

    Attributes
    ----------
    share : float
        The part of the examples that is taken.
    """

    def __init__(self, pairs: Iterable[tuple[Any, Any]], chosen: NDArray[np.bool_], size: int | None = None) -> None:
        self.pairs, self.size = pairs, size
        self.share = float(chosen.mean())
        self._chosen = torch.from_numpy(chosen)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        held: Any = None
        for part in self._parts():
            if self.size is None or held is None or not _fit(held, part):
                if held is not None:
                    yield held
                held = part
            else:
                held = _joined(held, part)
            while self.size is not None and batch_size(held) > self.size:
                full, held = (rows(held, piece) for piece in (slice(self.size), slice(self.size, None)))
                yield full
        if held is not None:
            yield held

    def _parts(self) -> Iterator[tuple[Any, Any]]:
        """What is left of each batch, of those of which anything is."""
        start = 0
        for batch in self.pairs:
            chosen = self._chosen[start : start + batch_size(batch)]
            start += len(chosen)
            if chosen.all():
                yield batch
            elif chosen.any():
                yield map_tensors(batch, partial(_taken, chosen))


class ExampleGroups:
    """The same examples in another order: group by group of a random partition, whose batches do not mix groups.

    Parameters
    ----------
    pairs : re-iterable of (inputs, targets)
        The same on every pass; all can be cut.
    group : ndarray, shape (N,)
        Of each example.
    size : int
        Examples per batch, at most.
    """

    def __init__(self, pairs: Iterable[tuple[Any, Any]], group: NDArray[np.int64], size: int) -> None:
        self.pairs, self.group, self.size = pairs, group, size

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for one in range(int(self.group.max()) + 1):
            yield from ExampleSubset(self.pairs, self.group == one, self.size)


def random_parts(n: int, n_parts: int, seed: int) -> NDArray[np.int64]:
    """The part, from 0 on, of each of ``n`` things in a random partition into parts of equal size, ``(n,)``."""
    parts = np.empty(n, dtype=np.int64)
    parts[np.random.default_rng(seed).permutation(n)] = np.arange(n) % n_parts
    return parts


def _taken(chosen: Tensor, tensor: Tensor) -> Tensor:
    return tensor[chosen.to(tensor.device)] if tensor.ndim else tensor


def _fit(one: Any, other: Any) -> bool:
    """Whether two batches can be put together: all of their tensors have the same dims after the first."""
    return [(t.shape[1:], t.ndim, t.dtype) for t in tensors(one)] == [
        (t.shape[1:], t.ndim, t.dtype) for t in tensors(other)
    ]


def _joined(one: Any, other: Any) -> Any:
    (first, structure), (second, _) = tree_flatten(one), tree_flatten(other)
    return tree_unflatten(
        [torch.cat([a, b]) if isinstance(a, Tensor) and a.ndim else a for a, b in zip(first, second, strict=True)],
        structure,
    )


__all__ = ["ExampleGroups", "ExampleSubset", "random_parts"]

"""Operators that several processes share: who decides, and which entries of every vector each of them holds.

Processes on unlike machines round differently, have other amounts of free memory and other clocks. Whatever decides
what is computed next is therefore asked of the first process and sent to all: :class:`Alone` is what one process by
itself does instead. An operator that is shared has the attribute ``processes``; one whose vectors are divided among
them also has ``part``, takes and returns the entries that this process holds, and keeps the whole size in ``shape``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Alone:
    """What several processes agree on, where there is one.

    Attributes
    ----------
    rank, n : int
        Of this process, and how many there are.
    """

    rank = 0
    n = 1

    @property
    def is_first(self) -> bool:
        """Whether this process decides, writes files and prints."""
        return self.rank == 0

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        return [value]

    def decided(self, value: T) -> T:
        """The value of the first process, in all."""
        return value

    def by_first(self, compute: Callable[[], T]) -> T:
        """What the first process computes, or the error that it raises, in all."""
        return compute()

    def by_all(self, compute: Callable[[], T]) -> T:
        """What each process computes; an error in all where any raises one."""
        return compute()

    def least(self, number: float) -> float:
        """The smallest of a number that processes may differ in, such as free memory."""
        return number

    def add(self, sums: Tensor) -> Tensor:
        """The sum of a small tensor over all processes, equal in all to the last bit."""
        return sums

    def send(self, tensor: Tensor) -> None:
        """Overwrite a tensor by that of the first process."""


ALONE = Alone()


@dataclass(frozen=True)
class Part:
    """The entries of every vector that a process holds.

    Attributes
    ----------
    ranges : tuple of (int, int)
        Where they begin and end in the whole vector; they are held one after the other.
    processes : Alone
        Those that hold the other entries.
    largest : int
        The most entries that any of them holds.
    n_whole : int
        Whole vectors that a product takes for each vector that it multiplies.
    """

    ranges: tuple[tuple[int, int], ...]
    processes: Alone
    largest: int
    n_whole: int = 0

    @property
    def length(self) -> int:
        """How many entries this process holds."""
        return sum(end - begin for begin, end in self.ranges)

    @property
    def is_all(self) -> bool:
        """Whether each process holds whole vectors."""
        return self.processes.n == 1

    def add(self, sums: Tensor) -> Tensor:
        """Sums over all entries, from those over the entries of each process."""
        return self.processes.add(sums)

    def of(self, V: Tensor) -> Tensor:
        """The entries ``(p, k)`` of whole vectors ``(P, k)``."""
        return V if self.is_all else torch.cat([V[begin:end] for begin, end in self.ranges])

    def whole(self, V: Tensor, n_parameters: int) -> Tensor:
        """Whole vectors ``(P, k)`` in every process, from the entries ``(p, k)`` of each; for small ``P``."""
        if self.is_all:
            return V
        whole, at = V.new_zeros(n_parameters, V.shape[1]), 0
        for begin, end in self.ranges:
            whole[begin:end] = V[at : at + end - begin]
            at += end - begin
        return self.add(whole)


def processes_of(operator: Any) -> Alone:
    """Those that share an operator."""
    found: Alone = getattr(operator, "processes", ALONE)
    return found


def part_of(operator: Any) -> Part:
    """The entries of vectors that this process holds: all of them, unless several divide vectors among them."""
    n = operator.shape[0]
    found: Part = getattr(operator, "part", None) or Part(((0, n),), ALONE, n)
    return found


__all__ = ["ALONE", "Alone", "Part", "part_of", "processes_of"]

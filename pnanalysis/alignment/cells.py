"""The parts of a tensor that are plain products of terminal factors: where the elements of each lie along its axes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from pnanalysis.alignment.factors import Factors


@dataclass(frozen=True)
class Cell:
    """A part of a tensor that is a plain product of terminals.

    Attributes
    ----------
    offsets : tuple of int
        Along each axis.
    entries : tuple of (int, int, int)
        Terminal, axis, and stride along it.
    """

    offsets: tuple[int, ...]
    entries: tuple[tuple[int, int, int], ...]

    @property
    def terminals(self) -> frozenset[int]:
        """Those that it is a product of."""
        return frozenset(entry[0] for entry in self.entries)


def cells_of(factors: Factors, axes: Sequence[Sequence[int]]) -> list[Cell]:
    """The parts of a tensor with these axes that are plain products of terminals.

    A sum in an axis divides the tensor into its parts; within each, the place along an axis is the cell's offset
    plus the index of each terminal times its stride.
    """
    todo: list[tuple[int, int, int]] = []
    for dim, own in enumerate(axes):
        stride = prod(factors.size(factor) for factor in own)
        for factor in own:
            stride //= factors.size(factor)
            todo.append((factor, dim, stride))
    return list(_cells(factors, todo, {}, (), [0] * len(axes), 0))


def _cells(
    factors: Factors,
    todo: list[tuple[int, int, int]],
    chosen: dict[int, int],
    entries: tuple[tuple[int, int, int], ...],
    offsets: list[int],
    postponed: int,
) -> Iterator[Cell]:
    if not todo:
        yield Cell(tuple(offsets), entries)
        return
    (factor, dim, stride), rest = todo[0], todo[1:]
    root, own = factors.find(factor), factors[factor]
    if own.product is not None:
        inner = own.size
        parts = []
        for part in own.product:
            inner //= factors.size(part)
            parts.append((part, dim, stride * inner))
        yield from _cells(factors, parts + rest, chosen, entries, offsets, 0)
    elif own.family is not None:
        owner = factors.find(own.family[0])
        if owner in chosen:
            member = own.family[1][chosen[owner]]
            yield from _cells(factors, [(member, dim, stride), *rest], chosen, entries, offsets, 0)
        elif postponed < len(todo):  # the owner may come later, where axes were permuted
            yield from _cells(factors, [*rest, todo[0]], chosen, entries, offsets, postponed + 1)
        else:  # the tensor has an axis for all parts alike
            yield from _cells(factors, [(factors.shared(root), dim, stride), *rest], chosen, entries, offsets, 0)
    elif own.sum is not None:
        begin = 0
        for k, part in enumerate(own.sum):
            shifted = list(offsets)
            shifted[dim] += begin * stride
            yield from _cells(factors, [(part, dim, stride), *rest], {**chosen, root: k}, entries, shifted, 0)
            begin += factors.size(part)
    elif own.wild or own.size == 1:
        yield from _cells(factors, rest, chosen, entries, offsets, postponed)
    else:
        yield from _cells(factors, rest, chosen, (*entries, (root, dim, stride)), offsets, postponed)

"""Index sets of tensors' axes, refined as the network's operations reveal their structure.

The indices of an axis are those of one *factor*, or of a product of several. A factor starts as a plain set, whose
elements may be permuted at will. Operations refine it: a view makes it a *product* (heads times channels within a
head), a slice a *sum* (queries, then keys, then values), and whatever mixes two factors element by element makes them
one. What remains at the end, the factors that were never refined, are the *terminals*: their permutations are the
symmetries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod

#: What is allowed besides permuting: any rotation, flips of the sign of each element, of all at once, or nothing.
ROTATIONS, EACH, JOINT, NONE = 3, 2, 1, 0


@dataclass
class _Factor:
    """What is known of a factor."""

    size: int
    fixed: bool = False  # may not be permuted
    wild: bool = False  # of an axis along which a tensor is constant: any permutation will do
    signs: int = ROTATIONS
    product: list[int] | None = None
    sum: list[int] | None = None
    # Of a factor that lies inside a sum: another set for each part of that sum.
    family: tuple[int, list[int]] | None = None
    origin: int = 0  # the factor that it was split from, and where in it: outer before inner
    path: tuple[int, ...] = ()
    marks: set[str] = field(default_factory=set)

    @property
    def plain(self) -> bool:
        return self.product is None and self.sum is None and self.family is None


class Factors:
    """All factors of a network: makes, refines and merges them. Factors are known by number."""

    def __init__(self) -> None:
        self._all: list[_Factor] = []
        self._parent: list[int] = []

    def new(self, size: int, *, fixed: bool = False, wild: bool = False) -> int:
        number = len(self._all)
        self._all.append(_Factor(size, fixed, wild, NONE if fixed else ROTATIONS, origin=number))
        self._parent.append(number)
        return number

    def find(self, factor: int) -> int:
        """The factor that stands for all those merged with this one."""
        while self._parent[factor] != factor:
            self._parent[factor] = self._parent[self._parent[factor]]
            factor = self._parent[factor]
        return factor

    def __getitem__(self, factor: int) -> _Factor:
        return self._all[self.find(factor)]

    def size(self, factor: int) -> int:
        return self[factor].size

    def expand(self, factor: int) -> list[int]:
        """The factors of a product, outer first; the factor itself where it is none."""
        product = self[factor].product
        return [self.find(factor)] if product is None else [leaf for part in product for leaf in self.expand(part)]

    def fix(self, factor: int) -> None:
        """Forbid to permute a factor, or to flip its signs."""
        own = self[factor]
        if own.wild or (own.fixed and own.plain):
            return
        own.fixed, own.signs = True, NONE
        for part in self._parts(factor):
            self.fix(part)

    def limit_signs(self, factor: int, level: int) -> None:
        """Allow no more than ``level``; flips of the sign of a whole factor are none of its parts'."""
        own = self[factor]
        own.signs = min(own.signs, level)
        for part in self._parts(factor):
            self.limit_signs(part, NONE if level == JOINT else level)

    def mark(self, factor: int, mark: str) -> None:
        """Note what a factor is used for."""
        self[factor].marks.add(mark)
        for part in self._parts(factor):
            self.mark(part, mark)

    def _parts(self, factor: int) -> list[int]:
        own = self[factor]
        return [*(own.product or ()), *(own.sum or ()), *(own.family[1] if own.family else ())]

    def _child(self, parent: int, size: int, path: tuple[int, ...]) -> int:
        """A new factor with what is known of the one it is a part of."""
        own, child = self[parent], self.new(size)
        record = self._all[child]
        record.fixed, record.wild, record.origin, record.path = own.fixed, own.wild, own.origin, path
        record.signs = NONE if own.signs == JOINT and size != own.size else own.signs
        record.marks = set(own.marks)
        return child

    def split(self, factor: int, outer: int) -> tuple[int, int] | None:
        """Refine a factor to a product of ``outer`` and the rest; ``None`` where that is impossible.

        A product, whose factors :meth:`expand` gives, is not split itself.
        """
        own = self[factor]
        if own.size % outer or own.sum is not None or own.product is not None:
            return None
        first, second = (self._child(factor, size, (*own.path, k)) for k, size in enumerate((outer, own.size // outer)))
        if own.family is not None:
            owner, members = own.family
            halves = [self.split_any(member, outer) for member in members]
            self._all[first].family = owner, [half[0] for half in halves]
            self._all[second].family = owner, [half[1] for half in halves]
            own.family = None
        own.product = [first, second]
        return first, second

    def split_any(self, factor: int, outer: int) -> tuple[int, int]:
        """:meth:`split`; where that is impossible, the factor is fixed, and so are the two."""
        found = self.split(factor, outer)
        if found is not None:
            return found
        self.fix(factor)
        return self.new(outer, fixed=True), self.new(self.size(factor) // outer, fixed=True)

    def regroup(self, factors: Sequence[int], sizes: Sequence[int]) -> list[list[int]] | None:
        """Distribute a product of factors over axes of the given sizes, splitting factors where necessary.

        ``None`` where the sizes do not fit.
        """
        todo = [leaf for factor in factors for leaf in self.expand(factor) if self.size(leaf) > 1][::-1]
        groups: list[list[int]] = []
        for size in sizes:
            group: list[int] = []
            while size > 1:
                if not todo:
                    return None
                leaf = todo.pop()
                own = self.size(leaf)
                if size % own == 0:
                    group.append(leaf)
                    size //= own
                    continue
                halves = self.split(leaf, size)
                if halves is None:
                    return None
                group.append(halves[0])
                todo.append(halves[1])
                size = 1
            groups.append(group)
        return groups

    def unify(self, a: int, b: int) -> int:
        """Make two factors of one size the same, as they are where two tensors are combined element by element."""
        a, b = self.find(a), self.find(b)
        first, second = self._all[a], self._all[b]
        if a == b or second.wild:
            return a
        if first.wild:
            return b
        if first.fixed or second.fixed:
            self.fix(a)
            self.fix(b)
        level = min(first.signs, second.signs)
        self.limit_signs(a, level)
        self.limit_signs(b, level)
        if not first.plain and not second.plain:
            return self._unify_structured(a, b)
        if second.plain:
            a, b, first, second = b, a, second, first
        self._parent[a] = b
        second.marks |= first.marks
        return b

    def unify_products(self, a: Sequence[int], b: Sequence[int]) -> list[tuple[int, int]] | None:
        """Pairs of factors that correspond to each other in two products of one size; ``None`` if they do not."""
        left = [leaf for factor in a for leaf in self.expand(factor) if self.size(leaf) > 1][::-1]
        right = [leaf for factor in b for leaf in self.expand(factor) if self.size(leaf) > 1][::-1]
        pairs: list[tuple[int, int]] = []
        while left and right:
            m, n = self.size(left[-1]), self.size(right[-1])
            if m != n:
                longer = left if m > n else right
                halves = self.split(longer[-1], min(m, n)) if max(m, n) % min(m, n) == 0 else None
                if halves is None:
                    return None
                longer.pop()
                longer += [halves[1], halves[0]]
            pairs.append((left.pop(), right.pop()))
        return pairs

    def _unify_structured(self, a: int, b: int) -> int:
        """Merge two factors that are both refined: part by part, or not at all."""
        first, second = self._all[a], self._all[b]
        if first.family and second.family and self.find(first.family[0]) == self.find(second.family[0]):
            for one, other in zip(first.family[1], second.family[1], strict=True):
                self.unify(one, other)
            return a
        if first.family or second.family:
            return self.unify(self.shared(a), self.shared(b))
        pairs = None
        if first.product and second.product:
            pairs = self.unify_products([a], [b])
        elif first.sum and second.sum:
            left, right = self._summands(a), self._summands(b)
            if [self.size(part) for part in left] == [self.size(part) for part in right]:
                pairs = list(zip(left, right, strict=True))
        if pairs is None:
            self.fix(a)
            self.fix(b)
        for one, other in pairs or ():
            self.unify(one, other)
        return a

    def _summands(self, factor: int) -> list[int]:
        parts = self[factor].sum
        return [factor] if parts is None else [leaf for part in parts for leaf in self._summands(part)]

    def shared(self, factor: int) -> int:
        """Make a family's members the same, since something depends on all of them alike."""
        own = self[factor]
        if own.family is None:
            return self.find(factor)
        members, own.family = own.family[1], None
        result = members[0]
        for member in members[1:]:
            result = self.unify(result, member)
        return self.unify(result, factor)

    def joined(self, parts: Sequence[int]) -> int:
        """The sum of factors, as where tensors are concatenated."""
        whole = self.new(sum(self.size(part) for part in parts))
        self._all[whole].sum = list(parts)
        if all(self[part].fixed for part in parts):
            self.fix(whole)
        return whole

    def multiplied(self, parts: Sequence[int]) -> int:
        """The product of factors, as one."""
        whole = self.new(prod(self.size(part) for part in parts))
        self._all[whole].product = list(parts)
        return whole

    def take(self, factor: int, inside: Sequence[int], start: int, stop: int) -> tuple[int, list[int]]:
        """Part of a factor, refined to a sum, and what the factors inside it are there.

        Parameters
        ----------
        factor : int
            Not a product.
        inside : sequence of int
            Other factors of the tensor that is sliced. Those that were split from the same factor and lie inside it
            may differ from one part to another, as channels of queries do from those of values.
        start, stop : int
        """
        segments = self._segments(self.find(factor), [self.find(leaf) for leaf in inside], start, stop)
        if len(segments) == 1:
            return segments[0]
        whole = self.joined([part for part, _ in segments])
        within = []
        for versions in zip(*(leaves for _, leaves in segments), strict=True):
            if len({self.find(leaf) for leaf in versions}) == 1:
                within.append(versions[0])
                continue
            family = self._child(versions[0], self.size(versions[0]), self[versions[0]].path)
            self._all[family].family = whole, list(versions)
            within.append(family)
        return whole, within

    def _segments(self, factor: int, inside: list[int], start: int, stop: int) -> list[tuple[int, list[int]]]:
        own = self[factor]
        if (start, stop) == (0, own.size):
            return [(factor, inside)]
        if own.wild or own.fixed:
            return [(self.new(stop - start, fixed=own.fixed, wild=own.wild), inside)]
        if own.family is not None:
            owner, members = own.family
            pieces = [self.take(member, (), start, stop)[0] for member in members]
            family = self._child(factor, stop - start, own.path)
            self._all[family].family = owner, pieces
            return [(family, inside)]
        if own.sum is None:
            cuts = sorted({0, start, stop, own.size})
            lengths = [b - a for a, b in pairwise(cuts)]
            own.sum = [self._child(factor, length, (*own.path, k)) for k, length in enumerate(lengths)]
        found: list[tuple[int, list[int]]] = []
        offset = 0
        for k, part in enumerate(own.sum):
            length = self.size(part)
            low, high = max(start - offset, 0), min(stop - offset, length)
            if low < high:
                found += self._segments(self.find(part), [self._member(leaf, factor, k) for leaf in inside], low, high)
            offset += length
        return found

    def _member(self, leaf: int, owner: int, k: int) -> int:
        """What a factor is in the k-th part of another one that was cut."""
        own, outer = self[leaf], self[owner]
        if own.family is not None and self.find(own.family[0]) == self.find(owner):
            return self.find(own.family[1][k])
        if own.plain and not own.fixed and not own.wild and own.origin == outer.origin and own.path > outer.path:
            parts = outer.sum or []
            own.family = owner, [self._child(leaf, own.size, own.path) for _ in parts]
            return own.family[1][k]
        return leaf

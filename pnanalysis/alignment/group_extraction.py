"""From what is known of all tensors of a network to the groups of channels that may be permuted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pnanalysis.alignment.cells import Cell, cells_of
from pnanalysis.alignment.channel_groups import ChannelGroup, TensorAxis
from pnanalysis.alignment.factors import EACH, JOINT, NONE, ROTATIONS, Factors
from pnanalysis.alignment.labelled import Labelled, Labels

#: Instances of one group inside others (a group of channels in each head) beyond which they are made one.
_MAX_INSTANCES = 65536
_SIGNS = {ROTATIONS: "each", EACH: "each", JOINT: "joint", NONE: "none"}


def groups_of(labels: Labels, values: Iterable[Labelled], aliases: Mapping[str, Sequence[str]]) -> list[ChannelGroup]:
    """The groups of channels that may be permuted, from what is known of all tensors.

    Parameters
    ----------
    labels : Labels
    values : iterable of Labelled
        Every tensor in the network.
    aliases : mapping of str to sequence of str
        All names of each parameter or buffer, by the first one.
    """
    return _Extraction(labels, [*values, *labels.apart], aliases).groups()


class _Unit(NamedTuple):
    """Terminals that are permuted together, as one index; mostly one."""

    terminals: tuple[int, ...]
    size: int


@dataclass
class _Place:
    """Where a unit lies in a part of a tensor: the axes, and the parts (cells) with the same axes."""

    tensor: str
    dims: tuple[int, ...]
    shape: tuple[int, ...]
    cells: list[Cell] = field(default_factory=list)


class _Extraction:
    """Finds out which terminals depend on which others, and where their elements are in the tensors."""

    def __init__(self, labels: Labels, values: list[Labelled], aliases: Mapping[str, Sequence[str]]) -> None:
        self.labels, self.factors, self.aliases = labels, labels.factors, aliases
        self.values = values
        while True:
            self._read()
            if not self._fix_repeated():
                break

    def _read(self) -> None:
        """All cells of all tensors; where a terminal occurs says what it may depend on."""
        computed = (value.axes for value in self.values if value.tensor is None and 0 not in self.labels.shape(value))
        axes = {tuple(tuple(atom.factor for atom in axis) for axis in own) for own in computed}
        sources = [(name, value) for name, value in self.labels.sources.items()]
        for _ in range(2):  # a first pass may make members of families the same
            self.cells = {
                name: cells_of(self.factors, [[atom.factor for atom in axis] for axis in value.axes])
                for name, value in sources
            }
            sets = {cell.terminals for own in axes for cell in cells_of(self.factors, own)}
            self.computed = set().union(*sets)
            sets |= {cell.terminals for cells in self.cells.values() for cell in cells}
        self.occurrences: dict[int, set[frozenset[int]]] = {}
        for found in sets:
            for terminal in found:
                self.occurrences.setdefault(terminal, set()).add(found)
        self.units = self._units()
        self.outer = {
            unit: [
                other
                for other in self.units
                if other is not unit and self._within(unit, other) and not (self._within(other, unit))
            ]
            + [other for other in self.fixed if self._within(unit, other)]
            for unit in self.units
        }

    def _units(self) -> list[_Unit]:
        """Terminals that may be permuted; those that only ever occur together are one unit."""
        size = self.factors.size
        free = [t for t in sorted(self.occurrences) if not self.factors[t].fixed]
        self.fixed = [_Unit((t,), size(t)) for t in sorted(self.occurrences) if self.factors[t].fixed]
        together: dict[frozenset[frozenset[int]], list[int]] = {}
        for terminal in free:
            together.setdefault(frozenset(self.occurrences[terminal]), []).append(terminal)
        return [_Unit(tuple(own), prod(map(size, own))) for own in together.values()]

    def _within(self, unit: _Unit, other: _Unit) -> bool:
        """Whether a unit only occurs along with another, and so may be permuted for each of its elements anew."""
        return self.occurrences[unit.terminals[0]] <= self.occurrences[other.terminals[0]]

    def _fix_repeated(self) -> bool:
        """Fix terminals that occur twice along one axis, as in a flattened outer product; whether there were any."""
        found = False
        for cells in self.cells.values():
            for cell in cells:
                seen: set[tuple[int, int]] = set()
                for terminal, dim, _ in cell.entries:
                    if (terminal, dim) in seen and not self.factors[terminal].fixed:
                        self.factors.fix(terminal)
                        found = True
                    seen.add((terminal, dim))
        return found

    def groups(self) -> list[ChannelGroup]:
        """Outer groups first, and in the order of the network otherwise."""
        placed = {unit: self._places(unit) for unit in self.units if self._is_used(unit)}
        first = {name: k for k, name in enumerate(self.labels.sources)}
        units = sorted(
            (unit for unit, places in placed.items() if places),
            key=lambda unit: (min(first[place.tensor] for place in placed[unit]), len(self.outer[unit])),
        )
        units.sort(key=lambda unit: len([o for o in self.outer[unit] if o in placed]))
        instances: list[tuple[_Unit, dict[_Unit, int], tuple[TensorAxis, ...]]] = []
        for unit in units:
            instances += self._instances(unit, placed[unit])
        inner = [self._inner(unit, context, instances) for unit, context, _ in instances]
        groups = [
            ChannelGroup(
                unit.size,
                axes,
                self._signs(unit),
                self._kind(unit, bool(inside)),
                inside,
                not inside and self._is_linear(unit, axes),
            )
            for (unit, _, axes), inside in zip(instances, inner, strict=True)
        ]
        return [replace(g, signs="none") if _signs_are_inner(g, groups) else g for g in groups]

    def _is_used(self, unit: _Unit) -> bool:
        """Whether anything depends on a unit; rows of a parameter that are always cut off belong to nothing."""
        sources = [name for name, cells in self.cells.items() if any(unit.terminals[0] in c.terminals for c in cells)]
        return len(sources) > 1 or bool(self.computed & set(unit.terminals))

    def _signs(self, unit: _Unit) -> str:
        level = min(self.factors[terminal].signs for terminal in unit.terminals)
        return _SIGNS[NONE if level == JOINT and len(unit.terminals) > 1 else level]

    def _is_linear(self, unit: _Unit, axes: Sequence[TensorAxis]) -> bool:
        rotated = all(self.factors[terminal].signs == ROTATIONS for terminal in unit.terminals)
        return rotated and all(axis.signed for axis in axes)

    def _kind(self, unit: _Unit, has_inner: bool) -> str:
        marks = set().union(*(self.factors[terminal].marks for terminal in unit.terminals))
        if "heads" in marks:
            return "heads"
        if "tokens" in marks:
            return "tokens"
        if "pairs" in marks:
            return "query-key"
        if any("heads" in self.factors[t].marks for other in self.outer[unit] for t in other.terminals):
            return "value"
        return "blocks" if has_inner else "stream" if "stream" in marks else "units"

    def _inner(
        self, unit: _Unit, context: dict[_Unit, int], instances: list[tuple[_Unit, dict[_Unit, int], Any]]
    ) -> tuple[tuple[int, ...], ...]:
        """For each element of a unit, the instances of others that lie in it."""
        inside: list[list[int]] = [[] for _ in range(unit.size)]
        for number, (_, other, _) in enumerate(instances):
            if unit in other and all(other.get(key) == at for key, at in context.items()):
                inside[other[unit]].append(number)
        return tuple(map(tuple, inside)) if any(inside) else ()

    def _places(self, unit: _Unit) -> list[_Place]:
        """Where a unit lies in tensors: once for every axis of each that it indexes."""
        places: dict[tuple[str, tuple[int, ...]], _Place] = {}
        for name, cells in self.cells.items():
            if name not in self.labels.signed:
                continue
            shape = self.labels.shape(self.labels.sources[name])
            for cell in cells:
                for dims in self._axes_in(unit, cell):
                    place = places.setdefault((name, dims), _Place(name, dims, shape))
                    place.cells.append(cell)
        return list(places.values())

    def _axes_in(self, unit: _Unit, cell: Cell) -> list[tuple[int, ...]]:
        """Axes of a cell that a unit and those related to it lie along: one set for each time that it occurs."""
        dims: dict[int, list[int]] = {terminal: [] for terminal in unit.terminals}
        for terminal, dim, _ in cell.entries:
            if terminal in dims:
                dims[terminal].append(dim)
        related = {terminal for other in self._related(unit) for terminal in other.terminals}
        if len(unit.terminals) > 1:
            own = {dim for found in dims.values() for dim in found}
            return [tuple(sorted(own | {dim for t, dim, _ in cell.entries if t in related}))] if own else []
        found = []
        for own_dim in dims[unit.terminals[0]]:
            here = {t for t, dim, _ in cell.entries if dim == own_dim}
            elsewhere = {dim for t, dim, _ in cell.entries if t in related and t not in here}
            found.append(tuple(sorted({own_dim} | elsewhere)))
        return found

    def _related(self, unit: _Unit) -> list[_Unit]:
        """Units that one depends on, those that depend on it, and those that depend on the same ones."""
        outer = {*self.outer[unit], unit}
        return [*self.outer[unit], *(other for other in self.units if outer & set(self.outer[other]))]

    def _instances(
        self, unit: _Unit, places: list[_Place]
    ) -> list[tuple[_Unit, dict[_Unit, int], tuple[TensorAxis, ...]]]:
        """A group for each element of all units that a unit depends on."""
        outer = self.outer[unit]
        if prod(other.size for other in outer) > _MAX_INSTANCES:
            outer = []
        found = []
        for at in product(*(range(other.size) for other in outer)):
            context = dict(zip(outer, at, strict=True))
            axes = [self._axis(unit, context, place) for place in places]
            named = [
                TensorAxis(name, axis.dims, axis.index, axis.signed)
                for axis in axes
                if axis is not None
                for name in self.aliases.get(axis.tensor, [axis.tensor])
            ]
            if named:
                found.append((unit, context, tuple(named)))
        return found

    def _axis(self, unit: _Unit, context: dict[_Unit, int], place: _Place) -> TensorAxis | None:
        """Places of a unit's elements along the flattened axes, for given elements of others."""
        shape = [place.shape[dim] for dim in place.dims]
        steps = {dim: prod(shape[k + 1 :]) for k, dim in enumerate(place.dims)}
        chosen = {t: i for other, at in context.items() for t, i in _digits(other, at, self.factors)}
        blocks = []
        for cell in place.cells:
            own = np.zeros(unit.size, dtype=np.intp)
            rest = np.full(1, sum(cell.offsets[dim] * steps[dim] for dim in place.dims), dtype=np.intp)
            elements = _all_digits(unit, self.factors)
            for terminal, dim, stride in cell.entries:
                if dim not in steps:
                    continue
                step = stride * steps[dim]
                if terminal in elements:
                    own += elements[terminal] * step
                elif terminal in chosen:
                    rest = rest + chosen[terminal] * step
                else:
                    rest = (rest[:, None] + np.arange(self.factors.size(terminal)) * step).reshape(-1)
            blocks.append(own[:, None] + rest)
        index = np.concatenate(blocks, axis=1)
        return TensorAxis(place.tensor, place.dims, index, self.labels.signed[place.tensor])


def _signs_are_inner(group: ChannelGroup, groups: Sequence[ChannelGroup]) -> bool:
    """Whether flips of the groups within a channel amount to all that a flip of the channel does."""
    if not group.inner or group.signs == "none":
        return False
    flipped = {
        (axis.tensor, place)
        for number in group.inner[0]
        if groups[number].signs == "each"
        for axis in groups[number].axes
        for place in axis.index.reshape(-1).tolist()
    }
    return all(
        (axis.tensor, place) in flipped for axis in group.axes if axis.signed for place in axis.index[0].tolist()
    )


def _digits(unit: _Unit, at: int, factors: Factors) -> list[tuple[int, int]]:
    """An element of a unit as one of each of its terminals."""
    return [(terminal, int(all_of[at])) for terminal, all_of in _all_digits(unit, factors).items()]


def _all_digits(unit: _Unit, factors: Factors) -> dict[int, NDArray[np.intp]]:
    digits = np.unravel_index(np.arange(unit.size), [factors.size(terminal) for terminal in unit.terminals])
    return dict(zip(unit.terminals, digits, strict=True))

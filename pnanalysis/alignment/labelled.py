"""Tensors whose axes are labelled by factors, and what combining them says about the factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from pnanalysis.alignment.factors import EACH, JOINT, NONE, Factors

Combination = Literal["sum", "product", "other"]


class Atom(NamedTuple):
    """A factor along an axis of a tensor.

    ``signed`` says whether the tensor's entries change sign with the elements of the factor; ``None`` of a parameter
    that was not used yet: weights and biases do, scales do not.
    """

    factor: int
    signed: bool | None


Axis = tuple[Atom, ...]


@dataclass(frozen=True)
class Labelled:
    """A tensor: the factors along each of its axes, outer first; none along axes of length 1.

    Attributes
    ----------
    axes : tuple of tuple of Atom
    tensor : str or None
        Name of the parameter or buffer that it is, rearranged at most.
    """

    axes: tuple[Axis, ...]
    tensor: str | None = None

    @property
    def atoms(self) -> list[Atom]:
        return [atom for axis in self.axes for atom in axis]

    def with_axes(self, axes: Sequence[Axis]) -> Labelled:
        """The same tensor, rearranged."""
        return replace(self, axes=tuple(axes))


class Labels:
    """What is known of the tensors of a network: their factors, and which of them change sign."""

    def __init__(self, buffers: set[str]) -> None:
        self.factors, self.buffers = Factors(), buffers
        self.sources: dict[str, Labelled] = {}  # parameters and buffers by name
        self.signed: dict[str, bool] = {}  # whether their entries change sign with their channels
        self.apart: list[Labelled] = []  # numbers within operations, which no tensor holds: see keep_apart

    def source(self, name: str, shape: Sequence[int]) -> Labelled:
        """A parameter or buffer, with a factor of its own along each axis."""
        axes = tuple((Atom(self.factors.new(size), None),) if size > 1 else () for size in shape)
        self.sources[name] = Labelled(axes, name)
        return self.sources[name]

    def constant(self, shape: Sequence[int], *, wild: bool = False) -> Labelled:
        """A tensor that does not depend on the channels: an input, or (``wild``) one number everywhere."""
        return Labelled(tuple(self.fixed_axis(size, wild=wild) for size in shape))

    def keep_apart(self, examples: Axis, blocks: Axis) -> None:
        """Note that an operation computes something for each block of channels, whatever lies within.

        Channels of one block can then change places with each other, and whole blocks, but not channels of two.
        """
        self.apart.append(Labelled((examples, blocks)))

    def fixed_axis(self, size: int, *, wild: bool = False) -> Axis:
        return (Atom(self.factors.new(size, fixed=True, wild=wild), False),) if size != 1 else ()

    def shape(self, value: Labelled) -> tuple[int, ...]:
        sizes = []
        for axis in value.axes:
            size = 1
            for atom in axis:
                size *= self.factors.size(atom.factor)
            sizes.append(size)
        return tuple(sizes)

    def expanded(self, axis: Axis) -> list[Atom]:
        return [Atom(leaf, atom.signed) for atom in axis for leaf in self.factors.expand(atom.factor)]

    def settle(self, value: Labelled, signed: bool) -> Labelled:
        """Use a parameter: from now on its entries change sign with their channels, or do not."""
        if value.tensor is None:
            return value
        if value.tensor in self.buffers and value.tensor not in self.signed:
            self.fix(
                self.sources[value.tensor]
            )  # only those of batch normalisation, which are settled there, follow the channels
        signed = self.signed.setdefault(value.tensor, signed)
        return Labelled(
            tuple(
                tuple(Atom(a.factor, signed and not self.factors[a.factor].wild) for a in axis) for axis in value.axes
            )
        )

    def claim(self, value: Labelled, signed: bool) -> Labelled:
        """:meth:`settle` for buffers that follow the channels."""
        if value.tensor is not None:
            self.signed.setdefault(value.tensor, signed)
        return self.settle(value, signed)

    def fix(self, *values: Labelled) -> bool:
        """Forbid to permute the factors of these tensors; whether any of them was free."""
        return self.fix_axes(axis for value in values for axis in value.axes)

    def fix_axes(self, axes: object) -> bool:
        found = False
        for axis in axes:  # type: ignore[attr-defined]
            for atom in self.expanded(axis):
                found |= not self.factors[atom.factor].fixed
                self.factors.fix(atom.factor)
        return found

    def limit(self, atoms: Sequence[Atom], level: int = NONE) -> None:
        """Forbid to flip the signs of these factors, where the tensor changes with them."""
        for atom in atoms:
            if atom.signed is not False:
                self.factors.limit_signs(atom.factor, level)

    def scale(self, atoms: Sequence[Atom]) -> None:
        """Elements of these factors are treated one by one, not by a linear map: they may not be rotated."""
        for atom in atoms:
            self.factors.limit_signs(atom.factor, EACH)

    def unsigned(self, value: Labelled) -> Labelled:
        """The tensor's image under an even function."""
        self.scale([atom for atom in value.atoms if atom.signed is not False])
        return Labelled(tuple(tuple(Atom(a.factor, False) for a in axis) for axis in value.axes))

    def mark(self, axis: Sequence[Atom], mark: str) -> None:
        for atom in axis:
            self.factors.mark(atom.factor, mark)

    def pair(self, a: Axis, b: Axis, combine: Callable[[bool, bool], bool | None]) -> Axis:
        """Make the factors of two axes of one length the same.

        ``combine`` says whether the result changes sign with a factor, from whether the two do; ``None`` if its signs
        may no longer be flipped.
        """
        left, right = self.expanded(a), self.expanded(b)
        signs = {**{atom.factor: bool(atom.signed) for atom in left}}
        others = {**{atom.factor: bool(atom.signed) for atom in right}}
        pairs = self.factors.unify_products([atom.factor for atom in left], [atom.factor for atom in right])
        if pairs is None:
            self.fix_axes([a, b])
            return self.fixed_axis(self.shape(Labelled((a,)))[0])
        origins, other_origins = self._origins(left, signs), self._origins(right, others)
        result = []
        for first, second in pairs:
            signed = combine(origins[self.factors.find(first)], other_origins[self.factors.find(second)])
            factor = self.factors.unify(first, second)
            if signed is None:
                self.factors.limit_signs(factor, NONE)
            result.append(Atom(factor, bool(signed)))
        return tuple(result)

    def _origins(self, atoms: Sequence[Atom], signs: dict[int, bool]) -> dict[int, bool]:
        """Whether each factor changes sign, after some of them were split."""
        return {leaf: signs[atom.factor] for atom in atoms for leaf in self.factors.expand(atom.factor)}

    def contract(self, a: Axis, b: Axis) -> None:
        """Make the factors of two axes the same that are summed over in a product of tensors."""
        self.pair(a, b, lambda x, y: x if x == y else None)

    def multiply_axis(self, a: Axis, b: Axis) -> Axis:
        """An axis of a product of tensors, in which both are taken element by element; length 1 is broadcast."""
        if not a or not b:
            return a or b
        result = self.pair(a, b, lambda x, y: x != y)
        if not any(self.factors[atom.factor].wild for atom in (*a, *b)):
            self.scale(result)
        return result

    def add_axis(self, a: Axis, b: Axis) -> Axis:
        """An axis of a sum of tensors, of which both have all elements."""
        return a or b if not a or not b else self.pair(a, b, lambda x, y: x if x == y else None)

    def add_bias(self, axis: Axis, bias: Labelled | None) -> Axis:
        """An axis of a tensor to which a parameter along that axis alone is added."""
        return axis if bias is None else self.add_axis(axis, self.settle(bias, True).axes[-1])

    def elementwise(self, values: Sequence[Labelled], kind: Combination) -> Labelled:
        """A function of tensors element by element, with broadcasting.

        ``other`` is any that is neither their sum nor their product, and does not keep signs.
        """
        values = self._settled(values, kind)
        if kind == "other":
            self.limit([atom for value in values for atom in value.atoms])
            values = [self.unsigned(value) for value in values]
        ndim = max(len(value.axes) for value in values)
        axes: list[Axis] = []
        for dim in range(-ndim, 0):
            own = [value.axes[dim] if len(value.axes) >= -dim else () for value in values]
            present = [axis for axis in own if axis]
            result: Axis = present[0] if present else ()
            for axis in present[1:]:
                result = self.multiply_axis(result, axis) if kind == "product" else self.add_axis(result, axis)
            if kind == "sum" and 0 < len(present) < len(own):  # x + 1 is not odd in x
                self.limit(result)
                result = tuple(Atom(atom.factor, False) for atom in result)
            axes.append(result)
        return Labelled(tuple(axes))

    def _settled(self, values: Sequence[Labelled], kind: Combination) -> list[Labelled]:
        """Decide what parameters are, from what they are combined with: a bias changes sign, a scale does not."""
        others = [value for value in values if value.tensor is None]
        settled = []
        for k, value in enumerate(values):
            if value.tensor is None:
                settled.append(value)
            elif not others:  # parameters alone: of a product, the first one takes the signs
                settled.append(self.settle(value, kind == "sum" or (kind == "product" and k == 0)))
            elif kind == "product":
                settled.append(self.settle(value, not self._overlap(value, others)))
            else:
                beside = [atom for other in others for atom in other.atoms if not self.factors[atom.factor].fixed]
                settled.append(self.settle(value, not beside or any(atom.signed for atom in beside)))
        return settled

    def _overlap(self, value: Labelled, others: Sequence[Labelled]) -> bool:
        """Whether another tensor has elements along an axis that this one has, too."""
        dims = [-dim for dim, axis in enumerate(reversed(value.axes), 1) if axis]
        return any(
            other.axes[dim] and not all(self.factors[atom.factor].wild for atom in other.axes[dim])
            for other in others
            for dim in dims
            if len(other.axes) >= -dim
        )

    def normalise(self, axes: Sequence[Axis]) -> None:
        """Statistics over these axes are taken from a tensor, its mean among them."""
        atoms = [atom for axis in axes for atom in self.expanded(axis)]
        free = [atom for atom in atoms if not self.factors[atom.factor].fixed]
        # If all elements change sign, so does their mean; a single one leaves its place relative to the others.
        self.limit(atoms, JOINT if len(free) == len(atoms) == 1 else NONE)

    def regrouped(self, axes: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
        """Distribute the factors of some axes over others with the same number of elements in all."""
        atoms = [atom for axis in axes for atom in self.expanded(axis)]
        groups = self.factors.regroup([atom.factor for atom in atoms], sizes)
        if groups is None:
            self.fix_axes(axes)
            return [self.fixed_axis(size) for size in sizes]
        signs = {leaf: a.signed for a in atoms for leaf in self.factors.expand(a.factor)}
        return [tuple(Atom(leaf, signs[self.factors.find(leaf)]) for leaf in group) for group in groups]


__all__ = ["EACH", "JOINT", "NONE", "Atom", "Axis", "Combination", "Labelled", "Labels"]

"""Axes of a tensor as products of labelled factors, and how they come through views and sums of products.

Every dim is a product of factors, outermost first, and a factor may be labelled: ``(B, T, 64)`` that is viewed as
``(B * T, 4, 16)`` has the dims ``[example B, T], [unit 4], [unit 16]``, from which the axes of examples and units come
back whatever is transposed, split or merged on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from math import prod
from typing import NamedTuple

from torch import Tensor

#: Labels. A feature of a 2-d input counts as a unit until the first layer with weights.
EXAMPLE, UNIT, FEATURE = "example", "unit", "feature"


class Factor(NamedTuple):
    """A factor of a dim: its size, and what it counts where that is known."""

    size: int
    label: str | None = None


Axes = tuple[tuple[Factor, ...], ...]  # factors of each dim, outermost first


def blank(shape: Iterable[int]) -> Axes:
    return tuple((Factor(size),) for size in shape)


def normalised(axes: Axes) -> Axes:
    """Neighbouring factors with one label made one, and factors of size 1 left out where the label has others."""
    kept = {
        label: any(f.size > 1 for dim in axes for f in dim if f.label == label) for label in (EXAMPLE, UNIT, FEATURE)
    }
    dims = []
    for dim in axes:
        factors = [f for f in dim if f.size > 1 or (f.label is not None and not kept[f.label])]
        runs = [(label, list(run)) for label, run in groupby(factors, key=lambda f: f.label)]
        dims.append(
            tuple(Factor(prod(f.size for f in run), label) for label, run in runs)
            or (Factor(prod(f.size for f in dim)),)
        )
    return tuple(dims)


def without(axes: Axes, labels: Iterable[str | None]) -> Axes:
    """The axes without some labels."""
    gone = set(labels)
    return tuple(tuple(Factor(f.size, None if f.label in gone else f.label) for f in dim) for dim in axes)


def labels_of(axes: Axes) -> set[str]:
    return {factor.label for dim in axes for factor in dim if factor.label is not None}


def last_units(axes: Axes) -> Axes:
    """The axes, if their last dim counts units."""
    size = prod(f.size for f in axes[-1])
    return (*without(axes, (UNIT, FEATURE))[:-1], (Factor(size, UNIT),))


Positions = Sequence[int | None]  # the output's dim for each dim of an operand; None where it is summed over


def merged(shape: Sequence[int], operands: Iterable[tuple[Axes, Positions]]) -> Axes:
    """Axes of an output by the operands that its dims come from.

    An operand says where a label is if all factors of the label come through; where two of them differ, it is unknown.
    """
    opinions: list[Axes] = []
    for axes, positions in operands:
        dims: list[tuple[Factor, ...]] = [(Factor(size),) for size in shape]
        lost: set[str | None] = set()
        for dim, at in zip(axes, positions, strict=True):
            if at is None or prod(f.size for f in dim) != shape[at]:  # summed over, or expanded
                lost |= {factor.label for factor in dim}
            else:
                dims[at] = dim
        opinions.append(normalised(without(tuple(dims), lost)))
    unknown: set[str | None] = set()
    for label in (EXAMPLE, UNIT, FEATURE):
        others = {EXAMPLE, UNIT, FEATURE} - {label}
        places = {normalised(without(axes, others)) for axes in opinions if label in labels_of(axes)}
        unknown |= {label} if len(places) > 1 else set()
    if any(UNIT in labels_of(axes) for axes in opinions):
        unknown.add(FEATURE)
    result: list[tuple[Factor, ...]] = []
    for i, size in enumerate(shape):
        said = {normalised(without((axes[i],), unknown))[0] for axes in opinions}
        said = {dim for dim in said if labels_of((dim,))}
        if len(said) > 1:  # each label in its own dim comes from one operand; two in one dim must come from one as well
            unknown |= {factor.label for dim in said for factor in dim}
        result.append(said.pop() if len(said) == 1 else (Factor(size),))
    return without(tuple(result), unknown)


def read_view(axes: Axes, view: Tensor, numel: int) -> Axes:
    """Axes of a view of a contiguous tensor, from its strides."""
    factors, stride = [], 1  # innermost first, with the stride of each
    for factor in [f for dim in reversed(axes) for f in reversed(dim)]:
        factors += [(factor, stride)] * (factor.size > 1)
        stride *= factor.size
    dims: list[tuple[Factor, ...]] = []
    spans: list[tuple[int, int]] = []
    lost: set[str | None] = set()
    for size, stride in zip(view.shape, view.stride(), strict=True):
        if size == 1:
            at = stride - numel - 1
            dims.append(axes[at] if 0 <= at < len(axes) else (Factor(1),))
        elif stride == 0:
            dims.append((Factor(size),))
        else:
            dim, gone = _covered(factors, size, stride)
            if any(stride < high and low < stride * size for low, high in spans):  # windows that overlap
                gone |= {f.label for f in dim}
            dims.append(dim)
            spans.append((stride, stride * size))
            lost |= gone
    if 0 in view.stride():
        return without(tuple(dims), lost)
    # The one example or unit is still the only one, whatever becomes of its dim.
    for label, single in ((EXAMPLE, 0), (UNIT, -1), (FEATURE, -1)):
        if label in labels_of(axes) and label not in labels_of(tuple(dims)) and dims:
            total = prod(f.size for dim in axes for f in dim if f.label == label)
            places = [i for i, dim in enumerate(dims) if not labels_of((dim,)) and view.shape[i] == 1]
            at = places[single] if places else single % len(dims)
            dims[at] = (*dims[at], Factor(1, label)) if total == 1 else dims[at]
    return without(tuple(dims), lost)


def _covered(factors: list[tuple[Factor, int]], size: int, stride: int) -> tuple[tuple[Factor, ...], set[str | None]]:
    """The factors that a dim of a view runs through, and the labels that are lost on the way."""
    at = next((i for i, (f, own) in enumerate(factors) if own <= stride < own * f.size), None)
    if at is None or stride % factors[at][1]:  # diagonals
        return (Factor(size),), {f.label for f, _ in factors}
    taken: list[Factor] = []
    rest = size
    step = stride // factors[at][1]
    for factor, _ in factors[at:]:
        length = -(-factor.size // step)  # of what is left of a factor that an inner dim has its part of, or of a slice
        if rest <= length or length * step != factor.size or rest % length:
            crossing = rest > length
            taken.append(Factor(rest, None if crossing else factor.label))
            return tuple(reversed(taken)), ({f.label for f, _ in factors[at:]} if crossing else set())
        taken.append(Factor(length, factor.label))
        rest, step = rest // length, 1
        if rest == 1:
            return tuple(reversed(taken)), set()
    return (Factor(size),), {f.label for f, _ in factors}

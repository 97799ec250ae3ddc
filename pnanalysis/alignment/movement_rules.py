"""Operations that only move entries of a tensor: views, permuted axes, slices, concatenations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from pnanalysis.alignment.calls import Call, Result, Rule
from pnanalysis.alignment.labelled import Atom, Axis, Labelled


def same(call: Call) -> Labelled:
    return call.source


def view(call: Call) -> Labelled:
    """Blocks of axes of the old shape hold the same elements as blocks of the new one."""
    old, new = call.labels.shape(call.source), call.shape
    axes: list[Axis] = []
    i = j = 0
    while i < len(old) or j < len(new):
        first, second, before, after = i, j, 1, 1
        while before != after or (i, j) == (first, second):
            if j < len(new) and (after <= before or i == len(old)):
                after, j = after * new[j], j + 1
            else:
                before, i = before * old[i], i + 1
        axes += call.labels.regrouped(call.source.axes[first:i], new[second:j])
    return call.source.with_axes(axes)


def restrided(call: Call) -> Result:
    """Another layout in memory: of the same elements, where only axes of length 1 have new strides."""
    before, after = (
        [(size, step) for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
        for tensor in (call.given[0], call.results[0])
    )
    return call.source if before == after and call.given[0].shape == call.results[0].shape else None


def permute(call: Call) -> Labelled:
    return call.source.with_axes([call.source.axes[dim] for dim in call.dims(len(call.source.axes))])


def transpose(call: Call) -> Labelled:
    axes = list(call.source.axes)
    if len(axes) > 1:
        a, b = (0, 1) if call.name == "t" else (call.dim("dim0"), call.dim("dim1"))
        axes[a], axes[b] = axes[b], axes[a]
    return call.source.with_axes(axes)


def unsqueeze(call: Call) -> Labelled:
    axes = list(call.source.axes)
    axes.insert(call["dim"] % (len(axes) + 1), ())
    return call.source.with_axes(axes)


def squeeze(call: Call) -> Labelled:
    axes = call.source.axes
    dims = call.dims(len(axes))
    sizes = call.labels.shape(call.source)
    return call.source.with_axes([axis for k, axis in enumerate(axes) if k not in dims or sizes[k] != 1])


def expand(call: Call) -> Labelled:
    """Axes of length 1 become longer, and the tensor is constant along them."""
    old = ((),) * (len(call.shape) - len(call.source.axes)) + call.source.axes
    return call.source.with_axes(
        [axis or call.labels.fixed_axis(size, wild=True) for axis, size in zip(old, call.shape, strict=True)]
    )


def repeat(call: Call) -> Labelled:
    old = ((),) * (len(call["repeats"]) - len(call.source.axes)) + call.source.axes
    return call.source.with_axes(
        [(*call.labels.fixed_axis(n, wild=True), *axis) for axis, n in zip(old, call["repeats"], strict=True)]
    )


def part(call: Call, value: Labelled, dim: int, start: int, stop: int) -> Labelled:
    """A slice along one axis: the factor that is cut becomes a sum."""
    labels, factors = call.labels, call.labels.factors
    atoms = labels.expanded(value.axes[dim])
    size = labels.shape(value)[dim]
    if (start, stop) == (0, size):
        return value
    inner = prod(factors.size(atom.factor) for atom in atoms[1:])
    if start % inner or stop % inner:
        labels.fix_axes([value.axes[dim]])
        return value.with_axes([*value.axes[:dim], labels.fixed_axis(stop - start), *value.axes[dim + 1 :]])
    axes = [labels.expanded(axis) for axis in value.axes]
    axes[dim] = atoms[1:]
    inside = [atom.factor for axis in axes for atom in axis]
    first, versions = factors.take(atoms[0].factor, inside, start // inner, stop // inner)
    remaining = iter(versions)
    renamed = [tuple(atom._replace(factor=next(remaining)) for atom in axis) for axis in axes]
    if factors.size(first) > 1:
        renamed[dim] = (atoms[0]._replace(factor=first), *renamed[dim])
    return value.with_axes(renamed)


def slice_(call: Call) -> Result:
    dim, step = call.dim(), call["step"] or 1
    size = call.labels.shape(call.source)[dim]
    start, stop = call["start"] or 0, size if call["end"] is None else call["end"]
    start, stop = (min(max(at + size if at < 0 else at, 0), size) for at in (start, stop))
    if stop <= start:
        return call.labels.constant(call.shape)
    if step != 1:
        return _without(call, [dim])
    return part(call, call.source, dim, start, stop)


def select(call: Call) -> Labelled:
    dim = call.dim()
    index = call["index"] % call.labels.shape(call.source)[dim]
    found = part(call, call.source, dim, index, index + 1)
    return found.with_axes([axis for k, axis in enumerate(found.axes) if k != dim])


def split(call: Call) -> tuple[Labelled, ...]:
    dim, at = call.dim(), 0
    parts = []
    for result in call.results:
        parts.append(part(call, call.source, dim, at, at + result.shape[dim]))
        at += result.shape[dim]
    return tuple(parts)


def unbind(call: Call) -> tuple[Labelled, ...]:
    dim = call.dim()
    parts = [part(call, call.source, dim, k, k + 1) for k in range(len(call.results))]
    return tuple(value.with_axes([axis for k, axis in enumerate(value.axes) if k != dim]) for value in parts)


def stack(call: Call) -> Result:
    dim = call["dim"] % (len(call.shape)) if call["dim"] else 0
    values = [value.with_axes([*value.axes[:dim], (), *value.axes[dim:]]) for value in call.values]
    return _concatenate(call, values, dim)


def cat(call: Call) -> Result:
    return _concatenate(call, call.values, (call["dim"] or 0) % len(call.shape))


def _concatenate(call: Call, values: Sequence[Labelled], dim: int) -> Result:
    labels, factors = call.labels, call.labels.factors
    values = [value for value in values if 0 not in labels.shape(value)]  # torch ignores them, whatever their shape
    if not values or any(len(value.axes) != len(call.shape) for value in values):
        return None
    values = [labels.settle(value, True) for value in values]
    parts, signs = [], []
    for value in values:
        atoms = labels.expanded(value.axes[dim])
        merged = [atom for atom in atoms if factors.size(atom.factor) > 1]
        signs.append({bool(atom.signed) for atom in merged if factors[atom.factor].signs})
        if any(factors[atom.factor].wild for atom in merged):  # a constant beside channels is no channel
            parts.append(factors.new(prod(factors.size(atom.factor) for atom in merged), fixed=True))
        elif len(merged) == 1:
            parts.append(merged[0].factor)
        elif not merged:
            parts.append(factors.new(1))
        else:
            parts.append(factors.multiplied([atom.factor for atom in merged]))
    found = set().union(*signs)
    if len(found) > 1:  # some parts change sign and others do not
        for value in values:
            labels.limit(value.axes[dim])
    signed = found == {True}
    rest = [value.with_axes([() if k == dim else axis for k, axis in enumerate(value.axes)]) for value in values]
    axes = list(labels.elementwise(rest, "sum").axes) if len(rest) > 1 else list(rest[0].axes)
    axes[dim] = (Atom(factors.joined(parts), signed),)
    return Labelled(tuple(axes))


def scatter(call: Call) -> Labelled:
    """Part of a tensor overwritten by another: along that axis nothing may be moved."""
    dim, (whole, inserted) = call.dim(), call.values
    if call.name.startswith("select"):
        inserted = inserted.with_axes([*inserted.axes[:dim], (), *inserted.axes[dim:]])
    call.labels.fix_axes([whole.axes[dim], inserted.axes[dim]])
    rest = [value.with_axes([() if k == dim else a for k, a in enumerate(value.axes)]) for value in (whole, inserted)]
    axes = list(call.labels.elementwise(rest, "sum").axes)
    axes[dim] = call.labels.fixed_axis(call.shape[dim])
    return Labelled(tuple(axes))


def rolled(call: Call) -> Labelled:
    """Entries change places along some axes: nothing may be moved there."""
    return _without(call, call.dims(len(call.source.axes)))


def padded(call: Call) -> Labelled:
    pads, ndim = call["pad"], len(call.source.axes)
    touched = [ndim - 1 - k for k in range(len(pads) // 2) if pads[2 * k] or pads[2 * k + 1]]
    if call["value"]:
        call.labels.limit(call.source.atoms)
    return _without(call, touched)


def index_select(call: Call) -> Labelled:
    return _without(call, [call.dim()])


def index(call: Call) -> Result:
    """Rows picked by tensors of indices."""
    value, indices = call.source, call["indices"]
    used = [k for k, chosen in enumerate(indices) if chosen is not None]
    if any(b - a != 1 for a, b in pairwise(used)):
        return None
    call.labels.fix_axes([value.axes[k] for k in used])
    picked = call.labels.elementwise([indices[k] for k in used], "other").axes
    axes = [*value.axes[: used[0]], *picked, *value.axes[used[-1] + 1 :]]
    return value.with_axes(axes) if len(axes) == len(call.shape) else None  # a mask picks an unknown number


def view_as_complex(call: Call) -> Labelled:
    call.labels.fix_axes(call.source.axes[-1:])
    return call.source.with_axes(call.source.axes[:-1])


def view_as_real(call: Call) -> Labelled:
    return call.source.with_axes([*call.source.axes, call.labels.fixed_axis(2)])


def _without(call: Call, dims: Sequence[int]) -> Labelled:
    """The tensor with fixed factors along some axes, of the result's lengths."""
    call.labels.fix_axes([call.source.axes[dim] for dim in dims])
    return call.source.with_axes(
        [call.labels.fixed_axis(call.shape[k]) if k in dims else axis for k, axis in enumerate(call.source.axes)]
    )


#: By name of the operation in torch's library of tensor operations (aten).
MOVEMENTS: dict[str, Rule] = {
    **dict.fromkeys(
        ("alias", "detach", "clone", "_to_copy", "lift_fresh", "lift_fresh_copy", "contiguous", "conj", "resolve_conj",
         "resolve_neg", "_conj", "dropout", "native_dropout", "positive", "to", "lift", "prims_convert_element_type"),
        same,
    ),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_copy", "view_copy"), view),
    **dict.fromkeys(("transpose", "t", "swapaxes", "transpose_copy", "t_copy"), transpose),
    **dict.fromkeys(("permute", "permute_copy"), permute),
    **dict.fromkeys(("unsqueeze", "unsqueeze_copy"), unsqueeze),
    **dict.fromkeys(("squeeze", "squeeze_copy"), squeeze),
    **dict.fromkeys(("expand", "expand_copy"), expand),
    **dict.fromkeys(("slice", "slice_copy", "narrow"), slice_),
    **dict.fromkeys(("select", "select_copy"), select),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "split_copy", "split_with_sizes_copy", "unsafe_split",
                     "unsafe_split_with_sizes", "unsafe_chunk"), split),
    **dict.fromkeys(("unbind", "unbind_copy"), unbind),
    **dict.fromkeys(("slice_scatter", "select_scatter"), scatter),
    **dict.fromkeys(("roll", "flip"), rolled),
    "as_strided": restrided, "repeat": repeat, "cat": cat, "stack": stack, "constant_pad_nd": padded, "index": index,
    "index_select": index_select, "view_as_complex": view_as_complex, "view_as_real": view_as_real,
}  # fmt: skip

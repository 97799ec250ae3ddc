"""Where the labels of axes go in each operation of torch: a table from names of operations to rules.

An operation that is not there loses them: an axis is known, or it is said to be unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor

from pnanalysis.activations.axes import (
    EXAMPLE,
    FEATURE,
    UNIT,
    Axes,
    Factor,
    Positions,
    blank,
    labels_of,
    last_units,
    merged,
    read_view,
    without,
)
from pnanalysis.torch_internals import is_view_of

#: States of tensors that depend on no input: parameters and what is computed from them, and all others.
WEIGHT, CONSTANT = "weight", "constant"
State = Axes | str | None  # axes of data; None of a tensor that was never seen
Origin = frozenset[int]  # the parameters that a tensor was computed with


@dataclass(frozen=True)
class Call:
    """A call of an operation: what :data:`RULES` are applied to."""

    function: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]
    state: Callable[[Tensor], State]
    origin: Callable[[Tensor], Origin]
    n_examples: int

    def argument(self, position: int, *names: str, default: Any = None) -> Any:
        """An argument by position, or by one of its names."""
        found = [self.kwargs[name] for name in names if name in self.kwargs]
        return self.args[position] if position < len(self.args) else found[0] if found else default

    @property
    def source(self) -> Tensor:
        """The first tensor."""
        return next(tensors_in((self.args, self.kwargs)))

    def data(self) -> list[Tensor]:
        """The tensors that depend on the inputs."""
        return [t for t in tensors_in((self.args, self.kwargs)) if isinstance(self.state(t), tuple)]

    def axes(self, tensor: Tensor) -> Axes:
        """Axes of a tensor, without labels where nothing is known of it."""
        state = self.state(tensor)
        return state if isinstance(state, tuple) and len(state) == tensor.ndim else blank(tensor.shape)

    def joined(self, axes: Axes, tensors: Iterable[Tensor]) -> Axes:
        """The axes of several tensors side by side: units of different layers are not the same ones."""
        return axes if len(set(map(self.origin, tensors))) < 2 else without(axes, (UNIT, FEATURE))

    def is_weight(self, tensor: Tensor) -> bool:
        return self.state(tensor) == WEIGHT

    def on_meta(self, sizes: Sequence[int], strides: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """A tensor without memory in place of the first, and what the operation makes of it."""
        with torch.inference_mode(False), torch.no_grad():  # views of inference tensors do not know what they are of
            probe = torch.empty_strided(sizes, strides, dtype=self.source.dtype, device="meta")
            return probe, list(tensors_in(self.function(probe, *self.args[1:], **self.kwargs)))


def name_of(function: Any) -> str:
    """Name of an operation, one for its forms as a function, method, operator, property, overload and in place."""
    name = str(getattr(function, "__name__", ""))
    if name == "__get__":  # of a property, such as Tensor.T
        name = str(getattr(function.__self__, "__name__", ""))
    name = name.split(".")[0].removeprefix("special_")
    if not name.startswith("__"):
        return name.rstrip("_")
    name = name.strip("_")
    plain = name[1:] if name[1:] in _OPERATORS else name  # __iadd__ and __radd__ add
    return name if name == "rmatmul" else _OPERATORS.get(plain, plain)


#: Operators, and what torch calls them.
_OPERATORS = {name: name for name in ("add", "sub", "mul", "pow", "matmul")} | {
    "truediv": "div", "floordiv": "div", "mod": "remainder", "and": "bitwise_and", "or": "bitwise_or",
    "xor": "bitwise_xor", "invert": "bitwise_not",
}  # fmt: skip


def rule_of(name: str) -> Rule | None:
    """The rule for an operation, if there is one."""
    return RULES.get(name) or (_pointwise if _is_pointwise(name) else None)


@cache
def _is_pointwise(name: str) -> bool:
    """Whether torch itself says that an operation works on each number alone (or on pairs of them)."""
    packet = getattr(torch.ops.aten, name, None) if name else None
    overloads = [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]
    return any(torch.Tag.pointwise in overload.tags for overload in overloads)


def tensors_in(nest: Any) -> Iterator[Tensor]:
    """All tensors in a nest of mappings, sequences and objects that hold them (batches of graphs, for example)."""
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, Mapping):
        for value in nest.values():
            yield from tensors_in(value)
    elif isinstance(nest, tuple | list):
        for value in nest:
            yield from tensors_in(value)
    elif hasattr(nest, "__dict__") and not callable(nest):
        for value in vars(nest).values():
            yield from tensors_in(value) if isinstance(value, Tensor | Mapping | tuple | list) else ()


def _aligned(call: Call) -> list[tuple[Axes, Positions]]:
    """The data among the operands, with trailing dims aligned, as in broadcasting."""
    ndim = call.outputs[0].ndim
    return [(call.axes(t), range(ndim - t.ndim, ndim)) for t in call.data() if t.ndim <= ndim]


def _pointwise(call: Call) -> list[Axes | None]:
    """Every number by itself, with broadcasting; also what keeps shapes: norms, softmax, dropout, casts."""
    shape = call.outputs[0].shape
    axes = merged(shape, _aligned(call))
    units = {i for i, dim in enumerate(axes) if labels_of((dim,)) & {UNIT, FEATURE}}
    from_data = {len(shape) - j for t in call.data() for j in range(1, t.ndim + 1) if t.shape[-j] > 1}
    for weight in filter(call.is_weight, tensors_in((call.args, call.kwargs))):
        own = {len(shape) - j for j in range(1, weight.ndim + 1) if weight.shape[-j] > 1}
        if own - from_data and not units <= own:  # an outer product with weights makes an axis of units of its own
            axes = without(axes, (UNIT, FEATURE))
    return [axes if out.shape == shape else None for out in call.outputs]


def _positions(letters: Sequence[str], out: str) -> list[Positions]:
    return [[out.index(letter) if letter in out else None for letter in own] for own in letters]


def _product(call: Call, tensors: Sequence[Tensor], letters: Sequence[str], out: str) -> Axes:
    """A sum over products, as an einsum of ``letters`` to ``out``: the dims that weights add count units.

    Where the units of the data come through as well, the weights may mix positions or nodes rather than units; where
    weights have a dim of the data besides, it may count positions or units. Both are unknown.
    """
    shape = call.outputs[0].shape
    pairs = list(zip(tensors, _positions(letters, out), strict=True))
    axes = merged(shape, [(call.axes(t), own) for t, own in pairs if not call.is_weight(t)])
    weights = [(t, own) for t, own in pairs if call.is_weight(t)]
    of_data = {at for t, own in pairs if not call.is_weight(t) for size, at in zip(t.shape, own, strict=True)
               if at is not None and size == shape[at]}  # fmt: skip
    if all(set(own) <= of_data for _, own in weights):  # no weights, or a scale for each number
        return axes
    fresh = {
        at for t, own in weights for size, stride, at in zip(t.shape, t.stride(), own, strict=True)
        if at is not None and size == shape[at] and (stride or size == 1) and EXAMPLE not in labels_of((axes[at],))
    }  # fmt: skip
    kept = {i for i, dim in enumerate(axes) if UNIT in labels_of((dim,))}
    units = {at for t, own in pairs for dim, at in zip(call.axes(t), own, strict=True) if UNIT in labels_of((dim,))}
    # weights of their own at each place along a dim that counts no units (heads do): positions, perhaps
    shared = {at for at in (fresh & of_data) - units if shape[at] > 1}
    axes = without(axes, (UNIT, FEATURE))
    if kept - fresh or shared:
        return axes
    return tuple(
        (Factor(size, UNIT),) if i in fresh else dim for i, (size, dim) in enumerate(zip(shape, axes, strict=True))
    )


def _view(call: Call) -> list[Axes | None]:
    """Whatever views or reshapes a tensor: transposes, splits, slices, expansions."""
    axes = call.axes(call.source)
    sizes = [prod(f.size for f in dim) for dim in axes]
    strides = [prod(sizes[i + 1 :]) for i in range(len(sizes))]
    # a dim of size 1 may have any stride, so that it can be told from others: larger than all of the rest
    strides = [
        prod(sizes) + 1 + i if size == 1 else stride
        for i, (size, stride) in enumerate(zip(sizes, strides, strict=True))
    ]
    probe, views = call.on_meta(sizes, strides)
    fine = prod(sizes) > 0 and all(is_view_of(v, probe) and v.dtype.itemsize == probe.dtype.itemsize for v in views)
    return [read_view(axes, view, prod(sizes)) if fine else None for view in views]


def _index(call: Call) -> list[Axes | None]:
    """``x[...]``: a view, unless tensors or lists are among the indices."""
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    if _gives_view(index):
        return _view(call)
    axes, shape = call.axes(call.source), call.outputs[0].shape
    entries = _entries(index, len(axes))
    if any(not isinstance(entry, Tensor) and entry != slice(None) for entry in entries):
        return [None]  # mixed with numbers, ranges and new dims
    chosen = [n for n, entry in enumerate(entries) if isinstance(entry, Tensor)]
    masks = any(entry.dtype == torch.bool for entry in entries if isinstance(entry, Tensor))
    if masks and len(chosen) > 1:
        return [None]
    widths = [max(entry.ndim, 1) if masks and isinstance(entry, Tensor) else 1 for entry in entries]
    n_new = len(shape) - len(axes) + sum(widths[n] for n in chosen)  # dims that the indices have together
    start = chosen[0] if chosen == list(range(chosen[0], chosen[-1] + 1)) else 0  # as in numpy
    rest = [i for i in range(len(shape)) if not start <= i < start + n_new]
    positions: list[int | None] = []
    for n, width in enumerate(widths):
        positions += [None] * width if n in chosen else [rest.pop(0)]
    found = merged(shape, [(axes, positions)])
    (at, first) = chosen[0], entries[chosen[0]]
    if len(chosen) == n_new == 1 and not masks and {f.label for f in axes[at]} == {UNIT}:
        return [_keeping_units(axes, at, shape)]  # some of the units
    if len(chosen) > n_new == 1 and not masks and _counts(first, shape[start]) and len(axes[at]) == 1:
        found = (*found[:start], axes[at], *found[start + 1 :])  # x[arange(n), last]: one position of each example
    return [found]


def _gives_view(index: Sequence[Any]) -> bool:
    return all(i is None or i is Ellipsis or (isinstance(i, slice | int) and not isinstance(i, bool)) for i in index)


def _entries(index: Sequence[Any], ndim: int) -> list[Any]:
    """What each dim is indexed with; lists as tensors, and masks once for all of their dims."""
    index = [torch.as_tensor(i) if isinstance(i, list) else i for i in index]
    used = sum(i.ndim if isinstance(i, Tensor) and i.dtype == torch.bool else 1 for i in index if i is not Ellipsis)
    dots = next((n for n, i in enumerate(index) if i is Ellipsis), len(index))
    return [*index[:dots], *[slice(None)] * (ndim - used), *index[dots + 1 :]]


def _counts(index: Tensor, size: int) -> bool:
    """Whether an index is 0, 1, 2 and so on."""
    return index.shape == (size,) and torch.equal(index, torch.arange(size, device=index.device, dtype=index.dtype))


def _assignment(call: Call) -> list[Axes | None]:
    """``x[...] = y``: what is known of x, and of y at its place within x."""
    target, index, value = call.args
    axes = call.axes(target)
    own = [(axes, range(len(axes)))] if isinstance(call.state(target), tuple) else []
    if not isinstance(value, Tensor) or not isinstance(call.state(value), tuple):
        return [axes]
    index = index if isinstance(index, tuple) else (index,)
    if not _gives_view(index):
        return [None]
    numbered = tuple((Factor(size, str(i)),) for i, size in enumerate(target.shape))
    part = read_view(numbered, torch.empty(target.shape, device="meta")[index], target.numel())[-value.ndim :]
    places = [next((int(f.label) for f in dim if f.label is not None), None) for dim in part]
    before = [target] if own and labels_of(axes) & {UNIT, FEATURE} else []  # else nothing has been put there yet
    return [call.joined(merged(target.shape, [*own, (call.axes(value), places)]), [*before, value])]


def _keeping_units(axes: Axes, dim: int, shape: Sequence[int]) -> Axes:
    """The axes with another number of units along a dim of nothing else."""
    return tuple((Factor(shape[i], UNIT),) if i == dim else own for i, own in enumerate(axes))


def _reduction(call: Call) -> list[Axes | None]:
    """Sums, means and extremes over dims, which are found by their sizes on a tensor that has none of them twice."""
    if sum(1 for _ in tensors_in(call.args)) > 1:  # max of two tensors
        return _pointwise(call)
    axes = call.axes(call.source)
    sizes = [2 + i for i in range(len(axes))]
    found: list[Axes | None] = []
    for reduced in call.on_meta(sizes, [prod(sizes[i + 1 :]) for i in range(len(sizes))])[1]:
        gone = {f.label for i, dim in enumerate(axes) if sizes[i] not in reduced.shape for f in dim if f.size > 1}
        found.append(without(tuple((Factor(1),) if size == 1 else axes[size - 2] for size in reduced.shape), gone))
    return found


def _same_places(call: Call) -> list[Axes | None]:
    """Dims stay where they are; what changes its size (pooling, padding) loses its label."""
    axes = call.axes(call.source)
    return [merged(out.shape, [(axes, range(len(axes)))]) if out.ndim == len(axes) else None for out in call.outputs]


def _along(call: Call) -> list[Axes | None]:
    """Numbers move along one dim only: gather, scatter, sort."""
    dim = next((a for a in (*call.args[1:], call.kwargs.get("dim")) if type(a) is int), -1)
    found: list[Axes | None] = []
    for out in call.outputs:
        at = dim % max(out.ndim, 1)
        places = [None if i == at else i for i in range(out.ndim)]
        axes = merged(out.shape, [(call.axes(t), places) for t in call.data() if t.ndim == out.ndim])
        own = call.axes(call.source)
        chosen = call.name in ("index_select", "glu") and len(own) == out.ndim and {f.label for f in own[at]} == {UNIT}
        found.append(_keeping_units(own, at, out.shape) if chosen else axes)
    return found


def _spectrum(call: Call) -> list[Axes | None]:
    """Fourier transforms mix what lies along their dims."""
    axes, out = call.axes(call.source), call.outputs[0]
    every = {"2": (-2, -1), "n": range(out.ndim)}.get(call.name[-1], (-1,))
    dims = call.argument(2, "dim", default=None)
    dims = every if dims is None else (dims,) if isinstance(dims, int) else dims
    mixed = {dim % out.ndim for dim in dims}
    return [merged(out.shape, [(axes, [None if i in mixed else i for i in range(out.ndim)])])]


def _complex_parts(call: Call) -> list[Axes | None]:
    """Real and imaginary parts along a last dim, and back."""
    axes = call.axes(call.source)
    return [(*axes, (Factor(2),)) if call.name == "view_as_real" else without(axes[:-1], labels_of(axes[-1:]))]


def _concatenation(call: Call) -> list[Axes | None]:
    """Tensors along a dim that they have: more units, if it counts units in each of them."""
    tensors = [t for t in call.argument(0, "tensors") if t.numel()]
    dim = call.argument(1, "dim", "axis", default={"hstack": min(1, tensors[0].ndim - 1)}.get(call.name, 0))
    out = call.outputs[0]
    at = dim % out.ndim
    places = [None if i == at else i for i in range(out.ndim)]
    followed = [t for t in tensors if isinstance(call.state(t), tuple)]
    data = [call.axes(t) for t in followed]
    axes = call.joined(merged(out.shape, [(own, places) for own in data]), followed)
    labels = {factor.label for t in tensors for factor in call.axes(t)[at]}
    (label,) = labels if len(labels) == 1 else (None,)
    elsewhere = any(label in labels_of((own[i],)) for own in data for i in range(out.ndim) if i != at)
    if label is None or elsewhere or (label == EXAMPLE and out.shape[at] != call.n_examples):
        return [axes]
    return [tuple((Factor(out.shape[i], label),) if i == at else own for i, own in enumerate(axes))]


def _stacking(call: Call) -> list[Axes | None]:
    """Tensors along a new dim."""
    out, dim = call.outputs[0], call.argument(1, "dim", default=0)
    places = [i for i in range(out.ndim) if i != dim % out.ndim]
    return [call.joined(merged(out.shape, [(call.axes(t), places) for t in call.data()]), call.data())]


def _repetition(call: Call) -> list[Axes | None]:
    """Copies along a dim: of all of it by ``repeat`` and ``tile``, of each entry by ``repeat_interleave``."""
    axes, shape = call.axes(call.source), call.outputs[0].shape
    padded = ((Factor(1),),) * (len(shape) - len(axes)) + axes
    dims: list[tuple[Factor, ...]] = []
    lost: set[str | None] = set()
    for size, dim in zip(shape, padded, strict=True):
        length = prod(f.size for f in dim)
        copies = (Factor(size // length),) if size != length else ()
        dims.append((*dim, *copies) if call.name == "repeat_interleave" else (*copies, *dim))
        lost |= {f.label for f in dim if copies and length == 1 and f.label != EXAMPLE}
    return [without(tuple(dims), lost)]


def _linear(call: Call) -> list[Axes | None]:
    """Units are the last dim, whatever came before; unless the weights are computed from the inputs."""
    inputs, weight = call.argument(0, "input"), call.argument(1, "weight")
    letters = ascii_letters[: inputs.ndim]
    out = letters[:-1] + "Z" * (weight.ndim - 1)
    axes = merged(call.outputs[0].shape, [(call.axes(inputs), _positions([letters], out)[0])])
    known = weight.ndim == 2 and not isinstance(call.state(weight), tuple)
    return [last_units(axes) if known else without(axes, (UNIT, FEATURE))]


def _layer(call: Call) -> list[Axes | None]:
    """Layers whose outputs' last dim is their own (recurrent cells, attention), and others those of the input."""
    return [_replacing_last(call.axes(call.source), out) for out in call.outputs]


def _replacing_last(axes: Axes, out: Tensor) -> Axes | None:
    if len(axes) != out.ndim or not axes:
        return None
    gone = {factor.label for factor in axes[-1]}
    return last_units((*without(axes, gone)[:-1], (Factor(out.shape[-1]),)))


def _embedding(call: Call) -> list[Axes | None]:
    """A row of the weights for each index: a new last dim."""
    pair = call.argument(0, "input", "weight"), call.argument(1, "weight", "indices")
    indices = next(t for t in pair if not t.is_floating_point())
    return [last_units((*call.axes(indices), (Factor(out.shape[-1]),))) for out in call.outputs]


def _recurrent(call: Call) -> list[Axes | None]:
    """Outputs at every step as those of a layer; last states (layers, examples, units)."""
    inputs, outputs = call.axes(call.source), call.outputs
    packed = len(inputs) != 3
    found = [_replacing_last(inputs, outputs[0])]
    batch = (Factor(outputs[1].shape[1]),) if packed else inputs[0 if call.args[-1] is True else 1]
    for state in outputs[1:]:
        found.append(last_units(((Factor(state.shape[0]),), batch, (Factor(state.shape[2]),))))
    return found


def _attention(call: Call) -> list[Axes | None]:
    """A mean of the values at all positions: examples of the queries, units of the values."""
    query, key, value = (call.argument(i, name) for i, name in enumerate(("query", "key", "value")))
    batch = ascii_letters[: query.ndim - 2]
    positions = _positions([batch + "XE", batch + "YE", batch + "YD"], batch + "XD")
    tensors = (query, key, value)
    return [merged(call.outputs[0].shape, [(call.axes(t), own) for t, own in zip(tensors, positions, strict=True)])]


def _multi_head(call: Call) -> list[Axes | None]:
    return [_replacing_last(call.axes(call.source), call.outputs[0])]  # not of the attention weights


def _convolution(call: Call) -> list[Axes | None]:
    inputs, weight = call.argument(0, "input"), call.argument(1, "weight")
    axes, out = call.axes(inputs), call.outputs[0]
    at = out.ndim - weight.ndim + 1  # of the channels
    elsewhere = {f.label for dim in axes[at:] for f in dim}
    dims = (*without(axes[:at], elsewhere | {UNIT, FEATURE}), *blank(out.shape[at:]))
    if isinstance(call.state(weight), tuple):  # computed from the inputs
        return [dims]
    return [(*dims[:at], (Factor(out.shape[at], UNIT),), *dims[at + 1 :])]


def _channel_norm(call: Call) -> list[Axes | None]:
    """Units as before; where there are none yet, the channels that are normalised."""
    (axes,) = _pointwise(call)
    if axes is None or UNIT in labels_of(axes) or EXAMPLE in labels_of((axes[1],)):
        return [axes]
    axes = without(axes, (FEATURE,))
    return [(axes[0], (Factor(call.outputs[0].shape[1], UNIT),), *axes[2:])]


def _matmul(call: Call) -> list[Axes | None]:
    left, right = list(tensors_in((call.args, call.kwargs)))[:2]
    if call.name == "rmatmul":
        left, right = right, left
    batch = ascii_letters[: max(left.ndim, right.ndim) - 2]
    own = [(batch[len(batch) - max(t.ndim - 2, 0) :]) + part[-t.ndim :] for t, part in ((left, "XI"), (right, "IY"))]
    own[1] = "I" if right.ndim == 1 else own[1]
    out = batch + "X" * (left.ndim > 1) + "Y" * (right.ndim > 1)
    return [_product(call, [left, right], own, out)]


def _added_matmul(call: Call) -> list[Axes | None]:
    """``addmm`` and ``baddbmm``: a product and a bias, which is left aside."""
    names = ("mat1", "batch1"), ("mat2", "batch2")
    left, right = (call.argument(i + 1, *own) for i, own in enumerate(names))
    batch = "B" * (left.ndim - 2)
    return [_product(call, [left, right], [batch + "XI", batch + "IY"], batch + "XY")]


def _einsum(call: Call) -> list[Axes | None]:
    equation, tensors = call.args[0].replace(" ", ""), list(tensors_in(call.args[1:]))
    terms, arrow, out = equation.partition("->")
    letters = terms.split(",")
    unused = [letter for letter in ascii_letters if letter not in equation]
    dots = [t.ndim - len(own.replace("...", "")) for t, own in zip(tensors, letters, strict=True)]
    if not arrow:
        counted = terms.replace(",", "").replace("...", "")
        out = "..." * ("..." in terms) + "".join(sorted(c for c in set(counted) if counted.count(c) == 1))
    longest = "".join(unused[: max(dots)])
    letters = [own.replace("...", longest[len(longest) - n :]) for own, n in zip(letters, dots, strict=True)]
    out = out.replace("...", longest)
    if any(len(set(own)) < len(own) for own in letters):  # diagonals
        return [None]
    return [_product(call, tensors, letters, out)]


def _bag(call: Call) -> list[Axes | None]:
    """A sum of rows of the weights for each bag of indices."""
    indices, offsets = call.argument(0, "input"), call.argument(2, "offsets")
    bags = call.axes(indices if indices.ndim == 2 else offsets)[:1]
    return [last_units((*bags, (Factor(call.outputs[0].shape[-1]),)))]


def _last_kept(call: Call) -> list[Axes | None]:
    """Sequences packed and padded: only the last dim stays what it was."""
    last = call.axes(call.source)[-1:]
    return [(*blank(out.shape[:-1]), *last) if out.ndim > 1 else None for out in call.outputs]


Rule = Callable[[Call], list[Axes | None]]


def _table(rules: Mapping[Rule, str]) -> dict[str, Rule]:
    return {name: rule for rule, names in rules.items() for name in names.split()}


#: Where labels go, by the names of operations as :func:`name_of` gives them; besides what torch calls pointwise.
RULES: dict[str, Rule] = _table({
    _pointwise: """layer_norm rms_norm native_layer_norm normalize softmax log_softmax softmin gumbel_softmax cumsum
        dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout native_dropout
        relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish hardtanh hardsigmoid hardswish softplus softsign
        logsigmoid log_sigmoid expit tanhshrink hardshrink softshrink threshold
        clone contiguous detach data requires_grad to type type_as float double half bfloat16 cpu cuda
        zeros_like ones_like full_like empty_like rand_like randn_like bernoulli copy where masked_fill fill zero
        clamp clip clamp_min clamp_max lerp addcmul addcdiv nan_to_num real conj flip roll dequantize""",
    _channel_norm: "batch_norm instance_norm group_norm",
    _view: """view view_as reshape reshape_as flatten unflatten ravel squeeze unsqueeze expand expand_as broadcast_to
        permute transpose t T mT H mH adjoint movedim moveaxis swapaxes swapdims narrow select unbind chunk split
        tensor_split split_with_sizes unsafe_chunk unsafe_split hsplit vsplit dsplit diagonal unfold""",
    _index: "getitem",
    _assignment: "setitem",
    _reduction: "mean sum nansum nanmean amax amin max min aminmax logsumexp norm vector_norm linalg_vector_norm prod "
        "var std var_mean std_mean median any all argmax argmin count_nonzero",
    _same_places: """max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_max_pool1d
        adaptive_max_pool2d adaptive_max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d lp_pool1d
        lp_pool2d lp_pool3d fractional_max_pool2d boolean_dispatch interpolate upsample pad grid_sample
        local_response_norm""",
    _along: """index_select gather take_along_dim scatter scatter_add scatter_reduce index_add index_copy index_fill
        sort glu cummax cummin logcumsumexp""",
    _spectrum: "fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn "
        "fft_rfftn fft_irfftn",
    _complex_parts: "view_as_real view_as_complex",
    _concatenation: "cat concat concatenate hstack",
    _stacking: "stack",
    _repetition: "repeat tile repeat_interleave",
    _linear: "linear",
    _layer: "lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell bilinear",
    _embedding: "embedding",
    _bag: "embedding_bag",
    _last_kept: "_pack_padded_sequence _pad_packed_sequence",
    _recurrent: "lstm gru rnn_tanh rnn_relu",
    _attention: "scaled_dot_product_attention",
    _multi_head: "multi_head_attention_forward",
    _convolution: "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    _matmul: "matmul rmatmul mm bmm mv _sparse_mm",
    _added_matmul: "addmm baddbmm",
    _einsum: "einsum",
})  # fmt: skip

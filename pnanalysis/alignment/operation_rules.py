"""Operations that compute: functions of single elements, products, sums over axes, normalisation, attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pnanalysis.alignment.calls import Call, Result, Rule
from pnanalysis.alignment.labelled import Axis, Combination, Labelled, Labels
from pnanalysis.alignment.movement_rules import MOVEMENTS, part

# Functions of single elements by what they do to signs: f(-x) = -f(x), and f(-x) = f(x). All others are called
# neither: the sign of what enters them must stay.
_ODD = {"tanh", "neg", "erf", "erfinv", "sin", "sinh", "asinh", "atan", "atanh", "asin", "tan", "sgn", "sign",
        "reciprocal", "round", "trunc", "softsign", "_conj_physical", "conj_physical"}  # fmt: skip
_LINEAR = {"neg", "_conj_physical", "conj_physical"}
_EVEN = {"abs", "square", "cos", "cosh"}
_SUMS = {"add", "sub", "rsub"}
_PRODUCTS = {"mul", "div", "true_divide"}


def pointwise(call: Call) -> Result:
    """Any function of single elements of its arguments."""
    name, values, labels = call.name, call.values, call.labels
    if name in _ODD and len(values) == 1:
        if name not in _LINEAR:
            labels.scale(values[0].atoms)
        return values[0]
    if len(values) == 1 and (name in _EVEN or (name == "pow" and _exponent(call) == 0)):
        return labels.unsigned(labels.settle(values[0], False))
    if len(values) == 1 and (name in _PRODUCTS or (name == "pow" and _exponent(call) == 1)):
        if name == "pow" and call["exponent"] != 1:
            labels.scale(values[0].atoms)
        return values[0] if call["rounding_mode"] is None else labels.elementwise(values, "other")
    kind: Combination = "sum" if name in _SUMS else "product" if name in _PRODUCTS else "other"
    if call["rounding_mode"] is not None:
        kind = "other"
    if len(values) == 1:
        value = labels.settle(values[0], False)
        neutral = kind == "sum" and not (call["other"] or 0)
        result = value if neutral else labels.elementwise([value], "other")
        return result if len(call.results) == 1 else (result, None)
    free = [_free_factors(labels, value) for value in values if value.tensor is None]
    result = labels.elementwise(values, kind)
    if len(call.results) > 1:
        return result, None
    if kind == "sum" and len(free) > 1 and all(free) and free[0] != free[1]:  # written by two different layers
        for axis in result.axes:
            labels.mark(axis, "stream")
    return result


def _free_factors(labels: Labels, value: Labelled) -> set[int]:
    factors = labels.factors
    return {leaf for a in value.atoms for leaf in factors.expand(a.factor) if not factors[leaf].fixed}


def where(call: Call) -> Result:
    """Elements of one tensor or another, like their sum; the condition must not depend on signs."""
    labels, values = call.labels, call.values
    chosen = call["mask" if call.name == "masked_fill" else "condition"]
    condition = labels.settle(chosen, False)
    labels.limit(condition.atoms)
    others = [labels.settle(value, True) for value in values if value is not chosen]
    mixed = labels.elementwise(others, "sum")
    if len(others) == 1 and any(call[name] for name in ("value", "other", "self") if call[name] not in values):
        labels.limit(mixed.atoms)  # the number in its place has no sign to change
        mixed = labels.unsigned(mixed)
    return labels.elementwise([mixed, labels.unsigned(condition)], "product")


def _exponent(call: Call) -> int | None:
    """0 for an even number, 1 for an odd one."""
    exponent = call["exponent"]
    return int(exponent) % 2 if isinstance(exponent, int | float) and float(exponent).is_integer() else None


def overwritten(call: Call) -> Labelled:
    """``copy`` and ``fill``: what was there before does not count."""
    values = call.values
    if len(values) == 2:
        source = call.labels.settle(values[1], True)
        axes = ((),) * (len(call.shape) - len(source.axes)) + source.axes
        return Labelled(
            tuple(axis or call.labels.fixed_axis(size, wild=True) for axis, size in zip(axes, call.shape, strict=True))
        )
    return call.labels.constant(call.shape, wild=True)


def constant(call: Call) -> Labelled:
    return call.labels.constant(call.shape)


def uniform(call: Call) -> Labelled:
    """A tensor of equal numbers."""
    return call.labels.constant(call.shape, wild=True)


def reduction(call: Call) -> Result:
    """Sums, means and extremes over axes."""
    labels, name = call.labels, call.name
    value = labels.settle(call.source, name in ("sum", "mean"))
    dims = call.dims(len(value.axes))
    if name in ("linalg_vector_norm", "norm"):
        value = labels.unsigned(value)
    elif name in ("sum", "mean"):
        labels.limit([atom for dim in dims for atom in value.axes[dim]])  # signs do not pass a sum over their elements
    elif name.startswith(("var", "std")):
        labels.limit([atom for dim in dims for atom in value.axes[dim]])
        value = labels.unsigned(value)
    else:
        labels.limit(value.atoms)
        value = labels.unsigned(value)
    if name in _ORDERED:  # the result is a place along the axis
        labels.fix_axes([value.axes[dim] for dim in dims])
    if call["keepdim"]:
        reduced = value.with_axes([() if k in dims else axis for k, axis in enumerate(value.axes)])
    else:
        reduced = value.with_axes([axis for k, axis in enumerate(value.axes) if k not in dims])
    if name == "var_mean":
        return reduced, None
    return reduced if len(call.results) == 1 else (reduced,) * len(call.results)


_ORDERED = {"argmax", "argmin", "max", "min", "median", "mode"}


def softmax(call: Call) -> Labelled:
    value = call.labels.settle(call.source, False)
    for axis in (value.axes[call.dim()], *value.axes[-2:-1]):  # of scores: keys, and queries
        call.labels.mark(axis, "tokens")
    call.labels.limit(value.atoms)
    return call.labels.unsigned(value)


def cumulative(call: Call) -> Labelled:
    """The order along the axis counts."""
    value = call.labels.settle(call.source, True)
    call.labels.fix_axes([value.axes[call.dim()]])
    if call.name != "cumsum":
        call.labels.limit(value.atoms)
    return value


def product(call: Call) -> Labelled:
    """Matrix products, with or without a batch, plus a bias."""
    labels = call.labels
    first, second = call.values[-2:]
    both_computed = first.tensor is None and second.tensor is None
    a, b = labels.settle(first, True), labels.settle(second, True)
    inner = b.axes[0] if len(b.axes) <= 2 else b.axes[-2]
    labels.contract(a.axes[-1], inner)
    batch = [labels.multiply_axis(x, y) for x, y in zip(a.axes[:-2], b.axes[:-2], strict=True)]
    if both_computed:
        _mark_attention(labels, batch, a.axes[-1])
    result = Labelled((*batch, *a.axes[len(batch) : -1], *(b.axes[-1:] if len(b.axes) > 1 else ())))
    return labels.elementwise([call["self"], result], "sum") if "add" in call.name else result


def _mark_attention(labels: Labels, batch: Sequence[Axis], summed: Axis) -> None:
    """Two results of the network are multiplied: those of heads with each other, channel by channel."""
    for axis in batch:
        labels.mark(axis, "heads")
    labels.mark(summed, "pairs")


def attention(call: Call) -> Result:
    """``scaled_dot_product_attention`` in any of its implementations; values and queries may have different widths."""
    labels = call.labels
    query, key, value = (labels.settle(call[name], True) for name in ("query", "key", "value"))
    if not len(query.axes) == len(key.axes) == len(value.axes) == 4:
        return None
    heads = labels.shape(query)[1]
    key, value = (_for_all_heads(labels, tensor, heads) for tensor in (key, value))
    labels.contract(query.axes[3], key.axes[3])
    labels.mark(query.axes[3], "pairs")
    scores = [labels.multiply_axis(a, b) for a, b in zip(query.axes[:2], key.axes[:2], strict=True)]
    tokens, positions = query.axes[2], key.axes[2]
    if call["is_causal"]:
        labels.fix_axes([tokens, positions])
    weights = Labelled((*scores, tokens, positions))
    mask = call["attn_mask"] or call["attn_bias"]
    if mask is not None:
        weights = labels.elementwise([weights, mask], "sum")
    labels.limit(weights.atoms)
    weights = labels.unsigned(weights)
    labels.contract(weights.axes[3], value.axes[2])
    for axis in weights.axes[2:]:
        labels.mark(axis, "tokens")
    batch = [labels.multiply_axis(a, b) for a, b in zip(weights.axes[:2], value.axes[:2], strict=True)]
    labels.mark(batch[1], "heads")
    return Labelled((*batch, weights.axes[2], value.axes[3])), Labelled(weights.axes[:3])


def _for_all_heads(labels: Labels, tensor: Labelled, heads: int) -> Labelled:
    """Keys or values of fewer heads than there are queries: each for several of these."""
    own = labels.shape(tensor)[1]
    if own == heads:
        return tensor
    shared = (*tensor.axes[1], *labels.fixed_axis(heads // own, wild=True))
    return tensor.with_axes([tensor.axes[0], shared, *tensor.axes[2:]])


def convolution(call: Call) -> Labelled:
    """A block of channels of the input gives a block of the output; one block if ``groups`` is 1."""
    labels, groups = call.labels, call["groups"]
    value, weight = labels.settle(call["input"], True), call["weight"]
    depthwise = labels.shape(weight)[:2] == (groups, 1) and groups > 1
    # The filters of a depthwise convolution scale their channels; signs pass them.
    weight = labels.settle(weight, not depthwise)
    labels.fix_axes([*weight.axes[2:], *value.axes[2:]])
    into, out = (1, 0) if not call["transposed"] else (0, 1)
    blocks, own = labels.regrouped([value.axes[1]], [groups, labels.shape(value)[1] // groups])
    if groups > 1:
        labels.keep_apart(value.axes[0], blocks)
    first, second = labels.regrouped([weight.axes[0]], [groups, labels.shape(weight)[0] // groups])
    by_place = {0: second, 1: weight.axes[1]}
    labels.contract(own, by_place[into])
    channels = labels.multiply_axis(blocks, first) + by_place[out]
    channels = labels.add_bias(channels, call["bias"])
    return Labelled((value.axes[0], channels, *(labels.fixed_axis(size) for size in call.shape[2:])))


def spatial(call: Call) -> Result:
    """Pooling, resizing and padding over the last axes, channel by channel."""
    labels, value = call.labels, call.labels.settle(call.source, True)
    n = next((int(name) for name in call.name if name.isdigit()), 0)
    if not n or len(value.axes) <= n:
        return None
    labels.fix_axes(value.axes[-n:])
    kept = value.axes[:-n]
    if "max" in call.name:
        labels.limit([atom for axis in kept for atom in axis])
        kept = labels.unsigned(Labelled(kept)).axes
    result = Labelled((*kept, *(labels.fixed_axis(size) for size in call.shape[-n:])))
    return result if len(call.results) == 1 else (result, None)


def embedding(call: Call) -> Labelled:
    labels, weight = call.labels, call.labels.settle(call["weight"], True)
    labels.fix_axes([weight.axes[0]])
    return Labelled((*call["indices"].axes, weight.axes[1]))


def gated(call: Call) -> Labelled:
    """``glu``: one half of the channels times a function of the other."""
    labels, dim = call.labels, call.dim()
    value, half = labels.settle(call.source, True), call.shape[dim]
    first, second = part(call, value, dim, 0, half), part(call, value, dim, half, 2 * half)
    labels.limit(second.atoms)
    return labels.elementwise([first, labels.unsigned(second)], "product")


def layer_norm(call: Call) -> tuple[Labelled, None, None]:
    labels, value = call.labels, call.labels.settle(call["input"], True)
    n = len(call["normalized_shape"])
    labels.normalise(value.axes[-n:])
    return _scaled(call, value, range(len(value.axes) - n, len(value.axes))), None, None


def rms_norm(call: Call) -> tuple[Labelled, None]:
    labels, value = call.labels, call.labels.settle(call["input"], True)
    n = len(call["normalized_shape"])
    labels.scale([atom for axis in value.axes[-n:] for atom in axis])
    return _scaled(call, value, range(len(value.axes) - n, len(value.axes))), None


def group_norm(call: Call) -> tuple[Labelled, None, None]:
    labels, value = call.labels, call.labels.settle(call["input"], True)
    groups, channels = call["group"], labels.shape(value)[1]
    outer, inner = labels.regrouped([value.axes[1]], [groups, channels // groups])
    labels.keep_apart(value.axes[0], outer)
    labels.normalise([inner])
    labels.scale(outer)
    value = value.with_axes([value.axes[0], outer + inner, *value.axes[2:]])
    return _scaled(call, value, [1]), None, None


def batch_norm(call: Call) -> tuple[Labelled | None, ...]:
    labels, value = call.labels, call.labels.settle(call["input"], True)
    axes = list(value.axes)
    labels.scale(axes[1])
    for name, signed in (("running_mean", True), ("running_var", False)):
        if call[name] is not None:
            axes[1] = labels.multiply_axis(axes[1], labels.unsigned(labels.claim(call[name], signed)).axes[0])
    return (_scaled(call, value.with_axes(axes), [1]), *[None] * (len(call.results) - 1))


def weight_norm(call: Call) -> tuple[Labelled, None]:
    """A direction times a length for each of its rows: each channel brings along its own length."""
    labels, direction = call.labels, call.labels.settle(call["v"], True)
    labels.scale(direction.atoms)
    weight = labels.elementwise([direction, labels.settle(call["g"], False)], "product")
    return replace(weight, tensor=call["v"].tensor), None  # a layer's own weight still, and no result of the network


def _scaled(call: Call, value: Labelled, dims: Sequence[int]) -> Labelled:
    """Multiply by a weight and add a bias, which lie along some axes."""
    kinds: tuple[tuple[str, Combination], ...] = (("weight", "product"), ("bias", "sum"))
    for name, kind in kinds:
        if call[name] is None:
            continue
        parameter = call.labels.settle(call[name], kind == "sum")
        placed = dict(zip(dims, parameter.axes, strict=True))
        own = Labelled(tuple(placed.get(k, ()) for k in range(len(value.axes))))
        value = call.labels.elementwise([value, own], kind)
    return value


#: By name of the operation in torch's library of tensor operations (aten).
RULES: dict[str, Rule] = {
    **MOVEMENTS,
    **dict.fromkeys(("where", "masked_fill"), where),
    **dict.fromkeys(("copy", "fill"), overwritten),
    **dict.fromkeys(("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones",
                     "new_full", "scalar_tensor", "empty", "empty_like", "new_empty"), uniform),
    **dict.fromkeys(("arange", "rand", "randn", "eye", "linspace", "rand_like", "randn_like"), constant),
    **dict.fromkeys(("sum", "mean", "amax", "amin", "prod", "logsumexp", "any", "all", "var", "std", "var_mean",
                     "linalg_vector_norm", "norm", *_ORDERED), reduction),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax"), softmax),
    **dict.fromkeys(("cumsum", "cumprod", "logcumsumexp"), cumulative),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot"), product),
    **dict.fromkeys(("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu",
                     "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
                     "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math",
                     "_scaled_dot_product_fused_attention_overrideable"), attention),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices",
                     "avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d",
                     "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
                     "adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d",
                     "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d",
                     "upsample_bicubic2d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
                     "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
                     "replication_pad2d", "replication_pad3d"), spatial),
    **dict.fromkeys(("_native_batch_norm_legit_no_training", "native_batch_norm", "_native_batch_norm_legit",
                     "cudnn_batch_norm", "batch_norm", "_batch_norm_no_update", "miopen_batch_norm",
                     "_batch_norm_impl_index"), batch_norm),
    **dict.fromkeys(("rms_norm", "_fused_rms_norm"), rms_norm),
    **dict.fromkeys(("_weight_norm_interface", "_weight_norm"), weight_norm),
    "native_layer_norm": layer_norm, "native_group_norm": group_norm, "convolution": convolution,
    "embedding": embedding, "glu": gated,
}  # fmt: skip

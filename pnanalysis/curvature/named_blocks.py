"""The parameters of a network divided into blocks: layers, tensors, queries, keys and values, heads, experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from pnanalysis.curvature.blocks import Block, block_of
from pnanalysis.curvature.parameters import Selection, select_unwrapped
from pnanalysis.errors import CurvatureError
from pnanalysis.inputs.copies import unwrapped
from pnanalysis.inputs.models import parameter_layers

#: What the option ``blocks`` may be called.
DIVISIONS = ("layers", "tensors", "qkv", "heads", "experts")
#: Blocks that a network is divided into: a name of :data:`DIVISIONS`, selections, or selections by label.
Blocks = str | Sequence[str] | Mapping[str, Any]

_FUSED = ("c_attn", "in_proj_weight", "in_proj_bias", "qkv")
_APART = {
    "q": ("q_proj", "q_proj_weight", "query", "q_lin", "wq"),
    "k": ("k_proj", "k_proj_weight", "key", "k_lin", "wk"),
    "v": ("v_proj", "v_proj_weight", "value", "v_lin", "wv"),
}
_OUTPUT = ("c_proj", "o_proj", "out_proj", "proj", "out_lin", "wo")
_HEADS = ("num_heads", "n_heads", "n_head", "num_attention_heads")
_KEY_HEADS = ("num_key_value_heads", "n_kv_heads")
_EXPERT = re.compile(r"(?P<label>.*\bexperts\.\d+)\b.*")


def blocks_of(model: nn.Module, blocks: Blocks = "layers", params: Selection = None) -> dict[str, list[str]]:
    """Names of parameters, or of parts of them, by the label of the block that they belong to.

    Parameters
    ----------
    model : Module
    blocks : str, sequence of str, or mapping of str to selection
        ``"layers"``; ``"tensors"``, every parameter by itself; ``"qkv"``, layers, but queries, keys and values apart
        where a layer computes them together; ``"heads"``, layers, but of attention every head, with its queries, keys,
        values and its inputs of the output layer; ``"experts"``, every expert of a mixture, and layers of the rest. Or
        selections as of :func:`pnanalysis.curvature.parameters.select_parameters`, each a block, under labels of their
        own where they come in a mapping; what none of them selects stays fixed.
    params : optional
        Parameters that are divided; all trainable ones by default.

    Raises
    ------
    CurvatureError
        If a division is not known, there is nothing of its kind in the network, or two blocks overlap.
    """
    if isinstance(blocks, str) and blocks not in DIVISIONS:
        raise CurvatureError(
            f"blocks is {blocks!r}; choose one of {', '.join(DIVISIONS)}, or give a list of layers or patterns"
        )
    if isinstance(blocks, str):
        return _divided(unwrapped(model), blocks, select_unwrapped(model, params))
    if params is not None:
        raise CurvatureError("blocks that are named one by one leave no choice of params; leave params out")
    chosen = dict(blocks) if isinstance(blocks, Mapping) else {str(one): one for one in blocks}
    found = {str(label): [_name(one) for one in select_unwrapped(model, chosen[label])] for label in chosen}
    if not found:
        raise CurvatureError("no blocks are named")
    seen: dict[str, str] = {}
    for label, names in found.items():
        for name in names:
            if name in seen:
                raise CurvatureError(f"{name!r} is in the blocks {seen[name]!r} and {label!r}; blocks may not overlap")
            seen[name] = label
    return found


def fused_layers(model: nn.Module) -> dict[str, list[str]]:
    """The parameters of each layer that computes queries, keys and values together, as far as its name says."""
    found: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        if _is_fused(model, name):
            found.setdefault(_layer_label(name), []).append(name)
    return found


def _divided(model: nn.Module, division: str, selected: Sequence[str | Block]) -> dict[str, list[str]]:
    layer_of = {name: layer for layer, own in parameter_layers(model) for name, _ in own}
    divide = {"qkv": _queries, "heads": _heads, "experts": _experts}.get(division)
    split = {} if divide is None else dict(divide(model))
    found: dict[str, list[str]] = {}
    for one in selected:
        whole = one.parameter if isinstance(one, Block) else one
        if isinstance(one, str) and one in split:
            for label, name in split[one]:
                found.setdefault(label, []).append(name)
        else:
            label = _name(one) if division == "tensors" else layer_of.get(whole, whole)
            found.setdefault(label, []).append(_name(one))
    if divide is not None and not split:
        raise CurvatureError(
            f"the network has no {division} that are known by name; give blocks as a list, such as "
            "['layer[0:64]', 'layer[64:128]'], or by layers"
        )
    return found


#: By parameter, its parts with the labels of their blocks.
Parts = Iterator[tuple[str, list[tuple[str, str]]]]


def _queries(model: nn.Module) -> Parts:
    """Queries, keys and values of layers that compute them together."""
    for name, _ in model.named_parameters():
        if _is_fused(model, name):
            layer = _layer_label(name)
            yield name, [(f"{layer}[{part}]", _part(model, name, f"[{part}]")) for part in "qkv"]
            continue
        layer, _, own = name.rpartition(".")
        if own in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):  # their bias is fused
            yield name, [(f"{_layer_label(f'{layer}.in_proj_bias')}[{own[0]}]", name)]


def _heads(model: nn.Module) -> Parts:
    """Heads of attention: queries, keys, values, and inputs of the output layer."""
    for path, module in model.named_modules():
        children = {name.partition(".")[0] for name, _ in module.named_parameters()}
        fused = children & set(_FUSED)
        apart = {part: children & set(names) for part, names in _APART.items()}
        if not fused and not all(apart.values()):
            continue
        n, n_keys = _number(module, _HEADS), _number(module, _KEY_HEADS)
        if n is None:
            continue
        n_keys = n_keys or n
        for name, _ in module.named_parameters(prefix=path):
            child = name.removeprefix(f"{path}.").partition(".")[0] if path else name.partition(".")[0]
            own = _parts_of_child(model, name, child, n, n_keys)
            if own is not None:
                yield name, [(f"{path or 'attention'}[{label}]", part) for label, part in own]


def _parts_of_child(
    model: nn.Module, name: str, child: str, n: int, n_keys: int
) -> list[tuple[str, str]] | None:  # fmt: skip
    """The parts of one parameter of an attention with ``n`` heads; ``None`` where it is not divided."""
    if child in _FUSED and _is_fused(model, name):
        return [(f"{i}/{n}", _part(model, name, f"[{part}.{i}/{n}]")) for part in "qkv" for i in range(n)]
    which = next((part for part, names in _APART.items() if child in names), None)
    if which == "q" or (which is not None and n_keys == n):
        return [(f"{i}/{n}", _part(model, name, f"[{i}/{n}]")) for i in range(n)]
    if which is not None:  # several heads share a key
        return [(f"kv.{i}/{n_keys}", _part(model, name, f"[{i}/{n_keys}]")) for i in range(n_keys)]
    if child in _OUTPUT and model.get_parameter(name).ndim == 2:
        return [(f"{i}/{n}", _part(model, name, f"[in.{i}/{n}]")) for i in range(n)]
    return None


def _experts(model: nn.Module) -> Parts:
    """Experts that are modules in a list, or lie along the first dim of a parameter."""
    for name, parameter in model.named_parameters():
        found = _EXPERT.fullmatch(name)
        if found is not None:
            yield name, [(found["label"], name)]
        elif "experts" in name.split(".") and parameter.ndim == 3:
            n = len(parameter)
            label = name[: name.index("experts") + len("experts")]
            yield name, [(f"{label}[{i}/{n}]", _part(model, name, f"[{i}/{n}]")) for i in range(n)]


def _is_fused(model: nn.Module, name: str) -> bool:
    """Whether a parameter holds queries, keys and values one after the other."""
    layer, _, own = name.rpartition(".")
    if own not in _FUSED and layer.rpartition(".")[2] not in _FUSED:
        return False
    try:
        return block_of(model, name, "[q]") is not None
    except CurvatureError:
        return False


def _layer_label(name: str) -> str:
    layer, _, own = name.rpartition(".")
    return f"{layer}.in_proj" if own.startswith("in_proj") else layer


def _part(model: nn.Module, name: str, part: str) -> str:
    block = block_of(model, name, part)
    return name if block is None else block.label


def _number(module: nn.Module, names: Sequence[str]) -> int | None:
    """A number of heads that a module, or its configuration, has under one of some names."""
    look: Callable[[Any], list[Any]] = lambda owner: [getattr(owner, name, None) for name in names]  # noqa: E731
    numbers = [*look(module), *look(getattr(module, "config", None))]
    return next((one for one in numbers if isinstance(one, int) and one > 0), None)


def _name(one: str | Block) -> str:
    return one.label if isinstance(one, Block) else one


__all__ = ["DIVISIONS", "Blocks", "blocks_of", "fused_layers"]

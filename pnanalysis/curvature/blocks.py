"""Parts of parameters: queries, keys, values, heads, experts, or any range along one dim.

A part is written behind a layer or parameter, in brackets: ``attn.c_attn[q]``, ``attn.c_attn[q.3/12]``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from pnanalysis.errors import CurvatureError

_PIECE = r"(?:[qkv]|\d+/\d+|\d+:\d+)"
_SELECTION = re.compile(rf"(?P<name>.+)\[(?P<inner>in\.)?(?P<pieces>{_PIECE}(?:\.{_PIECE})*)\]")
#: Where attention, or its configuration, says how many heads its queries, and its keys and values, have.
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv")
#: Layers that compute queries, keys and values together, one after the other.
_OF_TORCH = ("in_proj_weight", "in_proj_bias")
_FUSED = ("c_attn", "qkv", *_OF_TORCH)


class Block(NamedTuple):
    """The entries from ``start`` to ``stop`` along one dim of a parameter."""

    parameter: str
    dim: int
    start: int
    stop: int
    label: str

    def renamed(self, parameter: str) -> Block:
        """The same part of a parameter by another name."""
        return self._replace(parameter=parameter, label=parameter + self.label[len(self.parameter) :])

    def of(self, tensor: Tensor) -> Tensor:
        """The part of the tensor, as one of its own."""
        return tensor.narrow(self.dim, self.start, self.stop - self.start).clone()


def split_selection(wanted: str) -> tuple[str, str]:
    """The name that is selected, and the part of it in brackets; empty where there is none."""
    found = _SELECTION.fullmatch(wanted)
    return (found["name"], wanted[len(found["name"]) :]) if found else (wanted, "")


def block_of(model: nn.Module, parameter: str, part: str) -> Block | None:
    """The part of a parameter, given in brackets; ``None`` for a bias where the part is one of the inputs.

    Raises
    ------
    CurvatureError
        If the parameter has no such part.
    """
    found = _SELECTION.fullmatch(f"{parameter}{part}")
    if found is None:
        raise CurvatureError(f"{part!r} is no part of a parameter; write [q], [q.3/12], [in.3/12] or [0:64]")
    tensor, inner = model.get_parameter(parameter), bool(found["inner"])
    if tensor.is_complex():
        raise CurvatureError(f"{parameter!r} is complex; of complex parameters no parts can be chosen")
    if tensor.ndim < 1 + inner:
        if inner:
            return None
        raise CurvatureError(f"{parameter!r} is a single number, which has no parts")
    dim = _output_dim(model, parameter, tensor)
    dim = dim if not inner else 1 - dim
    start, stop = 0, tensor.shape[dim]
    for piece in found["pieces"].split("."):
        if piece in "qkv":
            _check_fused(model, parameter, stop - start, inner)
        start, stop = _narrowed(piece, start, stop, parameter)
    return Block(parameter, dim, start, stop, f"{parameter}[{'in.' if inner else ''}{start}:{stop}]")


def check_disjoint(blocks: list[Block], whole: set[str]) -> None:
    """Refuse parts that overlap each other, or a parameter that is chosen as a whole.

    Raises
    ------
    CurvatureError
    """
    for i, block in enumerate(blocks):
        if block.parameter in whole:
            raise CurvatureError(f"{block.label!r} is a part of {block.parameter!r}, which is chosen too; drop one")
        for other in blocks[:i]:
            if other.parameter == block.parameter and (
                other.dim != block.dim or max(other.start, block.start) < min(other.stop, block.stop)
            ):
                raise CurvatureError(f"{other.label!r} and {block.label!r} overlap; drop one")


def assembled(state: Mapping[str, Tensor], blocks: Mapping[str, Block]) -> dict[str, Tensor]:
    """The network's state, in which parts that are given by their labels take their places in their parameters."""
    whole = dict(state)
    for label, block in blocks.items():
        part = whole.pop(label)
        whole[block.parameter] = whole[block.parameter].slice_scatter(part, block.dim, block.start, block.stop)
    return whole


def _output_dim(model: nn.Module, parameter: str, tensor: Tensor) -> int:
    """The dim of outputs: the first, but for the transposed weights of ``Conv1D`` in transformers."""
    owner = model.get_submodule(parameter.rpartition(".")[0])
    return 1 if type(owner).__name__ == "Conv1D" and tensor.ndim == 2 else 0


def _narrowed(piece: str, start: int, stop: int, parameter: str) -> tuple[int, int]:
    """The part of a range that one piece of a selection means."""
    size = stop - start
    if piece in "qkv":
        index, n = "qkv".index(piece), 3
    elif ":" in piece:
        low, high = map(int, piece.split(":"))
        if not low < high <= size:
            raise CurvatureError(f"{parameter!r} has {size} entries there, of which {piece} is no range")
        return start + low, start + high
    else:
        index, n = map(int, piece.split("/"))
        if not index < n or size % n:
            raise CurvatureError(
                f"{parameter!r} has {size} entries there, which {piece} does not divide; write INDEX/NUMBER with an "
                "index from 0 on, or a range such as 0:64"
            )
    return start + index * size // n, start + (index + 1) * size // n


def _check_fused(model: nn.Module, parameter: str, size: int, inner: bool) -> None:
    """Refuse to look for queries, keys and values where they do not lie one after the other.

    Raises
    ------
    CurvatureError
    """
    layer, _, own = parameter.rpartition(".")
    around, _, name = layer.rpartition(".")
    owner = model.get_submodule(around)
    # with an attribute multi_query, GPT-BigCode's c_attn has them in turn for every head; beside q_attn, in GPT-2's
    # cross-attention, c_attn has keys and values alone
    other = hasattr(owner, "multi_query") or hasattr(owner, "q_attn")
    other |= bool(getattr(owner, "head_first", False))  # of timm: queries, keys and values of a head lie together
    if own not in _OF_TORCH:  # whose three parts are always equal
        other |= _shares_keys(owner) or not _in_three(model.get_submodule(layer))
    if (name not in _FUSED and own not in _FUSED) or inner or size % 3 or other:
        raise CurvatureError(
            f"{parameter!r} is not known to hold queries, keys and values one after the other; give a range such as "
            "[0:64], or where these are layers of their own, their names"
        )


def _shares_keys(attention: nn.Module) -> bool:
    """Whether a layer of attention, or its configuration, says that several queries share a key."""
    around = attention, getattr(attention, "config", None)
    n_queries, n_keys = (
        {count for one in around for name in names if isinstance(count := getattr(one, name, None), int)}
        for names in (_HEADS, _KEY_HEADS)
    )
    return bool(n_keys - n_queries)


def _in_three(layer: nn.Module) -> bool:
    """Whether a layer has three outputs for each input: three of another size may just add up to such a number."""
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and max(weight.shape) == 3 * min(weight.shape)

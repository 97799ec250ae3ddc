"""Take out of a traced graph what costs a pass over memory and changes nothing."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
_ALIASES = {_aten.alias.default, _aten.detach.default, _aten.lift_fresh.default}
_ZEROS = {_aten.zeros.default, _aten.zeros_like.default}

Node = Any  # an fx.Node whose arguments are known from its target


def simplify(graph: fx.Graph) -> None:
    """Remove aliases, copies to the type and layout a tensor already has, and sums with zero.

    The graph must come from ``make_fx``: each node knows its value's shape, type and layout.
    """
    for node in list(graph.nodes):
        if node.target in _ALIASES:
            _replace(node, node.args[0])
        elif node.target == _aten._efficientzerotensor.default:
            node.target = _aten.zeros.default
        elif node.target == _aten._new_zeros_with_same_feature_meta.default and _is_overwritten(node):
            shape, stride, *_ = _layout(node)
            node.target, node.args = _aten.new_empty_strided.default, (node.args[0], list(shape), list(stride))
    written = _written(graph)
    for node in list(graph.nodes):
        same = _same(node, written)
        if same is not None and not {node, same} & written and _layout(same) == _layout(node):
            _replace(node, same)
    graph.eliminate_dead_code(lambda node: is_mutated(node) or node.op in ("placeholder", "output"))


def is_mutated(node: Node) -> bool:
    """Whether the node writes into its first argument."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _same(node: Node, written: set[Node]) -> Node | None:
    """An earlier node with the same values, if there is one."""
    if node.target == _aten._to_copy.default:
        return node.args[0]
    if node.target == _aten.copy_.default and node.args[0].target == _aten.new_empty_strided.default:
        return node.args[1] if _is_overwritten(node.args[0]) else None
    if node.target == _aten.add.Tensor and not node.kwargs:
        for kept, other in (node.args, node.args[::-1]):
            if not (isinstance(kept, fx.Node) and isinstance(other, fx.Node)):
                continue
            if other.target in _ZEROS and other not in written:
                return kept
    return None


def _is_overwritten(node: Node) -> bool:
    """Whether a fresh tensor is used for nothing but a copy into it."""
    users = list(node.users)
    return len(users) == 1 and users[0].target == _aten.copy_.default and users[0].args[0] is node and not node.kwargs


def _layout(node: Node) -> Any:
    value = node.meta.get("val")
    return (value.shape, value.stride(), value.dtype, value.device) if isinstance(value, Tensor) else None


def _written(graph: fx.Graph) -> set[Node]:
    """All nodes whose memory a later node writes into, directly or through a view."""
    written = set()
    for node in graph.nodes:
        target: Node = node.args[0] if is_mutated(node) else None
        while isinstance(target, fx.Node):
            written.add(target)
            target = target.args[0] if is_mutated(target) or _is_view(target) else None
    return written


def _is_view(node: Node) -> bool:
    if node.target is operator.getitem:
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(node.args) and any(value.alias_info is not None for value in schema.returns)


def _replace(node: Node, by: Any) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)

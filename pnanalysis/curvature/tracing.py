"""Products with a fixed linear map, many at a time: trace once, keep what does not depend on the vector.

A product such as ``v -> H v`` is a function of parameters, a batch and ``v`` that is linear in ``v``. It is traced
once, on shapes alone, into a graph of tensor operations; the nodes that ``v`` does not reach (forward and backward
pass of the loss) form one program, run once a batch, and the others a second one, run once a vector on what the first
left. For a convolutional Hessian that leaves six convolutions a layer and product, where repeating both passes
takes nine.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from pnanalysis.torch_internals import (
    CONVERSION,
    ZEROS_FOR_TANGENT,
    ZEROS_WITHOUT_MEMORY,
    FakeTensorMode,
    TreeSpec,
    make_fx,
    returns_view,
    tree_flatten,
    tree_map_only,
    tree_unflatten,
    writes_into_argument,
)

Product = Callable[[Sequence[Tensor]], list[Tensor]]


class Untraceable(Exception):
    """The function looks at values and cannot be traced, or its graph cannot be split; use another way."""


class Linearisation:
    """``function(fixed, v)``, linear in the list of tensors ``v``, as two programs.

    Parameters
    ----------
    function : callable
        ``function(fixed, v)``: ``fixed`` any nest of tensors, ``v`` a list of tensors; returns a list of tensors.
    rehearsal : callable
        ``rehearsal(fixed)`` runs the same user code without any transform of functions. It is tried first, on tensors
        without values: torch does not recover from a trace that fails inside a transform.
    """

    def __init__(
        self, function: Callable[[Any, list[Tensor]], list[Tensor]], rehearsal: Callable[[Any], object]
    ) -> None:
        self.function = function
        self.rehearsal = rehearsal
        self._programs: dict[Any, tuple[fx.GraphModule, fx.GraphModule]] = {}

    def at(self, fixed: Any, like: Sequence[Tensor]) -> tuple[Product, int]:
        """Run the first program at ``fixed``.

        Parameters
        ----------
        fixed : nest of tensors
        like : sequence of Tensor
            What ``v`` will look like.

        Returns
        -------
        (callable, int)
            ``v -> function(fixed, v)``, and the bytes it keeps alive.

        Raises
        ------
        Untraceable
        """
        leaves, spec = tree_flatten(fixed)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = (spec, *((tuple(t.shape), t.stride(), t.dtype, t.device) if isinstance(t, Tensor) else t for t in leaves))
        if key not in self._programs:
            self._programs[key] = self._trace(leaves, spec, like)
        first, second = self._programs[key]
        with torch.no_grad():
            kept: tuple[Any, ...] = first(*tensors)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept if isinstance(t, Tensor)}

        def product(v: Sequence[Tensor]) -> list[Tensor]:
            with torch.no_grad():
                return cast("list[Tensor]", list(second(*kept, *v)))

        return product, sum(storages.values())

    def _trace(
        self, leaves: list[Any], spec: TreeSpec, like: Sequence[Tensor]
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

        def flat(*arguments: Tensor) -> list[Tensor]:
            given = iter(arguments)
            fixed = tree_unflatten([next(given) if isinstance(t, Tensor) else t for t in leaves], spec)
            return self.function(fixed, list(given))

        rehearse(self.rehearsal, tree_unflatten(leaves, spec))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch's own use of torch.jit.script
                traced = make_fx(flat, tracing_mode="fake")(*tensors, *like)
        except Exception as error:  # whatever a user's model may raise while it is traced
            raise Untraceable(f"{type(error).__name__}: {error}") from error
        simplify(traced.graph)
        return _split(traced, len(tensors))


def rehearse(function: Callable[[Any], object], fixed: Any) -> None:
    """Call ``function(fixed)`` on tensors without values, in no time.

    Raises
    ------
    Untraceable
        If that fails.
    """
    try:
        with FakeTensorMode() as mode:
            function(tree_map_only(Tensor, mode.from_tensor, fixed))
    except Exception as error:  # whatever a user's model may raise on tensors without values
        raise Untraceable(f"{type(error).__name__}: {error}") from error


def _split(traced: fx.GraphModule, n_fixed: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The program of all nodes that the vector does not reach, and that of the others."""
    nodes = list(traced.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    (output,) = (node for node in nodes if node.op == "output")
    reached = set(inputs[n_fixed:])
    for node in nodes:
        if node.op != "output" and any(source in reached for source in node.all_input_nodes):
            reached.add(node)
            if is_mutated(node) and node.args[0] not in reached:
                raise Untraceable(f"{node.target} writes into a value that all products share")
    wanted = {*_inputs_of(nodes, reached), *(n for n in output.all_input_nodes if n not in reached)}
    kept = [node for node in nodes if node in wanted]
    first = _program(traced, [n for n in nodes if n not in reached and n is not output], inputs[:n_fixed], kept)
    body = [node for node in nodes if node in reached and node.op != "placeholder"]
    second = _program(traced, body, [*kept, *inputs[n_fixed:]], output.args[0])
    return first, second


def _inputs_of(nodes: Iterable[fx.Node], reached: set[fx.Node]) -> Iterable[fx.Node]:
    for node in nodes:
        if node in reached:
            yield from (source for source in node.all_input_nodes if source not in reached)


def _program(root: fx.GraphModule, body: list[fx.Node], inputs: list[fx.Node], outputs: Any) -> fx.GraphModule:
    graph = fx.Graph()
    copies = {node: graph.placeholder(f"in_{i}") for i, node in enumerate(inputs)}
    for node in body:
        if node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(fx.map_arg(outputs if isinstance(outputs, tuple | list) else [outputs], copies.__getitem__))
    graph.eliminate_dead_code(lambda node: is_mutated(node) or node.op in ("placeholder", "output"))
    return fx.GraphModule(root, graph)


__all__ = ["Linearisation", "Product", "Untraceable", "rehearse"]


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
        elif node.target == ZEROS_WITHOUT_MEMORY:
            node.target = _aten.zeros.default
        elif node.target == ZEROS_FOR_TANGENT and _is_overwritten(node):
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
    return writes_into_argument(node.target)


def _same(node: Node, written: set[Node]) -> Node | None:
    """An earlier node with the same values, if there is one."""
    if node.target == CONVERSION:
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
    return bool(node.args) and returns_view(node.target)


def _replace(node: Node, by: Any) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)

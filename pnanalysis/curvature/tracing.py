"""Products of a fixed linear map with many vectors: trace once, and compute once what does not depend on the vector.

A product such as ``v -> H v`` is a function of parameters, a batch and ``v`` that is linear in ``v``. It is traced
once, on shapes alone, into a graph of tensor operations. The nodes that do not depend on ``v`` (forward and backward
pass of the loss) form a first program, run once per batch; the others form a second one, run once per vector on the
results of the first. For the Hessian of a convolutional network that leaves six convolutions per layer and product;
repeating both passes for every product takes nine.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pnanalysis.curvature.programs import Program, SecondProgram
from pnanalysis.inputs.hugging_face import masks_without_values
from pnanalysis.torch_internals import (
    CONVERSION,
    UNSAFE_VIEW,
    ZEROS_FOR_TANGENT,
    ZEROS_WITHOUT_MEMORY,
    FakeTensorMode,
    TreeSpec,
    in_own_thread,
    make_fx,
    returns_view,
    tree_flatten,
    tree_map_only,
    tree_unflatten,
    writes_into_argument,
)

Product = Callable[[Sequence[Tensor]], list[Tensor]]
#: A node of a traced graph. Untyped: what its arguments are follows from its target.
Node = Any

_aten = torch.ops.aten
_ALIASES = {_aten.alias.default, _aten.detach.default, _aten.lift_fresh.default}
_RESHAPES = {_aten.expand.default, _aten.view.default, UNSAFE_VIEW}
_COMMUTATIVE = {_aten.add.Tensor, _aten.mul.Tensor}
_ZEROS = {_aten.zeros.default, _aten.zeros_like.default}


class Untraceable(Exception):
    """The function depends on values and cannot be traced, or its graph cannot be split; use another way."""


class Linearisation:
    """``function(fixed, v)``, linear in the list of tensors ``v``, as two programs.

    Parameters
    ----------
    function : callable
        ``function(fixed, v)``: ``fixed`` any nest of tensors, ``v`` a list of tensors; returns a list of tensors.
    rehearsal : callable
        ``rehearsal(fixed)`` runs the same user code without torch.func's transforms.
    compile : bool
        Whether ``torch.compile`` compiles the second program.
    """

    def __init__(
        self,
        function: Callable[[Any, list[Tensor]], list[Tensor]],
        rehearsal: Callable[[Any], object],
        compile: bool = False,
    ) -> None:
        self.function = function
        self.rehearsal = rehearsal
        self.compile = compile
        self._programs: dict[Any, tuple[fx.GraphModule, SecondProgram]] = {}

    def at(self, fixed: Any, like: Sequence[Tensor]) -> tuple[Program, int]:
        """Run the first program at ``fixed``.

        Parameters
        ----------
        fixed : nest of tensors
        like : sequence of Tensor
            Tensors in the shapes and layouts that ``v`` will have.

        Returns
        -------
        product : Program
            ``v -> function(fixed, v)``.
        n_bytes : int
            Memory that ``product`` keeps alive.

        Raises
        ------
        Untraceable
        """
        leaves, spec = tree_flatten(fixed)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        # a trace holds for one set of shapes, layouts and types, and has all other leaves built in
        key = (spec, *((tuple(t.shape), t.stride(), t.dtype, t.device) if isinstance(t, Tensor) else t for t in leaves))
        if key not in self._programs:
            self._programs[key] = self._trace(leaves, spec, like)
        first, second = self._programs[key]
        with torch.no_grad():
            kept: tuple[Any, ...] = first(*tensors)
        # several results may be views of one storage: count each storage once
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept if isinstance(t, Tensor)}
        return Program(second, kept), sum(storages.values())

    def _trace(self, leaves: list[Any], spec: TreeSpec, like: Sequence[Tensor]) -> tuple[fx.GraphModule, SecondProgram]:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

        def function_of_tensors(*arguments: Tensor) -> list[Tensor]:
            given = iter(arguments)
            fixed = tree_unflatten([next(given) if isinstance(t, Tensor) else t for t in leaves], spec)
            return self.function(fixed, list(given))

        # code that cannot be traced is mostly found out here, sooner and without a transform
        rehearse(self.rehearsal, tree_unflatten(leaves, spec))
        try:
            with warnings.catch_warnings(), masks_without_values():
                warnings.simplefilter("ignore", FutureWarning)  # torch's own use of torch.jit.script
                traced = in_own_thread(make_fx(function_of_tensors, tracing_mode="fake"), *tensors, *like)
        except Exception as error:  # a user's model may raise anything while it is traced
            raise Untraceable(f"{type(error).__name__}: {error}") from error
        simplify(traced.graph)
        first, second = _split(traced, len(tensors))
        return first, SecondProgram(second, self.compile)


def rehearse(function: Callable[[Any], object], fixed: Any) -> None:
    """Call ``function(fixed)`` on tensors without values, at nearly no cost.

    Raises
    ------
    Untraceable
        If the call fails.
    """
    if FakeTensorMode is None:
        raise Untraceable("this version of torch has no fake tensors where they are looked for")
    try:
        with FakeTensorMode() as mode, masks_without_values():
            function(tree_map_only(Tensor, mode.from_tensor, fixed))
    except Exception as error:  # a user's model may raise anything on tensors without values
        raise Untraceable(f"{type(error).__name__}: {error}") from error


# -- splitting a graph ------------------------------------------------------------------------------------------


def _split(traced: fx.GraphModule, n_fixed: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The program of all nodes that do not depend on the vector, and that of the others."""
    nodes = list(traced.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    (output,) = (node for node in nodes if node.op == "output")
    dependent = set(inputs[n_fixed:])
    for node in nodes:
        if node.op != "output" and any(source in dependent for source in node.all_input_nodes):
            dependent.add(node)
            # the results of the first program serve every vector, so the second must not change them
            if is_mutated(node) and node.args[0] not in dependent:
                raise Untraceable(f"{node.target} writes into a value that all products share")
    wanted = {*_outside_inputs(nodes, dependent), *(n for n in output.all_input_nodes if n not in dependent)}
    kept = [node for node in nodes if node in wanted]
    first = _program(traced, [n for n in nodes if n not in dependent and n is not output], inputs[:n_fixed], kept)
    body = [node for node in nodes if node in dependent and node.op != "placeholder"]
    second = _program(traced, body, [*kept, *inputs[n_fixed:]], output.args[0])
    return first, second


def _outside_inputs(nodes: Iterable[fx.Node], inside: set[fx.Node]) -> Iterable[fx.Node]:
    """Nodes outside a set that nodes of the set take as arguments."""
    for node in nodes:
        if node in inside:
            yield from (source for source in node.all_input_nodes if source not in inside)


def _program(root: fx.GraphModule, body: list[fx.Node], inputs: list[fx.Node], outputs: Any) -> fx.GraphModule:
    """A module that computes ``outputs`` from ``inputs`` by the nodes of ``body``."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(f"in_{i}") for i, node in enumerate(inputs)}
    for node in body:
        if node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(fx.map_arg(outputs if isinstance(outputs, tuple | list) else [outputs], copies.__getitem__))
    graph.eliminate_dead_code(_has_effect)
    return fx.GraphModule(root, graph)


# -- simplifying a graph ----------------------------------------------------------------------------------------


def simplify(graph: fx.Graph) -> None:
    """Remove aliases, copies to the type and layout a tensor already has, sums with zero, and what is computed twice.

    Tangents of forward-mode differentiation bring many of these along. The graph must come from ``make_fx``, whose
    nodes know the shape, type and layout of their values.
    """
    for node in list(graph.nodes):
        if node.target in _ALIASES:
            _replace(node, node.args[0])
        elif node.target == ZEROS_WITHOUT_MEMORY:  # an optimisation of autograd's; outside, ordinary zeros do the same
            node.target = _aten.zeros.default
        elif node.target == ZEROS_FOR_TANGENT and _is_overwritten(node):  # no need to fill it first
            shape, stride = node.meta["val"].shape, node.meta["val"].stride()
            node.target, node.args = _aten.new_empty_strided.default, (node.args[0], list(shape), list(stride))
    graph.eliminate_dead_code(_has_effect)
    for node in graph.nodes:
        if is_mutated(node) and _is_new(node.args[0]) and _layout(node.args[0]) == _layout(node):
            node.target = _out_of_place(node.target)
    written = _written(graph)
    for node in list(graph.nodes):
        same = _same_values(node, written)
        # a node that is written into later must stay apart from the one it equals now
        if same is not None and not {node, same} & written and (_layout(same) == _layout(node) or _overlaps(node)):
            _replace(node, same)
    _merge_equal(graph, written)
    graph.eliminate_dead_code(_has_effect)


def _merge_equal(graph: fx.Graph, written: set[Node]) -> None:
    """Compute the same thing once: derivatives along one vector, taken twice, have most of their nodes in common."""
    changing, found = set(written), dict[str, Node]()
    for node in list(graph.nodes):
        sources, arguments = node.all_input_nodes, node.args
        if node.target == _aten.copy_.default and _is_overwritten(node.args[0]):  # where to is made for this copy alone
            sources, arguments = sources[1:], arguments[1:]
        elif is_mutated(node) or (_is_view(node) and node.args[0] in changing):
            changing.add(node)
        if node.op != "call_function" or node in changing or changing.intersection(sources):
            continue
        if node.target in _COMMUTATIVE and not node.kwargs:
            arguments = sorted(arguments, key=str)
        key = repr((node.target, arguments, sorted(node.kwargs.items()), _layout(node)))  # names of nodes are unique
        if key in found:
            _replace(node, found[key])
        else:
            found[key] = node


def is_mutated(node: Node) -> bool:
    """Whether the node writes into its first argument."""
    return writes_into_argument(node.target)


def _is_new(node: Node) -> bool:
    """Whether a node's value is a tensor of its own that is used once."""
    return node.op == "call_function" and len(node.users) == 1 and not _is_view(node) and not is_mutated(node)


def _out_of_place(target: Any) -> Any:
    """The operation that gives what another one writes into its first argument; the same one where there is none."""
    name, _, overload = str(target).removeprefix("aten.").partition(".")
    packet = getattr(_aten, name.removesuffix("_"), None) if name.endswith("_") and name != "copy_" else None
    return getattr(packet, overload, target)


def _has_effect(node: Node) -> bool:
    """Whether the node must stay although nothing uses its value."""
    return is_mutated(node) or node.op in ("placeholder", "output")


def _same_values(node: Node, written: set[Node]) -> Node | None:
    """An earlier node with the same values, if there is one."""
    if not (node.args and isinstance(node.args[0], fx.Node)):  # a number may be converted, too
        return None
    if node.target == CONVERSION or (node.target in _RESHAPES and _layout(node.args[0]) == _layout(node)):
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
    """Whether a new tensor is used for nothing but a copy into all of it."""
    users = list(node.users)
    return len(users) == 1 and users[0].target == _aten.copy_.default and users[0].args[0] is node and not node.kwargs


def _layout(node: Node) -> tuple[Any, ...] | None:
    """Shape, strides, type and device of a node's value; ``None`` if it is not a tensor."""
    value = node.meta.get("val")
    return (value.shape, value.stride(), value.dtype, value.device) if isinstance(value, Tensor) else None


def _overlaps(node: Node) -> bool:
    """Whether numbers of a node's value share memory, as those of an expanded tensor: nothing can be copied there."""
    value = node.meta["val"]
    return any(step == 0 and size > 1 for size, step in zip(value.shape, value.stride(), strict=True))


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
    """Whether the node's value may share memory with its first argument (one of several views, for ``getitem``)."""
    return node.target is operator.getitem or (bool(node.args) and returns_view(node.target))


def _replace(node: Node, by: Any) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


__all__ = ["Linearisation", "Product", "Untraceable", "rehearse", "simplify"]

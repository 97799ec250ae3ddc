"""Products with a fixed linear map, many at a time: trace once, keep what does not depend on the vector.

A product such as ``v -> H v`` is a function of parameters, a batch and ``v`` that is linear in ``v``. It is traced
once, on shapes alone, into a graph of tensor operations; the nodes that ``v`` does not reach (forward and backward
pass of the loss) form one program, run once a batch, and the others a second one, run once a vector on what the first
left. For a convolutional Hessian that leaves six convolutions a layer and product, where repeating both passes
takes nine.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from pnanalysis.curvature.simplify import is_mutated, simplify

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
        leaves, spec = pytree.tree_flatten(fixed)
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
        self, leaves: list[Any], spec: pytree.TreeSpec, like: Sequence[Tensor]
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

        def flat(*arguments: Tensor) -> list[Tensor]:
            given = iter(arguments)
            fixed = pytree.tree_unflatten([next(given) if isinstance(t, Tensor) else t for t in leaves], spec)
            return self.function(fixed, list(given))

        rehearse(self.rehearsal, pytree.tree_unflatten(leaves, spec))
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
            function(pytree.tree_map_only(Tensor, mode.from_tensor, fixed))
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

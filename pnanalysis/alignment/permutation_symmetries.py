"""Which channels of a network may be permuted, found by following them through its operations.

The network is run once on tensors without values, and the tensor operations it performs are recorded. Every axis of
every parameter starts as a factor of its own (:mod:`~pnanalysis.alignment.factors`). An operation that combines two
axes element by element, or sums over them, makes their factors one; views and slices refine factors to products and
sums. The channels of outputs and inputs may not be permuted, nor what goes through an operation that is not known
here. It does not matter of which layers a network is made: attention of whatever form, packed or not, comes down to
the same few operations.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from pnanalysis.alignment.calls import Call, Result, labelled_in
from pnanalysis.alignment.channel_groups import ChannelGroup
from pnanalysis.alignment.group_extraction import groups_of
from pnanalysis.alignment.labelled import Labelled, Labels
from pnanalysis.alignment.operation_rules import RULES, pointwise
from pnanalysis.errors import ModelError, reason
from pnanalysis.evaluation.forward import forward
from pnanalysis.inputs.batches import tensors
from pnanalysis.inputs.hugging_face import masks_without_values
from pnanalysis.inputs.models import canonical_names
from pnanalysis.torch_internals import (
    in_own_thread,
    is_elementwise,
    make_fx,
    tree_flatten,
    tree_unflatten,
    writes_into_argument,
)


class Symmetries(NamedTuple):
    """What may be permuted, and where that could not be found out.

    Attributes
    ----------
    groups : list of ChannelGroup
        Outer ones before those inside them.
    unknown : tuple of str
        Operations through which channels could not be followed; channels that enter them are left as they are.
    """

    groups: list[ChannelGroup]
    unknown: tuple[str, ...]


def find_groups(model: nn.Module, inputs: Any) -> list[ChannelGroup]:
    """Groups of hidden channels that may be permuted without changing the network's function.

    See :func:`find_symmetries`.
    """
    return find_symmetries(model, inputs).groups


def find_symmetries(model: nn.Module, inputs: Any) -> Symmetries:
    """Groups of hidden channels that may be permuted without changing the network's function.

    Parameters
    ----------
    model : Module
        In eval mode.
    inputs : Tensor, or mapping or tuple of tensors
        A few examples, which the network is run on.

    Returns
    -------
    Symmetries

    Raises
    ------
    ModelError
        If the network's operations cannot be recorded, or no channels may be permuted.
    """
    traced, names = _trace(model, inputs)
    aliases: dict[str, list[str]] = {}
    for name, first in canonical_names(model).items():
        aliases.setdefault(first, []).append(name)
    labels = Labels({name for name, _ in model.named_buffers()})
    followed = _follow(traced, names, labels)
    groups = groups_of(labels, followed.values, aliases)
    if not groups:
        through = f": they go through {', '.join(followed.unknown)}" if followed.unknown else ""
        raise ModelError(
            f"{type(model).__name__} cannot be aligned: it has no hidden channels that may be permuted{through}; "
            "compare it unaligned"
        )
    return Symmetries(groups, followed.unknown)


def _trace(model: nn.Module, inputs: Any) -> tuple[fx.Graph, list[str]]:
    """The operations of a forward pass, and the names of the tensors that are its first arguments."""
    state = {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}
    leaves, spec = tree_flatten(inputs)
    given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def run(*arguments: Tensor) -> list[Tensor]:
        own = dict(zip(state, arguments, strict=False))
        rest = iter(arguments[len(state) :])
        nest = tree_unflatten([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        found = list(tensors_in_output(forward(model, nest, own)))
        if not found:
            raise ModelError("it returns no tensors")
        return found

    def record(function: Callable[..., Any]) -> fx.Graph:
        with torch.no_grad(), warnings.catch_warnings(), masks_without_values():
            warnings.simplefilter("ignore")
            traced = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*state.values(), *given)
        return traced.graph

    def record_without_writes() -> fx.Graph:
        graph = record(run)
        if any(writes_into_argument(node.target) for node in graph.nodes):
            # What is written in place shows in every view of it: have it recorded as new tensors.
            return record(torch.func.functionalize(run, remove="mutations"))
        return graph

    try:
        return in_own_thread(record_without_writes), list(state)
    except Exception as error:  # a user's forward may raise anything on tensors without values
        raise ModelError(
            f"{type(model).__name__} cannot be aligned: its operations cannot be recorded ({reason(error)}); "
            "write its forward without branches on data"
        ) from error


def tensors_in_output(outputs: Any) -> list[Tensor]:
    """All tensors that a network returns, in whatever it returns them."""
    found = list(tensors(outputs))
    if not found and hasattr(outputs, "__dict__"):
        found = list(tensors(list(vars(outputs).values())))
    return [tensor for tensor in found if tensor.is_floating_point() or tensor.is_complex()]


class _Followed(NamedTuple):
    values: list[Labelled]
    unknown: tuple[str, ...]


def _follow(graph: fx.Graph, names: list[str], labels: Labels) -> _Followed:
    """Label the value of every node, in order."""
    values: dict[fx.Node, Any] = {}
    unknown: dict[str, None] = {}
    given = iter(names)
    for node in graph.nodes:
        if node.op == "placeholder":
            name = next(given, None)
            shape = node.meta["val"].shape
            if name is None:
                values[node] = labels.constant(shape)
            elif node.users:
                values[node] = labels.source(name, shape)
        elif node.op == "get_attr":
            value = node.meta.get("val", getattr(graph.owning_module, str(node.target), None))
            values[node] = labels.constant(getattr(value, "shape", ()))
        elif node.op == "output":
            labels.fix(*labelled_in(fx.node.map_arg(node.args, values.get)))
        elif node.target is operator.getitem:
            source, at = node.args
            values[node] = _entry(values.get(source), at)
            if values[node] is None and node.users:
                values[node] = _left_alone(node, labels, values, unknown)
        else:
            values[node] = _apply(node, labels, values, unknown)
    every = [value for found in values.values() for value in labelled_in(found)]
    return _Followed(every, tuple(unknown))


def _entry(results: Any, at: int) -> Labelled | None:
    return results[at] if isinstance(results, tuple) and at < len(results) else None


def _apply(node: fx.Node, labels: Labels, values: dict[fx.Node, Any], unknown: dict[str, None]) -> Any:
    """The value of a call: by its rule, or with all that enters it left where it is."""
    results = node.meta.get("val")
    listed = list(results) if isinstance(results, tuple | list) else [results]
    schema = getattr(node.target, "_schema", None)
    if schema is None or not any(isinstance(result, Tensor) for result in listed):
        return None if schema is not None and not listed else _left_alone(node, labels, values, unknown)
    name = schema.name.split("::")[-1].rstrip("_")
    rule = RULES.get(name) or (pointwise if is_elementwise(node.target) else None)
    if rule is not None:
        bound = {argument.name: argument.default_value for argument in schema.arguments}
        bound |= dict(zip(bound, node.args, strict=False))
        arguments = {key: fx.node.map_arg(value, values.get) for key, value in {**bound, **node.kwargs}.items()}
        given = [source.meta.get("val") for source in node.all_input_nodes]
        found = rule(Call(labels, name, arguments, listed, given))
        if _fits(found, listed, labels):
            return found
    return _left_alone(node, labels, values, unknown)


def _fits(found: Result, results: list[Any], labels: Labels) -> bool:
    """Whether a rule applied, and its result has the shape that the operation's has."""
    values = found if isinstance(found, tuple) else (found,)
    if values[0] is None:
        return False
    return all(
        value is None or not isinstance(result, Tensor) or labels.shape(value) == tuple(result.shape)
        for value, result in zip(values, results, strict=False)
    )


def _left_alone(node: fx.Node, labels: Labels, values: dict[fx.Node, Any], unknown: dict[str, None]) -> Any:
    """Fix all that enters an operation; what it returns has no channels."""
    entering = labelled_in([values.get(source) for source in node.all_input_nodes])
    name = getattr(getattr(node.target, "_schema", None), "name", str(node.target)).split("::")[-1]
    entering = [labels.settle(value, True) for value in entering]  # what buffers hold is fixed thereby
    if labels.fix(*entering) and node.target is not operator.getitem:
        unknown[name] = None
    results = node.meta.get("val")
    if isinstance(results, tuple | list):
        return tuple(labels.constant(part.shape) if isinstance(part, Tensor) else None for part in results)
    return labels.constant(results.shape) if isinstance(results, Tensor) else None

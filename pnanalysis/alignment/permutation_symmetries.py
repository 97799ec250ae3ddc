"""Which hidden units of a network can be relabelled: groups of channels, found by tracing how the network uses them.

A group is a set of interchangeable channels, with every axis of every tensor that they index. One pass over the graph
of :mod:`torch.fx` finds them: linear and convolutional layers open a group for their outputs; elementwise functions,
normalisation, pooling and flattening propagate it; additions merge two groups; channels of the network's output are
excluded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules import activation, padding, pooling

from pnanalysis.activations.hooks import ACTIVATIONS
from pnanalysis.alignment.channel_groups import ChannelAxis, ChannelGroups, Group, misunderstood
from pnanalysis.errors import ModelError, reason
from pnanalysis.inputs.batches import as_arguments
from pnanalysis.torch_internals import ConvolutionBase, NormBase, TransposedConvolutionBase


def find_groups(model: nn.Module, inputs: Any) -> list[Group]:
    """Groups of hidden channels that can be relabelled without changing the network's function.

    Parameters
    ----------
    model : Module
        In eval mode.
    inputs : Tensor, or mapping or tuple of tensors
        A few examples, to find the shapes of activations.

    Returns
    -------
    list of Group
        In the order in which the network uses them.

    Raises
    ------
    ModelError
        If torch.fx cannot trace the network, or it contains an operation that is not supported here.
    """
    try:
        traced = fx.symbolic_trace(model)
        with torch.no_grad():
            arguments, keywords = as_arguments(inputs)
            named = [keywords[node.name] for node in traced.graph.nodes if node.op == "placeholder" and keywords]
            ShapeProp(traced).propagate(*arguments, *named)
    except Exception as error:  # a user's forward may raise anything when called with proxies
        raise ModelError(
            f"{type(model).__name__} cannot be aligned: torch.fx cannot trace it ({reason(error)}); "
            "write its forward without branches on data"
        ) from error
    return _GroupTracer(traced, dict(model.named_modules()), _canonical(model)).channels.groups()


_ODD = {"tanh", "softsign", "dropout", "contiguous", "clone", "float", "double", "to", "neg", "avg_pool1d",
        "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "mean",
        "interpolate", "identity"}  # fmt: skip
_EVEN = {getattr(function, "__name__", "") for function in ACTIVATIONS} - _ODD | {
    "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "clamp", "abs", "pow",
    "square", "exp", "sqrt", "amax", "softmax", "log_softmax",
}  # fmt: skip
_SUMS = {"add", "iadd", "sub", "isub"}
_PRODUCTS = {"mul", "imul", "truediv", "div"}
_RESHAPES = {"flatten", "view", "reshape"}
_ODD_MODULES = (
    nn.Tanh, nn.Softsign, nn.Identity, nn.Upsample, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.AlphaDropout, nn.FeatureAlphaDropout, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip
_MIXING = (nn.GLU, nn.MultiheadAttention, nn.PReLU)


class _GroupTracer:
    """One pass over the graph that finds the channel axis of every activation."""

    def __init__(self, traced: fx.GraphModule, modules: dict[str, nn.Module], canonical: dict[str, str]) -> None:
        self.modules, self.channels = modules, ChannelGroups(canonical)
        self.values: dict[fx.Node, ChannelAxis] = {}
        for node in traced.graph.nodes:
            axis = self._visit(node)
            if axis is not None:
                self.values[node] = axis

    def _visit(self, node: fx.Node) -> ChannelAxis | None:
        if node.op == "output":
            for source in node.all_input_nodes:
                self.channels.fix(self.values.get(source))
            return None
        if _shape(node) is None and node.op != "get_attr":
            return None  # sizes and other numbers carry no channels
        if node.op == "placeholder":
            return ChannelAxis(None, 1)
        if node.op == "call_module":
            return self._module(node, str(node.target), self.modules[str(node.target)])
        if node.op == "get_attr":
            raise misunderstood("a parameter outside a layer", node.name)
        return self._call(node)

    def _module(self, node: fx.Node, name: str, module: nn.Module) -> ChannelAxis:
        axis = self._input(node)
        if isinstance(module, nn.Linear | nn.Embedding | ConvolutionBase):
            return self._layer(node, name, module, axis)
        if isinstance(module, NormBase | nn.LayerNorm | nn.GroupNorm):
            return self._normalise(node, name, module, axis)
        if isinstance(module, nn.Flatten):
            return self._reshape(node, axis)
        if isinstance(module, _ODD_MODULES):
            return axis
        kinds = (activation, pooling, padding)
        if any(type(module).__module__ == kind.__name__ for kind in kinds) and not isinstance(module, _MIXING):
            return self.channels.mark_even(axis)
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            return self.channels.mark_even(axis)
        raise misunderstood(type(module).__name__, node.name)

    def _call(self, node: fx.Node) -> ChannelAxis:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        name = name.rstrip("_")
        operands = [part for part in (*node.args, *node.kwargs.values()) if part in self.values]
        if name in _SUMS | _PRODUCTS and operands:
            return self._combine(node, cast("list[fx.Node]", operands), is_sum=name in _SUMS)
        if name in _RESHAPES:
            return self._reshape(node, self._input(node))
        if name in _ODD | _EVEN and len(operands) == 1:
            axis = self._input(node)
            if axis.group is not None and not self._keeps(node, axis):
                raise misunderstood(name, node.name)
            return axis if name in _ODD else self.channels.mark_even(axis)
        raise misunderstood(name, node.name)

    def _layer(self, node: fx.Node, name: str, module: nn.Module, axis: ChannelAxis) -> ChannelAxis:
        """A layer whose weight maps the channels of its input to new ones."""
        shape = cast("tuple[int, ...]", _shape(node))
        if isinstance(module, nn.Embedding):
            opened = self.channels.open(module.embedding_dim, len(shape) - 1)
            self.channels.bind(f"{name}.weight", 1, opened)
            return opened
        if isinstance(module, ConvolutionBase) and module.groups > 1:
            return self._grouped(node, name, module, axis)
        into, out = (0, 1) if isinstance(module, TransposedConvolutionBase) else (1, 0)
        dim = 1 if isinstance(module, ConvolutionBase) else len(shape) - 1
        if axis.group is not None and axis.dim != dim:
            raise misunderstood(f"{type(module).__name__} across axes other than the channels", node.name)
        self.channels.bind(f"{name}.weight", into, axis)
        opened = self.channels.open(shape[dim], dim)
        self.channels.bind(f"{name}.weight", out, opened)
        if getattr(module, "bias", None) is not None:
            self.channels.bind(f"{name}.bias", 0, opened)
        return opened

    def _grouped(self, node: fx.Node, name: str, module: ConvolutionBase, axis: ChannelAxis) -> ChannelAxis:
        if module.groups == module.in_channels == module.out_channels:  # depthwise: one filter per channel
            self.channels.bind(f"{name}.weight", 0, axis, signed=False)
            if module.bias is not None:
                self.channels.bind(f"{name}.bias", 0, axis)
            return axis
        self.channels.fix(axis)
        return ChannelAxis(None, 1)

    def _normalise(self, node: fx.Node, name: str, module: nn.Module, axis: ChannelAxis) -> ChannelAxis:
        if isinstance(
            module, nn.LayerNorm | nn.GroupNorm
        ):  # the mean over channels is not odd in the sign of one of them
            self.channels.mark_even(axis)
            last = axis.dim == len(cast("tuple[int, ...]", _shape(node))) - 1
            if isinstance(module, nn.LayerNorm) and not (last and len(module.normalized_shape) == 1):
                raise misunderstood("LayerNorm over more than the channels", node.name)
            if isinstance(module, nn.GroupNorm) and module.num_groups not in (1, module.num_channels):
                self.channels.fix(axis)
        for tensor, signed in (("weight", False), ("bias", True), ("running_mean", True), ("running_var", False)):
            if getattr(module, tensor, None) is not None:
                self.channels.bind(f"{name}.{tensor}", 0, axis, signed)
        return axis

    def _combine(self, node: fx.Node, operands: list[fx.Node], is_sum: bool) -> ChannelAxis:
        """A sum or product: its operands have the same channels, unless one is broadcast."""
        shape = cast("tuple[int, ...]", _shape(node))
        whole = [self.values[source] for source in operands if self._spans(source, self.values[source], shape)]
        if not whole:
            raise misunderstood("an operation on operands of different shapes", node.name)
        result = whole[0]
        for other in whole[1:]:
            result = self.channels.unify(result, other, node.name)
        keeps_signs = len(whole) > 1 if is_sum else len(operands) == 1  # x + y and 2 x are odd, x + 1 and x y are not
        if not keeps_signs or len(whole) < len(operands):
            for source in operands:
                self.channels.mark_even(self.values[source])
        return result

    def _spans(self, source: fx.Node, axis: ChannelAxis, shape: tuple[int, ...]) -> bool:
        """Whether an operand has all channels of the result, rather than being broadcast along them."""
        own = cast("tuple[int, ...]", _shape(source))
        shift = len(shape) - len(own)
        return axis.group is None or own[axis.dim] == shape[axis.dim + shift]

    def _reshape(self, node: fx.Node, axis: ChannelAxis) -> ChannelAxis:
        """Flattening (N, C, ...) to (N, C * ...) repeats each channel; other reshapes must keep N and C."""
        if axis.group is None:
            return axis
        before = cast("tuple[int, ...]", _shape(node.all_input_nodes[0]))
        after = cast("tuple[int, ...]", _shape(node))
        if before == after:
            return axis
        if axis.dim == 1 and len(after) == 2 and after[1] == prod(before[1:]):
            return replace(axis, repeat=axis.repeat * prod(before[2:]))
        if axis.dim == 1 and before[:2] == after[:2] and axis.repeat == 1:
            return axis
        raise misunderstood(f"a reshape of {before} to {after}", node.name)

    def _keeps(self, node: fx.Node, axis: ChannelAxis) -> bool:
        """Whether the channels stay on their axis (a mean over other axes keeps them)."""
        before = cast("tuple[int, ...]", _shape(node.all_input_nodes[0]))
        after = cast("tuple[int, ...]", _shape(node))
        if len(after) == len(before):
            return after[axis.dim] == before[axis.dim]
        reduced = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        dims = [reduced] if isinstance(reduced, int) else list(cast("Any", reduced) or [])
        return bool(dims) and all(dim % len(before) > axis.dim for dim in dims)

    def _input(self, node: fx.Node) -> ChannelAxis:
        sources = [self.values[source] for source in node.all_input_nodes if source in self.values]
        if len(sources) != 1:
            raise misunderstood(f"{len(sources)} inputs", node.name)
        return sources[0]


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    meta = node.meta.get("tensor_meta")
    shape = getattr(meta, "shape", None)
    return None if shape is None else tuple(shape)


def _canonical(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer to the first name of the same tensor."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    walks: list[Callable[..., Any]] = [model.named_parameters, model.named_buffers]
    for walk in walks:
        for name, tensor in cast("list[tuple[str, Tensor]]", list(walk(remove_duplicate=False))):
            names[name] = first.setdefault(id(tensor), name)
    return names

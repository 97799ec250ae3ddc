"""Which hidden units of a network may be permuted: groups of channels, found by tracing how the network uses them.

A group is a set of interchangeable channels together with every axis of every tensor that is indexed by them. The
graph of :mod:`torch.fx` is walked once: linear and convolutional layers open a group for their outputs; elementwise
functions, normalisation, pooling and flattening pass it on; additions merge two groups into one; and the channels of
the network's output may not be permuted.
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
from pnanalysis.alignment.channel_groups import ChannelGroup, ChannelGroups, Channels, cannot_follow
from pnanalysis.errors import ModelError, reason
from pnanalysis.inputs.batches import as_arguments
from pnanalysis.torch_internals import ConvolutionBase, NormBase, TransposedConvolutionBase


def find_groups(model: nn.Module, inputs: Any) -> list[ChannelGroup]:
    """Groups of hidden channels that may be permuted without changing the network's function.

    Parameters
    ----------
    model : Module
        In eval mode.
    inputs : Tensor, or mapping or tuple of tensors
        A few examples, from which the shapes of activations are found.

    Returns
    -------
    list of ChannelGroup
        In the order of the network.

    Raises
    ------
    ModelError
        If torch.fx cannot trace the network, or an operation's effect on its channels is unknown here.
    """
    try:
        traced = fx.symbolic_trace(model)
        with torch.no_grad():
            arguments, keywords = as_arguments(inputs)
            named = [keywords[node.name] for node in traced.graph.nodes if node.op == "placeholder" and keywords]
            ShapeProp(traced).propagate(*arguments, *named)
    except Exception as error:  # a forward of the user's may raise anything when it is given proxies for tensors
        raise ModelError(
            f"{type(model).__name__} cannot be aligned: torch.fx cannot trace it ({reason(error)}); "
            "write its forward without branches on data"
        ) from error
    return _ChannelTracer(traced, dict(model.named_modules()), _canonical_names(model)).groups.groups()


# Functions that do not mix channels, by what they do to signs. Odd ones, f(-x) = -f(x), pass a flipped sign on; all
# others are called even here, whether f(-x) = f(x) or not: the sign of what enters them must stay.
_ODD = {"tanh", "softsign", "dropout", "contiguous", "clone", "float", "double", "to", "neg", "avg_pool1d",
        "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "mean",
        "interpolate", "identity"}  # fmt: skip
_EVEN = set(ACTIVATIONS) - _ODD | {
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
_MIXING = (nn.GLU, nn.MultiheadAttention, nn.PReLU)  # in torch's module of activations, but not elementwise


class _ChannelTracer:
    """Walks the graph once, node by node, and records the channels of each value."""

    def __init__(self, traced: fx.GraphModule, modules: dict[str, nn.Module], canonical: dict[str, str]) -> None:
        self.modules, self.groups = modules, ChannelGroups(canonical)
        self.values: dict[fx.Node, Channels] = {}
        for node in traced.graph.nodes:
            channels = self._visit(node)
            if channels is not None:
                self.values[node] = channels

    def _visit(self, node: fx.Node) -> Channels | None:
        """The channels of a node's value; ``None`` for the output, and for values that are not tensors."""
        if node.op == "output":
            for source in node.all_input_nodes:
                self.groups.fix(self.values.get(source))
            return None
        if _tensor_shape(node) is None and node.op != "get_attr":  # the size of a tensor, for example
            return None
        if node.op == "placeholder":
            return Channels(None, 1)
        if node.op == "call_module":
            return self._call_module(node, str(node.target), self.modules[str(node.target)])
        if node.op == "get_attr":
            raise cannot_follow("a parameter outside a layer", node.name)
        return self._call_function(node)

    def _call_module(self, node: fx.Node, name: str, module: nn.Module) -> Channels:
        channels = self._input(node)
        if isinstance(module, nn.Linear | nn.Embedding | ConvolutionBase):
            return self._layer(node, name, module, channels)
        if isinstance(module, NormBase | nn.LayerNorm | nn.GroupNorm):
            return self._normalise(node, name, module, channels)
        if isinstance(module, nn.Flatten):
            return self._reshape(node, channels)
        if isinstance(module, _ODD_MODULES):
            return channels
        kinds = (activation, pooling, padding)
        if any(type(module).__module__ == kind.__name__ for kind in kinds) and not isinstance(module, _MIXING):
            return self.groups.mark_even(channels)
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            return self.groups.mark_even(channels)
        raise cannot_follow(type(module).__name__, node.name)

    def _call_function(self, node: fx.Node) -> Channels:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        name = name.rstrip("_")  # relu_ is relu
        operands = [part for part in (*node.args, *node.kwargs.values()) if part in self.values]
        if name in _SUMS | _PRODUCTS and operands:
            return self._combine(node, cast("list[fx.Node]", operands), is_sum=name in _SUMS)
        if name in _RESHAPES:
            return self._reshape(node, self._input(node))
        if name in _ODD | _EVEN and len(operands) == 1:
            channels = self._input(node)
            if channels.group is not None and not self._keeps_channels(node, channels):
                raise cannot_follow(name, node.name)
            return channels if name in _ODD else self.groups.mark_even(channels)
        raise cannot_follow(name, node.name)

    def _layer(self, node: fx.Node, name: str, module: nn.Module, channels: Channels) -> Channels:
        """A layer whose weight maps the channels of its input to new ones."""
        shape = _shape(node)
        if isinstance(module, nn.Embedding):
            opened = self.groups.open(module.embedding_dim, len(shape) - 1)
            self.groups.bind(f"{name}.weight", 1, opened)
            return opened
        if isinstance(module, ConvolutionBase) and module.groups > 1:
            return self._grouped_convolution(node, name, module, channels)
        in_dim, out_dim = (0, 1) if isinstance(module, TransposedConvolutionBase) else (1, 0)
        dim = 1 if isinstance(module, ConvolutionBase) else len(shape) - 1
        if channels.group is not None and channels.dim != dim:
            raise cannot_follow(f"a {type(module).__name__} layer over other axes than the channels", node.name)
        self.groups.bind(f"{name}.weight", in_dim, channels)
        opened = self.groups.open(shape[dim], dim)
        self.groups.bind(f"{name}.weight", out_dim, opened)
        if getattr(module, "bias", None) is not None:
            self.groups.bind(f"{name}.bias", 0, opened)
        return opened

    def _grouped_convolution(self, node: fx.Node, name: str, module: ConvolutionBase, channels: Channels) -> Channels:
        if module.groups == module.in_channels == module.out_channels:  # depthwise: one filter per channel
            # A flipped sign passes from the input to the output, and leaves the filter as it is.
            self.groups.bind(f"{name}.weight", 0, channels, signed=False)
            if module.bias is not None:
                self.groups.bind(f"{name}.bias", 0, channels)
            return channels
        self.groups.fix(channels)  # only channels of one group of the convolution could be exchanged: left alone
        return Channels(None, 1)

    def _normalise(self, node: fx.Node, name: str, module: nn.Module, channels: Channels) -> Channels:
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            # Their mean over channels is the same for any order of the channels, but not for any signs.
            self.groups.mark_even(channels)
            last = channels.dim == len(_shape(node)) - 1
            if isinstance(module, nn.LayerNorm) and not (last and len(module.normalized_shape) == 1):
                raise cannot_follow("a LayerNorm over more than the channels", node.name)
            if isinstance(module, nn.GroupNorm) and module.num_groups not in (1, module.num_channels):
                # Channels must not leave their normalisation group.
                self.groups.fix(channels)
        for tensor, signed in (("weight", False), ("bias", True), ("running_mean", True), ("running_var", False)):
            if getattr(module, tensor, None) is not None:
                self.groups.bind(f"{name}.{tensor}", 0, channels, signed)
        return channels

    def _combine(self, node: fx.Node, operands: list[fx.Node], is_sum: bool) -> Channels:
        """A sum or product: its operands have the same channels, except where one is broadcast along them."""
        shape = _shape(node)
        full = [self.values[source] for source in operands if self._has_all_channels(source, shape)]
        if not full:
            raise cannot_follow("operands of different shapes", node.name)
        result = full[0]
        for other in full[1:]:
            result = self.groups.unify(result, other, node.name)
        keeps_signs = len(full) > 1 if is_sum else len(operands) == 1  # x + y and 2 x are odd, x + 1 and x y are not
        if not keeps_signs or len(full) < len(operands):
            for source in operands:
                self.groups.mark_even(self.values[source])
        return result

    def _has_all_channels(self, operand: fx.Node, shape: tuple[int, ...]) -> bool:
        """Whether an operand has the channels of the result of this shape, or is broadcast along them."""
        channels, own = self.values[operand], _shape(operand)
        shift = len(shape) - len(own)  # broadcasting aligns shapes at their last dims
        return channels.group is None or own[channels.dim] == shape[channels.dim + shift]

    def _reshape(self, node: fx.Node, channels: Channels) -> Channels:
        """Flattening (N, C, ...) to (N, C * ...) repeats each channel; other reshapes must keep N and C."""
        if channels.group is None:
            return channels
        before = _shape(node.all_input_nodes[0])
        after = _shape(node)
        if before == after:
            return channels
        if channels.dim == 1 and len(after) == 2 and after[1] == prod(before[1:]):
            return replace(channels, repeat=channels.repeat * prod(before[2:]))
        if channels.dim == 1 and before[:2] == after[:2] and channels.repeat == 1:
            return channels
        raise cannot_follow(f"a reshape of {before} to {after}", node.name)

    def _keeps_channels(self, node: fx.Node, channels: Channels) -> bool:
        """Whether the channels lie along the same dim before and after; a mean over later dims keeps them there."""
        before = _shape(node.all_input_nodes[0])
        after = _shape(node)
        if len(after) == len(before):
            return after[channels.dim] == before[channels.dim]
        reduced = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        dims = [reduced] if isinstance(reduced, int) else list(cast("Any", reduced) or [])
        return bool(dims) and all(dim % len(before) > channels.dim for dim in dims)

    def _input(self, node: fx.Node) -> Channels:
        """The channels of a node's only input."""
        sources = [self.values[source] for source in node.all_input_nodes if source in self.values]
        if len(sources) != 1:
            raise cannot_follow(f"an operation with {len(sources)} inputs", node.name)
        return sources[0]


def _tensor_shape(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a node's value; ``None`` if it is not a tensor."""
    meta = node.meta.get("tensor_meta")
    shape = getattr(meta, "shape", None)
    return None if shape is None else tuple(shape)


def _shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's value, which is known to be a tensor."""
    return cast("tuple[int, ...]", _tensor_shape(node))


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer to the first name of the same tensor."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    listings: list[Callable[..., Any]] = [model.named_parameters, model.named_buffers]
    for named_tensors in listings:
        for name, tensor in cast("list[tuple[str, Tensor]]", list(named_tensors(remove_duplicate=False))):
            names[name] = first.setdefault(id(tensor), name)
    return names

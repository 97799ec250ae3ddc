"""How a network uses its weights: in which order, and which of their dims gives the outputs of the layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pnanalysis.activations.axis_rules import name_of
from pnanalysis.evaluation.forward import forward

#: The dim of outputs in weights of torch's layers.
_LAYERS = {"linear": 0, **{f"conv{n}d": 0 for n in (1, 2, 3)}, **{f"conv_transpose{n}d": 1 for n in (1, 2, 3)}}
#: Views of a matrix that may be its transpose, and the position of the two factors among the arguments of products.
_TRANSPOSES = {"t", "T", "mT", "transpose", "swapaxes", "swapdims", "permute", "adjoint"}
_PRODUCTS = {"matmul": 0, "mm": 0, "bmm": 0, "rmatmul": 0, "addmm": 1, "baddbmm": 1}


class WeightUse(NamedTuple):
    """A product of a weight with its layer's inputs.

    Attributes
    ----------
    name : str
        Of the parameter.
    output_dim : int
        The dim of the weight that counts outputs.
    is_grouped : bool
        Whether that dim counts the outputs of one group of a transposed convolution only.
    """

    name: str
    output_dim: int
    is_grouped: bool = False


@torch.no_grad()
def weight_uses(network: nn.Module, inputs: Any) -> list[WeightUse]:
    """The products of trainable weights in a forward pass, in their order.

    Weights that are used through something else, such as a view other than their transpose or a parametrisation, are
    not among them.
    """
    watching = _Watching(network)
    with watching:
        forward(network, inputs)
    return watching.found


class _Weight(NamedTuple):
    """A parameter, or the transpose of a matrix."""

    name: str
    is_transposed: bool
    tensor: Tensor  # kept, so that its id remains its own


class _Watching(TorchFunctionMode):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.found: list[WeightUse] = []
        named = ((name, one) for name, one in network.named_parameters() if one.requires_grad and one.ndim > 1)
        self._weights = {id(parameter): _Weight(name, False, parameter) for name, parameter in named}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = name_of(func)
        if name in _TRANSPOSES and isinstance(output, Tensor) and output.ndim == 2 and id(args[0]) in self._weights:
            source = self._weights[id(args[0])]
            is_same = output.stride() == args[0].stride() and output.shape == args[0].shape
            self._weights[id(output)] = _Weight(source.name, source.is_transposed ^ (not is_same), output)
        use = self._use(name, args, kwargs or {}, output)
        if use is not None:
            self.found.append(use)
        return output

    def _use(self, function: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> WeightUse | None:
        if function in _LAYERS:
            weight = self._weights.get(id(args[1] if len(args) > 1 else kwargs.get("weight")))
            if weight is None:
                return None
            dim = _LAYERS[function]
            channels = output.shape[-1 if function == "linear" else 1 - weight.tensor.ndim]
            return WeightUse(weight.name, dim ^ weight.is_transposed, dim == 1 and channels != weight.tensor.shape[1])
        at = _PRODUCTS.get(function)
        for position, factor in enumerate(() if at is None else args[at : at + 2]):
            weight = self._weights.get(id(factor))
            if weight is not None:
                outputs_first = (position == 0) != (function == "rmatmul")
                dim = weight.tensor.ndim - (2 if outputs_first else 1)
                return WeightUse(weight.name, dim ^ weight.is_transposed)
        return None

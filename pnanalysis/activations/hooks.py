"""Watch every activation function that a network calls, whether as a module or as a function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pnanalysis.errors import ModelError


@dataclass(frozen=True)
class Activation:
    """An activation function.

    Attributes
    ----------
    name : str
    low, high : float
        Horizontal asymptotes, infinite where there is none.
    rectifier : bool
        Whether the output is positive exactly where the input is.
    """

    name: str
    low: float = -inf
    high: float = inf
    rectifier: bool = False

    @property
    def bounded(self) -> bool:
        """Whether there are both asymptotes."""
        return isfinite(self.low) and isfinite(self.high)


def _rectifier(name: str, low: float = 0.0, high: float = inf) -> Activation:
    return Activation(name, low, high, rectifier=True)


_TANH, _SIGMOID = Activation("tanh", -1.0, 1.0), Activation("sigmoid", 0.0, 1.0)
_RELU = _rectifier("relu")

#: The activation functions that are recognised, by identity. One that calls another is recorded once, as itself.
ACTIVATIONS: dict[Callable[..., Any], Activation] = {
    torch.tanh: _TANH,
    torch.tanh_: _TANH,
    Tensor.tanh: _TANH,
    Tensor.tanh_: _TANH,
    F.tanh: _TANH,
    torch.sigmoid: _SIGMOID,
    torch.sigmoid_: _SIGMOID,
    Tensor.sigmoid: _SIGMOID,
    Tensor.sigmoid_: _SIGMOID,
    F.sigmoid: _SIGMOID,
    torch.relu: _RELU,
    torch.relu_: _RELU,
    Tensor.relu: _RELU,
    Tensor.relu_: _RELU,
    F.relu: _RELU,
    F.relu6: _rectifier("relu6", 0.0, 6.0),
    F.leaky_relu: _rectifier("leaky_relu", -inf),
    F.prelu: _rectifier("prelu", -inf),
    F.elu: _rectifier("elu", -1.0),
    F.selu: _rectifier("selu", -1.7580993408473766),
    F.celu: _rectifier("celu", -1.0),
    F.gelu: _rectifier("gelu"),
    F.silu: _rectifier("silu"),
    F.mish: _rectifier("mish"),
    F.hardtanh: Activation("hardtanh", -1.0, 1.0),
    F.hardsigmoid: Activation("hardsigmoid", 0.0, 1.0),
    F.hardswish: _rectifier("hardswish"),
    F.softplus: Activation("softplus", 0.0),
    F.softsign: Activation("softsign", -1.0, 1.0),
    F.logsigmoid: Activation("logsigmoid", high=0.0),
}


def _hardtanh(min_val: float = -1.0, max_val: float = 1.0, **_: Any) -> Activation:
    """Hardtanh with the limits that it is called with; ``nn.ReLU6`` calls it with 0 and 6."""
    if (min_val, max_val) == (0.0, 6.0):
        return _rectifier("relu6", 0.0, 6.0)
    return Activation("hardtanh", min_val, max_val)


#: Which dim of an activation counts units is determined by the last of these functions that was called before it.
_UNIT_DIMS: dict[Callable[..., Any], int] = {
    **dict.fromkeys((F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__), -1),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d, F.batch_norm, F.instance_norm, F.group_norm), 1),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), 1),
}

Observer = Callable[[str, Activation, Tensor], None]


class _WatchMode(TorchFunctionMode):
    """Calls ``observe(layer, activation, output)`` after every activation function that no other one calls."""

    def __init__(self, model: nn.Module, observe: Observer) -> None:
        super().__init__()
        self.observe = observe
        self.modules: list[tuple[str, nn.Module]] = [("", model)]  # those being called, from the outermost in
        self.calls: Counter[str] = Counter()  # of each name in this forward pass
        self.depth = 0  # of activation functions that call one another
        self.unit_dim = 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        activation = ACTIVATIONS.get(func)
        self.unit_dim = _UNIT_DIMS.get(func, self.unit_dim)
        if activation is None or self.depth:
            return func(*args, **(kwargs or {}))
        self.depth += 1
        try:
            output = func(*args, **(kwargs or {}))
        finally:
            self.depth -= 1
        if func is F.hardtanh:
            activation = _hardtanh(*args[1:3], **(kwargs or {}))
        values = output if output.ndim > 1 else output.reshape(-1, 1)
        self.observe(self._layer(activation), activation, values.movedim(self.unit_dim, 1))
        return output

    def _layer(self, activation: Activation) -> str:
        """Name of the activation module, or of the calling module and the function; repeated names are numbered."""
        path, module = self.modules[-1]
        is_activation_module = type(module).__module__ == "torch.nn.modules.activation"
        name = path if is_activation_module and path else ".".join(part for part in (path, activation.name) if part)
        self.calls[name] += 1
        return name if self.calls[name] == 1 else f"{name}#{self.calls[name]}"


@contextmanager
def watch_activations(model: nn.Module, observe: Observer) -> Iterator[None]:
    """Within the body, every forward pass of ``model`` reports its activations.

    Parameters
    ----------
    model : torch.nn.Module
    observe : callable
        ``observe(layer, activation, output)``. ``layer`` is the name of the activation module, or that of the module
        that calls the function, followed by the function's name; a second call in one pass is ``name#2``. ``output``
        has examples along dim 0 and units along dim 1 (channels after a convolution, features after a linear layer).
        It is the network's own tensor, not a copy, which the network may overwrite in place afterwards.
    """
    mode = _WatchMode(model, observe)

    def begin_pass(module: nn.Module, args: Any) -> None:
        mode.calls.clear()

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            mode.modules.append((name, module))

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        mode.modules.pop()

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(begin_pass, prepend=True).remove)
        for name, module in model.named_modules():
            if module is not model:
                stack.callback(module.register_forward_pre_hook(enter(name), prepend=True).remove)
                # also after a forward that raises, or later names would start with this module's
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(mode)
        yield


def no_activations(model: nn.Module) -> ModelError:
    """The error for a network without activation functions."""
    return ModelError(
        f"{type(model).__name__} has no activation functions whose saturation can be measured (tanh, sigmoid, the ReLU "
        "family, GELU, SiLU...); call them as modules or functions of torch"
    )

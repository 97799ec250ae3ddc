"""Watch every activation function of a network while it runs, whether it is a module or a functional call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Activation:
    """An activation function: its name and its horizontal asymptotes (infinite where it has none)."""

    name: str
    low: float = -inf
    high: float = inf


_TANH, _SIGMOID = Activation("tanh", -1.0, 1.0), Activation("sigmoid", 0.0, 1.0)
_RELU, _GELU, _SILU = Activation("relu", 0.0), Activation("gelu", 0.0), Activation("silu", 0.0)

#: Every function that is seen, by identity; functions that call one another are recorded once, at the outermost.
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
    F.relu6: Activation("relu6", 0.0, 6.0),
    F.leaky_relu: Activation("leaky_relu"),
    F.prelu: Activation("prelu"),
    F.elu: Activation("elu", -1.0),
    F.selu: Activation("selu", -1.7580993408473766),
    F.celu: Activation("celu", -1.0),
    F.gelu: _GELU,
    F.silu: _SILU,
    F.mish: Activation("mish", 0.0),
    F.hardtanh: Activation("hardtanh", -1.0, 1.0),
    F.hardsigmoid: Activation("hardsigmoid", 0.0, 1.0),
    F.hardswish: Activation("hardswish", 0.0),
    F.softplus: Activation("softplus", 0.0),
    F.softsign: Activation("softsign", -1.0, 1.0),
    F.logsigmoid: Activation("logsigmoid", high=0.0),
}


def _hardtanh(min_val: float = -1.0, max_val: float = 1.0, **_: Any) -> Activation:
    """torch's hardtanh, which ReLU6 is made of, has the limits it is called with."""
    return Activation("hardtanh", min_val, max_val)


Observer = Callable[[str, Activation, Tensor], None]


class _Watch(TorchFunctionMode):
    """Calls ``observe(layer, activation, output)`` for every outermost activation function."""

    def __init__(self, observe: Observer) -> None:
        super().__init__()
        self.observe = observe
        self.modules: list[tuple[str, nn.Module]] = []
        self.calls: Counter[str] = Counter()
        self.depth = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        activation = ACTIVATIONS.get(func)
        if activation is None or self.depth:
            return func(*args, **(kwargs or {}))
        self.depth += 1
        try:
            output = func(*args, **(kwargs or {}))
        finally:
            self.depth -= 1
        if func is F.hardtanh:
            activation = _hardtanh(*args[1:3], **(kwargs or {}))
        self.observe(self._layer(activation), activation, output)
        return output

    def _layer(self, activation: Activation) -> str:
        """The module's name; for a functional call, of the calling module and the function; numbered when repeated."""
        path, module = self.modules[-1] if self.modules else ("", None)
        own_module = type(module).__module__ == "torch.nn.modules.activation"
        name = path if own_module and path else ".".join(part for part in (path, activation.name) if part)
        self.calls[name] += 1
        return name if self.calls[name] == 1 else f"{name}#{self.calls[name]}"


@contextmanager
def watch_activations(model: nn.Module, observe: Observer) -> Iterator[None]:
    """Within the body, each forward pass of ``model`` reports its activations.

    Parameters
    ----------
    model : torch.nn.Module
    observe : callable
        ``observe(layer, activation, output)``; ``layer`` is the name of the activation module, or of the module that
        calls the function followed by the function's name. A second use in one pass is ``name#2``.
    """
    watch = _Watch(observe)

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if module is model:
                watch.calls.clear()
            watch.modules.append((name, module))

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        watch.modules.pop()

    with ExitStack() as stack:
        for name, module in model.named_modules():
            for handle in (
                module.register_forward_pre_hook(enter(name), prepend=True),
                module.register_forward_hook(leave, always_call=True),
            ):
                stack.callback(handle.remove)
        stack.enter_context(watch)
        yield

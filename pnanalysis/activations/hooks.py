"""Watch every activation function that a network calls, whether as a module or as a function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pnanalysis.activations.axis_rules import name_of
from pnanalysis.activations.axis_tracker import AxisTracker, FollowAxes, Known
from pnanalysis.activations.eager import eager
from pnanalysis.activations.functions import ACTIVATIONS, COMPOSITES, Activation
from pnanalysis.errors import ModelError
from pnanalysis.torch_internals import is_vmapped


def composite(module: nn.Module) -> Activation | None:
    """The activation function that a module of several functions is as a whole; ``None`` for other modules.

    It is one by its class, not of torch itself: by name (:data:`~pnanalysis.activations.functions.COMPOSITES`), or as
    one of ``transformers.activations``. A module with weights of two or more dims is a layer, whatever its name.
    """
    kind = type(module)
    name = kind.__name__.lower().replace("_", "").removesuffix("activation")
    if kind.__module__.startswith("torch.nn.") or any(weight.ndim > 1 for weight in module.parameters()):
        return None
    others = kind.__module__ == "transformers.activations" and name != "linear"
    return COMPOSITES.get(name) or (Activation(name) if others else None)


def _as_called(activation: Activation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Activation:
    """The activation with the limits that it is called with; ``nn.ReLU6`` calls hardtanh with 0 and 6."""

    def argument(position: int, name: str, default: float) -> float:
        value = args[position] if position < len(args) else kwargs.get(name, default)
        return float(value)

    if activation.name in ("elu", "celu"):
        return replace(activation, low=-argument(1, "alpha", 1.0))
    if activation.name != "hardtanh":
        return activation
    low, high = argument(1, "min_val", -1.0), argument(2, "max_val", 1.0)
    if (low, high) == (0.0, 6.0):
        return ACTIVATIONS["relu6"]
    # other limits are named: figures take a hardtanh for bounded by one
    return activation if (low, high) == (-1.0, 1.0) else Activation(f"hardtanh({low:g}, {high:g})", low, high)


Observer = Callable[[str, Activation, Tensor, Known], None]


class _WatchMode(FollowAxes):
    """Follows axes, and calls ``observe`` after every activation function outside of composite ones."""

    def __init__(self, model: nn.Module, observe: Observer) -> None:
        super().__init__(AxisTracker(model))
        self.observe = observe
        self.modules: list[tuple[str, nn.Module]] = [("", model)]  # those being called, from the outermost in
        self.calls: Counter[str] = Counter()  # of each name in this forward pass
        self.composites = 0  # of the modules being called

    def called(self, function: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Report activations."""
        activation = ACTIVATIONS.get(name_of(function))
        if activation is not None and not self.composites and isinstance(output, Tensor):
            path, module = self.modules[-1]
            own = type(module).__module__ == "torch.nn.modules.activation" and path
            name = path if own else ".".join(part for part in (path, activation.name) if part)
            self.report(name, _as_called(activation, args, kwargs), output)

    def report(self, name: str, activation: Activation, output: Tensor) -> None:
        """Tell the observer; repeated names are numbered."""
        self.calls[name] += 1
        name = name if self.calls[name] == 1 else f"{name}#{self.calls[name]}"
        problem = _unmeasurable(output)
        if problem is not None:
            raise ModelError(f"{name}: {problem}")
        with self.pause():
            self.observe(name, activation, *self.tracker.arranged(output))


def _unmeasurable(output: Tensor) -> str | None:
    """Why no statistics can be made of an activation, if so."""
    if is_vmapped(output):
        return "an activation function within torch.vmap hides its examples; call the network without vmap"
    if output.is_nested:
        return "an activation function of a nested tensor has no axes; give the network padded batches"
    if output.is_complex():
        return "an activation function of complex numbers has no saturation; leave this analysis out"
    return None


@contextmanager
def watch_activations(model: nn.Module, observe: Observer, inputs: Any = None) -> Iterator[None]:
    """Within the body, every forward pass of ``model`` reports its activations.

    Compiled parts run uncompiled, and transformer encoders without their fast path.

    Parameters
    ----------
    model : torch.nn.Module
    observe : callable
        ``observe(layer, activation, values, known)``. ``layer`` is the name of the activation module, or that of the
        module that calls the function, followed by the function's name; a second call in one pass is ``name#2``.
        Functions that a :func:`composite` module calls are part of it and not reported. ``values`` has examples along
        dim 0, units along dim 1 (features of a linear layer, channels of a convolution, wherever they are moved to),
        and what else there is along a third one. What ``known`` says is unknown has size 1. It may be the network's
        own tensor, not a copy, which the network may overwrite in place afterwards.
    inputs : optional
        Of a forward pass that has begun already.

    Raises
    ------
    ModelError
        If parts of the network are scripted, so that their activations cannot be seen.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"{name or type(model).__name__} is scripted or traced (torch.jit), which hides its activation "
                "functions; give the network that it was made from"
            )
    mode = _WatchMode(model, observe)
    if inputs is not None:
        mode.tracker.start(inputs)

    def begin_pass(module: nn.Module, args: Any, kwargs: Any) -> None:
        mode.calls.clear()
        mode.tracker.start((args, kwargs))

    def enter(name: str, activation: Activation | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            mode.modules.append((name, module))
            mode.composites += activation is not None

        return hook

    def leave(name: str, activation: Activation | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            mode.modules.pop()
            if activation is None:
                return
            mode.composites -= 1
            if not mode.composites and isinstance(output, Tensor):
                mode.tracker.follow_like(args, output)
                mode.report(name or activation.name, activation, output)

        return hook

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(begin_pass, prepend=True, with_kwargs=True).remove)
        for path, module in model.named_modules():
            name, activation = path.replace("_orig_mod.", "").removesuffix("._orig_mod"), composite(module)
            if module is not model or activation is not None:
                stack.callback(module.register_forward_pre_hook(enter(name, activation), prepend=True).remove)
                # also after a forward that raises, or later names would start with this module's
                stack.callback(module.register_forward_hook(leave(name, activation), always_call=True).remove)
        stack.enter_context(eager())
        stack.enter_context(mode)
        yield


def no_activations(model: nn.Module) -> ModelError:
    """The error for a network without activation functions."""
    return ModelError(
        f"{type(model).__name__} has no activation functions whose saturation can be measured (tanh, sigmoid, the ReLU "
        "family, GELU, SiLU...); call them as modules or functions of torch"
    )

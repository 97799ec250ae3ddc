"""Forward passes: how a network is called, and which part of its output is the prediction."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from pnanalysis.activations.eager import without_fast_path
from pnanalysis.errors import ModelError
from pnanalysis.inputs.batches import IGNORED, as_arguments, map_tensors, tensors
from pnanalysis.inputs.functional_calls import functional_call
from pnanalysis.inputs.models import Loss
from pnanalysis.torch_internals import tree_map_only, without_checkpointing

#: Entries of an output that hold the prediction: in Hugging Face's models, and in torchvision's segmentation models.
PREDICTIONS = ("logits", "out")
_WRAP = "wrap the network in a module that returns its logits, or give a loss that takes what it returns"


#: Networks that need gradients within their forward pass (of outputs by inputs, say), which no_grad would forbid.
_differentiating: WeakSet[nn.Module] = WeakSet()
_NO_GRADIENTS = re.compile(r"requires?[ _]grad|grad_fn")


def forward(model: nn.Module, inputs: Any, state: Mapping[str, Tensor] | None = None) -> Any:
    """Output of the network: a mapping is passed by keyword, a tuple or list by position, anything else as it is.

    The network gets copies of the inputs, so that one that works in place on them changes nothing. Under
    ``torch.no_grad``, a network that needs gradients within its pass is run with them, and its output detached.

    Parameters
    ----------
    model : Module
    inputs : tensor, or nest of tensors
    state : mapping of tensors, optional
        Replaces the network's own parameters and buffers.
    """
    arguments, keywords = as_arguments(copies_of(inputs), model)
    if torch.is_grad_enabled():
        return _call(model, state, arguments, keywords)
    if model not in _differentiating:
        try:
            return _call(model, state, arguments, keywords)
        except RuntimeError as error:
            if not _NO_GRADIENTS.search(str(error)):
                raise
            arguments, keywords = as_arguments(copies_of(inputs), model)
    with torch.enable_grad():
        outputs = _call(model, state, arguments, keywords)
    _differentiating.add(model)  # the next pass need not try
    return tree_map_only(Tensor, Tensor.detach, outputs)


def loss_of_model(
    loss: Loss, model: nn.Module, inputs: Any, targets: Any, state: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Value of a loss of the form ``loss(model, (inputs, targets))``, with gradients enabled.

    Parameters
    ----------
    loss : callable
    model : Module
    inputs, targets : nests of tensors
        The loss gets copies.
    state : mapping of tensors, optional
        Replaces the network's own parameters and buffers for as long as the loss is computed.
    """
    batch = copies_of((inputs, targets))
    with torch.enable_grad():
        value: Tensor = _call(WithModel(model, loss), None if state is None else within_model(state), (batch,), {})
        return value


class WithModel(nn.Module):
    """A function of a model as a module, in which the model's parameters can be replaced during a call."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *arguments: Any) -> Tensor:
        return self.function(self.model, *arguments)


def within_model(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a :class:`WithModel`, from that of its model."""
    return {f"model.{name}": tensor for name, tensor in state.items()}


def copies_of(nest: Any) -> Any:
    """The nest with copies of its tensors, which require gradients where the originals do."""

    def copy(tensor: Tensor) -> Tensor:
        own = tensor.detach().clone()
        return own.requires_grad_() if tensor.requires_grad else own

    return map_tensors(nest, copy)


def learnt_from(copy: nn.Module, network: nn.Module) -> None:
    """Take over from a copy of a network whether its passes need gradients."""
    if copy in _differentiating:
        _differentiating.add(network)


def _call(model: nn.Module, state: Mapping[str, Tensor] | None, arguments: Any, keywords: Any) -> Any:
    with without_fast_path(), without_checkpointing():
        if state is None:
            return model(*arguments, **keywords)
        return functional_call(model, dict(state), tuple(arguments), keywords)


def prediction(outputs: Any) -> Tensor | None:
    """The tensor that is the prediction: the output itself, its ``logits`` or ``out``, or the first of a sequence.

    ``None`` where there is none of these.
    """
    if isinstance(outputs, Tensor):
        return outputs
    for name in PREDICTIONS:
        found = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        if isinstance(found, Tensor):
            return found
    first = next(iter(outputs), None) if isinstance(outputs, tuple | list) else None
    return first if isinstance(first, Tensor) else None


def required_prediction(outputs: Any, who: str = "the network") -> Tensor:
    """The :func:`prediction`, where there has to be one.

    Raises
    ------
    ModelError
        If there is none.
    """
    found = prediction(outputs)
    if found is None:
        raise ModelError(f"{who} returns {_kind(outputs)}, in which there is no prediction; {_WRAP}")
    return found


def not_for(loss: Loss, outputs: Any) -> ModelError:
    """The error for a loss that takes a tensor where the network returns something else."""
    name = getattr(loss, "__name__", type(loss).__name__)
    held = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    way_out = _WRAP if held is None else 'give loss="model" for the loss in it, or a loss that takes all of it'
    return ModelError(f"the network returns {_kind(outputs)}, where {name} takes a tensor; {way_out}")


def no_class(n_classes: int, targets: Tensor, ignored: int = IGNORED) -> str | None:
    """A message about the first target that is not one of ``n_classes`` classes; ``None`` if all are."""
    bad = ((targets < 0) | (targets >= n_classes)) & (targets != ignored)
    if not bool(bad.any()):
        return None
    return (
        f"the target {int(targets[bad][0])} is not a class of a network with {n_classes} outputs (0 to {n_classes - 1})"
    )


def _shapes(nest: Any) -> str:
    """Shapes and types, as words."""
    parts = [f"shape {tuple(t.shape)}, {str(t.dtype).removeprefix('torch.')}" for t in tensors(nest)]
    return " and ".join(parts) or _kind(nest)


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"

"""Forward passes: how a network is called, and which part of its output is the prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from pnanalysis.errors import ModelError
from pnanalysis.inputs.batches import as_arguments, tensors
from pnanalysis.inputs.models import Loss

#: Entries of an output that hold the prediction: in Hugging Face's models, and in torchvision's segmentation models.
PREDICTIONS = ("logits", "out")
#: The target that torch's cross-entropy ignores by default.
IGNORED = -100
_WRAP = "wrap the network in a module that returns its logits, or give a loss that takes what it returns"


def forward(model: nn.Module, inputs: Any, state: Mapping[str, Tensor] | None = None) -> Any:
    """Output of the network: a mapping is passed by keyword, a tuple or list by position, anything else as it is.

    ``state`` replaces the network's own parameters and buffers.
    """
    arguments, keywords = as_arguments(inputs)
    if state is None:
        return model(*arguments, **keywords)
    return functional_call(model, dict(state), arguments, keywords)


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
    return ModelError(f"the network returns {_kind(outputs)}, where {name} takes a tensor; {_WRAP}")


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

"""Where a network meets its data: how it is called, what counts of its answer, and what goes wrong as one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pnanalysis.errors import DataError, ModelError, PnError, reason
from pnanalysis.inputs.batches import as_arguments, cut, move, tensors
from pnanalysis.inputs.models import Loss

#: Entries of an answer that hold the prediction: of Hugging Face's models, and of torchvision's segmentation.
PREDICTIONS = ("logits", "out")
#: The target that torch's cross-entropy passes over where it is not told another.
IGNORED = -100
_WRAP = "wrap the network in a module that returns its logits, or give a loss that takes what it returns"


def run(model: nn.Module, inputs: Any, state: Mapping[str, Tensor] | None = None) -> Any:
    """The network's answer: a mapping is passed by keyword, a tuple or list by position, all else as it is.

    ``state`` stands in for the network's own parameters and buffers.
    """
    arguments, keywords = as_arguments(inputs)
    if state is None:
        return model(*arguments, **keywords)
    return functional_call(model, dict(state), arguments, keywords)


def prediction(outputs: Any) -> Tensor | None:
    """The tensor that is a network's prediction: the answer itself, its ``logits`` or ``out``, the first of a sequence.

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


def wanted(outputs: Any, who: str = "the network") -> Tensor:
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


def placed(loss: Loss, device: torch.device, dtype: torch.dtype) -> Loss:
    """The loss with what tensors it holds (class weights, say) on the device and in the precision of the network."""
    if isinstance(loss, nn.Module):
        held = [*loss.parameters(), *loss.buffers()]
        if all(t.device == device and (t.dtype == dtype or not t.is_floating_point()) for t in held):
            return loss
        return deepcopy(loss).to(device, dtype)
    if isinstance(loss, partial):
        return partial(loss.func, *loss.args, **move(loss.keywords, device, dtype))
    return loss


def not_for(loss: Loss, outputs: Any) -> ModelError:
    """What to say where a loss takes a tensor and the network returns something else."""
    name = getattr(loss, "__name__", type(loss).__name__)
    return ModelError(f"the network returns {_kind(outputs)}, where {name} takes a tensor; {_WRAP}")


@contextmanager
def explained(
    label: str, model: nn.Module | None = None, batches: Iterable[Any] = (), loss: Loss | None = None
) -> Iterator[None]:
    """What the network or the loss raise when given the data, as one sentence.

    Parameters
    ----------
    label : str
        What the network is called.
    model, batches, loss : optional
        Tried again on two examples when something was raised, to say which of them does not fit.

    Raises
    ------
    DataError
        In place of what was raised in the body, where two examples or a target show the fault, or torch raised it;
        all else passes.
    """
    try:
        yield
    except (PnError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        found = None if model is None else _diagnosis(model, batches, loss, error)
        if found is None and not isinstance(error, RuntimeError | IndexError | ValueError):
            raise  # no fault of the data's that could be shown
        if found is None:
            found = (
                f"the network and the loss cannot be computed with here ({reason(error)}); "
                "check the data beyond the first two examples, and what the network does"
            )
        raise DataError(f"{label}: {found}") from error


@torch.no_grad()
def _diagnosis(model: nn.Module, batches: Iterable[Any], loss: Loss | None, error: Exception) -> str | None:
    """What does not fit, as far as two examples and a look at all targets tell."""
    try:
        first = next(iter(batches))
        own = next(model.parameters())
        inputs, targets = move(cut(first, slice(0, 2)), own.device, own.dtype)
    except Exception:  # nothing that could be tried
        return None
    try:
        outputs = run(model, inputs)
    except Exception as own_error:
        return f"the network cannot take these data: inputs of {_shapes(inputs)} ({reason(own_error)})"
    if loss is None:
        return None
    try:
        loss(outputs, targets)
        failed = None
    except Exception as own_error:
        failed = own_error
    if not isinstance(outputs, Tensor):
        if failed is not None:
            return str(not_for(loss, outputs))
        return f"the network returns {_kind(outputs)}, which cannot be taken here ({reason(error)}); {_WRAP}"
    about_targets = failed is not None or isinstance(error, IndexError) or "assert" in str(error)
    beyond = _no_class(outputs, batches, loss) if about_targets else None
    if beyond is not None:
        return f"the loss cannot take these data: {beyond}"
    if failed is None:
        return None
    return (
        f"the loss cannot take these data: outputs of {_shapes(outputs)} with targets of {_shapes(targets)} "
        f"({reason(failed)})"
    )


def _no_class(outputs: Tensor, batches: Iterable[Any], loss: Loss) -> str | None:
    """The first integer target that is no class of these outputs."""
    ignored = getattr(loss, "ignore_index", getattr(loss, "keywords", {}).get("ignore_index", IGNORED))
    for _, targets in batches:
        whole = isinstance(targets, Tensor) and not targets.is_floating_point() and not targets.is_complex()
        if not whole or outputs.ndim != targets.ndim + 1:
            return None
        said = no_class(outputs.shape[1], targets, ignored)
        if said is not None:
            return said
    return None


def no_class(n_classes: int, targets: Tensor, ignored: int = IGNORED) -> str | None:
    """That some target is not one of so many classes; ``None`` if all are."""
    bad = ((targets < 0) | (targets >= n_classes)) & (targets != ignored)
    if not bool(bad.any()):
        return None
    return f"the target {int(targets[bad][0])} is no class of a network with {n_classes} outputs (0 to {n_classes - 1})"


def _shapes(nest: Any) -> str:
    """Shapes and types, as words."""
    parts = [f"shape {tuple(t.shape)}, {str(t.dtype).removeprefix('torch.')}" for t in tensors(nest)]
    return " and ".join(parts) or _kind(nest)


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"

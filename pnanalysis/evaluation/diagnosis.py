"""What goes wrong between a network, its loss and its data, as one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pnanalysis.errors import DataError, PnError, reason
from pnanalysis.evaluation.forward import _WRAP, IGNORED, _kind, _shapes, forward, no_class, not_for
from pnanalysis.evaluation.losses import known
from pnanalysis.inputs.batches import cut, move
from pnanalysis.inputs.models import Loss


@contextmanager
def clear_errors(
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
        outputs = forward(model, inputs)
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
    found = known(loss)
    ignored = getattr(loss, "ignore_index", IGNORED) if found is None else found.ignored
    for _, targets in batches:
        whole = isinstance(targets, Tensor) and not targets.is_floating_point() and not targets.is_complex()
        if not whole or outputs.ndim != targets.ndim + 1:
            return None
        said = no_class(outputs.shape[1], targets, ignored)
        if said is not None:
            return said
    return None

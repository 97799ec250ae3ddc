"""Errors of networks, losses and data that do not fit together, as one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pnanalysis.errors import DataError, PnError, reason
from pnanalysis.evaluation.forward import _WRAP, IGNORED, _kind, _shapes, forward, no_class, not_for
from pnanalysis.evaluation.losses import known
from pnanalysis.inputs.batches import first_examples, move
from pnanalysis.inputs.models import Loss


@contextmanager
def clear_errors(
    label: str, model: nn.Module | None = None, batches: Iterable[Any] = (), loss: Loss | None = None
) -> Iterator[None]:
    """Turn errors that a network or loss raises on data into one sentence.

    Parameters
    ----------
    label : str
        How messages refer to the network.
    model, batches, loss : optional
        Tried again on two examples after an error, to find out which of them does not fit.

    Raises
    ------
    DataError
        Instead of the original error, if two examples or a target reproduce it, or if torch raised it. Other errors
        propagate.
    """
    try:
        yield
    except (PnError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        found = None if model is None else _diagnosis(model, batches, loss, error)
        if found is None and not isinstance(error, RuntimeError | IndexError | ValueError):
            raise  # a bug, not data that do not fit
        if found is None:
            found = (
                f"the network and the loss cannot be computed with here ({reason(error)}); "
                "check the data beyond the first two examples, and what the network does"
            )
        raise DataError(f"{label}: {found}") from error


@torch.no_grad()
def _diagnosis(model: nn.Module, batches: Iterable[Any], loss: Loss | None, error: Exception) -> str | None:
    """What does not fit, as far as two examples and all targets show."""
    try:
        first = next(iter(batches))
        own = next(model.parameters())
        inputs, targets = move(first_examples(first, 2), own.device, own.dtype)
    except Exception:  # there is nothing to try again
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
    """A message about the first integer target that is not a class of these outputs."""
    found = known(loss)
    ignored = getattr(loss, "ignore_index", IGNORED) if found is None else found.ignored
    for _, targets in batches:
        whole = isinstance(targets, Tensor) and not targets.is_floating_point() and not targets.is_complex()
        if not whole or outputs.ndim != targets.ndim + 1:
            return None
        message = no_class(outputs.shape[1], targets, ignored)
        if message is not None:
            return message
    return None

"""Errors of networks, losses and data that do not fit together, as one sentence."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pnanalysis
from pnanalysis.errors import USER_ERRORS, DataError, ModelError, PnError, is_out_of_memory, reason
from pnanalysis.evaluation.forward import _WRAP, _kind, _shapes, forward, loss_of_model, no_class, not_for
from pnanalysis.evaluation.losses import known
from pnanalysis.inputs.batches import IGNORED, first_examples, move
from pnanalysis.inputs.models import Loss, takes_model

#: How torch words that an operation lacks a derivative or a vectorised form; the group names the operation.
_UNSUPPORTED = re.compile(
    r"derivative for (?:aten::)?(\w+) is not implemented"
    r"|the derivative of '?(\w+)'? is not implemented"
    r"|forward AD with (?:aten::)?(\w+)"
    r"|[Bb]atching rule not implemented for (?:aten::)?(\w+)"
    r"|(\w+)\(\) (?:is not|isn't) (?:twice )?differentiable"
)
#: Where torch and this package live, neither of which is the user's own code; nor is what Python brings.
_LIBRARIES = tuple(str(Path(library.__path__[0]).resolve()) for library in (torch, pnanalysis))
_PYTHON = str(Path(contextlib.__file__).resolve().parent)


@contextlib.contextmanager
def clear_errors(
    label: str, model: nn.Module | None = None, batches: Iterable[Any] = (), loss: Loss | None = None
) -> Iterator[None]:
    """Turn errors that a network or loss raises on data into one sentence.

    Parameters
    ----------
    label : str
        How messages refer to the network.
    model, batches, loss : optional
        Tried again on two examples after an error, and then batch by batch, to find out which of them does not fit.

    Raises
    ------
    ModelError
        Instead of the original error, if torch lacks a derivative that was asked for, the code of a network or loss
        ends the program, or the error is neither that of data nor of a target.
    DataError
        If two examples, a batch or a target reproduce it. Errors of running out of memory propagate, and so do those
        that nothing reproduces and that arose neither in torch nor in the user's code.
    """
    try:
        yield
    except PnError:
        raise
    except SystemExit as ending:
        raise ModelError(
            f"{label}: the code of the network or the loss ends the program ({described(ending)}); let it return a "
            "result, or raise an error"
        ) from ending
    except Exception as error:
        if is_out_of_memory(error):
            raise
        operation = _unsupported(error)
        if operation is not None:
            raise ModelError(
                f"{label}: torch has no derivative of {operation} of the order or kind that is needed here "
                f"({described(error)}); compute it from operations that have one, or leave its layer out"
            ) from error
        found = None if model is None else _diagnosis(model, batches, loss, error)
        if found is not None:
            raise DataError(f"{label}: {found}") from error
        if not isinstance(error, RuntimeError | IndexError | ValueError) and not _of_user(error):
            raise  # a bug, or a disk: not a network or data that do not fit
        look = (
            "at the data, and at what the network does" if model is None else "at what they do; they take all the data"
        )
        raise ModelError(
            f"{label}: the network and the loss cannot be computed with here ({described(error)}); look {look}"
        ) from error


def described(error: BaseException) -> str:
    """Message of an error, and the place where it arose in the code of a network or loss, if it did there."""
    frames = _user_frames(error)
    place = f", at {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
    return reason(error) + place


def _user_frames(error: BaseException, first: int = 0) -> list[traceback.FrameSummary]:
    """Where an error passed through code that is neither of torch, this package nor Python."""
    frames = traceback.extract_tb(error.__traceback__)[first:]
    return [frame for frame in frames if not _of_library(frame.filename)]


def _of_user(error: Exception) -> bool:
    """Whether an error is that of a user's code; those of files may come from libraries that write results.

    The first two frames are of :func:`clear_errors` and of its body.
    """
    return not isinstance(error, OSError) and bool(_user_frames(error, 2))


def _of_library(filename: str) -> bool:
    path = str(Path(filename).resolve())
    return path.startswith(_LIBRARIES) or (path.startswith(_PYTHON) and "-packages" not in path)


def _unsupported(error: BaseException) -> str | None:
    """The operation that torch cannot differentiate, or vectorise, as it was asked to."""
    found = _UNSUPPORTED.search(str(error))
    return None if found is None else next(group for group in found.groups() if group)


@torch.no_grad()
def _diagnosis(model: nn.Module, batches: Iterable[Any], loss: Loss | None, error: Exception) -> str | None:
    """What does not fit, as far as two examples, all batches and all targets show."""
    try:
        own = next(model.parameters())
        first = move(next(iter(batches)), own.device, own.dtype)
    except USER_ERRORS:  # there is nothing to try again
        return None
    failed: BaseException | None
    few = inputs, targets = first_examples(first, 2)
    if loss is not None and takes_model(getattr(loss, "function", loss)):
        return _of_loss_with_model(model, few, loss)
    try:
        outputs = forward(model, inputs)
    except USER_ERRORS as own_error:
        return f"the network cannot take these data: inputs of {_shapes(inputs)} ({described(own_error)})"
    if loss is None:
        return _failing_batch(model, batches, loss)
    try:
        loss(outputs, targets)
        failed = None
    except USER_ERRORS as own_error:
        failed = own_error
    if isinstance(failed, PnError):
        return str(failed)
    if not isinstance(outputs, Tensor):
        if failed is not None and known(loss) is None:
            return f"the loss cannot take what the network returns, {_kind(outputs)} ({described(failed)})"
        if failed is not None:
            return str(not_for(loss, outputs))
        return f"the network returns {_kind(outputs)}, which cannot be taken here ({reason(error)}); {_WRAP}"
    about_targets = failed is not None or isinstance(error, IndexError) or "assert" in str(error)
    beyond = _no_class(outputs, batches, loss) if about_targets else None
    if beyond is not None:
        return f"the loss cannot take these data: {beyond}"
    if failed is None:
        return _failing_batch(model, batches, loss)
    return (
        f"the loss cannot take these data: outputs of {_shapes(outputs)} with targets of {_shapes(targets)} "
        f"({described(failed)})"
    )


def _of_loss_with_model(model: nn.Module, batch: tuple[Any, Any], loss: Loss) -> str | None:
    try:
        loss_of_model(loss, model, *batch)
    except USER_ERRORS as error:
        return f"the loss cannot take this network with these data: batches of {_shapes(batch)} ({described(error)})"
    return None


def _failing_batch(model: nn.Module, batches: Iterable[Any], loss: Loss | None) -> str | None:
    """A message about the first batch on which the network or the loss fails."""
    own = next(model.parameters())
    for i, batch in enumerate(batches):
        inputs, targets = move(batch, own.device, own.dtype)
        try:
            outputs = forward(model, inputs)
            if loss is not None:
                loss(outputs, targets)
        except USER_ERRORS as error:
            return f"the network or the loss cannot take batch {i}: {_shapes((inputs, targets))} ({described(error)})"
    return None


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

"""Turn a name into the thing it names: registered through an entry point, or ``module:attribute``."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pnanalysis.errors import USER_ERRORS, DataError, ModelError, PnError, reason

MODELS = "pnanalysis.models"
DATASETS = "pnanalysis.datasets"

_ERRORS: dict[str, type[PnError]] = {MODELS: ModelError, DATASETS: DataError}


def registered(group: str) -> list[str]:
    """Names that an entry-point group offers, sorted."""
    return sorted(entry_points(group=group).names)


def resolve(group: str, name: str) -> Any:
    """Load the object registered as ``name`` in an entry-point group.

    Raises
    ------
    PnError
        A `ModelError` or `DataError` that lists the registered names.
    """
    matches = tuple(entry_points(group=group, name=name))
    if not matches:
        what = "model" if group == MODELS else "data set"
        raise _ERRORS[group](
            f"unknown {what} {name!r}; registered: {', '.join(registered(group))}; give a custom one as module:factory"
        )
    return matches[0].load()


def import_object(spec: str, error: type[PnError] = PnError) -> Any:
    """Import ``module:attribute``, looking in the current folder too.

    This runs the module's code: only call it with text that the user typed.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise error(f"{spec!r} is neither a registered name nor of the form module:attribute")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except ImportError as cause:
        raise error(f"cannot import {module_name!r} ({cause}); is it on the path or in this folder?") from cause
    except AttributeError as cause:
        if module_name in sys.modules:
            raise error(f"module {module_name!r} has no {attribute!r}") from cause
        raise error(f"cannot import {module_name!r}: {describe_error(cause)}") from cause
    except USER_ERRORS as cause:  # user code may raise anything on import
        raise error(f"cannot import {module_name!r}: {describe_error(cause)}") from cause
    return found


def describe_error(error: BaseException) -> str:
    """Message and place of an error in user code."""
    text = reason(error)
    if isinstance(error, SyntaxError):
        return text  # its message names the place already
    own = Path(__file__).parent
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent != own]
    return f"{text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else text

"""Checks that arguments of several analyses share; each failure is one sentence."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from math import isfinite
from typing import Any

import torch

from pnanalysis.errors import PnError

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def at_least(least: int, **numbers: Any) -> None:
    """Whole numbers must not be smaller than this; ``None`` stands for a default and passes.

    Raises
    ------
    PnError
    """
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not _whole(value) or value < least):
            raise PnError(f"{name} is {value!r}; it must be a whole number of at least {least}")


def positive(**numbers: Any) -> None:
    """Numbers must be finite and above zero; ``None`` stands for a default and passes.

    Raises
    ------
    PnError
    """
    for name, value in numbers.items():
        if value is not None and not (_finite(value) and float(value) > 0):
            raise PnError(f"{name} is {value!r}; it must be a number above 0")


def ascending(name: str, values: Any, n: int) -> None:
    """So many finite numbers, in pairs of a minimum below its maximum; ``None`` stands for a default and passes.

    Raises
    ------
    PnError
    """
    if values is None:
        return
    numbers = list(values) if isinstance(values, Iterable) else [values]
    right = len(numbers) == n and all(map(_finite, numbers))
    if not right or any(low >= high for low, high in zip(numbers[::2], numbers[1::2], strict=True)):
        raise PnError(f"{name} is {values!r}; it must be {n} numbers, each minimum below its maximum")


def _whole(value: Any) -> bool:
    try:
        return operator.index(value) is not None
    except TypeError:
        return False


def _finite(value: Any) -> bool:
    try:
        return not isinstance(value, str | bytes) and isfinite(float(value))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


def one_of(known: Iterable[str], **names: Any) -> None:
    """Names must be among those known.

    Raises
    ------
    PnError
    """
    known = list(known)
    for name, value in names.items():
        if value not in known:
            raise PnError(f"unknown {name} {value!r}; there are {', '.join(known)}")


def resolve_dtype(name: Any) -> torch.dtype:
    """``float32`` or ``float64``.

    Raises
    ------
    PnError
        For any other name.
    """
    one_of(DTYPES, dtype=name)
    return DTYPES[name]

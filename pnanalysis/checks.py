"""Checks of arguments and of output paths before any work begins; each error is one sentence."""

from __future__ import annotations

import operator
import os
import shutil
from collections.abc import Iterable
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pnanalysis.errors import PnError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float64")


#: The most that a count may be: more examples, steps or bins fit into no memory.
LARGEST_COUNT = 2**31 - 1
#: Seeds are stored as whole numbers of 64 bits with a sign, by generators as in files.
LARGEST_SEED = 2**63 - 1
#: Of a run: its manifest lists them all.
MOST_ITERATIONS = 100_000
#: Sums of a few squares of larger numbers may overflow.
_LARGEST = 1e100


def at_least(least: int, **numbers: Any) -> None:
    """Check that counts are whole, not below ``least`` nor beyond any memory; ``None`` stands for a default and passes.

    Raises
    ------
    PnError
    """
    _check_whole(least, LARGEST_COUNT, numbers)


def check_seed(least: int = 0, **seeds: Any) -> None:
    """Check that seeds are whole numbers that generators and files can hold; ``None`` passes.

    Raises
    ------
    PnError
    """
    _check_whole(least, LARGEST_SEED, seeds)


def _check_whole(least: int, most: int, numbers: dict[str, Any]) -> None:
    for name, value in numbers.items():
        if value is None:
            continue
        if not _is_whole(value, least):
            raise PnError(f"{name} is {shown(value)}; it must be a whole number of at least {least}")
        if value > most:
            raise PnError(f"{name} is {shown(value)}; it must be at most {most:,}")


def shown(value: Any, length: int = 60) -> str:
    """A value in a message, shortened: numbers of thousands of digits cannot even be written out."""
    try:
        text = repr(value)
    except Exception:
        return f"a {type(value).__name__} that cannot be written out"
    return text if len(text) <= length else f"{text[: length // 2]}... ({len(text):,} characters)"


def positive(**numbers: Any) -> None:
    """Check that numbers are above zero, and not so large that results overflow; ``None`` is a default and passes.

    Raises
    ------
    PnError
    """
    for name, value in numbers.items():
        if value is not None and not (_is_finite(value) and 0 < float(value) <= _LARGEST):
            limit = f" and at most {_LARGEST:g}" if _is_finite(value) and float(value) > _LARGEST else ""
            raise PnError(f"{name} is {shown(value)}; it must be a number above 0{limit}")


def ascending(name: str, values: Any, n: int) -> None:
    """Check for ``n`` finite numbers, in pairs of a minimum below its maximum; ``None`` is a default and passes.

    Raises
    ------
    PnError
    """
    if values is None:
        return
    numbers = list(values) if isinstance(values, Iterable) else [values]
    are_numbers = len(numbers) == n and all(map(_is_finite, numbers))
    if not are_numbers or any(low >= high for low, high in zip(numbers[::2], numbers[1::2], strict=True)):
        raise PnError(f"{name} is {values!r}; it must be {n} numbers, each minimum below its maximum")


def _is_whole(value: Any, least: int) -> bool:
    """Whether the value is an integer of Python, NumPy or torch, not below the least; whole floats are none."""
    try:
        return not isinstance(value, bool) and operator.index(value) >= least
    except TypeError:
        return False


def _is_finite(value: Any) -> bool:
    try:
        return not isinstance(value, str | bytes) and isfinite(float(value))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


def one_of(known: Iterable[str], **names: Any) -> None:
    """Check that names are among the known ones.

    Raises
    ------
    PnError
    """
    known = list(known)
    for name, value in names.items():
        if value not in known:
            raise PnError(f"unknown {name} {shown(value)}; choose one of {', '.join(known)}")


def resolve_dtype(name: Any) -> torch.dtype:
    """The torch type of the name ``float32`` or ``float64``.

    Raises
    ------
    PnError
        For any other name.
    """
    one_of(DTYPES, dtype=name)
    import torch  # here, so that command lines check their options without loading it

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def check_room(path: str | os.PathLike[str], n_bytes: int, what: str, advice: str) -> None:
    """Refuse work whose files would not fit on the disk; those that are in the folder ``path`` already count as room.

    Raises
    ------
    PnError
    """
    path = Path(path)
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    written = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if existing == path else 0
    free = shutil.disk_usage(existing).free + written
    if n_bytes > free:
        raise PnError(f"{path}: {what} {human(n_bytes)}, the disk has {human(free)} free; {advice}")


def human(n_bytes: float) -> str:
    """Bytes as text: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 999.5:  # three digits
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.3g} TiB"


def duration(seconds: float) -> str:
    """A time as text, in its two largest units: ``1 h 02 min``."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


_SYSTEM = ("/dev", "/proc", "/sys")

#: Suffixes of the formats that figures are saved in.
FIGURE_FORMATS = (".png", ".pdf", ".svg")


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Refuse a path where no file can be written.

    Raises
    ------
    PnError
        If the path is a folder, pipe or device, lies below a file, or in a folder without write permission.
    """
    path = Path(path)
    if path.is_dir():
        raise PnError(f"{path}: is a folder; name a file in it")
    if path.exists() and (not path.is_file() or is_of_system(path)):
        raise PnError(f"{path}: is a device or pipe, where results cannot be saved; name a file")
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    if not existing.is_dir():
        raise PnError(f"{path}: cannot be written, {existing} is a file; choose another place")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PnError(f"{path}: cannot be written, no permission in {existing}; choose another place")
    return path


def is_of_system(path: Path) -> bool:
    """Whether a path is among the system's devices and streams; these may be links that lead to ordinary files."""
    folder = path.absolute().parent
    return any(folder.is_relative_to(root) for root in _SYSTEM) and not folder.is_relative_to("/dev/shm")


def check_figure(path: str | os.PathLike[str]) -> Path:
    """:func:`check_writable` for a figure, whose format is given by its suffix.

    Raises
    ------
    PnError
        If the suffix is not one of :data:`FIGURE_FORMATS`, or nothing can be written there.
    """
    path = Path(path)
    if path.suffix.lower() not in FIGURE_FORMATS:
        raise PnError(f"{path}: figures are saved as {', '.join(FIGURE_FORMATS)}; choose one of these suffixes")
    return check_writable(path)

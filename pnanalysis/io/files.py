"""Files opened as what they must be: regular ones, no larger than expected, and inside their run's own folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from pnanalysis.errors import PnError, reason


def open_regular(path: str | os.PathLike[str], error: type[PnError], within: Path | None = None) -> BinaryIO:
    """Open a regular file for reading.

    Parameters
    ----------
    path : path
    error : type
        The error to raise.
    within : Path, optional
        The run to which the file belongs. Links are then not followed, for a run may come from a stranger, and its
        links would lead to the reader's own files.

    Raises
    ------
    PnError
        If there is no such file, it cannot be opened, is a folder, pipe or device, or leads out of ``within``.
    """
    path = Path(path)
    if within is not None:
        check_inside(path, within, error)
    # Opening a pipe would otherwise wait for someone to write into it.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_NOFOLLOW if within is not None else 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError as missing:
        raise error(f"{path}: no such file") from missing
    except (OSError, ValueError) as failure:
        raise error(f"{path}: cannot be opened ({reason(failure)})") from failure
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise error(f"{path}: is not a regular file, and only these are read; replace it by a copy of what is meant")
    return os.fdopen(descriptor, "rb")


def read_regular(path: str | os.PathLike[str], limit: int, error: type[PnError], within: Path | None = None) -> bytes:
    """The bytes of a regular file; see :func:`open_regular`.

    Raises
    ------
    PnError
        Also if there are more than ``limit`` of them, before any is read.
    """
    with open_regular(path, error, within) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise error(f"{path}: has {size:,} bytes, and a file of this kind at most {limit:,}; it is not one")
        try:
            return file.read(size)  # not more: as much memory is taken as is asked for
        except OSError as failure:
            raise error(f"{path}: cannot be read ({reason(failure)})") from failure


def check_inside(path: Path, within: Path, error: type[PnError]) -> None:
    """Refuse a path that is a link, or whose folder leads out of the run ``within``.

    Raises
    ------
    PnError
    """
    if path.is_symlink():
        raise error(f"{path}: is a link, and in a run only its own files count; replace it by a copy of what is meant")
    try:
        inside = path.parent.resolve().is_relative_to(within.resolve())
    except (OSError, RuntimeError):  # links in a circle
        inside = False
    if not inside:
        raise error(f"{path}: its folder is a link out of the run; replace it by a folder in the run")


def check_tree(folder: Path, error: type[PnError]) -> None:
    """Refuse a folder with links, pipes or devices anywhere below it.

    Raises
    ------
    PnError
    """
    for parent, folders, files in os.walk(folder):
        for item in (Path(parent, name) for name in (*folders, *files)):
            try:
                mode = item.lstat().st_mode
            except FileNotFoundError:  # removed by another process meanwhile
                continue
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise error(f"{item}: is a link, pipe or device, and only files are read here; remove it")

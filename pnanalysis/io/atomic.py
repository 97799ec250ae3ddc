"""Files and directories that appear whole or not at all, whenever the process is killed."""

from __future__ import annotations

import glob
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pnanalysis.checks import is_of_system
from pnanalysis.errors import PnError

#: Ends the names of unfinished files, which no pattern for datasets or weights matches.
PARTIAL = ".partial"
#: Seconds after which a removed directory is looked for again.
_PAUSES = (0.01, 0.1, 1.0, 1.0)


@contextmanager
def atomic_path(path: str | os.PathLike[str], within: Path | None = None) -> Iterator[Path]:
    """Yield a temporary file name next to ``path``; on success sync that file to disk and rename it to ``path``.

    If the body raises, ``path`` is untouched and the temporary file is removed. What processes that were killed have
    left of earlier attempts is removed, too. The file gets the permissions of the one that it replaces, or those that
    the user's umask allows. A link at ``path`` is replaced, and never followed.

    Folders on the way to ``path`` are made; not ``within`` or those above it, if that is given.

    Raises
    ------
    PnError
        If there is a folder, pipe or device at ``path``.
    OSError
        If the folder cannot be created or written to (the disk may be full).
    """
    path = check_replaceable(path)
    if within is None:
        path.parent.mkdir(parents=True, exist_ok=True)
    else:
        for folder in reversed([each for each in path.parents if each.is_relative_to(within) and each != within]):
            folder.mkdir(exist_ok=True)
    _remove_leftovers(path)
    temporary = _unfinished_name(path)
    mode = path.stat().st_mode & 0o777 if path.is_file() and not path.is_symlink() else None
    try:
        # unlike mkstemp, this lets the umask decide
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        yield temporary
        if mode is not None:
            temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def check_replaceable(path: str | os.PathLike[str]) -> Path:
    """Refuse a path where there is anything but a regular file, or nothing: devices must not be renamed over.

    Raises
    ------
    PnError
    """
    path = Path(path)
    # Streams such as /dev/stdout are links, at times to a file: the link must not be replaced either.
    if path.exists() and (not path.is_file() or is_of_system(path)):
        raise PnError(f"{path}: is a device, pipe or folder, which cannot be replaced by a file; name another file")
    return path


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a name under which the body makes a directory; on success sync its files and rename it to ``path``.

    A directory at ``path`` is replaced. If the body raises, it is untouched and the new directory is removed.

    Raises
    ------
    OSError
        If the folder cannot be created or written to (the disk may be full).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    workplace = _unfinished_name(path)
    workplace.mkdir()
    temporary, replaced = workplace / path.name, workplace / f"{path.name}.replaced"
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as opened:
                    os.fsync(opened.fileno())
        # A directory that is not empty cannot be renamed over: the old one moves aside for the moment between.
        if path.exists():
            os.replace(path, replaced)
        try:
            os.replace(temporary, path)
        except OSError:
            if replaced.exists():
                os.replace(replaced, path)
            raise
    except BaseException:
        _remove_while_written(workplace)
        raise
    shutil.rmtree(workplace, ignore_errors=True)
    _sync_directory(path.parent)


def _remove_while_written(path: Path) -> None:
    """Remove a directory into which threads of a writer that has failed may still write."""
    for seconds in _PAUSES:
        shutil.rmtree(path, ignore_errors=True)
        time.sleep(seconds)
        if not path.exists():
            return


def _unfinished_name(path: Path) -> Path:
    """A hidden name next to ``path`` that tells whose it is."""
    # names of files have at most 255 bytes
    return path.with_name(f".{path.name[:40]}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}{PARTIAL}")


def _remove_leftovers(path: Path) -> None:
    """Remove what earlier writers of this path on this machine have left, if their processes are gone."""
    prefix = f".{path.name[:40]}.{_host()}."
    for leftover in path.parent.glob(f"{glob.escape(prefix)}*{PARTIAL}"):
        owner = leftover.name.removeprefix(prefix).partition(".")[0]
        if owner.isdecimal() and not _is_alive(int(owner)):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", platform.node())[:64]


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def _sync_directory(path: Path) -> None:
    """Sync a directory, without which a rename in it may not survive a power failure."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)

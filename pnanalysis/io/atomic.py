"""Files and directories that appear whole or not at all, whenever the process is killed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file name next to ``path``; on success sync that file to disk and rename it to ``path``.

    If the body raises, ``path`` is untouched and the temporary file is removed.

    Raises
    ------
    OSError
        If the folder cannot be created or written to (the disk may be full).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes files that only their owner can read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


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
    workplace = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.stem}-"))
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
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    """Sync a directory, without which a rename in it may not survive a power failure."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)

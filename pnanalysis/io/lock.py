"""One writer at a time: a lock that ends with the process that holds it, however that ends."""

from __future__ import annotations

import fcntl
import os
import platform
import time
import weakref
from contextlib import suppress
from pathlib import Path

from pnanalysis.errors import RunError

LOCK = ".lock"


class Lock:
    """Exclusive use of a folder, by a lock of the operating system on a hidden file that names the owner.

    A process that dies leaves the file, but not the lock: the next one takes it over.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._held: weakref.finalize[..., Lock] | None = None

    def acquire(self) -> None:
        """Take the lock; nothing happens if it is held already, or where the file system has no locks.

        Raises
        ------
        RunError
            If another process holds it; the message says which.
        OSError
            If the file cannot be created.
        """
        while self._held is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(self.path, flags, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if not _is_exclusive(descriptor):  # someone was looking: see is_held
                    os.close(descriptor)
                    time.sleep(0.01)
                    continue
                owner = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
                os.close(descriptor)
                raise RunError(
                    f"{self.path.parent}: is being written by {owner}; wait until it has ended, or stop it"
                ) from error
            except OSError:  # no locks here: as before there were any
                os.close(descriptor)
                return
            if not self._is_current(descriptor):  # its owner has removed the file meanwhile
                os.close(descriptor)
                continue
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
            # also when the lock is forgotten, or the process ends
            self._held = weakref.finalize(self, _release, self.path, descriptor, os.getpid())

    def release(self) -> None:
        """Give the lock back, if it is held, and remove its file."""
        if self._held is not None:
            self._held()
            self._held = None

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path, follow_symlinks=False))
        except FileNotFoundError:
            return False


def is_held(folder: Path) -> bool:
    """Whether a process holds the lock of a folder, as far as that can be told; nothing is written to find out."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:  # another user's
        return True
    try:
        return _is_exclusive(descriptor)
    finally:
        os.close(descriptor)


def _is_exclusive(descriptor: int) -> bool:
    """Whether another one has this file for itself, by sharing it for a moment."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # also where the file system has no locks, so that nothing is known
        return True
    return False


def _release(path: Path, descriptor: int, owner: int) -> None:
    if os.getpid() == owner:  # and not a copy of this process, such as one that loads data
        with suppress(OSError):  # the folder may be read-only by now; without its lock the file means nothing
            if os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False)):  # and not another one's
                path.unlink()
    os.close(descriptor)

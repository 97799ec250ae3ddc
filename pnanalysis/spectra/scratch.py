"""Where bases lie on the disk, if nothing else is said."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pnanalysis.errors import CurvatureError

_MOUNTS = Path("/proc/self/mounts")
_IN_MEMORY = ("tmpfs", "ramfs")


def scratch_folder() -> Path:
    """The system's folder for temporary files, or another one that may be written to where that is kept in memory.

    Raises
    ------
    CurvatureError
        If there is none on a disk.
    """
    first = Path(tempfile.gettempdir())
    for folder in (first, Path("/var/tmp"), Path.cwd()):
        if folder.is_dir() and os.access(folder, os.W_OK) and not lies_in_memory(folder):
            return folder
    raise CurvatureError(
        f"{first} is kept in memory (tmpfs), so that a basis there would spare none; set TMPDIR to a folder on a disk"
    )


def lies_in_memory(folder: Path) -> bool:
    """Whether files there take memory, as far as the system says."""
    try:
        mounts = [line.split()[1:3] for line in _MOUNTS.read_text().splitlines()]
    except OSError:  # not Linux
        return False
    folder = folder.resolve()
    # blanks are written as octal numbers there; of several mounts at one place the last one holds
    holding = [
        (len(place), i, kind) for i, (place, kind) in enumerate(mounts) if folder.is_relative_to(_unescaped(place))
    ]
    return max(holding)[2] in _IN_MEMORY if holding else False


def _unescaped(place: str) -> str:
    return place.replace("\\040", " ").replace("\\011", "\t")


__all__ = ["lies_in_memory", "scratch_folder"]

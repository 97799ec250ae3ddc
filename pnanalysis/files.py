"""Places that are going to be written to, looked at before the work begins."""

from __future__ import annotations

import os
from pathlib import Path

from pnanalysis.errors import PnError

#: Suffixes of the formats that figures are saved in.
FIGURE_FORMATS = (".png", ".pdf", ".svg")


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Refuse a path where no file can be written, while nothing has been computed yet.

    Raises
    ------
    PnError
        If the path is a folder, lies below a file, or in a folder that may not be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise PnError(f"{path}: is a folder; name a file in it")
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    if not existing.is_dir():
        raise PnError(f"{path}: cannot be written, {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PnError(f"{path}: cannot be written, no permission in {existing}; choose another place")
    return path


def check_figure(path: str | os.PathLike[str]) -> Path:
    """The same for a figure, whose suffix says the format.

    Raises
    ------
    PnError
        If the suffix is of no format that figures are saved in, or nothing can be written there.
    """
    path = Path(path)
    if path.suffix.lower() not in FIGURE_FORMATS:
        raise PnError(f"{path}: figures are saved as {', '.join(FIGURE_FORMATS)}; choose one of these suffixes")
    return check_writable(path)

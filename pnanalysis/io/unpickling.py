"""Files saved by ``torch.save``, read without importing or running anything that they name."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from pnanalysis.errors import ModelError

#: An archive may hold this many times its own size, and this many bytes in any case.
_MOST_GROWTH, _SMALL = 4, 2**24
#: More parts than any network has; torch takes about 0.1 ms for each.
_MOST_ENTRIES = 100_000


def unpickled(path: Path, mmap: bool = False) -> Any:
    """What ``torch.load(weights_only=True)`` gives, with objects of all other types replaced by inert ones.

    Parameters
    ----------
    path : Path
    mmap : bool
        Map tensors into memory instead of reading them, where the format allows.

    Raises
    ------
    ModelError
        If the file is an archive of too many parts, or whose content would take much more memory than its size.
    """
    _refuse_bombs(path)
    with safe_globals(list(_stand_ins(path))):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except (RuntimeError, ValueError):
            if not mmap:
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # older formats cannot be mapped


def _refuse_bombs(path: Path) -> None:
    """Refuse an archive that grows beyond reason when it is read: ``torch.save`` compresses nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # an older format, or damaged: torch says so
    if len(entries) > _MOST_ENTRIES:
        raise ModelError(
            f"{path}: holds {len(entries):,} parts, more than the {_MOST_ENTRIES:,} that are read from such a file; "
            "save the weights as safetensors"
        )
    size, most = sum(entry.file_size for entry in entries), _MOST_GROWTH * path.stat().st_size + _SMALL
    if size > most:
        raise ModelError(
            f"{path}: {size:,} bytes are compressed into it, which torch.save does not do; it is refused, as it may be "
            "made to fill the memory"
        )


def _stand_ins(path: Path) -> Iterator[tuple[type, str]]:
    """A class that does nothing for each name that unpickling would otherwise import.

    Checkpoints of training hold configurations, paths and numbers next to the weights. None of their classes is
    imported: the names are read from the file, and what would be their objects stays empty.
    """
    try:
        names = get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError):  # older formats and other files: torch.load says what is wrong, or reads them
        return
    for name in names:
        # torch fills mappings only if they are plain ones; Lightning keeps hyperparameters in a mapping of its own
        yield dict if name.endswith("AttributeDict") else type("Inert", (Inert,), {}), name


class Inert:
    """Stands for an object of a class that is not imported."""

    def __new__(cls, *arguments: Any, **options: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

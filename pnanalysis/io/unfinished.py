"""Unfinished work in a folder: named tensors and numbers, in files that are replaced as a whole."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pnanalysis.errors import PnError
from pnanalysis.io import digest
from pnanalysis.io.atomic import atomic_path
from pnanalysis.io.files import open_regular

#: Seconds between saves.
EVERY = 300.0


class Unfinished:
    """Parts of a computation that was interrupted, refused where they belong to another one.

    Parameters
    ----------
    folder : Path
    about : mapping
        What the computation depends on, as numbers and texts.
    seen : sequence of float
        Numbers that tell whether a user's code or data have changed meanwhile, which names cannot: a loss, for example.
    tolerance : float
        By how much these may differ.
    error : type of PnError
        Raised for parts that are damaged, or those of another computation.
    every : float
        Seconds between saves.
    """

    def __init__(
        self, folder: Path, about: Mapping[str, Any], seen: Sequence[float], tolerance: float, error: type[PnError],
        every: float = EVERY,
    ) -> None:  # fmt: skip
        self.folder, self.every, self._error = folder, every, error
        self._about, self._seen, self._tolerance = json.dumps(dict(about), sort_keys=True), list(seen), tolerance
        self._last = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether the interval between saves has passed."""
        return time.monotonic() - self._last >= self.every

    def save(self, part: str, tensors: Mapping[str, Tensor], **numbers: Any) -> None:
        """Write a part; where that fails, there is a warning."""
        path = self._path(part)
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {
            "about": self._about, "seen": json.dumps(self._seen), "numbers": json.dumps(numbers),
        }  # fmt: skip
        try:
            with atomic_path(path) as temporary:
                write_signed(kept, temporary, metadata)
        except OSError as error:
            warn_unsaved(path, error)
        self._last = time.monotonic()

    def load(self, part: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors, on the CPU, and numbers of a part; ``None`` where it is not saved.

        Raises
        ------
        PnError
            If it is damaged, or that of another computation.
        """
        path = self._path(part)
        if not path.is_file():
            return None
        with open_regular(path, self._error) as opened:
            digest.check_entry(opened, path, self._error, "delete it to start again")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                numbers, seen = json.loads(metadata["numbers"]), json.loads(metadata["seen"])
                # sums may depend on where in memory their terms begin: copies begin where torch's own tensors do
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            same = metadata["about"] == self._about and all(
                abs(before - now) <= self._tolerance for before, now in zip(seen, self._seen, strict=True)
            )
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise self._error(f"{path}: is no saved state of unfinished work; delete it to start again") from error
        if not same:
            raise self._error(
                f"{path}: holds unfinished work with other settings, data or code; finish it as it was begun, or "
                "delete it to start again"
            )
        return tensors, numbers

    def _path(self, part: str) -> Path:
        return self.folder / f"{part}.safetensors"


def write_signed(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that holds its digest.

    Raises
    ------
    OSError
        If it cannot be written; the disk may be full.
    """
    try:
        save_file(dict(tensors), path, {**metadata, digest.KEY: digest.BLANK})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    digest.sign(path)


def warn_unsaved(path: Path, error: OSError) -> None:
    """Warn that unfinished work is not safe from an interruption."""
    warnings.warn(f"{path}: cannot be written, {error.strerror or error}; going on without", stacklevel=3)

"""Writing run directories, for trainers."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as dump_safetensors

from pnanalysis import schema
from pnanalysis.checks import check_writable
from pnanalysis.errors import RunError, reason
from pnanalysis.io import digest, netcdf
from pnanalysis.io.atomic import atomic_path
from pnanalysis.io.files import check_inside, open_regular
from pnanalysis.io.lock import LOCK, Lock
from pnanalysis.io.manifest import FORMAT, dump_manifest
from pnanalysis.io.runs import CHECKPOINTS, HISTORY, MANIFEST, RESUME
from pnanalysis.io.weights import State


def check_new(path: str | os.PathLike[str]) -> None:
    """Refuse a run directory that exists already and is not empty, or cannot be written.

    Raises
    ------
    RunError
    """
    path = Path(path)
    # Hidden files are the lock, and what a process left that was killed while it wrote its first file.
    if path.exists() and (not path.is_dir() or any(not entry.name.startswith(".") for entry in path.iterdir())):
        raise RunError(
            f"{path}: exists already; give another --out, or --resume to continue it"
            if (path / MANIFEST).is_file()
            else f"{path}: exists and is not a run directory; give another --out"
        )
    check_writable(path / MANIFEST)


class RunWriter:
    """Writes a run directory, every file atomically."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self._lock = Lock(path)

    def lock(self) -> None:
        """Keep other processes from writing this run, until :meth:`release` or the end of this one.

        Raises
        ------
        RunError
            If another process is writing it, or nothing can be written there.
        """
        with self._explaining_failed_writes(LOCK):
            self._lock.acquire()

    def release(self) -> None:
        """Let others write. A writer that is no longer used does so by itself."""
        self._lock.release()

    @classmethod
    def create(cls, path: str | os.PathLike[str], manifest: Mapping[str, Any], parents: bool = True) -> RunWriter:
        """Start a new run, and lock it; ``parents`` says whether to make the folders above it, too.

        Raises
        ------
        RunError
            If the directory exists already and is not empty, or cannot be written.
        """
        path = Path(path)
        check_new(path)
        writer = cls(path, {"format": FORMAT, "schema_version": schema.SCHEMA_VERSION, **manifest})
        try:
            path.mkdir(parents=parents, exist_ok=True)
        except FileNotFoundError as error:
            raise RunError(f"{path.parent}: this folder is gone; put it back and continue with --resume") from error
        writer.lock()
        check_new(path)  # another process may have begun a run here meanwhile
        writer.update()
        return writer

    def update(self, **entries: Any) -> None:
        """Change entries of the manifest and write it."""
        self.manifest.update(entries)
        self._write(MANIFEST, dump_manifest(self.manifest))

    def save_checkpoint(self, iteration: int, epoch: int, state: Mapping[str, torch.Tensor]) -> None:
        """Write weights and buffers as ``checkpoints/iterNN/epochNNN.safetensors``."""
        self._write(f"{CHECKPOINTS}/iter{iteration:02d}/epoch{epoch:03d}.safetensors", _dump(state))

    def save_history(self, history: xr.Dataset) -> None:
        """Write the history dataset."""
        self._write(HISTORY, netcdf.as_bytes(history))

    def save_state(self, tensors: Mapping[str, torch.Tensor], **position: int) -> None:
        """Write what is needed to resume from here: tensors, and integers such as iteration and epoch."""
        self._write(RESUME, _dump(tensors, {key: str(value) for key, value in position.items()}))

    def load_state(self) -> tuple[State, dict[str, int]] | None:
        """What :meth:`save_state` wrote last, or ``None``.

        Raises
        ------
        RunError
            If the file is damaged.
        """
        path = self.path / RESUME
        if not os.path.lexists(path):
            return None
        try:
            with open_regular(path, RunError, self.path) as opened:
                digest.check_entry(opened, path, RunError, "delete it to repeat the iteration")
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                position = {key: int(value) for key, value in metadata.items() if key != digest.KEY}
                return {name: file.get_tensor(name) for name in file.keys()}, position  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
            raise RunError(f"{path}: damaged ({reason(error)}); delete it to repeat the iteration") from error

    def drop_state(self) -> None:
        """Remove the resume state: the run is complete."""
        (self.path / RESUME).unlink(missing_ok=True)

    def _write(self, name: str, content: bytes) -> None:
        path = self.path / name
        with self._explaining_failed_writes(name):
            check_inside(path, self.path, RunError)
            with atomic_path(path, within=self.path) as temporary:
                temporary.write_bytes(content)

    @contextmanager
    def _explaining_failed_writes(self, name: str) -> Iterator[None]:
        """Turn what the operating system raises in the body into a sentence that says how to continue."""
        gone = RunError(f"{self.path}: the folder of the run is gone; put it back and continue with --resume")
        if not self.path.is_dir():  # not to be made again, without what was in it
            raise gone
        try:
            yield
        except OSError as error:
            if not self.path.is_dir():
                raise gone from error
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            cause = "the disk is full" if is_full else error.strerror or reason(error)
            advice = "make room" if is_full else "mend that"
            raise RunError(
                f"{self.path / name}: cannot be written, {cause}; what was saved before is intact: "
                f"{advice} and continue with --resume"
            ) from error


def _dump(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Tensors as the bytes of a safetensors file."""
    # Copies, because the format refuses tensors that share memory (tied weights) or are not contiguous.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    return digest.with_entry(dump_safetensors(copies, {**(metadata or {}), digest.KEY: digest.BLANK}))

"""Flat pieces of checkpoints' parameters, read from their files without loading the rest."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pnanalysis.errors import ModelError, reason
from pnanalysis.io.runs import Checkpoint


class FlatWeights:
    """The named tensors of one checkpoint, seen as one vector.

    Of a safetensors file only the header is read at first, and later only the requested pieces; other files are mapped
    into memory where their format allows.

    Parameters
    ----------
    checkpoint : Checkpoint
    names : sequence of str
        In the order in which they form the vector.

    Raises
    ------
    ModelError
        If the file is damaged, or lacks a tensor.
    """

    def __init__(self, checkpoint: Checkpoint, names: Sequence[str]) -> None:
        self.path: Path = checkpoint.path
        self._checkpoint = checkpoint
        self._places: dict[str, _Place] | None = None
        if self.path.suffix == ".safetensors":
            self._places = _places(self.path)
            self.shapes = {name: place.shape for name, place in self._places.items()}
        else:
            self.shapes = {name: tuple(tensor.shape) for name, tensor in self._load().items()}
        missing = [name for name in names if name not in self.shapes]
        if missing:
            raise ModelError(f"{self.path}: lacks {missing[0]!r}, so it is of another architecture")
        self.names = list(names)

    def read(self, name: str, begin: int, end: int) -> Tensor:
        """Entries ``begin`` to ``end`` of one tensor, flattened, float64."""
        if self._places is None:
            return self._load()[name].reshape(-1)[begin:end].double()
        dtype, _, offset = self._places[name]
        # Not through a memory map: pages of a map stay resident, which for thousands of checkpoints adds up.
        raw = np.fromfile(self.path, np.uint8, (end - begin) * dtype.itemsize, offset=offset + begin * dtype.itemsize)
        if len(raw) < (end - begin) * dtype.itemsize:
            raise ModelError(f"{self.path}: is cut short within {name!r}; copy the file again or repeat the training")
        return torch.from_numpy(raw).view(dtype).double()

    def _load(self) -> dict[str, Tensor]:
        try:
            loaded = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            if isinstance(loaded, dict) and all(isinstance(value, Tensor) for value in loaded.values()):
                return loaded
        except (pickle.UnpicklingError, RuntimeError, ValueError, OSError):
            pass  # older formats cannot be mapped; Checkpoint.load reads them, or raises what is wrong with the file
        return self._checkpoint.load()


class _Place(NamedTuple):
    """A tensor in a file: its type, its shape and the byte where it begins."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


def _places(path: Path) -> dict[str, _Place]:
    """Type, shape and position of every floating-point tensor of a safetensors file."""
    found = {}
    try:
        end = path.stat().st_size
        with safe_open(path, framework="pt") as file:
            # The format allows no gaps between tensors nor after the last, and the library has checked that, so their
            # sizes give their places, counted from the end of the file. The tensors are views that nothing reads.
            for name in reversed(file.offset_keys()):
                tensor = file.get_tensor(name)
                end -= tensor.nbytes
                if tensor.is_floating_point():
                    found[name] = _Place(tensor.dtype, tuple(tensor.shape), end)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: not a readable safetensors file, damaged or cut short ({reason(error)}); "
            "copy the file again or repeat the training"
        ) from error
    return dict(reversed(found.items()))

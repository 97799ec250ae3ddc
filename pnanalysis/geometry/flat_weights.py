"""Flat pieces of checkpoints' parameters, read from their files without loading the rest."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pnanalysis.errors import ModelError
from pnanalysis.io.runs import Checkpoint

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class FlatWeights:
    """The named tensors of one checkpoint, seen as one vector.

    Of a safetensors file the header alone is read at first, and each piece in one go at its place; other files are
    mapped into memory where their format allows.

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
        self._places: dict[str, tuple[torch.dtype, int]] | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        if self.path.suffix == ".safetensors":
            self._places = {}
            for name, (dtype, shape, begin) in _header(self.path).items():
                self._places[name], self.shapes[name] = (dtype, begin), shape
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
        dtype, offset = self._places[name]
        raw = np.fromfile(self.path, np.uint8, (end - begin) * dtype.itemsize, offset=offset + begin * dtype.itemsize)
        if len(raw) < (end - begin) * dtype.itemsize:
            raise ModelError(f"{self.path}: is cut short within {name!r}; copy or train it anew")
        return torch.from_numpy(raw).view(dtype).double()

    def _load(self) -> dict[str, Tensor]:
        try:
            loaded = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            if isinstance(loaded, dict) and all(isinstance(value, Tensor) for value in loaded.values()):
                return loaded
        except (pickle.UnpicklingError, RuntimeError, ValueError, OSError):
            pass  # the checkpoint itself says what is wrong, if anything is
        return self._checkpoint.load()


def _header(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
    """Type, shape and place in the file of every floating-point tensor."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            entries = json.loads(file.read(length))
        found = {}
        for name, entry in entries.items():
            if name != "__metadata__" and entry["dtype"] in _DTYPES:
                dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
                if begin < 0 or min(shape, default=0) < 0 or end - begin != prod(shape) * dtype.itemsize:
                    raise ValueError(f"the place of {name!r} does not fit its shape")
                found[name] = (dtype, shape, 8 + length + begin)
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error})") from error

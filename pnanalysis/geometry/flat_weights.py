"""Flat pieces of checkpoints' parameters, read from their files without loading the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pnanalysis.errors import ModelError, reason
from pnanalysis.inputs.copies import as_real
from pnanalysis.inputs.loading import WeightNames
from pnanalysis.io.runs import Checkpoint
from pnanalysis.io.unpickling import unpickled
from pnanalysis.io.weights import State, StateDicts, check_digest, found_in, is_index, shards


class FlatWeights:
    """The named tensors of one checkpoint, seen as one vector of real numbers: complex ones count as two.

    Of a safetensors file only the header is read at first, and later only the requested pieces; other files are mapped
    into memory where their format allows.

    Parameters
    ----------
    checkpoint : Checkpoint
    names : sequence of str
        In the order in which they form the vector.
    weight_names : WeightNames, optional
        Finds the tensors of a network in the file; without it, the names are those in the file.

    Attributes
    ----------
    shapes : dict of str to tuple of int
        Of each tensor's real numbers: see :func:`pnanalysis.inputs.copies.as_real`.
    complex_names : set of str

    Raises
    ------
    ModelError
        If the file is damaged, or lacks a tensor.
    """

    def __init__(self, checkpoint: Checkpoint, names: Sequence[str], weight_names: WeightNames | None = None) -> None:
        self.path = checkpoint.origin
        self._checkpoint = checkpoint
        self._weight_names = weight_names
        found, places = self._mapped()
        if weight_names is None:
            self._where: dict[str, tuple[str, str]] | None = {
                name: (key, name) for key, state in found.items() for name in state
            }
        else:
            self._where = weight_names.find(found, self.path)
        self._places = {own: places[name] for own, (_, name) in (self._where or {}).items() if name in places}
        tensors = (
            self._loaded()
            if self._where is None
            else {own: found[key][name] for own, (key, name) in self._where.items()}
        )
        self.shapes, self.complex_names = real_shapes(tensors)
        check_names(self.shapes, names, self.path)

    def read(self, name: str, begin: int, end: int) -> Tensor:
        """Entries ``begin`` to ``end`` of one tensor, flattened, float64."""
        if self._where is None:
            return entries(self._loaded()[name], begin, end)
        if name not in self._places:
            key, name = self._where[name]
            return entries(self._mapped()[0][key][name], begin, end)
        # Not through a memory map: pages of a map stay resident, which for thousands of checkpoints adds up.
        file, dtype, offset = self._places[name]
        raw = np.fromfile(file, np.uint8, (end - begin) * dtype.itemsize, offset=offset + begin * dtype.itemsize)
        if len(raw) < (end - begin) * dtype.itemsize:
            raise ModelError(f"{file}: is cut short within {name!r}; copy the file again or repeat the training")
        return torch.from_numpy(raw).view(dtype).double()

    def _loaded(self) -> State:
        """The weights as the network loads them, where its modules compute some."""
        assert self._weight_names is not None
        return self._weight_names.loaded(self._checkpoint.state_dicts(), self.path)

    def _mapped(self) -> tuple[StateDicts, dict[str, _Place]]:
        """The state dicts in the file, mapped into memory if possible; and where tensors of safetensors files lie."""
        path = self._checkpoint.path
        if is_index(path):
            tensors: State = {}
            places: dict[str, _Place] = {}
            for file, names in shards(path).items():
                if file.suffix != ".safetensors":
                    return self._checkpoint.state_dicts(), {}
                held, theirs = _placed(file, None)
                tensors |= {name: held[name] for name in names if name in held}
                places |= theirs
            return {"": tensors}, places
        if path.suffix == ".safetensors":
            held, places = _placed(path, self._checkpoint.run)
            return {"": held}, places
        try:
            return found_in(unpickled(path, mmap=True), path), {}
        except Exception:  # as many types as for damaged bytes: reading the whole file says what is wrong with it
            return self._checkpoint.state_dicts(), {}


class StateWeights:
    """The named tensors of a state dict in memory, as :class:`FlatWeights` has those of a file."""

    def __init__(self, state: Mapping[str, Tensor], names: Sequence[str], origin: str = "weights") -> None:
        self.path, self._state = origin, state
        self.shapes, self.complex_names = real_shapes(state)
        check_names(self.shapes, names, origin)

    def read(self, name: str, begin: int, end: int) -> Tensor:
        """Entries ``begin`` to ``end`` of one tensor, flattened, float64, on the CPU."""
        return entries(self._state[name], begin, end)


def entries(tensor: Tensor, begin: int, end: int) -> Tensor:
    """Real numbers ``begin`` to ``end`` of a tensor, float64, on the CPU."""
    return as_real(tensor.detach()).reshape(-1)[begin:end].double().cpu()


def real_shapes(tensors: Mapping[str, Tensor]) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Shapes of the tensors' real numbers, without tensors of integers; and which of them are complex."""
    numbers = {
        name: tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor) and (tensor.is_floating_point() or tensor.is_complex())
    }
    complex_names = {name for name, tensor in numbers.items() if tensor.is_complex()}
    return {name: (*t.shape, *((2,) if name in complex_names else ())) for name, t in numbers.items()}, complex_names


def check_names(shapes: Mapping[str, object], names: Sequence[str], origin: str) -> None:
    """Refuse weights that lack a tensor.

    Raises
    ------
    ModelError
    """
    missing = [name for name in names if name not in shapes]
    if missing:
        raise ModelError(f"{origin}: lacks {missing[0]!r}, so it is of another architecture")


class _Place(NamedTuple):
    """Where the real numbers of a tensor are: their file, their type and the byte where they begin."""

    file: Path
    dtype: torch.dtype
    offset: int


def _placed(path: Path, run: Path | None) -> tuple[State, dict[str, _Place]]:
    """The tensors of a safetensors file, as views that nothing has read, and the places of their real numbers."""
    tensors: State = {}
    places: dict[str, _Place] = {}
    check_digest(path, run)
    try:
        end = path.stat().st_size
        with safe_open(path, framework="pt") as file:
            # The format allows no gaps between tensors nor after the last, and the library has checked that, so their
            # sizes give their places, counted from the end of the file.
            for name in reversed(file.offset_keys()):
                tensor = tensors[name] = file.get_tensor(name)
                end -= tensor.nbytes
                places[name] = _Place(path, tensor.dtype.to_real(), end)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: not a readable safetensors file, damaged or cut short ({reason(error)}); "
            "copy the file again or repeat the training"
        ) from error
    return dict(reversed(tensors.items())), places

"""Inner products of many checkpoints, with only a block of parameters of each in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg.blas import dsyrk
from torch import Tensor, nn

from pnanalysis.errors import ModelError
from pnanalysis.geometry.directions import FilterNormalised
from pnanalysis.geometry.flat_weights import FlatWeights, StateWeights
from pnanalysis.inputs.copies import as_real
from pnanalysis.inputs.loading import WeightNames
from pnanalysis.inputs.sources import AnyCheckpoint, MemoryCheckpoint
from pnanalysis.io.weights import State, sole
from pnanalysis.terminal.progress import progress_bar

_BLOCK_BYTES = 256_000_000  # of all rows of a block together, in float64

Matrix = NDArray[np.float64]


class _Slice(NamedTuple):
    """Entries ``begin`` to ``end`` of a flattened tensor."""

    name: str
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin


def layer_grams(
    checkpoints: Sequence[AnyCheckpoint],
    layers: Mapping[str, Sequence[str]],
    *,
    network: nn.Module | None = None,
    reference: int = 0,
    n_directions: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[tuple[str, Matrix]]:
    """Inner products over the parameters of each layer, in turn.

    Every file is read once from end to end, a block at a time; products are summed in float64. A complex parameter
    counts as two real ones.

    Parameters
    ----------
    checkpoints : sequence of Checkpoint or MemoryCheckpoint, length T
        Of one architecture.
    layers : mapping of str to sequence of str
        Names of each layer's parameters.
    network : Module, optional
        The architecture, which says what checkpoints of other names mean; without it, the names must be the same.
    reference : int
        Index of the checkpoint to whose filters random directions are scaled.
    n_directions : int
        Number R of random directions to draw (see :class:`pnanalysis.geometry.directions.FilterNormalised`).
    seed : int
    progress : bool

    Yields
    ------
    (str, ndarray, shape (T + 1 + R, T + 1 + R))
        The layer, and the inner products of the displacements from the first checkpoint (T), the first checkpoint
        itself (1) and the directions (R).

    Raises
    ------
    ModelError
        If a file is damaged, or the checkpoints are of different architectures.
    """
    names = [name for own in layers.values() for name in own]
    weight_names = None if network is None else WeightNames(network)
    weights = [_reader(checkpoint, names, weight_names) for checkpoint in checkpoints]
    _check_same_architecture(weights)
    scale = weights[reference]
    random = FilterNormalised(n_directions, seed)
    total = sum(prod(scale.shapes[name]) for name in names)
    with progress_bar("reading checkpoints", total, progress) as advance:
        for layer, own in layers.items():
            directions: State = {}
            if n_directions:
                drawn = ((name, random.of(_whole(scale, name))) for name in own)
                directions = {name: as_real(tensor).flatten(1) for name, tensor in drawn}
            gram = _gram(weights, own, directions, n_directions, partial(advance, text=layer))
            _check_finite(gram, weights, layer)
            yield layer, gram


def displacement_gram(states: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> Matrix:
    """Inner products of states' displacements from the first, (T, T), over the named tensors, in float64.

    A complex tensor counts as two real ones.
    """
    weights = [StateWeights(state, names) for state in states]
    return _gram(weights, names, {}, 0, lambda n: None)[: len(states), : len(states)]


class _Reader(Protocol):
    """Named tensors that are read slice by slice, as real numbers in float64 on the CPU."""

    path: str
    shapes: dict[str, tuple[int, ...]]
    complex_names: set[str]

    def read(self, name: str, begin: int, end: int) -> Tensor: ...


def _reader(checkpoint: AnyCheckpoint, names: Sequence[str], weight_names: WeightNames | None) -> _Reader:
    if not isinstance(checkpoint, MemoryCheckpoint):
        return FlatWeights(checkpoint, names, weight_names)
    found = checkpoint.state_dicts()
    if checkpoint.network is not None or weight_names is None:
        return StateWeights(sole(found, checkpoint.origin), names, checkpoint.origin)
    where = weight_names.find(found, checkpoint.origin)
    if where is None:
        return StateWeights(weight_names.loaded(found, checkpoint.origin), names, checkpoint.origin)
    return StateWeights({own: found[key][name] for own, (key, name) in where.items()}, names, checkpoint.origin)


def _whole(reader: _Reader, name: str) -> Tensor:
    shape = reader.shapes[name]
    entries = reader.read(name, 0, prod(shape)).view(shape)
    return torch.view_as_complex(entries) if name in reader.complex_names else entries


def _gram(
    weights: Sequence[_Reader],
    names: Sequence[str],
    directions: Mapping[str, Tensor],
    n_directions: int,
    advance: Callable[[int], None],
) -> Matrix:
    """Inner products over the named tensors: see what :func:`layer_grams` yields."""
    n_rows = len(weights) + 1 + n_directions
    width = max(1, _BLOCK_BYTES // (8 * n_rows))
    gram = np.zeros((n_rows, n_rows), order="F")
    for slices in _blocks([(name, prod(weights[0].shapes[name])) for name in names], width):
        block = _read_block(slices, n_rows, weights, directions)
        # Adds block @ block.T to the upper triangle, in place: half the work of a general product, and no copy, since
        # the transpose of a C-ordered block is in the Fortran order that BLAS takes.
        gram = dsyrk(1.0, block.numpy().T, beta=1.0, c=gram, trans=1, overwrite_c=1)
        advance(block.shape[1])
    return np.triu(gram) + np.triu(gram, 1).T


def _read_block(
    slices: list[_Slice], n_rows: int, weights: Sequence[_Reader], directions: Mapping[str, Tensor]
) -> Tensor:
    """Displacements, the first checkpoint and the directions, as rows, over some slices of tensors."""
    block = torch.empty(n_rows, sum(piece.size for piece in slices), dtype=torch.float64)
    n, column = len(weights), 0
    for piece in slices:
        columns = block[:, column : column + piece.size]
        for row, reader in zip(columns, weights, strict=False):
            row.copy_(reader.read(*piece))
        # Displacements are formed before any product: inner products of the points themselves would lose the small
        # distances between checkpoints to cancellation.
        columns[n] = columns[0]
        columns[:n] -= columns[n]
        if directions:
            columns[n + 1 :] = directions[piece.name][:, piece.begin : piece.end]
        column += piece.size
    return block


def _blocks(tensors: list[tuple[str, int]], width: int) -> Iterator[list[_Slice]]:
    """Tensors of given names and sizes, laid end to end and cut into blocks of ``width`` entries."""
    slices: list[_Slice] = []
    room = width
    for name, size in tensors:
        begin = 0
        while begin < size:
            end = min(size, begin + room)
            slices.append(_Slice(name, begin, end))
            room -= end - begin
            begin = end
            if room == 0:
                yield slices
                slices, room = [], width
    if slices:
        yield slices


def _check_finite(gram: Matrix, weights: Sequence[_Reader], layer: str) -> None:
    bad = np.flatnonzero(~np.isfinite(np.diag(gram)[: len(weights)]))
    if len(bad):
        at = int(bad[0]) if np.isfinite(gram[len(weights), len(weights)]) else 0  # the first is in every displacement
        raise ModelError(
            f"{weights[at].path}: holds values that are not finite in {layer!r}: training diverged; leave it out"
        )


def _check_same_architecture(weights: Sequence[_Reader]) -> None:
    first = weights[0]
    for other in weights[1:]:
        differing = [
            name for name in {**first.shapes, **other.shapes} if first.shapes.get(name) != other.shapes.get(name)
        ]
        if differing:
            theirs, ours = (reader.shapes.get(differing[0], "missing") for reader in (other, first))
            raise ModelError(
                f"{other.path}: is of another architecture than {first.path} ({differing[0]!r} is {theirs} here and "
                f"{ours} there); compare checkpoints of one architecture"
            )

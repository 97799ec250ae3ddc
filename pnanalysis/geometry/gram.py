"""Inner products of many checkpoints, a block of parameters at a time; and random directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg.blas import dsyrk
from torch import Tensor

from pnanalysis.errors import ModelError
from pnanalysis.geometry.flat_weights import FlatWeights
from pnanalysis.inputs.sources import AnyCheckpoint, MemoryCheckpoint
from pnanalysis.terminal.progress import progress_bar

_BLOCK_BYTES = 256_000_000  # large enough for BLAS to run at full speed, small beside any memory

Matrix = NDArray[np.float64]


class _Piece(NamedTuple):
    """Entries ``begin`` to ``end`` of one flattened tensor."""

    name: str
    begin: int
    end: int


def layer_grams(
    checkpoints: Sequence[AnyCheckpoint],
    layers: Mapping[str, Sequence[str]],
    *,
    reference: int = 0,
    n_directions: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[tuple[str, Matrix]]:
    """Inner products over the parameters of each layer, one layer after the other.

    Every file is read once from start to end, a block at a time; products are summed in float64.

    Parameters
    ----------
    checkpoints : sequence of Checkpoint, length T
        Of one architecture.
    layers : mapping of str to sequence of str
        Names of each layer's parameters.
    reference : int
        Index of the checkpoint whose filter norms random directions get.
    n_directions : int
        Number of directions to draw, R. Each filter (the entries of one output unit or channel) is normal, scaled to
        the norm of the reference's; biases and other vectors stay zero (Li et al. 2018, section 4).
    seed : int

    Yields
    ------
    (str, ndarray, shape (T + 1 + R, T + 1 + R))
        The layer, and the inner products of the displacements from the first checkpoint (T), the first checkpoint
        itself (1) and the directions (R).

    Raises
    ------
    ModelError
        If a file is damaged, or the checkpoints are of different architectures.

    References
    ----------
    H. Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018, arXiv:1712.09913.
    """
    names = [name for own in layers.values() for name in own]
    weights = [_readable(checkpoint, names) for checkpoint in checkpoints]
    _same_architecture(weights)
    generator = torch.Generator().manual_seed(seed)
    total = sum(prod(weights[0].shapes[name]) for name in names)
    with progress_bar("reading checkpoints", total, progress) as advance:
        for layer, own in layers.items():
            drawn = {}
            for name in own if n_directions else ():
                size = prod(weights[reference].shapes[name])
                about = weights[reference].read(name, 0, size).view(weights[reference].shapes[name])
                drawn[name] = filter_directions(about, n_directions, generator).flatten(1)
            yield layer, _summed(weights, own, drawn, n_directions, partial(advance, text=layer))


def displacement_gram(states: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> Matrix:
    """Inner products of states' displacements from the first, (T, T), over the named tensors, in float64."""
    weights = [_StateReader(state, names) for state in states]
    return _summed(weights, names, {}, 0, lambda n: None)[: len(states), : len(states)]


def filter_directions(about: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Normal directions of one tensor, each filter (the entries of one output) scaled to the norm of the tensor's own.

    Parameters
    ----------
    about : Tensor, shape (F, ...)
    n : int
    generator : torch.Generator
        On the CPU.

    Returns
    -------
    Tensor, shape (n, F, ...)
        In float64, on the CPU; zeros where ``about`` has fewer than two axes (biases, batch normalisation).

    References
    ----------
    H. Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018, arXiv:1712.09913, section 4.
    """
    if about.ndim < 2:
        return torch.zeros(n, *about.shape, dtype=torch.float64)
    norms = about.detach().double().cpu().flatten(1).norm(dim=1, keepdim=True)
    drawn = torch.randn(n, *norms.shape[:1], about[0].numel(), generator=generator, dtype=torch.float64)
    return (drawn * (norms / drawn.norm(dim=2, keepdim=True))).view(n, *about.shape)


class _WeightsReader(Protocol):
    """Named tensors that are read piece by piece."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, begin: int, end: int) -> Tensor: ...


class _StateReader:
    """A state, read as :class:`pnanalysis.geometry.flat_weights.FlatWeights` are."""

    def __init__(self, state: Mapping[str, Tensor], names: Sequence[str], origin: str = "weights") -> None:
        self._state, self.path = state, origin
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if tensor.is_floating_point()}
        missing = [name for name in names if name not in self.shapes]
        if missing:
            raise ModelError(f"{origin}: lacks {missing[0]!r}, so it is of another architecture")

    def read(self, name: str, begin: int, end: int) -> Tensor:
        return self._state[name].detach().reshape(-1)[begin:end].double().cpu()


def _readable(checkpoint: AnyCheckpoint, names: Sequence[str]) -> FlatWeights | _StateReader:
    if isinstance(checkpoint, MemoryCheckpoint):
        return _StateReader(checkpoint.load(), names, checkpoint.origin)
    return FlatWeights(checkpoint, names)


def _summed(
    weights: Sequence[_WeightsReader],
    names: Sequence[str],
    drawn: Mapping[str, Tensor],
    n_directions: int,
    advance: Callable[[int], None],
) -> Matrix:
    """Inner products over the named tensors: see what :func:`layer_grams` yields."""
    n_rows = len(weights) + 1 + n_directions
    width = max(1, _BLOCK_BYTES // (8 * n_rows))
    gram = np.zeros((n_rows, n_rows), order="F")
    for pieces in _blocks([(name, prod(weights[0].shapes[name])) for name in names], width):
        block = torch.empty(n_rows, sum(end - begin for _, begin, end in pieces), dtype=torch.float64)
        _fill(block, pieces, weights, drawn)
        gram = dsyrk(1.0, block.numpy().T, beta=1.0, c=gram, trans=1, overwrite_c=1)
        advance(block.shape[1])
    return np.triu(gram) + np.triu(gram, 1).T


def _fill(block: Tensor, pieces: list[_Piece], weights: Sequence[_WeightsReader], drawn: Mapping[str, Tensor]) -> None:
    """Displacements, the first checkpoint and the directions over some pieces of tensors."""
    n, at = len(weights), 0
    for name, begin, end in pieces:
        part = block[:, at : at + end - begin]
        for row, own in zip(part, weights, strict=False):
            row.copy_(own.read(name, begin, end))
        part[n] = part[0]
        part[:n] -= part[n]
        if drawn:
            part[n + 1 :] = drawn[name][:, begin:end]
        at += end - begin


def _blocks(tensors: list[tuple[str, int]], width: int) -> Iterator[list[_Piece]]:
    """Cut tensors, end to end, into blocks of ``width`` entries."""
    pieces: list[_Piece] = []
    room = width
    for name, size in tensors:
        begin = 0
        while begin < size:
            end = min(size, begin + room)
            pieces.append(_Piece(name, begin, end))
            room -= end - begin
            begin = end
            if room == 0:
                yield pieces
                pieces, room = [], width
    if pieces:
        yield pieces


def _same_architecture(weights: Sequence[FlatWeights | _StateReader]) -> None:
    first = weights[0]
    for other in weights[1:]:
        differing = [
            name for name in {**first.shapes, **other.shapes} if first.shapes.get(name) != other.shapes.get(name)
        ]
        if differing:
            shapes = [one.shapes.get(differing[0], "missing") for one in (other, first)]
            raise ModelError(
                f"{other.path}: is of another architecture than {first.path} ({differing[0]!r} is {shapes[0]}, there "
                f"{shapes[1]}); compare checkpoints of one architecture"
            )

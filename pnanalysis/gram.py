"""Inner products of many checkpoints, in memory for a block of parameters at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg.blas import dsyrk
from torch import Tensor

from pnanalysis.errors import ModelError
from pnanalysis.progress import progress_bar
from pnanalysis.runs import Checkpoint
from pnanalysis.weights import FlatWeights

_BLOCK_BYTES = 256_000_000

Matrix = NDArray[np.float64]
_Piece = tuple[str, int, int]


def layer_grams(
    checkpoints: Sequence[Checkpoint],
    layers: Mapping[str, Sequence[str]],
    *,
    reference: int = 0,
    n_directions: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[tuple[str, Matrix]]:
    """Inner products over the parameters of each layer, in turn.

    Every file is read once from end to end, a block at a time; products are summed in float64.

    Parameters
    ----------
    checkpoints : sequence of Checkpoint, length T
        Of one architecture.
    layers : mapping of str to sequence of str
        Names of each layer's parameters.
    reference : int
        The checkpoint whose filters give random directions their norms.
    n_directions : int
        How many directions to draw, R. Each filter (the entries of one output unit or channel) is normal, scaled to the
        norm of the reference's; biases and other vectors stay zero (Li et al. 2018, section 4).
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
    weights = [FlatWeights(checkpoint, names) for checkpoint in checkpoints]
    _same_architecture(weights)
    n_rows = len(weights) + 1 + n_directions
    width = max(1, _BLOCK_BYTES // (8 * n_rows))
    generator = torch.Generator().manual_seed(seed)
    total = sum(prod(weights[0].shapes[name]) for name in names)
    with progress_bar("reading checkpoints", total, progress) as advance:
        for layer, own in layers.items():
            gram = np.zeros((n_rows, n_rows), order="F")
            drawn = {
                name: _directions(weights[reference], name, n_directions, generator) for name in own if n_directions
            }
            for pieces in _blocks([(name, prod(weights[0].shapes[name])) for name in own], width):
                block = torch.empty(n_rows, sum(end - begin for _, begin, end in pieces), dtype=torch.float64)
                _fill(block, pieces, weights, drawn)
                gram = dsyrk(1.0, block.numpy().T, beta=1.0, c=gram, trans=1, overwrite_c=1)
                advance(block.shape[1], text=layer)
            yield layer, np.triu(gram) + np.triu(gram, 1).T


def _fill(block: Tensor, pieces: list[_Piece], weights: list[FlatWeights], drawn: dict[str, Tensor]) -> None:
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
            pieces.append((name, begin, end))
            room -= end - begin
            begin = end
            if room == 0:
                yield pieces
                pieces, room = [], width
    if pieces:
        yield pieces


def _directions(weights: FlatWeights, name: str, n: int, generator: torch.Generator) -> Tensor:
    """Filter-normalised directions of one tensor, (n, size)."""
    shape = weights.shapes[name]
    size = prod(shape)
    if len(shape) < 2:
        return torch.zeros(n, size, dtype=torch.float64)
    norms = weights.read(name, 0, size).view(shape[0], -1).norm(dim=1, keepdim=True)
    drawn = torch.randn(n, shape[0], size // shape[0], generator=generator, dtype=torch.float64)
    return (drawn * (norms / drawn.norm(dim=2, keepdim=True))).view(n, size)


def _same_architecture(weights: list[FlatWeights]) -> None:
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

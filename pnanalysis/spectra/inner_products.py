"""Inner products, norms and projections of vectors with up to hundreds of millions of entries.

In float32 on a CPU, ``torch.linalg.vector_norm`` and matrix products add terms one after the other (a few at a time).
Their sums are off by 4e-4 at 1e7 entries and by 1e-2 at 1e8: the running sum grows until it rounds off a part of each
term. Here vectors are cut into chunks, and float64 adds up the chunks. Working memory is a few chunks.

Where several processes hold a part of each vector, ``add`` makes their sums those over all entries (see
:mod:`pnanalysis.spectra.sharing`). Combinations of vectors need none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pnanalysis.spectra.linear_operator import empty_columns
from pnanalysis.spectra.sharing import ALONE

Add = Callable[[Tensor], Tensor]

#: Entries of a chunk on a CPU: small enough for its second reading to come from the cache, and for float32 to lose no
#: more than 1e-5 within it (see :func:`orthogonalised`; other sums lose nothing).
_CPU_CHUNK = 2**16
#: On other devices, where the sums within a chunk are pairwise and each chunk costs the start of a few kernels.
_DEVICE_CHUNK = 2**22
#: Numbers of a basis that are copied at a time, and entries of a chunk in any case. On a CPU, products with several
#: start vectors copy what they multiply; elsewhere only a basis in another precision is copied.
_MOST_COPIED, _MOST_COPIED_ON_DEVICE, _SMALLEST_CHUNK = 2**21, 2**24, 2**12


def inner_products(a: Tensor, b: Tensor, add: Add = ALONE.add) -> Tensor:
    """Inner products of each column of ``a`` with that of ``b``: ``(..., P, k)`` to ``(..., k)``, float64."""
    total = _zeros(a, *a.shape[:-2], a.shape[-1])
    for chunk in _chunks(a):
        ours = _widened(a[..., chunk, :].mT)
        theirs = ours if b is a else _widened(b[..., chunk, :].mT)
        total = total + (ours[..., None, :] @ theirs[..., None])[..., 0, 0]  # faster than vecdot: no temporary
    return add(total)


def norms(V: Tensor, add: Add = ALONE.add) -> Tensor:
    """Euclidean norm of each column: ``(..., P, k)`` to ``(..., k)``, float64."""
    return inner_products(V, V, add).sqrt()


def orthogonalised(V: Tensor, bases: Sequence[Tensor], add: Add = ALONE.add) -> tuple[Tensor, list[Tensor]]:
    """Vectors ``(P, k)`` less their projections onto spaces: two passes of classical Gram-Schmidt.

    Parameters
    ----------
    V : torch.Tensor
        ``(P, k)``; not changed.
    bases : sequence of torch.Tensor
        Orthonormal columns on the device of ``V``, in its dtype or a half precision: ``(P, n)`` for a space that all
        vectors are projected off, ``(k, P, n)`` for a space of each vector. The spaces are orthogonal to one another.
    add : callable
        See above; called twice.

    Returns
    -------
    rest : torch.Tensor
        ``(P, k)``, each column contiguous in memory; shares none with ``V``.
    coordinates : list of torch.Tensor
        Of ``V`` in each basis, ``(n, k)``.

    Notes
    -----
    A coordinate may be off by the round-off of one chunk, 1e-5 of its size at most; what that leaves behind is
    taken off in the second pass. Subtracting a projection and computing the coordinates of what remains are one
    loop, which saves a third of the time for bases that do not fit in the cache.
    """
    rest = empty_columns(V.shape[0], V.shape[1], V.dtype, V.device)
    coordinates: list[Tensor] = []
    first: list[Tensor] = []
    for sweep in range(3):
        totals = [_zeros(V, basis.shape[-1], V.shape[1]) for basis in bases]
        for chunk in _chunks(V, bases):
            piece, parts = (V if sweep < 2 else rest)[chunk], [basis[..., chunk, :].to(V.dtype) for basis in bases]
            for part, known in zip(parts, coordinates, strict=False):  # none in the first sweep
                piece = piece - _combinations(part, known)
            if sweep > 0:
                rest[chunk] = piece
            if sweep < 2:
                totals = [
                    total + _widened(_coordinates(part, piece)) for total, part in zip(totals, parts, strict=True)
                ]
        if bases and sweep < 2:
            coordinates = list(torch.split(add(torch.cat(totals)).to(V.dtype), [len(total) for total in totals]))
        first = first or coordinates
    return rest, first


def coordinates(basis: Tensor, V: Tensor, add: Add = ALONE.add) -> Tensor:
    """Of vectors ``(P, k)`` in the columns of a basis ``(P, n)``: ``(n, k)``, summed in float64."""
    total = _zeros(V, basis.shape[1], V.shape[1])
    for chunk in _chunks(V, [basis]):
        total = total + _widened(_coordinates(basis[chunk].to(V.dtype), V[chunk]))
    return add(total)


def residual_gram(product: Tensor, V: Tensor, value: Tensor) -> Tensor:
    """Inner products of the residuals ``HV - V diag(value)``, of products and vectors ``(P, k)``: ``(k, k)``."""
    total = _zeros(V, V.shape[1], V.shape[1])
    for chunk in _chunks(V, [V]):
        rest = product[chunk] - V[chunk] * value
        total = total + _widened(_coordinates(rest, rest))
    return total


def combinations(basis: Tensor, coordinates: Tensor) -> Tensor:
    """Vectors ``(P, c)`` with the given coordinates ``(n, c)`` in a basis ``(P, n)``; in the dtype of the former."""
    if basis.dtype == coordinates.dtype:
        return _combinations(basis, coordinates)
    found = empty_columns(len(basis), coordinates.shape[1], coordinates.dtype, basis.device)
    for chunk in _chunks(found, [basis]):
        found[chunk] = _combinations(basis[chunk].to(coordinates.dtype), coordinates)
    return found


def add_combinations(into: Tensor, basis: Tensor, coordinates: Tensor) -> None:
    """Add vectors with the given coordinates ``(n, c)`` in a basis ``(P, n)`` to ``(P, c)``, chunk by chunk."""
    coordinates = coordinates.to(into)
    for chunk in _chunks(into, [basis]):
        into[chunk] += _combinations(basis[chunk].to(into.dtype), coordinates)


def recombine(basis: Tensor, coordinates: Tensor) -> None:
    """Replace the first vectors of ``(P, n)`` by combinations with the coordinates ``(n, c)``, chunk by chunk."""
    for chunk in _chunks(basis, [basis]):
        basis[chunk, : coordinates.shape[1]] = _combinations(basis[chunk], coordinates)


def _coordinates(basis: Tensor, V: Tensor) -> Tensor:
    """Of vectors ``(P, k)`` in a basis ``(P, n)`` or in one of each ``(k, P, n)``: ``(n, k)``."""
    if basis.ndim == 2:
        return basis.mT @ V
    return torch.bmm(basis.mT, V.mT[..., None])[..., 0].mT


def _combinations(basis: Tensor, coordinates: Tensor) -> Tensor:
    """Vectors ``(P, k)`` of coordinates ``(n, k)``; see :func:`_coordinates`."""
    if basis.ndim == 2:
        return (coordinates.mT @ basis.mT).mT
    return torch.bmm(coordinates.mT[:, None], basis.mT)[:, 0].mT


def _chunks(V: Tensor, bases: Sequence[Tensor] = ()) -> list[slice]:
    """Of the entries of vectors; smaller where a chunk of the bases is copied."""
    on_cpu = V.device.type == "cpu"
    size, most = (_CPU_CHUNK, _MOST_COPIED) if on_cpu else (_DEVICE_CHUNK, _MOST_COPIED_ON_DEVICE)
    copied = max((basis.shape[-1] for basis in bases if on_cpu or basis.dtype != V.dtype), default=0)
    if copied:
        size = max(min(size, most // copied), _SMALLEST_CHUNK)
    return [slice(begin, begin + size) for begin in range(0, V.shape[-2], size)]


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(_wide(tensor))


def _zeros(like: Tensor, *shape: int) -> Tensor:
    return like.new_zeros(shape, dtype=_wide(like))


def _wide(tensor: Tensor) -> torch.dtype:
    return wide_dtype(tensor.device)


def wide_dtype(device: torch.device) -> torch.dtype:
    """What sums are computed in: float64, but for Metal, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64

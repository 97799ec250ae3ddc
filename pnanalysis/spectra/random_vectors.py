"""Random vectors that depend on a seed, an index and a place only: the same on every device, drawn there and in place.

Entries ``2 i`` and ``2 i + 1`` of a vector are a pair of normal numbers (Box and Muller) made of the 64 bits of a hash
of ``i`` and the vector's key. The hash is the output function of SplitMix64, which passes the usual batteries of tests
on counters. Nothing depends on how many entries are drawn at a time, so that vectors of any length take a few chunks
of working memory. Devices agree to the last digit of their logarithms and cosines.

References
----------
Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA (2014). Salmon, Moraes, Dror and Shaw,
Parallel random numbers: as easy as 1, 2, 3, SC (2011), on counters instead of states.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from pnanalysis.spectra.inner_products import wide_dtype
from pnanalysis.spectra.linear_operator import LinearOperator, empty_columns
from pnanalysis.spectra.sharing import ALONE, Part, part_of

#: Pairs of entries that are drawn at a time.
_CHUNK = 2**17
#: Keep the keys of sign vectors and of normal numbers apart from those of vectors on the sphere, and these from streams
#: that callers name.
_SIGNS, _NORMAL = 1, 2**16
#: Of SplitMix64, as signed numbers of 64 bits.
_STEP, _FIRST, _SECOND = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def random_unit_vectors(operator: LinearOperator, indices: Iterable[int], seed: int) -> Tensor:
    """Vectors ``(P, k)`` uniform on the unit sphere, on the operator's device and in its dtype.

    Vector ``i`` depends on ``seed`` and ``i`` only, not on the device, the dtype or the other indices. Of operators
    whose vectors several processes hold in parts, the part of this one.
    """
    indices, part = list(indices), part_of(operator)
    vectors = empty_columns(part.length, len(indices), operator.dtype, operator.device)
    for column, index in zip(vectors.T, indices, strict=True):
        key = int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])
        _fill_on_sphere(column, key, part, operator.shape[0])
    return vectors


def random_unit_vector(n: int, index: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One vector ``(n,)`` of :func:`random_unit_vectors`, without an operator."""
    vector = torch.empty(n, dtype=dtype, device=device)
    key = int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])
    _fill_on_sphere(vector, key, Part(((0, n),), ALONE, n), n)
    return vector


def random_signs(n_parameters: int, indices: Iterable[int], seed: int, device: torch.device) -> Tensor:
    """Independent random signs, ``(P, k)`` in int8; sign vector ``i`` depends on ``seed`` and ``i`` only."""
    indices = list(indices)
    signs = empty_columns(n_parameters, len(indices), torch.int8, device)
    for column, index in zip(signs.T, indices, strict=True):
        key = int(np.random.SeedSequence([seed, index, _SIGNS]).generate_state(1, np.uint64)[0])
        for first in range(0, n_parameters, 2 * _CHUNK):
            counters = torch.arange(first, min(first + 2 * _CHUNK, n_parameters), device=device)
            column[first : first + len(counters)] = 1 - 2 * (hashed(counters, key) < 0).to(torch.int8)
    return signs


def normal_numbers(
    n: int, index: int, seed: int, device: torch.device, *, stream: int = _NORMAL, first: int = 0
) -> Tensor:
    """Independent normal numbers ``(n,)``, from place ``2 first`` on of vector ``index`` of a stream, in float64.

    In float32 on Metal, which has no float64. They depend on index, seed and stream only, not on the device.
    """
    numbers = torch.empty(n, dtype=wide_dtype(device), device=device)
    key = int(np.random.SeedSequence([seed, stream, index]).generate_state(1, np.uint64)[0])
    for begin in range(0, n, 2 * _CHUNK):
        end = min(begin + 2 * _CHUNK, n)
        pairs = torch.arange(first + begin // 2, first + (end + 1) // 2, device=device)
        numbers[begin:end] = normal_pairs(pairs, key, numbers.dtype).flatten()[: end - begin]
    return numbers


def _fill_on_sphere(column: Tensor, key: int, part: Part, n_parameters: int) -> None:
    wide = wide_dtype(column.device)
    # numbers are far from the bounds of half precision once they are divided by about the norm
    scale, squares, at = n_parameters**-0.5, torch.zeros((), dtype=wide, device=column.device), 0
    for begin, end in part.ranges:
        for first in range(begin - begin % 2, end, 2 * _CHUNK):
            last = min(first + 2 * _CHUNK, end)
            pairs = torch.arange(first // 2, (last + 1) // 2, device=column.device)
            numbers = normal_pairs(pairs, key, wide).flatten()[max(begin - first, 0) : last - first]
            squares += numbers @ numbers
            column[at : at + len(numbers)] = numbers * scale
            at += len(numbers)
    column.div_(part.add(squares).sqrt().mul_(scale).to(column.dtype))


def normal_pairs(counters: Tensor, key: int, dtype: torch.dtype) -> Tensor:
    """Two independent normal numbers for each counter ``(n,)``: ``(n, 2)``."""
    bits = hashed(counters, key)
    # the higher half gives the radius, which is never that of probability zero; the lower half the angle
    high, low = ((bits >> 32) & 0xFFFFFFFF).to(dtype), (bits & 0xFFFFFFFF).to(dtype)
    radius = high.add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = low.mul_(2 * math.pi * 2.0**-32)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)


def hashed(counters: Tensor, key: int) -> Tensor:
    """64 bits for each counter, as signed whole numbers: output ``counter + 1`` of SplitMix64 started from a key."""
    state = (counters + 1) * _STEP + (key - 2**64 if key >= 2**63 else key)  # products wrap around
    state = (state ^ ((state >> 30) & 0x3FFFFFFFF)) * _FIRST  # shifts bring in copies of the sign, which are masked
    state = (state ^ ((state >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return state ^ ((state >> 31) & 0x1FFFFFFFF)

"""Inner products and norms of layers with millions of parameters, for use in every training step.

In float32 on a CPU, torch adds up the terms of a dot product one after the other (a few at a time), which at 1e7 terms
loses four digits. Here long sums are taken chunk by chunk, and the chunks added pairwise. All but :func:`distance` can
be differentiated.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Terms of a dot product or norm that are summed at once, off by a few 1e-6 at most.
_CHUNK = 2**18
#: The same in products with a matrix, where fewer terms are added side by side.
_PRODUCT_CHUNK = 2**14


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of two vectors ``(P,)``."""
    if not _long(a):
        return torch.dot(a, b)
    return torch.stack([torch.dot(*chunk) for chunk in zip(a.split(_CHUNK), b.split(_CHUNK), strict=True)]).sum()


def products(rows: Tensor, vector: Tensor) -> Tensor:
    """Inner products of rows ``(..., n, P)`` with a vector each ``(..., P)``: ``(..., n)``."""
    if not _long(vector, _PRODUCT_CHUNK):
        return (rows @ vector[..., None])[..., 0]
    chunks = zip(rows.split(_PRODUCT_CHUNK, -1), vector.split(_PRODUCT_CHUNK, -1), strict=True)
    return torch.stack([(part @ piece[..., None])[..., 0] for part, piece in chunks]).sum(0)


def norm(vectors: Tensor) -> Tensor:
    """Euclidean norms of vectors ``(..., P)``: ``(...)``."""
    if not _long(vectors):
        return torch.linalg.vector_norm(vectors, dim=-1)
    chunks = [torch.linalg.vector_norm(chunk, dim=-1) for chunk in vectors.split(_CHUNK, -1)]
    return torch.linalg.vector_norm(torch.stack(chunks), dim=0)


def distance(a: Tensor, b: Tensor) -> float:
    """Euclidean distance of two vectors ``(P,)``, which are not differentiated."""
    if not _long(a):
        return float(torch.dist(a, b))
    chunks = zip(a.split(_CHUNK), b.split(_CHUNK), strict=True)
    return float(torch.linalg.vector_norm(torch.stack([torch.dist(*chunk) for chunk in chunks])))


def _long(vectors: Tensor, chunk: int = _CHUNK) -> bool:
    return vectors.device.type == "cpu" and vectors.shape[-1] > chunk

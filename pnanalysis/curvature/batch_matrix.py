"""The matrix of a single batch as an operator, made while an operator goes through its batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pnanalysis.curvature.parameters import join_tensors, split_vector
from pnanalysis.curvature.tracing import Product


class BatchMatrix:
    """A symmetric operator ``(P, P)``.

    Parameters
    ----------
    product : callable
        The product with a direction, by parameters.
    shapes : sequence of Size
        Those of the parameters.
    device, dtype : torch.device, torch.dtype
    """

    def __init__(
        self, product: Product, shapes: Sequence[torch.Size], device: torch.device, dtype: torch.dtype
    ) -> None:
        n_parameters = sum(shape.numel() for shape in shapes)
        self.shape, self.device, self.dtype = (n_parameters, n_parameters), device, dtype
        self.n_hvp = 0
        self._product, self._shapes = product, shapes

    def matvec(self, v: Tensor) -> Tensor:
        return self.matmat(v[:, None])[:, 0]

    def matmat(self, V: Tensor) -> Tensor:
        self.n_hvp += V.shape[1]
        columns = [join_tensors(self._product(split_vector(v, self._shapes))) for v in V.to(self.dtype).T.contiguous()]
        return torch.stack(columns, dim=1).to(self.dtype)

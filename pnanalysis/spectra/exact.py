"""All eigenvalues of an operator, from its products with all unit vectors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from pnanalysis.errors import CurvatureError
from pnanalysis.spectra.data_feed import DataFeed
from pnanalysis.spectra.lanczos import largest_asymmetry
from pnanalysis.spectra.linear_operator import (
    NOT_FINITE,
    LinearOperator,
    checked_product,
    contiguous_columns,
    not_symmetric,
)
from pnanalysis.spectra.sample import LanczosCoefficients, SamplingSettings, SpectrumSample
from pnanalysis.spectra.sharing import part_of, processes_of

#: Keeps ratios of zeros finite.
_TINY = 1e-300


def all_columns(
    operator: LinearOperator, settings: SamplingSettings, feed: DataFeed, advance: Callable[[float], None]
) -> SpectrumSample:
    """The exact spectrum, at the cost of P products.

    Raises
    ------
    CurvatureError
        If a product is not finite, or the operator is not symmetric.
    """
    n, part, processes = operator.shape[0], part_of(operator), processes_of(operator)
    eye = torch.eye(n, dtype=operator.dtype, device=operator.device)
    matrix = torch.empty_like(eye)
    for block in torch.split(torch.arange(n), max(settings.n_probes, 1)):
        product = checked_product(operator, contiguous_columns(part.of(eye[:, block])))
        matrix[:, block] = part.whole(product, n)
        advance(len(block))
    matrix = matrix.double()
    if not bool(torch.isfinite(matrix).all()):
        raise CurvatureError(NOT_FINITE)
    largest = float(matrix.abs().max()) + _TINY
    scaled = matrix / largest  # squares of its entries do not underflow
    skew = float(torch.linalg.matrix_norm(scaled - scaled.T)) / 2
    relative = skew / (float(torch.linalg.matrix_norm(scaled)) + _TINY)
    if processes.decided(relative > (settings.symmetry_tolerance or largest_asymmetry(operator))):
        raise not_symmetric(operator, f"its skew part has {relative:.1%} of its norm")
    matrix = (matrix + matrix.T) / 2
    if feed.wanted:
        values, vectors = torch.linalg.eigh(matrix)
        processes.send(vectors)  # whose signs may differ between machines
        feed.exact(values.cpu().numpy(), vectors)
    else:
        values = torch.linalg.eigvalsh(matrix)
    eigenvalues = values.cpu().numpy()
    norm = float(np.abs(eigenvalues).max()) / largest + _TINY
    probe = LanczosCoefficients(eigenvalues, np.zeros(n), sampled=False, deflated=True)
    return SpectrumSample(n, "exact", [probe], n_hvp=n, asymmetry=skew / n**0.5 / norm)

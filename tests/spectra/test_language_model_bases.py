"""Ways to keep the Lanczos basis, and pairs in few vectors: the Hessian of a transformer of ten million parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import wasserstein_distance
from torch import Tensor, nn

import pnanalysis as pn
from pnanalysis.spectra.inner_products import coordinates
from pnanalysis.spectra.restarted import extreme_pairs
from pnanalysis.spectra.verified_pairs import verified_pairs

VOCABULARY, LENGTH, WIDTH = 65, 16, 384


class Decoder(nn.Module):
    """Characters, with the sizes of a small GPT: six layers of width 384, six heads."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 6, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        hidden = self.layers(self.tokens(tokens) + self.places.weight, mask, is_causal=True)
        return self.head(hidden).transpose(1, 2)


@pytest.fixture(scope="module")
def operator() -> pn.HessianOperator:
    torch.manual_seed(0)
    text = torch.randint(VOCABULARY, (2, LENGTH + 1))
    op = pn.HessianOperator(Decoder(), nn.CrossEntropyLoss(), [(text[:, :-1], text[:, 1:])])
    assert op.shape[0] > 10_000_000
    return op


def spectrum(op: pn.HessianOperator, basis: str, **options: object) -> xr.Dataset:
    return pn.spectral_density(op, n_lanczos=30, n_probes=1, basis=basis, data_error="none", progress=False, **options)


@pytest.fixture(scope="module")
def expected(operator: pn.HessianOperator) -> dict[bool, xr.Dataset]:
    """With the whole basis in memory, deflated and not."""
    return {deflate: spectrum(operator, "memory", deflate=deflate) for deflate in (True, False)}


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "tolerance"), [("half", 1e-3), ("disk", 1e-6), ("none", 1e-3)])
def test_every_way_gives_the_spectrum(
    operator: pn.HessianOperator, expected: dict[bool, xr.Dataset], mode: str, tolerance: float
) -> None:
    found, whole = spectrum(operator, mode), expected[mode != "none"]
    assert found.attrs["basis"] == mode
    scale = float(whole.lambda_max)
    for name in ("lambda_max", "lambda_min"):
        assert abs(float(found[name]) - float(whole[name])) <= tolerance * scale
    # trace and norm are sums over all parameters of what single products give, whose float32 differs in its last digits
    for name in ("trace", "frobenius_norm"):
        assert float(found[name]) == pytest.approx(float(whole[name]), rel=1e-2)
    distance = wasserstein_distance(found.node, whole.node, found.weight, whole.weight)
    assert distance <= tolerance * scale


@pytest.mark.slow
def test_pairs_in_few_vectors_are_those_of_the_whole_basis(operator: pn.HessianOperator) -> None:
    k, tolerance = 3, 1e-3
    whole = extreme_pairs(operator, k, n_vectors=40, tolerance=tolerance, max_hvp=40)  # never restarted
    assert whole.converged
    few = verified_pairs(operator, k, max_memory_bytes=18 * 4 * operator.shape[0], tolerance=tolerance)
    assert few.complete
    assert few.converged.all()
    error = np.maximum(whole.residual, few.bound)
    assert (np.abs(few.value - whole.value) <= 2 * error).all()
    # either space is as near to the eigenvectors as its residuals are small beside the gap to the next eigenvalue
    assert few.angles.space.max() < 0.1
    cosines = np.linalg.svd(coordinates(few.vector, whole.vector).numpy(), compute_uv=False)
    assert cosines.min() > 1 - (2 * few.angles.space.max()) ** 2

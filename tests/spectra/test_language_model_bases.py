"""Ways to keep the Lanczos basis, and pairs in few vectors: the Hessian of a transformer of ten million parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys

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


def hessian() -> pn.HessianOperator:
    torch.manual_seed(0)
    text = torch.randint(VOCABULARY, (2, LENGTH + 1))
    op = pn.HessianOperator(Decoder(), nn.CrossEntropyLoss(), [(text[:, :-1], text[:, 1:])])
    assert op.shape[0] > 10_000_000
    return op


@pytest.fixture(scope="module")
def operator() -> pn.HessianOperator:
    return hessian()


def spectrum(op: pn.HessianOperator, basis: str, **options: object) -> xr.Dataset:
    options = {"n_lanczos": 30, "n_probes": 1, "data_error": "none", "progress": False} | options
    return pn.spectral_density(op, basis=basis, **options)


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


PEAK = """
import json, sys, torch
import pnanalysis as pn
from pnanalysis.spectra.forecast import forecasts
from pnanalysis.spectra.linear_operator import DiagonalOperator
from pnanalysis.spectra.used_memory import PeakMemory
from tests.spectra.test_language_model_bases import hessian, spectrum

torch.set_num_threads(1)
op = hessian()
pn.spectral_density(DiagonalOperator(torch.ones(50)), n_hvp=20, progress=False)
with PeakMemory(op.device) as memory, forecasts() as said:
    spectrum(op, sys.argv[1], n_lanczos=int(sys.argv[2]), progress=True)
print(json.dumps({"rise": memory.peak - memory.before, "said": said[0].peak - said[0].before}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("mode", "n_lanczos"), [("memory", 24), ("half", 12), ("disk", 12), ("none", 12)])
def test_the_peak_is_what_was_said(mode: str, n_lanczos: int) -> None:
    """Beyond what network and libraries take before the first product, which is compared with others and takes most.

    The first basis grows beyond that.
    """
    # arrays of a megabyte and more are given back at once, so that the peak is that of what is in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, mode, str(n_lanczos)], capture_output=True, text=True, check=True, env=environment
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["said"] == pytest.approx(found["rise"], rel=0.1), done.stderr

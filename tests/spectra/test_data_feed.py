"""Vectors that are handed on during sampling: Ritz vectors, and probes of the rest with their products."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pnanalysis.spectra import data_feed
from pnanalysis.spectra.deflation import sample_spectrum
from pnanalysis.spectra.linear_operator import DenseOperator
from pnanalysis.spectra.memory import Storage
from pnanalysis.spectra.sample import SamplingSettings

WAYS = {
    "in turn": {"n_hvp": 60},
    "lockstep": {"n_lanczos": 20, "n_probes": 40},
    "plain": {"n_lanczos": 20, "n_probes": 40, "deflate": False},
    "plain in groups": {"n_lanczos": 20, "n_probes": 40, "deflate": False, "max_memory_bytes": 8 * 200 * 23 * 7},
    "exact": {"n_hvp": 200},
    "one step a probe": {"n_lanczos": 1, "n_probes": 40},
}


class Counting(DenseOperator):
    n_products = 0

    def matmat(self, V):
        self.n_products += V.shape[1]
        return super().matmat(V)


class Recorder:
    def __init__(self, n_leading=3, n_probes=25):
        self.n_leading, self.n_probes = n_leading, n_probes
        self.leading, self.n_columns, self.blocks = [], [], []

    def add_leading(self, value, vectors):
        blocks = list(vectors)
        self.n_columns = [block.shape[1] for block in blocks]
        self.leading.append((value, torch.cat(blocks, dim=1)))

    def add_probes(self, probe, product):
        self.blocks.append((probe.clone(), product.clone()))

    @property
    def probes(self):
        return tuple(torch.cat(parts, dim=1) for parts in zip(*self.blocks, strict=True))


def matrix(n: int = 200) -> torch.Tensor:
    """Eigenvalues in [-1, 1], and six outliers, in a random basis."""
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.standard_normal((n, n)))[0]
    eigenvalues = np.r_[rng.uniform(-1, 1, n - 6), -9, 8, 12, 16, 22, 30]
    return torch.from_numpy((rotation * eigenvalues) @ rotation.T)


def sample(way: str, recorder: Recorder | None = None, seed: int = 0) -> Counting:
    operator = Counting(matrix())
    options = {"n_lanczos": 20, "n_probes": 5, "n_hvp": None, "deflate": True, **WAYS[way]}
    cpu = torch.device("cpu")
    sample_spectrum(
        operator,
        SamplingSettings(seed=seed, storage=Storage(torch.float64, cpu), data=recorder, **options),
    )
    return operator


@pytest.mark.parametrize("way", WAYS)
def test_vectors_cost_no_product_and_come_as_often_as_asked(way):
    recorder = Recorder()
    assert sample(way, recorder).n_products == sample(way).n_products
    assert len(recorder.leading) == 1
    assert all(probe.shape[1] <= 5 for probe, _ in recorder.blocks)
    assert recorder.probes[0].shape[1] <= 25
    if way != "in turn":
        assert recorder.probes[0].shape[1] == 25


@pytest.mark.parametrize("way", [way for way in WAYS if way != "one step a probe"])
def test_leading_vectors_are_the_largest_and_the_smallest_eigenvectors(way):
    recorder = Recorder()
    sample(way, recorder)
    value, vector = recorder.leading[0]
    np.testing.assert_allclose(value, [30, 22, 16, -9], atol=1e-6)
    torch.testing.assert_close(matrix() @ vector, vector * torch.from_numpy(value), atol=1e-3, rtol=0)
    torch.testing.assert_close(vector.T @ vector, torch.eye(4).double(), atol=1e-10, rtol=0)


def test_long_leading_vectors_come_in_blocks(monkeypatch):
    whole, cut = Recorder(n_leading=9), Recorder(n_leading=9)
    sample("in turn", whole)
    monkeypatch.setattr(data_feed, "_MOST_BYTES", 0)
    sample("in turn", cut)
    assert (whole.n_columns, cut.n_columns) == ([10], [4, 4, 2])
    for one, other in zip(whole.leading[0], cut.leading[0], strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=0, atol=1e-12)


def test_a_single_ritz_vector_is_the_largest_and_the_smallest():
    recorder = Recorder()
    sample("one step a probe", recorder)
    assert recorder.leading[0][0].shape == (1,)
    assert recorder.leading[0][1].shape == (200, 1)


@pytest.mark.parametrize("way", WAYS)
def test_probes_are_those_of_the_rest_of_the_space(way):
    recorders = [Recorder() for _ in range(20)]
    for seed, recorder in enumerate(recorders):
        sample(way, recorder, seed)
    trace, errors = [], []
    for recorder in recorders:
        vector, (probe, product) = recorder.leading[0][1], recorder.probes
        assert (vector.T @ probe).abs().max() < 1e-9
        rest = matrix().trace() - (vector.T @ matrix() @ vector).trace()
        forms = (probe * (matrix() @ probe)).sum(0) - rest
        trace.append(float(forms.mean()))
        errors.append(float((matrix() @ probe - product).norm() / (matrix() @ probe).norm()))
        # exactly P - t long where signs combine orthonormal vectors, and close to it for other random ones
        assert float((probe**2).sum(0).mean()) == pytest.approx(200 - vector.shape[1], rel=0.1)
    # the mean over probes is the trace of the rest within its standard error
    assert abs(np.mean(trace)) < 4 * np.std(trace, ddof=1) / len(trace) ** 0.5 + 1e-9
    # products miss the couplings alone, which are of the size of the bulk over the square root of P
    assert np.median(errors) < (0.3 if way == "one step a probe" else 0.15)

"""What a budget is spent on, when sampling stops, and what it does with odd arithmetic."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from pnanalysis.errors import PnError
from pnanalysis.spectra.density import spectral_density
from pnanalysis.spectra.linear_operator import ROUND_OFF, DenseOperator, DiagonalOperator, arithmetic, round_off
from pnanalysis.spectra.quadrature import SpectralMeasure

QUIET = {"progress": False, "grid": np.array([0.0, 1.0])}


def heavy_tailed(n: int = 600) -> np.ndarray:
    """A narrow bulk, a power-law tail and ten outliers."""
    bulk = np.random.default_rng(0).normal(0, 1e-3, n - 110)
    return np.r_[bulk, 3.0 / np.arange(1, 101) ** 1.3, np.linspace(5, 40, 10)]


def diagonal(eigenvalues: np.ndarray, dtype: torch.dtype = torch.float64) -> DiagonalOperator:
    return DiagonalOperator(torch.from_numpy(eigenvalues).to(dtype))


class Counting(DiagonalOperator):
    n_products = 0

    def matmat(self, V):
        self.n_products += V.shape[1]
        return super().matmat(V)


@pytest.mark.parametrize("n_hvp", [12, 60, 101, 199])
@pytest.mark.parametrize("deflate", [True, False])
@pytest.mark.parametrize("eigenvalues", [heavy_tailed(), np.linspace(0, 1, 600)], ids=["tail", "uniform"])
def test_all_of_a_budget_is_spent(eigenvalues, n_hvp, deflate):
    operator = Counting(torch.from_numpy(eigenvalues))
    ds = spectral_density(operator, n_hvp=n_hvp, deflate=deflate, **QUIET)
    assert ds.attrs["n_hvp"] == operator.n_products == n_hvp


def test_a_budget_is_the_default():
    few = spectral_density(diagonal(np.linspace(0, 1, 20)), **QUIET)
    assert (few.attrs["method"], few.attrs["n_hvp"]) == ("exact", 20)
    assert spectral_density(diagonal(np.linspace(0, 1, 1000)), **QUIET).attrs["n_hvp"] == 900
    steps = spectral_density(diagonal(np.linspace(0, 1, 20)), n_probes=3, deflate=False, **QUIET)
    assert steps.attrs["n_lanczos"] == 20


def test_single_products_sharpen_the_trace_and_the_norm_by_their_precision():
    eigenvalues = heavy_tailed()
    alone, together, stated = [], [], []
    for seed in range(24):
        ds = spectral_density(diagonal(eigenvalues), n_hvp=100, seed=seed, **QUIET)
        assert ds.attrs["n_single"] == 10
        alone.append(float(ds.probe_trace) - eigenvalues.sum())
        together.append(float(ds.trace) - eigenvalues.sum())
        stated.append(float(ds.trace_se))
    alone, together = (np.sqrt(np.mean(np.square(errors))) for errors in (alone, together))
    assert together < 0.6 * alone  # 0.3 expected; 24 draws know a ratio of such means to 20 %
    assert 0.65 < np.sqrt(np.mean(np.square(stated))) / together < 1.5


def test_the_measure_has_the_moments_that_are_stated():
    ds = spectral_density(diagonal(np.linspace(0, 1, 600)), n_hvp=100, **QUIET)
    measure = SpectralMeasure.from_dataset(ds)
    assert abs(float(ds.trace) - float(ds.probe_trace)) > 1e-6 * float(ds.trace)
    assert measure.weight.sum() == pytest.approx(1, abs=1e-12)
    assert 600 * float(measure.weight @ measure.node) == pytest.approx(float(ds.trace), rel=1e-9)
    for probe in np.unique(measure.probe[measure.sampled]):
        n_before = measure.n_before[measure.probe == probe][0]
        expected = float(ds.probe_weight[probe - 1]) * (1 - n_before / 600)
        assert measure.weight[measure.probe == probe].sum() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["trace", "frobenius_norm", "effective_rank", "lambda_max"])
def test_sampling_stops_at_a_target_error(name):
    eigenvalues = heavy_tailed()
    target = 1e-3 if name == "lambda_max" else 0.02
    ds = spectral_density(diagonal(eigenvalues), n_hvp=400, until={name: target}, **QUIET)
    assert ds.attrs["until_reached"] == 1
    assert ds.attrs["n_hvp"] < 300
    error = float(ds.lambda_max_high - ds.lambda_max_low) if name == "lambda_max" else float(ds[f"{name}_se"])
    assert error <= 1.01 * target * abs(float(ds[name])) + 2e-14 * 40


def test_a_target_out_of_reach_takes_the_whole_budget():
    ds = spectral_density(diagonal(np.linspace(-1, 1, 600)), n_hvp=60, until={"trace": 1e-9}, **QUIET)
    assert (ds.attrs["until_reached"], ds.attrs["n_hvp"]) == (0, 60)


def test_a_killed_run_stops_at_the_same_place(tmp_path):
    options = {"n_hvp": 400, "until": {"trace": 0.003}, **QUIET}
    whole = spectral_density(diagonal(heavy_tailed()), **options)

    class Dying(DiagonalOperator):
        left = 15

        def matmat(self, V):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().matmat(V)

    with pytest.raises(KeyboardInterrupt):
        spectral_density(Dying(torch.from_numpy(heavy_tailed())), state=tmp_path, save_every=0.0, **options)
    again = spectral_density(diagonal(heavy_tailed()), state=tmp_path, **options)
    assert again.attrs["n_hvp"] == whole.attrs["n_hvp"]
    np.testing.assert_array_equal(again.node, whole.node)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"until": {"rank": 0.1}}, "until has no quantity 'rank'"),
        ({"until": {"trace": 0.0}}, "trace.*above 0"),
        ({"until": 0.02}, "give relative errors by name"),
        ({"until": {"trace": 0.1}, "n_lanczos": 5}, "until takes a budget"),
    ],
)
def test_targets_that_make_no_sense_are_refused(options, message):
    with pytest.raises(PnError, match=message):
        spectral_density(np.eye(20), **options, **QUIET)


@pytest.mark.parametrize("budget", [{"n_hvp": 80}, {"n_lanczos": 20, "n_probes": 4}, {"n_hvp": 2000}])
@pytest.mark.parametrize("exponent", [-100, -67, 67, 100])
def test_the_scale_of_single_precision_products_does_not_matter(budget, exponent):
    one = spectral_density(diagonal(heavy_tailed(), torch.float32), **budget, **QUIET)
    scaled = spectral_density(diagonal(heavy_tailed() * 2.0**exponent, torch.float32), **budget, **QUIET)
    for name in ("trace", "frobenius_norm", "lambda_max", "trace_se"):
        # entries of products below 1e-38 lose digits
        assert float(scaled[name]) == pytest.approx(2.0**exponent * float(one[name]), rel=1e-6)


def skewed(fraction: float, n: int = 300) -> torch.Tensor:
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.standard_normal((n, n)))[0]
    symmetric, square = (rotation * heavy_tailed(n)) @ rotation.T, rng.standard_normal((n, n))
    skew = square - square.T
    return torch.from_numpy(symmetric + fraction * np.linalg.norm(symmetric) / np.linalg.norm(skew) * skew).float()


@pytest.mark.parametrize("budget", [{"n_hvp": 80}, {"n_lanczos": 20, "n_probes": 3}])
def test_a_skew_part_is_measured_and_warned_of(budget):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert spectral_density(skewed(0.0), **budget, **QUIET).attrs["asymmetry"] < ROUND_OFF["float32"]
    with pytest.warns(UserWarning, match="not quite symmetric"):
        ds = spectral_density(skewed(0.02), **budget, **QUIET)
    # |S q| for random q is |S|_F / sqrt(n); the matrix of norm 40 has a Frobenius norm of 80
    expected = 0.02 * np.linalg.norm(heavy_tailed(300)) / 300**0.5 / 40
    assert expected / 2 < ds.attrs["asymmetry"] < 8 * expected


def test_symmetry_is_judged_by_what_computes_the_products():
    class Rounded(DenseOperator):
        arithmetic = "bfloat16"

    square = torch.from_numpy(np.random.default_rng(0).standard_normal((200, 200))).float()
    matrix = square + square.T + 0.7 * torch.triu(square)
    with pytest.raises(PnError, match="not symmetric"):
        spectral_density(matrix, 10, 3, **QUIET)
    assert round_off(Rounded(matrix)) == ROUND_OFF["bfloat16"]
    assert arithmetic(DenseOperator(matrix)) == "float32"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert spectral_density(Rounded(matrix), 10, 3, **QUIET).attrs["round_off"] == ROUND_OFF["bfloat16"]

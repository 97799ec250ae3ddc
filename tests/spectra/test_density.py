"""Spectral densities against spectra that are known exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import wasserstein_distance

from pnanalysis import schema
from pnanalysis.errors import CurvatureError, PnError
from pnanalysis.io import netcdf
from pnanalysis.spectra.density import default_grid, smooth, spectral_density
from pnanalysis.spectra.linear_operator import DiagonalOperator, as_operator

QUIET = {"progress": False}
#: plain quadrature's probes and steps for a budget
PLAIN = {100: (1, 100), 200: (4, 50), 400: (4, 100)}


def diagonal(eigenvalues: np.ndarray) -> DiagonalOperator:
    return DiagonalOperator(torch.from_numpy(np.asarray(eigenvalues, dtype=np.float64)))


def distance(ds, eigenvalues: np.ndarray) -> float:
    uniform = np.full(len(eigenvalues), 1 / len(eigenvalues))
    return wasserstein_distance(ds.node.values, eigenvalues, ds.weight.values, uniform)


def like_a_network(n: int = 1500, seed: int = 0) -> np.ndarray:
    """A few outliers, a power-law tail, most of it in a cluster around zero: what trained networks show."""
    rng = np.random.default_rng(seed)
    tail = 3.0 / np.arange(1, 201) ** 1.3
    return np.sort(np.r_[rng.normal(0, 1e-3, n - 210), tail, np.linspace(5, 40, 10)])


def wigner(n: int = 600) -> np.ndarray:
    square = np.random.default_rng(0).standard_normal((n, n))
    return np.linalg.eigvalsh((square + square.T) / np.sqrt(2 * n))


spectra = hnp.arrays(np.float64, st.integers(12, 40), elements=st.floats(-10, 10, width=16))
budgets = st.sampled_from(
    [{"n_hvp": 9}, {"n_lanczos": 4, "n_probes": 2}, {"n_lanczos": 5, "n_probes": 2, "deflate": False}]
)


def spikes(*values: float, n: int = 12) -> np.ndarray:
    """A few eigenvalues among zeros: deflation leaves nothing but roundoff."""
    return np.r_[values, np.zeros(n - len(values))]


@given(spectra, budgets, st.integers(0, 3))
@example(spikes(2**-14, 1.0), {"n_hvp": 9}, 0)
@example(spikes(2**-23), {"n_hvp": 9}, 0)
@example(spikes(-1.0, 1.0, 2.0, 4.0, n=17), {"n_hvp": 9}, 0)
@example(spikes(-1.0, 1.0, 2.0, 3.0, n=14), {"n_hvp": 9}, 0)
@example(np.bincount([0, 2, 11, 24], [1.0, 2.0, 3.0, 4.0], 30), {"n_hvp": 9}, 1)
@example(np.bincount([0, 1, 2, 23], [2.0, 4.0, 1.0, 3.0], 24), {"n_hvp": 9}, 1)
@settings(max_examples=40, deadline=None)
def test_weights_sum_to_one_and_nodes_lie_within_the_bounds(eigenvalues, budget, seed):
    ds = spectral_density(diagonal(eigenvalues), seed=seed, **budget, **QUIET)
    tiny = 1e-9 * (1 + np.abs(eigenvalues).max())
    assert ds.weight.sum() == pytest.approx(1, abs=1e-12)
    assert (ds.weight >= 0).all()
    assert ds.lambda_min_low - tiny <= ds.node.min()
    assert ds.node.max() <= ds.lambda_max_high + tiny
    assert eigenvalues.min() - tiny <= ds.lambda_min
    assert ds.lambda_max <= eigenvalues.max() + tiny
    for array in ds.data_vars.values():
        assert not np.isinf(array).any()
    assert np.isfinite(ds.density_se).all()


@given(st.integers(0, 50), budgets, st.floats(0.25, 8), st.floats(-5, 5))
@settings(max_examples=25, deadline=None)
def test_shift_and_scale_of_the_operator_shift_and_scale_the_spectrum(draw, budget, scale, shift):
    eigenvalues = np.random.default_rng(draw).normal(size=30)
    before = spectral_density(diagonal(eigenvalues), **budget, **QUIET)
    after = spectral_density(diagonal(scale * eigenvalues + shift), **budget, **QUIET)
    tolerance = 1e-6 * scale * (1 + np.abs(eigenvalues).max() + abs(shift))
    assert wasserstein_distance(scale * before.node + shift, after.node, before.weight, after.weight) < tolerance
    assert float(after.trace_se) == pytest.approx(scale * float(before.trace_se), abs=40 * tolerance)
    assert float(after.lambda_max) == pytest.approx(scale * float(before.lambda_max) + shift, abs=tolerance)


@pytest.mark.slow
def test_rotation_of_the_operator_does_not_change_the_errors_distribution():
    eigenvalues = like_a_network(300)
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((300, 300)))[0]
    rotated = as_operator((rotation * eigenvalues) @ rotation.T)
    errors = {
        name: [distance(spectral_density(op, n_hvp=60, seed=seed, **QUIET), eigenvalues) for seed in range(12)]
        for name, op in (("diagonal", diagonal(eigenvalues)), ("rotated", rotated))
    }
    # medians of 12 draws of a quantity whose relative spread is about a third
    assert 0.6 < np.median(errors["diagonal"]) / np.median(errors["rotated"]) < 1.7


@pytest.mark.parametrize("budget", [{"n_hvp": 60}, {"n_lanczos": 20, "n_probes": 3}])
@pytest.mark.parametrize(
    "eigenvalues",
    [np.zeros(100), np.full(100, 3.0), np.r_[np.zeros(95), 1, 2, 3, 4, 5.0]],
    ids=["zero", "identity", "low rank"],
)
def test_spectra_of_one_repeated_level_are_recovered_exactly(eigenvalues, budget):
    ds = spectral_density(diagonal(eigenvalues), **budget, **QUIET)
    assert ds.lambda_max == pytest.approx(eigenvalues.max(), abs=1e-12)
    assert ds.lambda_min == pytest.approx(eigenvalues.min(), abs=1e-12)
    assert distance(ds, eigenvalues) < 1e-12
    assert ds.trace == pytest.approx(eigenvalues.sum(), abs=1e-10)
    assert ds.trace_se == pytest.approx(0, abs=1e-6)
    assert np.isfinite(ds.density).all()


@pytest.mark.parametrize("budget", [{"n_hvp": 60}, {"n_lanczos": 20, "n_probes": 3}])
def test_multiplicities_of_several_levels_are_estimated_within_their_error(budget):
    eigenvalues = np.repeat([-1.0, 0.0, 2.0], [20, 40, 40])
    ds = spectral_density(diagonal(eigenvalues), **budget, **QUIET)
    assert ds.lambda_max == pytest.approx(2, abs=1e-12)
    assert ds.lambda_min == pytest.approx(-1, abs=1e-12)
    assert abs(ds.trace - eigenvalues.sum()) < 4 * ds.trace_se
    assert np.isfinite(ds.density).all()


def test_cluster_at_zero_does_not_ruin_the_trace():
    # inside the cluster Ritz pairs converge too: counting them while the probes still see them is off by 20 % and more
    eigenvalues = np.sort(np.r_[np.random.default_rng(0).normal(0, 1e-7, 1970), np.linspace(0.5, 8, 30)])
    distances = []
    for seed in range(5):
        ds = spectral_density(diagonal(eigenvalues), n_hvp=150, seed=seed, **QUIET)
        assert float(ds.trace) == pytest.approx(eigenvalues.sum(), rel=1e-5)
        distances.append(distance(ds, eigenvalues))
    assert np.median(distances) < 1e-6
    # where deflation ends before the last eigenvalue has converged, two nodes share it: off by their coupling
    assert max(distances) < 2 * 0.5 / len(eigenvalues)


@pytest.mark.parametrize("n_hvp", [100, *(pytest.param(n, marks=pytest.mark.slow) for n in (200, 400))])
def test_deflation_beats_plain_quadrature_at_equal_cost(n_hvp):
    eigenvalues = like_a_network()
    n_probes, n_lanczos = PLAIN[n_hvp]
    errors = {"plain": [], "deflated": []}
    for seed in range(10):
        plain = spectral_density(diagonal(eigenvalues), n_lanczos, n_probes, deflate=False, seed=seed, **QUIET)
        deflated = spectral_density(diagonal(eigenvalues), n_hvp=n_hvp, seed=seed, **QUIET)
        assert deflated.n_hvp <= n_hvp == plain.n_hvp
        for name, ds in (("plain", plain), ("deflated", deflated)):
            errors[name].append((distance(ds, eigenvalues), float(ds.trace) - eigenvalues.sum()))
    plain, deflated = np.array(errors["plain"]), np.array(errors["deflated"])
    fraction = 1 / 2 if n_hvp == 100 else 1 / 4
    assert np.median(deflated[:, 0]) <= fraction * np.median(plain[:, 0])
    fraction = 1 / 2 if n_hvp == 100 else 1 / 5
    assert np.sqrt(np.mean(deflated[:, 1] ** 2)) <= fraction * np.sqrt(np.mean(plain[:, 1] ** 2))


@pytest.mark.parametrize(
    "eigenvalues",
    [
        pytest.param(wigner(), id="Wigner", marks=pytest.mark.slow),
        pytest.param(np.linspace(0, 1, 600), id="uniform", marks=pytest.mark.slow),
    ],
)
def test_deflation_is_no_worse_where_there_are_no_outliers(eigenvalues):
    plain = [
        distance(spectral_density(diagonal(eigenvalues), 50, 4, deflate=False, seed=seed, **QUIET), eigenvalues)
        for seed in range(20)
    ]
    deflated = [
        distance(spectral_density(diagonal(eigenvalues), n_hvp=200, seed=seed, **QUIET), eigenvalues)
        for seed in range(20)
    ]
    assert np.median(deflated) <= 1.1 * np.median(plain)  # the medians themselves are known to some 10 %


@pytest.mark.parametrize(
    "budget",
    [
        pytest.param({"n_hvp": 60}, id="budget", marks=pytest.mark.slow),
        pytest.param({"n_lanczos": 20, "n_probes": 4}, id="lockstep", marks=pytest.mark.slow),
        pytest.param({"n_lanczos": 20, "n_probes": 4, "deflate": False}, id="plain", marks=pytest.mark.slow),
    ],
)
def test_intervals_of_the_trace_cover_it(budget):
    eigenvalues = like_a_network(400)
    covered, errors, stated = 0, [], []
    for seed in range(100):
        ds = spectral_density(diagonal(eigenvalues), seed=seed, grid=np.array([0.0, 1.0]), **budget, **QUIET)
        covered += bool(ds.trace_low <= eigenvalues.sum() <= ds.trace_high)
        errors.append(float(ds.trace) - eigenvalues.sum())
        stated.append(float(ds.trace_se))
    assert covered >= 88  # 95 expected; below 88 with probability 0.2 %
    assert 0.7 < np.sqrt(np.mean(np.square(stated)) / np.mean(np.square(errors))) < 1.4


def test_density_errors_are_those_seen_over_seeds():
    eigenvalues = like_a_network(400)
    grid = np.linspace(-0.2, 2.0, 30)
    runs = [
        spectral_density(diagonal(eigenvalues), 20, 4, grid=grid, kernel_width=0.2, seed=seed, **QUIET)
        for seed in range(60)
    ]
    density = np.stack([ds.density for ds in runs])
    stated = np.sqrt(np.mean([ds.density_se**2 for ds in runs], axis=0))
    ratio = density.std(axis=0, ddof=1) / stated
    assert 0.6 < np.median(ratio) < 1.4


def test_density_is_the_smoothed_measure_and_integrates_to_one():
    eigenvalues = like_a_network(300)
    exact = spectral_density(diagonal(eigenvalues), n_hvp=300, kernel_width=0.3, **QUIET)
    assert exact.attrs["method"] == "exact"
    assert not exact.density_se.any()
    kernel = np.exp(-0.5 * ((exact.eigenvalue.values[:, None] - eigenvalues) / 0.3) ** 2) / (0.3 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(exact.density, kernel.mean(axis=1), atol=1e-12)
    ds = spectral_density(diagonal(eigenvalues), n_hvp=100, **QUIET)
    assert float(ds.density.integrate("eigenvalue")) == pytest.approx(1, abs=1e-3)


def test_smoothing_on_another_grid_equals_asking_for_it():
    op = diagonal(like_a_network(300))
    a = spectral_density(op, n_hvp=80, **QUIET)
    b = spectral_density(diagonal(2 * like_a_network(300)), n_hvp=80, **QUIET)
    grid = default_grid(a, b)
    again = smooth(a, grid, kernel_width=0.2)
    asked = spectral_density(op, n_hvp=80, grid=grid, kernel_width=0.2, **QUIET)
    np.testing.assert_array_equal(again.density, asked.density)
    np.testing.assert_array_equal(again.density_se, asked.density_se)
    assert schema.validate(again).attrs["kernel_width"] == 0.2
    assert grid[0] < b.lambda_min
    assert grid[-1] > b.lambda_max


@pytest.mark.parametrize("budget", [{"n_hvp": 60}, {"n_lanczos": 20, "n_probes": 3}])
def test_killed_run_continues_to_the_same_result(tmp_path, budget):
    op = diagonal(like_a_network(300))
    whole = spectral_density(op, **budget, **QUIET)

    class Dying(DiagonalOperator):
        left = 35

        def matmat(self, V):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().matmat(V)

    options = {**budget, **QUIET, "state": tmp_path / "state", "save_every": 0.0}
    with pytest.raises(KeyboardInterrupt):
        spectral_density(Dying(op.eigenvalues), **options)
    assert any((tmp_path / "state").iterdir())
    with pytest.raises(CurvatureError, match="delete it to start again"):
        spectral_density(op, **{**options, "seed": 1})
    again = spectral_density(op, **options)
    for name in whole.data_vars:
        np.testing.assert_array_equal(again[name], whole[name], err_msg=name)
    once_more = spectral_density(Dying(op.eigenvalues), **options)  # nothing is lost before the caller has saved it
    xr.testing.assert_equal(once_more, again)


def test_probes_in_smaller_groups_are_the_same_probes():
    op, budget = diagonal(like_a_network(1000)), {"n_lanczos": 20, "n_probes": 5}
    ds = spectral_density(op, max_memory_bytes=70 * 1000 * 8, **budget, **QUIET)
    np.testing.assert_allclose(ds.ritz_value, spectral_density(op, **budget, **QUIET).ritz_value, atol=1e-8)


@pytest.mark.parametrize("budget", [{"n_hvp": 100}, {"n_lanczos": 20, "n_probes": 5}])
def test_memory_bound_is_kept(budget):
    eigenvalues = like_a_network(1000)
    bound = 70 * 1000 * 8
    ds = spectral_density(diagonal(eigenvalues), max_memory_bytes=bound, **budget, **QUIET)
    free = spectral_density(diagonal(eigenvalues), **budget, **QUIET)
    assert distance(ds, eigenvalues) < 3 * distance(free, eigenvalues)
    with pytest.raises(CurvatureError, match="the bound is"):
        spectral_density(diagonal(eigenvalues), max_memory_bytes=10 * 1000 * 8, basis="memory", **budget, **QUIET)


def test_float32_operator_agrees_with_float64():
    eigenvalues = like_a_network(500)
    double = spectral_density(diagonal(eigenvalues), 20, 5, **QUIET)
    single = spectral_density(DiagonalOperator(torch.from_numpy(eigenvalues).float()), 20, 5, **QUIET)
    # roundoff times the largest eigenvalue, with a margin for its growth over 20 steps
    assert wasserstein_distance(double.node, single.node, double.weight, single.weight) < 1e-4 * eigenvalues.max()
    assert float(single.trace) == pytest.approx(float(double.trace), rel=1e-4)
    assert single.attrs["dtype"] == "float32"


@pytest.mark.slow
def test_one_step_a_probe_still_tells_the_error_of_the_trace():
    eigenvalues = np.arange(100.0)
    runs = [spectral_density(diagonal(eigenvalues), 1, 4, deflate=False, seed=seed, **QUIET) for seed in range(60)]
    errors = np.array([float(ds.trace) for ds in runs]) - eigenvalues.sum()
    stated = np.sqrt(np.mean([float(ds.trace_se) ** 2 for ds in runs]))
    assert 0.7 < stated / np.sqrt(np.mean(errors**2)) < 1.4  # 60 draws know a root mean square to 9 %


def test_cost_is_as_asked_and_recorded():
    op = diagonal(like_a_network(500))
    assert spectral_density(op, 20, 5, **QUIET).attrs["n_hvp"] == 100
    assert spectral_density(op, 20, 5, deflate=False, **QUIET).attrs["n_hvp"] == 100
    for n_hvp in (30, 77, 250):
        assert 0.9 * n_hvp < spectral_density(op, n_hvp=n_hvp, **QUIET).attrs["n_hvp"] <= n_hvp
    ds = spectral_density(op, 30, 1, seed=5, **QUIET)
    assert ds.attrs["n_hvp"] <= 30
    assert (ds.attrs["seed"], ds.attrs["deflate"], ds.attrs["dtype"]) == (5, 1, "float64")


def test_dataset_survives_a_round_trip(tmp_path):
    ds = spectral_density(diagonal(like_a_network(300)), n_hvp=60, **QUIET)
    again = netcdf.load(netcdf.save(ds, tmp_path / "spectrum.nc"))
    np.testing.assert_array_equal(again.node, ds.node)
    assert smooth(again, ds.eigenvalue.values).density.equals(ds.density)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_lanczos": 21}, "n_lanczos is 21; it must lie between 1 and 20"),
        ({"n_lanczos": 0}, "between 1 and"),
        ({"n_lanczos": 5, "n_probes": 0}, "at least one probe"),
        ({"n_hvp": 3}, "at least 4 products"),
        ({"n_hvp": 10, "kernel_width": 0.0}, "kernel_width is 0.0"),
        ({"n_hvp": 10, "grid": np.array([1.0, 0.0])}, "ascending"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(PnError, match=message):
        spectral_density(np.diag(np.arange(20.0)), **arguments, **QUIET)


@pytest.mark.parametrize("budget", [{"n_hvp": 40}, {"n_hvp": 100}, {"n_lanczos": 10, "n_probes": 3}])
def test_bad_operators_are_refused(budget):
    square = np.random.default_rng(0).standard_normal((80, 80))
    with pytest.raises(CurvatureError, match=r"not symmetric.*\d%"):
        spectral_density(square, **budget, **QUIET)
    broken = np.eye(80)
    broken[3, 3] = np.nan
    with pytest.raises(CurvatureError, match="NaN or infinite"):
        spectral_density(broken, **budget, **QUIET)


@pytest.mark.parametrize("budget", [{"n_hvp": 40}, {"n_hvp": 100}, {"n_lanczos": 10, "n_probes": 3}])
def test_eigenvalues_whose_squares_underflow_are_refused(budget):
    eigenvalues = np.linspace(-1, 3, 80)
    for scale in (1e-160, 1e-300):
        with pytest.raises(CurvatureError, match="too small for float64.*multiply the loss"):
            spectral_density(diagonal(scale * eigenvalues), **budget, **QUIET)
    small, one = (spectral_density(diagonal(scale * eigenvalues), **budget, **QUIET) for scale in (1e-100, 1.0))
    for name in ("trace", "frobenius_norm", "lambda_max"):
        assert float(small[name]) == pytest.approx(1e-100 * float(one[name]), rel=1e-9)
    assert not spectral_density(diagonal(0 * eigenvalues), **budget, **QUIET).node.values.any()


@pytest.mark.parametrize("n_parameters", [1, 2, 3])
@pytest.mark.parametrize("budget", [{"n_hvp": 500}, {"n_hvp": 500, "deflate": False}, {"n_lanczos": 1, "n_probes": 9}])
def test_fewer_parameters_than_products_will_do(n_parameters, budget):
    eigenvalues = np.arange(1.0, n_parameters + 1)
    ds = spectral_density(diagonal(eigenvalues), **budget, **QUIET)
    assert float(ds.lambda_max) == pytest.approx(n_parameters)
    assert float(ds.trace) == pytest.approx(eigenvalues.sum(), abs=4 * float(ds.trace_se) + 1e-12)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("budget", [{"n_hvp": 60}, {"n_lanczos": 20, "n_probes": 4}])
def test_cuda_equals_cpu(budget):
    eigenvalues = torch.from_numpy(like_a_network(500))
    cpu = spectral_density(DiagonalOperator(eigenvalues), **budget, **QUIET)
    cuda = spectral_density(DiagonalOperator(eigenvalues.cuda()), **budget, **QUIET)
    assert wasserstein_distance(cpu.node, cuda.node, cpu.weight, cuda.weight) < 1e-7
    assert float(cuda.trace) == pytest.approx(float(cpu.trace), rel=1e-8)


@pytest.mark.parametrize(("n_lanczos", "n_probes"), [(1, 1), (2, 1), (3, 1)])
def test_so_few_products_are_all_spent_on_probes(n_lanczos: int, n_probes: int) -> None:
    values = np.r_[np.linspace(0, 1, 295), 3.0, 4, 5, 6, 7]
    inside = 0
    for seed in range(20):
        ds = spectral_density(np.diag(values), n_lanczos=n_lanczos, n_probes=n_probes, seed=seed, progress=False)
        assert float(ds.trace_high - ds.trace_low) > 1.0
        inside += bool(ds.trace_low <= values.sum() <= ds.trace_high)
    assert inside >= 17

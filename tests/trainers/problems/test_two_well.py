"""Descents on surfaces of two parameters, compared with hand-written loops and the paper's end points."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from pnanalysis.errors import TrainingError
from pnanalysis.io import netcdf
from trainers.problems.basins import basin_map
from trainers.problems.descent import PlaneFunction
from trainers.problems.two_well import (
    START,
    WINDOW,
    closed_form_gradient,
    descend,
    descend_restarts,
    penalised,
    surfaces,
    two_well,
)

matplotlib.use("agg")


def branching(x: Tensor, y: Tensor) -> Tensor:
    return x * x + y * y if x > 0 else 2 * x * x + y * y


def quadratic_form(x: Tensor, y: Tensor) -> Tensor:
    v = torch.stack([x, y])
    return v @ torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64) @ v


def himmelblau(x: Tensor, y: Tensor) -> Tensor:
    return (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2


TWO_WELLS: dict[str, PlaneFunction] = {
    "two wells": two_well,
    "repelled": penalised(two_well, [(2.0, -2.0), (-1.9, -1.0)], 0.1),
    "repelled twice": penalised(penalised(two_well, [(2.0, -2.0)], 0.1), [(0.3, 0.2)], 2.0),
}
OTHER: dict[str, PlaneFunction] = {
    "Himmelblau": himmelblau,
    "Himmelblau, repelled": penalised(himmelblau, [(3.0, 2.0)], 0.5),
    "a branch": branching,
    "matrix products": quadratic_form,
    "hypot": torch.hypot,
}


def by_hand(surface: PlaneFunction, start: tuple[float, float], lr: float, steps: int) -> np.ndarray:
    """Positions (steps + 1, 2) of plain descent through torch's autograd."""
    path = [start]
    for _ in range(steps):
        x, y = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in path[-1])
        slope = torch.autograd.grad(surface(x, y), (x, y))
        path.append((path[-1][0] - lr * float(slope[0]), path[-1][1] - lr * float(slope[1])))
    return np.array(path)


@pytest.mark.parametrize("name", TWO_WELLS)
def test_closed_form_gradient_is_torchs_own(name: str) -> None:
    gradient = closed_form_gradient(TWO_WELLS[name])
    assert gradient is not None
    points = np.random.default_rng(0).uniform(*zip(*WINDOW, strict=True), size=(200, 2)).T
    expected = torch.func.vmap(torch.func.grad(TWO_WELLS[name], argnums=(0, 1)))(*torch.from_numpy(points))
    one_by_one = np.array([gradient(x, y) for x, y in points.T.tolist()]).T
    # some ten roundings, 2^-53 each, of terms up to 10
    np.testing.assert_allclose(one_by_one, torch.stack(expected), rtol=0, atol=100 * 2**-53)
    np.testing.assert_allclose(gradient(*points), torch.stack(expected), rtol=0, atol=100 * 2**-53)


def test_closed_form_gradient_is_zero_on_the_kink_of_the_penalty() -> None:
    x, y = torch.tensor([1.0, 1.0], dtype=torch.float64)
    repelled = penalised(two_well, [(2.0, -2.0)], 0.1)  # whose kink passes through (1, 1)
    expected = [float(slope) for slope in torch.func.grad(repelled, argnums=(0, 1))(x, y)]
    for point in ((1.0, 1.0), (np.ones(1), np.ones(1))):
        slopes = closed_form_gradient(repelled)(*point)  # type: ignore[misc]
        np.testing.assert_allclose(np.ravel(slopes), expected, rtol=1e-14)


@pytest.mark.parametrize("name", OTHER)
def test_other_surfaces_are_left_to_torch(name: str) -> None:
    assert closed_form_gradient(OTHER[name]) is None


@pytest.mark.parametrize("name", [*TWO_WELLS, *OTHER])
def test_descent_follows_the_hand_written_loop(name: str) -> None:
    surface = {**TWO_WELLS, **OTHER}[name]
    ds = descend(surface, (-0.5, 1.0), iterations=1, lr=1e-2, steps=60, samples=60)
    expected = by_hand(surface, (-0.5, 1.0), 1e-2, 60)
    np.testing.assert_allclose(ds["path"][0], expected, rtol=1e-12)  # 60 steps of a few roundings, 2^-53 each
    assert ds["step"].values.tolist() == list(range(61))
    np.testing.assert_allclose(ds["value"][0], [surface(*torch.from_numpy(p)) for p in expected], rtol=1e-12)


def test_end_points_are_the_papers() -> None:
    ds = descend(iterations=2, lam=0.1)
    expected = [(2.000, -2.000), (-1.973, -1.013)]
    np.testing.assert_allclose(ds["end"], expected, atol=5e-4)  # to the digits given
    np.testing.assert_allclose(ds["end_value"], [-1.000, -1.534], atol=5e-4)
    assert int(ds["champion"]) == 1
    assert ds.sizes["step"] == 501
    assert ds["step"].values[-1] == 50_000


def test_persistent_iterations_are_repelled_from_all_before() -> None:
    ds = descend(iterations=3, lam=0.2, steps=300, lr=1e-2, samples=3)
    ends = ds["end"].values

    def repelled(x: Tensor, y: Tensor) -> Tensor:
        value = two_well(x, y)
        for a, b in ends[:2]:
            value = value + 0.2 * torch.abs(a * x + b * y) / (a * a + b * b)
        return value

    np.testing.assert_allclose(ends[2], by_hand(repelled, START, 1e-2, 300)[-1], rtol=1e-11)


def test_numpys_scalars_do_as_settings() -> None:
    settings = {"steps": 200, "samples": 2}
    ds = descend(iterations=3, lam=np.float64(0.2), lr=np.float64(1e-2), **settings)
    xr.testing.assert_equal(ds, descend(iterations=3, lam=0.2, lr=1e-2, **settings))


def test_surfaces_are_the_penalised_ones() -> None:
    ds = descend(iterations=3, lam=0.2, steps=300, lr=1e-2, samples=3)
    grid = surfaces(two_well, ds, window=((-3, 3), (-3, 1)), n=11)
    x, y = np.meshgrid(np.linspace(-3, 3, 11), np.linspace(-3, 1, 11))
    expected = -np.exp(-((x - 2) ** 2 + (y + 2) ** 2) / 5) - 1.5 * np.exp(-((x + 2) ** 2) - (y + 1) ** 2)
    for k in range(3):
        np.testing.assert_allclose(grid["value"].sel(iteration=k), expected, rtol=1e-13, atol=1e-15)
        a, b = ds["end"].values[k]
        expected = expected + 0.2 * np.abs(a * x + b * y) / (a * a + b * b)


def test_an_end_point_at_the_origin_repels_nothing() -> None:
    with pytest.warns(UserWarning, match="origin"):
        assert penalised(two_well, [(0.0, 0.0)], 0.1) is two_well


def test_restarts_begin_with_the_plain_descent_and_stay_in_the_window() -> None:
    three = descend_restarts(iterations=3, steps=200, seed=5)
    five = descend_restarts(iterations=5, steps=200, seed=5)
    np.testing.assert_array_equal(three["path"][:, 0], five["path"][:3, 0])
    np.testing.assert_array_equal(five["path"][0, 0], START)
    (left, right), (bottom, top) = WINDOW
    starts = five["path"][1:, 0].values
    assert len(np.unique(starts)) == 8
    assert (starts[:, 0] > left).all()
    assert (starts[:, 0] < right).all()
    assert (starts[:, 1] > bottom).all()
    assert (starts[:, 1] < top).all()
    expected = by_hand(two_well, tuple(starts[0]), 1e-3, 200)[-1]
    np.testing.assert_allclose(five["end"][1], expected, rtol=1e-12)


def test_a_stopped_descent_resumes_where_it_was() -> None:
    seen: list[xr.Dataset] = []
    whole = descend(iterations=4, steps=400, on_iteration=seen.append)
    assert [ds.sizes["iteration"] for ds in seen] == [1, 2, 3, 4]
    resumed = descend(iterations=4, steps=400, resume=seen[1])
    xr.testing.assert_equal(resumed, whole)
    with pytest.raises(TrainingError, match="another lam"):
        descend(iterations=4, steps=400, lam=0.3, resume=seen[1])


def test_descents_resume_from_a_file(tmp_path: Path) -> None:
    first = descend(iterations=2, steps=100)
    loaded = netcdf.load(netcdf.save(first, tmp_path / "descent.nc"))
    xr.testing.assert_equal(descend(iterations=3, steps=100, resume=loaded), descend(iterations=3, steps=100))


def first_bad_step(surface: PlaneFunction, start: tuple[float, float], lr: float, steps: int) -> int:
    for step, position in enumerate(by_hand(surface, start, lr, steps)):
        if not math.isfinite(float(surface(*torch.from_numpy(position)))):
            return step
    raise AssertionError("always finite")


@pytest.mark.parametrize(
    "surface",
    [
        lambda x, y: torch.log(x) + y * y,  # no value at negative x, but a slope
        lambda x, y: torch.sqrt(x) + y * y,
        lambda x, y: y * y + torch.where(x < 0.5, torch.nan, 1.0) * x,  # left to torch
    ],
)
@pytest.mark.parametrize("restarts", [False, True])
def test_a_surface_that_returns_nan_is_named_with_the_step(surface: PlaneFunction, restarts: bool) -> None:
    step = first_bad_step(surface, (1.0, 1.0), 0.01, 200)
    go: Callable[..., xr.Dataset] = descend_restarts if restarts else descend
    with pytest.raises(TrainingError, match=rf"not finite at step {step}, at \(-?0\.\d+, "):
        go(surface, (1.0, 1.0), lr=0.01, steps=1000, samples=7, **({"window": ((2.9, 3), (0, 1))} if restarts else {}))


def test_a_descent_that_runs_away_is_an_error_with_the_step() -> None:
    with pytest.raises(TrainingError, match="not finite at step 21"):
        descend(lambda x, y: -(x**4) - y**2, (1.0, 1.0), lr=0.01, steps=5000)


@pytest.mark.parametrize("lam", [-0.1, math.nan, math.inf])
def test_bad_strengths_are_refused(lam: float) -> None:
    with pytest.raises(TrainingError, match="lam is"):
        descend(lam=lam)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: descend(start=(1.0, math.nan)), "two finite numbers"),
        (lambda: descend(start=(1.0, 2.0, 3.0)), "two finite numbers"),
        (lambda: descend(lambda x, y: 3.0), "must return one number"),  # type: ignore[arg-type,return-value]
        (lambda: descend(lambda x, y: torch.stack([x, y])), "must return one number"),
        (lambda: descend(lambda x, y: torch.tensor(float(x) ** 2)), "must return one number"),
        (lambda: descend(iterations=0), "iterations is 0"),
        (lambda: descend(steps=0), "steps is 0"),
        (lambda: descend(lr=-1.0), "lr is -1"),
        (lambda: basin_map(window=((1, 0), (0, 1))), "window"),
        (lambda: basin_map(n=1), "n is 1"),
    ],
)
def test_bad_settings_are_refused(call: Callable[[], xr.Dataset], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        call()


@pytest.mark.usefixtures("closed_figures")
def test_figures_draw_what_the_datasets_hold() -> None:
    from pnanalysis.plots import two_well as plots

    ds = descend(iterations=3, steps=200)
    grid = surfaces(two_well, ds, n=21)
    ax = plots.descent(ds, grid)
    values = [f"{float(value):.3f}".replace("-", "−") for value in ds["end_value"]]
    named = [f"{name}: {value}" for name, value in zip(("plain", "persistent 1", "persistent 2"), values, strict=True)]
    assert [line.get_label() for line in ax.lines[1::4]] == named  # each over its rim, and with two ends
    np.testing.assert_array_equal(ax.lines[5].get_xydata(), ds["path"].values[1])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x", "y")
    panels = [ax for ax in plots.surface(grid, ds).axes if ax.get_title()]
    assert [ax.get_title() for ax in panels] == ["$f$", "$f_{1}$", "$f_{2}$"]
    np.testing.assert_array_equal(panels[2].lines[0].get_xydata(), ds["path"].values[2])
    basins = basin_map(n=21)
    ax = plots.basin(basins)
    np.testing.assert_array_equal(np.concatenate([line.get_xydata() for line in ax.lines]), basins["minimum"].values)
    perspective = plots.surface_3d(grid, ds, iteration=1).axes[0]
    path = perspective.lines[0].get_data_3d()  # type: ignore[attr-defined]
    np.testing.assert_array_equal(path[0], ds["path"].values[1, :, 0])
    low, high = float(grid["value"].sel(iteration=1).min()), float(grid["value"].sel(iteration=1).max())
    assert (path[2] >= low).all()
    assert (path[2] <= high).all()

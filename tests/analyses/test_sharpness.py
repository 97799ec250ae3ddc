"""Sharpness: quadratics, whose largest rise is known, and what is refused."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pnanalysis.analyses.sharpness import RADII, sharpness
from pnanalysis.errors import ModelError, RunError
from pnanalysis.inputs.networks import open_files
from pnanalysis.inputs.sources import Source
from pnanalysis.io import netcdf
from pnanalysis.io.runs import Run

RADIUS = {"ball": 0.2, "adaptive": 0.3, "box": 0.05}


@pytest.fixture
def quadratic(tmp_path: Path) -> tuple[Source, np.ndarray, np.ndarray, np.ndarray]:
    """Weights at the minimum of a squared error, and beside it; inputs, targets and both weights."""
    rng = np.random.default_rng(0)
    inputs, best = rng.normal(size=(80, 6)) * [3, 2, 1.5, 1, 0.5, 0.2], rng.normal(size=6)
    targets = inputs @ best
    model = nn.Linear(6, 1, bias=False).double()
    files = []
    points = np.stack([best, best + 0.3])
    for name, weight in zip(("minimum", "beside"), points, strict=True):
        torch.save({"weight": torch.as_tensor(weight)[None]}, tmp_path / f"{name}.pt")
        files.append(tmp_path / f"{name}.pt")
    data = (torch.as_tensor(inputs), torch.as_tensor(targets)[:, None])
    return open_files(model, files, data, "mse"), inputs, targets, points


def loss(weight: np.ndarray, inputs: np.ndarray, targets: np.ndarray) -> float:
    return float(np.mean((inputs @ weight - targets) ** 2))


def test_at_a_minimum_the_rise_is_that_of_the_top_eigenvector(quadratic) -> None:
    source, inputs, targets, (best, _) = quadratic
    ds = sharpness(source, checkpoints=["minimum"], radii=RADIUS, n_steps=80, dtype="float64", progress=False)
    rise = ds.rise.sel(checkpoint="minimum")
    hessian = 2 * inputs.T @ inputs / len(inputs)
    top = np.linalg.eigvalsh(hessian)[-1]
    # power iteration: (lambda_2 / lambda_1)^160 is nil
    assert float(rise.sel(neighbourhood="ball")) == pytest.approx(0.2**2 * top / 2, rel=1e-9)
    scaled = np.abs(best)[:, None] * hessian * np.abs(best)
    expected = 0.3**2 * np.linalg.eigvalsh(scaled)[-1] / 2
    assert float(rise.sel(neighbourhood="adaptive")) == pytest.approx(expected, rel=1e-9)
    half_sides = 0.05 * (np.abs(best) + 1)
    corners = [loss(best + half_sides * signs, inputs, targets) for signs in product([-1, 1], repeat=6)]
    found = float(rise.sel(neighbourhood="box"))
    assert found <= max(corners) * (1 + 1e-12)
    assert min(abs(found - corner) for corner in corners) < 1e-9 * max(corners)  # a corner, and a good one
    assert found > np.quantile(corners, 0.9)


def test_more_starts_find_the_highest_corner_of_the_box(quadratic) -> None:
    source, inputs, targets, (best, _) = quadratic
    options = {"radii": {"box": 0.05}, "dtype": "float64", "progress": False}
    many = sharpness(source, checkpoints=["minimum"], n_starts=12, **options)
    half_sides = 0.05 * (np.abs(best) + 1)
    corners = [loss(best + half_sides * signs, inputs, targets) for signs in product([-1, 1], repeat=6)]
    assert float(many.rise[0, 0]) == pytest.approx(max(corners), rel=1e-12)


def test_beside_a_minimum_one_step_follows_the_gradient(quadratic) -> None:
    source, inputs, targets, (_, beside) = quadratic
    ds = sharpness(source, checkpoints=["beside"], radii=RADIUS, dtype="float64", progress=False)
    gradient = 2 * inputs.T @ (inputs @ beside - targets) / len(inputs)
    scale = np.abs(beside)
    steps = {
        "ball": 0.2 * gradient / np.linalg.norm(gradient),
        "adaptive": 0.3 * scale**2 * gradient / np.linalg.norm(scale * gradient),
        "box": 0.05 * (scale + 1) * np.sign(gradient),
    }
    here = loss(beside, inputs, targets)
    assert float(ds.loss[0]) == pytest.approx(here, rel=1e-12)
    for name, step in steps.items():
        at = ds.sel(checkpoint="beside", neighbourhood=name)
        each = (inputs @ (beside + step) - targets) ** 2 - (inputs @ beside - targets) ** 2
        assert float(at.one_step) == pytest.approx(each.mean(), rel=1e-11)
        assert float(at.one_step_se) == pytest.approx(each.std(ddof=1) / np.sqrt(80), rel=1e-11)
        assert float(at.rise) >= float(at.one_step)
        assert float(at.relative) == pytest.approx(100 * float(at.rise) / (1 + here), rel=1e-12)
    assert ds.radius.values.tolist() == list(RADIUS.values())


def test_rescaling_a_relu_network_leaves_only_adaptive_sharpness_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scaled = {**state, "0.weight": 4 * state["0.weight"], "0.bias": 4 * state["0.bias"],
              "2.weight": state["2.weight"] / 4}  # fmt: skip
    files = []
    for name, one in (("a", state), ("b", scaled)):
        torch.save(one, tmp_path / f"{name}.pt")
        files.append(tmp_path / f"{name}.pt")
    data = (torch.randn(50, 4, dtype=torch.float64), torch.randint(3, (50,)))
    ds = sharpness(
        open_files(model, files, data), radii={"ball": 0.1, "adaptive": 0.1}, n_starts=1, dtype="float64",
        progress=False,
    )  # fmt: skip
    a, b = ds.rise.sel(neighbourhood="adaptive").values
    assert a == pytest.approx(b, rel=1e-9)
    a, b = ds.rise.sel(neighbourhood="ball").values
    assert abs(a - b) > 0.05 * a


def test_a_runs_checkpoints_lie_along_checkpoint(tiny_run: Run, tmp_path: Path) -> None:
    ds = sharpness(tiny_run, checkpoints=["start", "plain", "champion"], n=200, n_steps=4, n_starts=1, progress=False)
    assert ds.checkpoint.values.tolist() == ["start", "plain", "champion"]
    assert ds.neighbourhood.values.tolist() == list(RADII)
    assert (ds.rise > 0).all()
    assert (ds.rise >= ds.one_step - 1e-6).all()
    assert netcdf.load(netcdf.save(ds, tmp_path / "s.nc")).identical(ds)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radii": {"cube": 1.0}}, "unknown neighbourhood 'cube'"),
        ({"radii": {"ball": 0.0}}, "must be a number above 0"),
        ({"n_steps": 1}, "at least 2"),
        ({"checkpoints": ["middle"]}, "no checkpoint"),
    ],
)
def test_bad_input_is_one_clear_sentence(tiny_run: Run, options: dict, message: str) -> None:
    with pytest.raises((ModelError, ValueError), match=message):
        sharpness(tiny_run, progress=False, **options)


def test_no_run_is_refused() -> None:
    with pytest.raises(RunError, match="name a run"):
        sharpness()

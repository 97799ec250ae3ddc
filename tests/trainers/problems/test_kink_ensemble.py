"""Ensembles compared with single networks trained by autograd and torch.optim.SGD."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from pnanalysis.errors import TrainingError
from pnanalysis.io import netcdf
from trainers import PersistentPenalty
from trainers.problems.batched_relu import pack, predict
from trainers.problems.escape import escape
from trainers.problems.kink_ensemble import initial_parameters, train_chains, train_restarts
from trainers.zoo.kink import kink_data
from trainers.zoo.models import relu32

matplotlib.use("agg")

X, Y = kink_data("kink6")
STEPS = 300


def single_chain(seed: int, lam: float, iterations: int, dtype: torch.dtype, steps: int = STEPS) -> list[Tensor]:
    """End points of a chain of one network, through autograd and torch's own optimiser."""
    x, y = (torch.tensor(values, dtype=dtype)[:, None] for values in (X, Y))
    ends: list[dict[str, Tensor]] = []
    for _ in range(iterations):
        torch.manual_seed(seed)
        model = relu32().to(dtype)
        penalty = PersistentPenalty(model, lam)
        for end in ends:
            penalty.add(end)
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        for _ in range(steps):
            optimiser.zero_grad()
            loss = (model(x) - y).square().mean()
            (loss + penalty() if ends else loss).backward()
            optimiser.step()
        ends.append({name: value.detach().clone() for name, value in model.state_dict().items()})
    return [pack(end) for end in ends]


def round_off(dtype: torch.dtype, parameters: np.ndarray) -> float:
    """One rounding error of the largest parameter at every step, all in the same direction."""
    return STEPS * torch.finfo(dtype).eps / 2 * float(np.abs(parameters).max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batch_equals_single_networks_to_round_off(dtype: torch.dtype) -> None:
    ds = train_chains(X, Y, seeds=[3, 7], lams=[0.01, 0.1], iterations=3, steps=STEPS, dtype=dtype, progress=False)
    for seed, lam in ((3, 0.01), (7, 0.1)):
        member = np.flatnonzero((ds["seed"] == seed) & (ds["lam"] == lam))[0]
        for iteration, expected in enumerate(single_chain(seed, lam, 3, dtype)):
            found = ds["parameters"].values[iteration, member]
            assert found.dtype == expected.numpy().dtype
            np.testing.assert_allclose(found, expected, rtol=0, atol=round_off(dtype, found))


def test_a_seeds_start_does_not_depend_on_other_seeds() -> None:
    torch.manual_seed(11)
    model = relu32()
    assert torch.equal(initial_parameters(11), pack(model.state_dict()))
    assert not any(layer.bias.any() for layer in (model.fc1, model.fc2, model.fc3))  # type: ignore[union-attr]
    alone = train_restarts(X, Y, seeds=[11], steps=STEPS, samples=2, progress=False)
    company = train_restarts(X, Y, seeds=[*range(40), 11], steps=STEPS, samples=2, progress=False)
    assert float(alone["loss"][0, 0, 0]) == float(company["loss"][0, 40, 0])
    found = company["parameters"].values[0, 40]
    np.testing.assert_allclose(found, alone["parameters"].values[0, 0], rtol=0, atol=round_off(torch.float32, found))


def test_same_seeds_give_the_same_numbers() -> None:
    first, second = (train_chains(X, Y, seeds=range(5), iterations=2, steps=300, progress=False) for _ in range(2))
    xr.testing.assert_identical(first.drop_attrs(), second.drop_attrs())


def test_dataset_holds_what_was_trained() -> None:
    ds = train_chains(X, Y, seeds=[0, 1], lams=[0.1, 0.01], iterations=3, steps=500, samples=5, progress=False)
    assert ds["loss"].dims == ("iteration", "member", "step")
    assert ds["step"].values.tolist() == [0, 100, 200, 300, 400, 500]
    assert list(zip(ds["seed"].values, ds["lam"].values, strict=True)) == [(0, 0.1), (1, 0.1), (0, 0.01), (1, 0.01)]
    np.testing.assert_array_equal(ds["loss"].isel(step=-1), ds["final_loss"])
    np.testing.assert_array_equal(ds["champion"], ds["final_loss"].values.argmin(0))
    np.testing.assert_array_equal(ds["champion_loss"], ds["final_loss"].values.min(0))
    outputs = predict(torch.from_numpy(ds["parameters"].values[2]), torch.from_numpy(X).float(), 32).double().numpy()
    np.testing.assert_allclose(((outputs - Y) ** 2).mean(1), ds["final_loss"][2], rtol=1e-5)  # float32: a few 2^-24
    np.testing.assert_array_equal(ds["loss"][:, 0, 0], ds["loss"][:, 2, 0])  # all from one start


def test_other_data_and_widths_can_be_used() -> None:
    x = np.linspace(-1, 1, 15)
    ds = train_restarts(x, x, seeds=[0], width=8, steps=2000, lr=1e-2, progress=False)
    assert float(ds["final_loss"][0, 0]) < 1e-2 < float(ds["loss"][0, 0, 0])


@pytest.mark.parametrize("train", [train_chains, train_restarts])
def test_a_stopped_ensemble_resumes_where_it_was(train: Callable[..., xr.Dataset], tmp_path: Path) -> None:
    seen: list[xr.Dataset] = []
    settings: dict[str, Any] = {"seeds": [2, 5], "steps": 200, "samples": 4, "progress": False}
    whole = train(X, Y, iterations=4, on_iteration=seen.append, **settings)
    assert [ds.sizes["iteration"] for ds in seen] == [1, 2, 3, 4]
    saved = netcdf.load(netcdf.save(seen[1], tmp_path / "ensemble.nc"))
    resumed = train(X, Y, iterations=4, resume=saved, **settings)
    xr.testing.assert_identical(resumed.drop_attrs(), whole.drop_attrs())
    xr.testing.assert_identical(train(X, Y, iterations=4, resume=whole, **settings).drop_attrs(), whole.drop_attrs())
    with pytest.raises(TrainingError, match="without losses and parameters"):
        train(X, Y, resume=saved.drop_vars("parameters"), **settings)
    with pytest.raises(TrainingError, match="another lr"):
        train(X, Y, iterations=4, resume=saved, **settings, lr=1e-2)
    with pytest.raises(TrainingError, match="another members"):
        train(X, Y, iterations=4, resume=saved, **{**settings, "seeds": [2, 6]})


def test_restarts_begin_where_the_chains_do_and_then_afresh() -> None:
    restarts = train_restarts(X, Y, seeds=[2, 5], iterations=3, steps=100, progress=False)
    chains = train_chains(X, Y, seeds=[2, 5], iterations=1, steps=100, progress=False)
    np.testing.assert_array_equal(restarts["parameters"][0], chains["parameters"][0])
    assert len(np.unique(restarts["init_seed"])) == 6
    again = initial_parameters(int(restarts["init_seed"][2, 1]))
    loss = (predict(again[None], torch.from_numpy(X).float(), 32)[0].double() - torch.from_numpy(Y)).square().mean()
    assert float(restarts["loss"][2, 1, 0]) == pytest.approx(float(loss), rel=1e-5)


def test_most_he_initialisations_reach_the_plateau() -> None:
    """The paper's figure 4, after 2,000 of its 50,000 steps; the full length is the slow test below."""
    ds = train_restarts(X, Y, seeds=range(100), steps=2000, samples=1, progress=False)
    assert 93 - 8 <= int((abs(ds["final_loss"] - 4.2) < 0.042).sum()) <= 93 + 8


@pytest.mark.slow
def test_most_he_initialisations_stay_on_the_plateau() -> None:
    ds = train_restarts(X, Y, seeds=range(100), progress=False)
    stuck = int((abs(ds["final_loss"] - 4.2) < 0.01).sum())
    assert 93 - 8 <= stuck <= 93 + 8
    assert float(ds["final_loss"].min()) < 0.33  # the paper's best of 100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lams": [-0.01]}, "lam is -0.01"),
        ({"lams": [0.1, math.nan]}, "lam is nan"),
        ({"lams": []}, "no seeds"),
        ({"seeds": []}, "no seeds"),
        ({"x": X[:-1]}, r"x has shape \(5,\) and y \(6,\)"),
        ({"x": X[:, None]}, "one-dimensional, of the same length"),
        ({"y": np.full(6, np.nan)}, "all finite"),
        ({"x": [], "y": []}, "at least one point"),
        ({"steps": 0}, "steps is 0"),
        ({"iterations": 0}, "iterations is 0"),
        ({"width": 0}, "width is 0"),
        ({"lr": math.nan}, "lr nan"),
        ({"momentum": 1.0}, "momentum 1.0"),
    ],
)
def test_bad_input_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        train_chains(**{"x": X, "y": Y, "steps": 10, "progress": False, **settings})


def test_a_loss_that_is_not_finite_is_named() -> None:
    message = r"seed 4, lam 0.01 became (nan|inf) by step \d+ of iteration 0"
    with pytest.raises(TrainingError, match=message):
        train_chains(X, Y, seeds=[4], lr=10.0, steps=500, progress=False)


def test_the_number_of_threads_is_restored() -> None:
    before = torch.get_num_threads()
    train_restarts(X, Y, steps=10, progress=False)
    assert torch.get_num_threads() == before


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu() -> None:
    settings: dict[str, Any] = {
        "seeds": [3, 7],
        "lams": [0.01, 0.1],
        "iterations": 3,
        "steps": STEPS,
        "progress": False,
    }
    ours = train_chains(X, Y, device="cuda", dtype=torch.float64, **settings)["parameters"].values
    theirs = train_chains(X, Y, device="cpu", dtype=torch.float64, **settings)["parameters"].values
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=round_off(torch.float64, theirs))


@pytest.mark.usefixtures("closed_figures")
def test_figures_draw_what_the_datasets_hold() -> None:
    from pnanalysis.plots import kink as plots

    settings: dict[str, Any] = {"steps": 100, "samples": 2, "progress": False}
    chains = train_chains(X, Y, seeds=[0, 1, 2], lams=[0.01, 0.1], iterations=3, **settings)
    restarts = train_restarts(X, Y, seeds=[0, 1, 2], iterations=3, **settings)
    ax = plots.predictors(chains, restarts, member=4)
    plain, best_restart, best, data = (line.get_xydata() for line in ax.lines)
    np.testing.assert_array_equal(plain[:, 1], chains["prediction"][0, 4])
    champion = int(chains["champion"][4])
    np.testing.assert_array_equal(best[:, 1], chains["prediction"][champion, 4])
    where = np.unravel_index(restarts["final_loss"].values.argmin(), (3, 3))
    np.testing.assert_array_equal(best_restart[:, 1], restarts["prediction"].values[where])
    np.testing.assert_array_equal(data, np.stack([X, Y], axis=1))
    ax = plots.losses_by_iteration(chains, plateau=4.2)
    np.testing.assert_array_equal([line.get_ydata() for line in ax.lines[1:-1]], chains["final_loss"].values.T)
    ax = plots.losses_by_seed(restarts)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), restarts["final_loss"][0])
    assert ax.get_xlabel() == "seed"
    assert len(plots.ensemble(chains).axes) == 2
    ds = escape(chains, restarts)
    ax = plots.escape(ds)
    np.testing.assert_array_equal([line.get_ydata() for line in ax.lines], ds["probability"])
    assert len(ax.collections) == 3

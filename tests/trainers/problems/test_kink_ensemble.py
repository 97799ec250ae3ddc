"""Batched networks against single ones trained by autograd and torch.optim.SGD; kink data; escape probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import binomtest
from torch import Tensor

from pnanalysis.errors import TrainingError
from pnanalysis.io import netcdf
from trainers import PersistentPenalty
from trainers.problems.batched_relu import ReluBatch, Repulsion, layer_sizes, pack, predict, unpack
from trainers.problems.escape import escape, wilson_interval
from trainers.problems.kink_ensemble import initial_parameters, train_chains, train_restarts
from trainers.zoo.kink import kink_data, two_sided_fit_loss
from trainers.zoo.models import relu32

matplotlib.use("agg")

X, Y = kink_data("kink6")
STEPS = 1000


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


def test_steps_agree_one_by_one() -> None:
    torch.manual_seed(3)
    model = relu32().double()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    batch = ReluBatch(x, y, pack(model.state_dict())[None], 32, 1e-3, 0.9)
    for step in range(1, 31):
        optimiser.zero_grad()
        loss = (model(x[:, None])[:, 0] - y).square().mean()
        loss.backward()
        torch.testing.assert_close(batch.losses()[0], loss.detach(), rtol=step * 1e-14, atol=0)
        optimiser.step()
        batch.step()
        torch.testing.assert_close(batch.parameters[0], pack(model.state_dict()), rtol=0, atol=step * 2**-52)


def test_repulsion_is_the_gradient_of_the_penalty_for_each_member() -> None:
    width, lams, n = 5, [0.3, 0.0, 0.02], 4
    torch.manual_seed(0)
    ends = torch.randn(n, 3, sum(layer_sizes(width)), dtype=torch.float64)
    repulsion = Repulsion(ends, torch.tensor(lams, dtype=torch.float64), width)
    for _ in range(3):  # signs change between the points
        theta = torch.randn(3, sum(layer_sizes(width)), dtype=torch.float64)
        gradient = repulsion.update([block[:, None] for block in theta.split(layer_sizes(width), dim=1)])
        found = torch.cat([f.view(3, -1) for f in gradient.split([3 * s for s in layer_sizes(width)])], dim=1)
        for member, lam in enumerate(lams):
            model = relu32(width).double()
            model.load_state_dict(unpack(theta[member], width))
            penalty = PersistentPenalty(model, lam)
            for end in ends:
                penalty.add(unpack(end[member], width))
            penalty().backward()
            expected = pack({name: p.grad for name, p in model.named_parameters()})  # type: ignore[misc]
            torch.testing.assert_close(found[member], expected, rtol=1e-13, atol=1e-15)


def test_a_layer_of_zeros_repels_nothing_and_is_reported() -> None:
    ends = torch.ones(1, 2, sum(layer_sizes(4)))
    ends[0, 1, : layer_sizes(4)[0]] = 0
    with pytest.warns(UserWarning, match="1 layers of end points are zero"):
        repulsion = Repulsion(ends, torch.ones(2), 4)
    gradient = repulsion.update([torch.ones(2, 1, size) for size in layer_sizes(4)])
    first = gradient[: 2 * layer_sizes(4)[0]].view(2, -1)
    assert (first[0] == 1 / layer_sizes(4)[0]).all()
    assert (first[1] == 0).all()


def test_a_seeds_start_does_not_depend_on_its_company() -> None:
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


def test_packing_predicting_and_unpacking_agree_with_the_network() -> None:
    torch.manual_seed(0)
    model = relu32(7).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    parameters = pack(model.state_dict())
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    expected = model(x[:, None])[:, 0].detach()
    torch.testing.assert_close(predict(parameters[None], x, 7)[0], expected, rtol=1e-13, atol=1e-13)
    other = relu32(7).double()
    other.load_state_dict(unpack(parameters, 7))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


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


def test_any_data_and_width_will_do() -> None:
    x = np.linspace(-1, 1, 15)
    ds = train_restarts(x, x, seeds=[0], width=8, steps=2000, lr=1e-2, progress=False)
    assert float(ds["final_loss"][0, 0]) < 1e-2 < float(ds["loss"][0, 0, 0])


@pytest.mark.parametrize("train", [train_chains, train_restarts])
def test_a_stopped_study_goes_on_where_it_was(train: Callable[..., xr.Dataset], tmp_path: Path) -> None:
    seen: list[xr.Dataset] = []
    settings: dict[str, Any] = {"seeds": [2, 5], "steps": 200, "samples": 4, "progress": False}
    whole = train(X, Y, iterations=4, on_iteration=seen.append, **settings)
    assert [ds.sizes["iteration"] for ds in seen] == [1, 2, 3, 4]
    saved = netcdf.load(netcdf.save(seen[1], tmp_path / "study.nc"))
    resumed = train(X, Y, iterations=4, resume=saved, **settings)
    xr.testing.assert_identical(resumed.drop_attrs(), whole.drop_attrs())
    xr.testing.assert_identical(train(X, Y, iterations=4, resume=whole, **settings).drop_attrs(), whole.drop_attrs())
    with pytest.raises(TrainingError, match="not kept its losses"):
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


@pytest.mark.parametrize("name", ["kink6", "kink20"])
def test_two_sided_linear_fit_has_the_papers_plateau(name: str) -> None:
    x, y = kink_data(name)
    residuals = [y[side] - np.polyval(np.polyfit(x[side], y[side], 1), x[side]) for side in (x < 0, x > 0)]
    assert np.mean(np.concatenate(residuals) ** 2) == pytest.approx(4.2, rel=1e-12)
    assert two_sided_fit_loss(x, y) == pytest.approx(4.2, rel=1e-12)
    np.testing.assert_allclose(y, -y[::-1])
    assert len(x) == int(name.removeprefix("kink"))


def test_six_points_are_those_of_the_literature() -> None:
    np.testing.assert_array_equal(X, [-3, -2, -1, 1, 2, 3])
    np.testing.assert_allclose(Y, math.sqrt(2.1) * np.array([-1, 2, -1, 1, -2, 1]))


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


@pytest.mark.slow
def test_persistent_chains_leave_the_plateau_more_often_than_restarts() -> None:
    chains = train_chains(X, Y, seeds=range(6), lams=[0.01, 0.1], iterations=12, progress=False)
    ds = escape(chains, train_restarts(X, Y, seeds=range(6), iterations=12, progress=False))
    weak, strong, restart = (ds["probability"].values[k] for k in range(3))
    assert weak[-1] >= 5 / 6 > restart[-1]
    assert strong[2] > weak[2]
    assert strong[-1] >= 5 / 6


def made_up(losses: list[list[float]], lams: list[float]) -> xr.Dataset:
    """An ensemble with the given final losses (iteration, member)."""
    variables = {"final_loss": (("iteration", "member"), np.array(losses)), "data_x": ("point", X)}
    coords = {"lam": ("member", lams), "iteration": np.arange(len(losses))}
    return xr.Dataset({**variables, "data_y": ("point", Y)}, coords=coords)


def test_escape_counts_starts_that_have_left_so_far() -> None:
    chains = made_up([[4.2, 4.2, 4.2, 4.19], [0.1, 4.2, 4.2, 2.0], [4.2, 4.2, 1.0, 4.2]], [0.1, 0.1, 0.01, 0.01])
    restarts = made_up([[4.2, 0.5, 4.2], [4.2, 4.2, 4.2], [4.2, 4.2, 4.2]], [math.nan] * 3)
    ds = escape(chains, restarts)
    assert ds["strategy"].values.tolist() == ["persistent, λ = 0.01", "persistent, λ = 0.1", "restart"]
    np.testing.assert_allclose(ds["probability"], [[0, 0.5, 1], [0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]])
    assert ds["n_starts"].values.tolist() == [2, 2, 3]
    np.testing.assert_allclose(ds["best_loss"][0], [4.195, 3.1, 1.5])  # medians of (4.2, 4.19), (4.2, 2), (1, 2)
    assert ds.attrs["plateau"] == pytest.approx(4.2)
    interval = binomtest(1, 3).proportion_ci(0.95, method="wilson")
    assert float(ds["probability_low"][2, 0]) == pytest.approx(interval.low)
    assert float(ds["probability_high"][2, 0]) == pytest.approx(interval.high)
    np.testing.assert_array_equal(ds["lam"], [0.01, 0.1, math.nan])


def test_escape_takes_one_strength_and_a_shorter_control() -> None:
    ds = escape(made_up([[4.2], [0.1]], [0.1]))
    assert ds["probability"].dims == ("strategy", "iteration")
    assert ds["lam"].values.tolist() == [0.1]
    both = escape(made_up([[4.2], [0.1]], [0.1]), made_up([[4.2]], [math.nan]))
    np.testing.assert_array_equal(both["probability"], [[0, 1], [0, math.nan]])


def test_escape_refuses_other_data() -> None:
    chains = made_up([[4.2]], [0.1])
    with pytest.raises(TrainingError, match="different data"):
        escape(chains, chains.assign(data_y=2 * chains["data_y"]))
    with pytest.raises(TrainingError, match="margin"):
        escape(chains, margin=1.5)


@pytest.mark.parametrize(("k", "n"), [(0, 5), (5, 5), (7, 30), (29, 30)])
def test_wilson_interval_agrees_with_scipy(k: int, n: int) -> None:
    expected = binomtest(k, n).proportion_ci(0.9, method="wilson")
    low, high = wilson_interval([k], n, 0.9)
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lams": [-0.01]}, "lam is -0.01"),
        ({"lams": [0.1, math.nan]}, "lam is nan"),
        ({"lams": []}, "no seeds"),
        ({"seeds": []}, "no seeds"),
        ({"x": X[:-1]}, r"x has shape \(5,\) and y \(6,\)"),
        ({"x": X[:, None]}, "one row of the same length"),
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


def test_unknown_data_is_refused() -> None:
    with pytest.raises(TrainingError, match="there are kink6 and kink20"):
        kink_data("kink7")


def test_threads_are_given_back() -> None:
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


@pytest.fixture
def closed_figures() -> Iterator[None]:
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


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

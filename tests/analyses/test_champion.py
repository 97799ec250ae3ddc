"""Champions of known kind: a relabelled copy, the same weights, a better network, one of equals, and runs."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import pnanalysis as pn
from pnanalysis.analyses import finished_eigenpairs, network_sharpness
from pnanalysis.analyses.champion import _with_selection
from pnanalysis.analyses.champion_verdict import ADVICE, number_of
from pnanalysis.analyses.contest import contest
from pnanalysis.errors import PnError
from pnanalysis.io.runs import Run
from trainers import Config, train

champion_module = import_module("pnanalysis.analyses.champion")
blocks_module = import_module("pnanalysis.analyses.blocks")
FAST: dict[str, Any] = {"hessian": False, "saturation": False, "progress": False}
CLASSES, INPUTS, HIDDEN = 3, 6, 10


def points(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes by the largest of three smooth functions."""
    x = torch.randn(n, INPUTS, generator=torch.Generator().manual_seed(seed))
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3] ** 2 - 1], dim=1).argmax(1)


DATA = {"train": points(600, 0), "validation": points(400, 1), "test": points(4000, 2)}


def trained(seed: int, steps: int = 60) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))
    optimizer, (x, y) = torch.optim.Adam(net.parameters(), lr=0.03), DATA["train"]
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


def relabelled(net: nn.Sequential) -> nn.Sequential:
    """The same function, hidden units in another order and some with the opposite sign."""
    order = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(0))
    sign = torch.where(torch.arange(HIDDEN) % 3 == 0, -1.0, 1.0)
    other = deepcopy(net)
    with torch.no_grad():
        other[0].weight.copy_(sign[:, None] * net[0].weight[order])
        other[0].bias.copy_(sign * net[0].bias[order])
        other[2].weight.copy_(net[2].weight[:, order] * sign)
    return other


@pytest.fixture(scope="module")
def plain() -> nn.Sequential:
    return trained(0)


@pytest.fixture(scope="module")
def restarts() -> dict[str, nn.Sequential]:
    return {f"restart {seed}": trained(seed) for seed in (1, 2, 3, 5)}


def judged(plain: nn.Module, best: nn.Module, restarts: dict[str, Any], **options: Any) -> xr.Dataset:
    return pn.champion({"plain": plain, "best": best, **restarts}, data=DATA, **(FAST | options))


def test_a_relabelled_copy_is_the_same_minimum_by_symmetry(plain, restarts) -> None:
    ds = judged(plain, relabelled(plain), dict(list(restarts.items())[:2]))
    assert (ds.attrs["minimum"], ds.attrs["better"]) == ("same by symmetry", "not shown")
    assert number_of(ds, "distance", 1).value > 1
    assert number_of(ds, "aligned_distance", 1).value < 1e-5
    assert number_of(ds, "barrier", 1).value > 0.1  # before alignment
    assert number_of(ds, "aligned_barrier", 1).value < 1e-6
    unaligned = judged(plain, relabelled(plain), {}, align=False)
    assert unaligned.attrs["minimum"] == "same function"


def test_the_same_weights_are_identical_and_no_better(plain) -> None:
    ds = judged(plain, deepcopy(plain), {})
    assert (ds.attrs["minimum"], ds.attrs["better"]) == ("identical", "not shown")
    assert ADVICE in pn.verdict(ds)
    assert "restart" not in ds.attrs["better"]
    np.testing.assert_array_equal(ds.error_difference, [0.0])


def test_a_better_network_is_another_and_better_minimum(plain, restarts) -> None:
    best = trained(7, steps=300)
    ds = judged(plain, best, restarts)
    assert (ds.attrs["minimum"], ds.attrs["better"]) == ("another minimum", "better")
    first, second, *_ = pn.verdict(ds)
    assert first.startswith("Another minimum? Yes: the barrier of the training loss")
    assert second.startswith("Better? Yes: test error")
    with torch.no_grad():
        x, y = DATA["test"]
        wrong = [net(x).argmax(1) != y for net in (best, plain)]
    at = ds.sel(reference="plain")
    assert int(at.only_wrong) == int((wrong[0] & ~wrong[1]).sum())
    assert int(at.only_right) == int((wrong[1] & ~wrong[0]).sum())
    assert float(at.error_difference) == pytest.approx(float(wrong[0].float().mean() - wrong[1].float().mean()))
    low = ds.sel(diagnostic="train_loss")
    assert float(low.null_p_single) < 0.01  # those of one training length, and one of five times that
    assert float(low.null_rank) == 1
    assert ds.attrs["best_restart"] in restarts


def test_one_more_restart_lies_inside(plain, restarts) -> None:
    others = dict(restarts)
    best = others.pop("restart 3")
    ds = judged(plain, best, others)
    assert ds.attrs["minimum"] == "another minimum"
    tested = ds.null_p.notnull()
    assert int(tested.sum()) >= 8
    assert not bool((ds.null_p <= 0.05).any())
    # the pairs are with the plain model
    own = {name: [number_of(ds, name, i).value for i in range(5)] for name in ("distance", "disagreement")}
    networks = [plain, best, *others.values()]
    flat = [torch.cat([p.detach().ravel() for p in net.parameters()]).double() for net in networks]
    np.testing.assert_allclose(own["distance"][1:], [float((one - flat[0]).norm()) for one in flat[1:]], rtol=1e-5)
    with torch.no_grad():
        classes = [net(DATA["test"][0]).argmax(1) for net in networks]
    np.testing.assert_allclose(
        own["disagreement"][1:], [float((one != classes[0]).double().mean()) for one in classes[1:]]
    )
    assert all(np.isnan(values[0]) for values in own.values())
    np.testing.assert_allclose(float(ds.null_mean.sel(diagnostic="distance")), np.mean(own["distance"][2:]), rtol=1e-6)


def test_a_network_that_cannot_be_aligned_is_judged_as_it_is(plain, restarts) -> None:
    ds = judged(plain, restarts["restart 1"], {}, align=False)
    assert ds.attrs["minimum"] == "another minimum (not aligned)"
    assert "alignment is turned off" in pn.verdict(ds)[0]
    assert "aligned_distance" not in ds.diagnostic.values


@pytest.mark.parametrize("order", ["as drawn", "class after class"])
def test_the_gradient_and_its_noise_are_those_of_the_loss(order: str, plain, restarts) -> None:
    data = dict(DATA)
    if order != "as drawn":
        by_class = data["train"][1].argsort()
        data["train"] = (data["train"][0][by_class], data["train"][1][by_class])
    ds = pn.champion(
        {"plain": plain, "best": restarts["restart 1"]}, data=data, hessian={"n": 200, "n_hvp": 20}, cka=False,
        saturation=False, n_line=600, n_points=3, progress=False,
    )  # fmt: skip
    loss = nn.functional.cross_entropy(plain(DATA["train"][0]), DATA["train"][1])
    norm = torch.cat([g.ravel() for g in torch.autograd.grad(loss, list(plain.parameters()))]).norm()
    assert number_of(ds, "gradient_norm", 0).value == pytest.approx(float(norm), rel=1e-4)
    each = torch.func.vmap(
        torch.func.grad(lambda p, x, y: nn.functional.cross_entropy(torch.func.functional_call(plain, p, x), y)),
        in_dims=(None, 0, 0),
    )(dict(plain.named_parameters()), *DATA["train"])
    flat = torch.cat([one.reshape(600, -1) for one in each.values()], dim=1)
    exact = float(((flat.detach() - flat.detach().mean(0)) ** 2).sum() / (599 * 600)) ** 0.5
    assert float(ds.gradient_noise[0]) == pytest.approx(exact, rel=0.4)  # from nine batches
    assert any(sentence.startswith("A minimum at all?") for sentence in pn.verdict(ds))


MORE: dict[str, Any] = {
    "eigenpairs": {"n": 100, "k": 2, "data_error": "none"}, "blocks": {"n": 100, "n_hvp": 16, "data_error": "none"},
    "sharpness": {"n": 100, "n_steps": 2, "n_directions": 2, "measures": ("worst", "average")},
    "n_points": 3, "n_line": 100, "cka": False, "align": False,
}  # fmt: skip


def test_an_interrupted_call_goes_on_and_finds_the_same(plain, restarts, tmp_path, monkeypatch) -> None:
    """The second time, what was finished is not measured again: the call is as if it had not been interrupted."""
    best, other = restarts["restart 1"], {"r": restarts["restart 2"]}
    whole = judged(plain, best, other, **MORE)
    new = ("overlap", "1_eigenvalue", "2_eigenvalue", "gradient_top", "0_block_trace", "2_block_trace",
           "network_off_diagonal_share", "trace_concentration", "worst_rise")  # fmt: skip
    assert set(new) <= set(whole.diagnostic.values)
    assert (whole.diagnostic_units.sel(diagnostic=["1_eigenvalue", "2_block_trace"]) == "loss").all()
    assert whole.null_rank.sel(diagnostic=["overlap", "2_eigenvalue", "0_block_trace"]).notnull().all()
    calls: list[str] = []

    def counted(module: Any, name: str, stop_at: int = 0) -> None:
        inner = getattr(module, name)

        def wrapped(*given: Any, **options: Any) -> Any:
            calls.append(name)
            if calls.count(name) == stop_at:
                raise KeyboardInterrupt
            return inner(*given, **options)

        monkeypatch.setattr(module, name, wrapped)

    counted(champion_module, "network_landscape")
    counted(finished_eigenpairs, "matrix_eigenpairs")
    counted(network_sharpness, "worst_case")
    counted(blocks_module, "matrix_blocks", stop_at=2)
    with pytest.raises(KeyboardInterrupt):
        judged(plain, best, other, **MORE, state=tmp_path / "w")
    names = ("network_landscape", "matrix_eigenpairs", "worst_case", "matrix_blocks")
    assert [calls.count(name) for name in names] == [2, 3, 3, 2]
    again = judged(plain, best, other, **MORE, state=tmp_path / "w")
    assert [calls.count(name) for name in names] == [2, 3, 3, 4]
    xr.testing.assert_equal(again, whole)
    with pytest.raises(PnError, match="holds unfinished work with"):
        judged(plain, best, other, **(MORE | {"n_points": 5}), state=tmp_path / "w")


@pytest.fixture(scope="module")
def study(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A persistent run, with its control beside it."""
    folder = tmp_path_factory.mktemp("champion")
    config = replace(tiny_config, strategy="persistent", layers="all", lam=1.0, epochs=2)
    train(replace(config, strategy="restart", iterations=4), folder / "run-restart", device="cpu", progress=False)
    return train(config, folder / "run", device="cpu", progress=False)


def test_a_run_finds_its_control_and_counts_its_selection(study: Run, tmp_path: Path) -> None:
    ds = pn.champion(study, **FAST)
    role = study.contenders[1]
    assert ds.checkpoint.values.tolist() == ["plain", role, "restart 1", "restart 2", "restart 3"]
    last = study.history.isel(epoch=-1)
    control = pn.open_run(study.path.with_name("run-restart"))
    restart = control.history.isel(epoch=-1)
    errors = ds.value.sel(diagnostic="test_error").values
    best = getattr(study, role).iteration
    np.testing.assert_allclose(errors, [last.test_error[0], last.test_error[best], *restart.test_error[1:4]], atol=1e-9)
    np.testing.assert_allclose(ds.training_test_error, [*last.test_error[1:3], *restart.test_error[1:4]], atol=1e-9)
    assert (ds.attrs["n_iterations"], float(ds.selection_least_p)) == (2, pytest.approx(2 / 5))
    # of as many restarts as there are iterations, the first two
    picked = 1 + int(np.argmin(restart.validation_error.values[1:3]))
    assert ds.attrs["best_restart"] == f"restart {picked}"
    start = control.trajectory(1)[0].load()
    end = control.ends[1].load()
    moved = np.sqrt(sum(float((end[k].double() - start[k].double()).square().sum()) for k in end))
    assert number_of(ds, "distance_from_start", 2).value == pytest.approx(moved, rel=1e-5)
    pn.save(ds, tmp_path / "c.nc")
    again = pn.load(tmp_path / "c.nc")
    assert pn.verdict(again) == pn.verdict(ds)
    assert pn.validate(again).attrs["kind"] == "champion"


def test_restarts_from_elsewhere_count_their_plain_models(study: Run, tiny_config: Config, tmp_path: Path) -> None:
    other = train(
        replace(tiny_config, seed=5, iterations=1, epochs=1), tmp_path / "other", device="cpu", progress=False
    )
    ds = pn.champion(study, restarts=other, **FAST)
    assert ds.checkpoint.values.tolist()[2:] == ["restart 1"]
    assert "epochs 1 instead of 2" in ds.attrs["note"]
    assert "single restart" in pn.verdict(ds)[-1]
    halves = train(
        replace(tiny_config, split_seed=3, iterations=1, epochs=1), tmp_path / "halves", device="cpu", progress=False
    )
    with pytest.raises(PnError, match="other validation and test halves"):
        pn.champion(study, restarts=halves, **FAST)


def test_regression_is_judged_by_the_loss() -> None:
    """Squared errors are the loss itself, and have no row of their own."""

    def points(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
        return x, (x[:, :1] * x[:, 1:2]).sin()

    def fitted(seed: int, steps: int) -> nn.Sequential:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer, (x, y) = torch.optim.Adam(net.parameters(), lr=0.03), points(200, 0)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
        return net

    data = {
        name: points(n, seed) for seed, (name, n) in enumerate({"train": 200, "validation": 100, "test": 500}.items())
    }
    nets = {"plain": fitted(0, 60), "best": fitted(7, 300), "one": fitted(1, 60), "two": fitted(2, 60)}
    ds = pn.champion(nets, data=data, loss="mse", **FAST)
    assert ds.attrs["judged_by"] == "loss"
    with torch.no_grad():
        loss = {
            name: [float(nn.functional.mse_loss(net(data[name][0]), data[name][1])) for net in nets.values()]
            for name in data
        }
    assert ds.attrs["best_restart"] == ["one", "two"][int(np.argmin(loss["validation"][2:]))]
    better, ranks = pn.verdict(ds)[1:3]
    assert better.startswith(f"Better? Yes: test loss {loss['test'][1]:.4g} ± ")
    assert f"against {loss['test'][0]:.4g} ± " in better
    assert "–" not in better
    assert ranks.startswith("0 of 2 restarts have a test loss as low: p 0.33 by rank")


def test_iterations_whose_loss_is_not_finite_are_no_candidates(study: Run) -> None:
    """They cannot be chosen, so that the champion is the best of fewer; the same goes for restarts."""
    run, control = pn.open_run(study.path), pn.open_run(study.path.with_name("run-restart"))
    before = contest([run], control)
    other = next(i for i in (1, 2) if i != getattr(run, run.contenders[1]).iteration)
    run.history.train_loss[other, -1] = np.nan  # its validation error is finite
    control.history.train_loss[1, -1] = np.inf
    found = contest([run], control)
    assert (before.attrs["n_iterations"], found.attrs["n_iterations"]) == (2, 1)
    assert "1 later iteration has diverged" in found.attrs["note"]
    assert found.own is not None
    assert found.others is not None
    assert np.isinf(found.own.criterion).tolist() == [i == other for i in (1, 2)]  # in the tables
    np.testing.assert_array_equal(found.own.test_error, run.history.test_error[1:, -1])
    assert np.isinf(found.others.criterion).tolist() == [True, False, False]
    assert found.best_restart(None) == 1  # the first that ended
    ds = _with_selection(xr.Dataset(), found)
    assert ds.sizes["training"] == 5
    assert float(ds.selection_least_p) == pytest.approx(1 / 3)


def test_what_has_no_champion_is_refused(study: Run, tiny_config: Config, tmp_path: Path) -> None:
    with pytest.raises(PnError, match="holds restarts"):
        pn.champion(study.path.with_name("run-restart"), **FAST)
    single = train(
        replace(tiny_config, strategy="plain", iterations=1, epochs=1), tmp_path / "p", device="cpu", progress=False
    )
    with pytest.raises(PnError, match="no persistent iteration"):
        pn.champion(single, **FAST)
    with pytest.raises(PnError, match="name one persistent run"):
        pn.champion(study, single, **FAST)
    with pytest.raises(PnError, match="at least two networks"):
        pn.champion(trained(0, steps=1), data=DATA, **FAST)

"""Sharpness: quadratics, whose largest rise is known, and what is refused."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import pnanalysis as pn
from pnanalysis.analyses import network_sharpness
from pnanalysis.analyses.diagnostics import diagnostics
from pnanalysis.analyses.sharpness import RADII, sharpness
from pnanalysis.errors import ModelError, PnError, RunError
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
    ds = sharpness(
        tiny_run, checkpoints=["start", "plain", "champion"], n=100, n_steps=4, n_starts=1, n_directions=2,
        progress=False,
    )  # fmt: skip
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


def least_squares() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """A linear network near the least squared error, in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 2.0, 1.0, 0.5])
    network = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[0.5, -1.0, 2.0, 0.3]]))
    noise = 0.1 * torch.randn(60, 1, generator=generator, dtype=torch.float64)
    return network, (x, network(x).detach() + noise)


def test_averages_of_a_quadratic_are_its_trace_and_their_second_order_value() -> None:
    network, data = least_squares()
    radii = {"ball": [0.05, 0.2], "adaptive": [0.1, 0.3], "linf": [0.1, 0.2], "adaptive-linf": [0.2, 0.4]}
    ds = sharpness(
        network, data=data, loss="mse", average_radii=radii, measures="average", n_directions=200, dtype="float64",
        progress=False,
    ).squeeze("checkpoint")  # fmt: skip
    np.testing.assert_allclose(ds.average, ds.average_quadratic, rtol=1e-9)
    for end in ("_se", "_direction_se", "_data_se"):
        np.testing.assert_allclose(ds[f"average{end}"], ds[f"average_quadratic{end}"], rtol=1e-6)
    curvature = 2 * data[0].square().mean(0).numpy()
    w = network.weight.detach().abs().numpy()[0]
    for kind, sizes in radii.items():
        scale = w if kind.startswith("adaptive") else np.ones(4)
        spread = 1 / 3 if kind.endswith("linf") else 1.0  # variance of uniform numbers
        expected = np.array(sizes) ** 2 / 2 * spread * (scale**2 * curvature).sum()
        at = ds.sel(neighbourhood=kind)
        assert (np.abs(at.average - expected) < 4 * at.average_direction_se).all()
    # the rise of an example along a pair of directions is the mean of (x'd)^2
    total = np.hypot(ds.average_direction_se, ds.average_data_se)
    assert (ds.average_se <= total * (1 + 1e-12)).all()
    assert (ds.average_low < ds.average).all()
    assert (ds.average_high > ds.average).all()


def test_the_error_of_a_largest_rise_is_the_infinitesimal_jackknife() -> None:
    network, (x, _) = least_squares()
    targets = network(x).detach()  # at the minimum the largest rise is rho^2 / 2 times the top eigenvalue
    ds = sharpness(
        network, data=(x, targets), loss="mse", radii={"ball": 0.3}, measures="worst", n_steps=60, dtype="float64",
        progress=False,
    )  # fmt: skip

    def exact(weights: torch.Tensor) -> torch.Tensor:
        return 0.3**2 * torch.linalg.eigvalsh((x.T * weights) @ x / 60)[-1]

    influence = torch.func.grad(exact)(torch.ones(60, dtype=torch.float64)) * 60
    assert ds.rise.item() == pytest.approx(float(exact(torch.ones(60, dtype=torch.float64))), rel=1e-9)
    assert ds.rise_se.item() == pytest.approx(float(influence.std() / 60**0.5), rel=1e-6)
    assert ds.rise_quadratic.item() == pytest.approx(ds.rise.item(), rel=1e-9)
    assert ds.rise_quadratic_se.item() == pytest.approx(ds.rise_se.item(), rel=1e-6)


@pytest.mark.parametrize("method", ["frank-wolfe", pytest.param("apgd", marks=pytest.mark.slow)])
def test_each_group_has_a_worst_case_of_its_own(method: str) -> None:
    network, (x, y) = least_squares()
    options = {"data": (x, y), "loss": "mse", "measures": "worst", "dtype": "float64", "progress": False,
               "n_steps": 40, "method": method}  # fmt: skip
    alone = sharpness(network, radii={"ball": 0.1}, group=1, **options)
    residual = (network(x) - y).detach().abs()[:, 0]
    each = (residual + 0.1 * x.norm(dim=1)) ** 2 - residual**2
    assert alone.rise.item() == pytest.approx(float(each.mean()), rel=1e-6)
    assert alone.rise_se.item() == pytest.approx(float(each.std() / 60**0.5), rel=1e-6)
    whole, grouped = (sharpness(network, radii={"ball": 0.1}, group=group, **options) for group in (None, 60))
    np.testing.assert_allclose(whole.rise, grouped.rise, rtol=1e-12)
    assert alone.rise.item() > float(whole.rise.item())


def test_groups_do_not_depend_on_the_batches() -> None:
    """Groups larger than batches, or that these are no multiple of, hold as many examples as are asked for."""
    network, (x, y) = least_squares()
    options = {"loss": "mse", "measures": "worst", "radii": {"ball": 0.1}, "dtype": "float64", "second_order": False,
               "progress": False}  # fmt: skip
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))  # that of a loader is kept
    uneven = [(x[order][a:b], y[order][a:b]) for a, b in ((0, 7), (7, 31), (31, 32), (32, 60))]
    for group in (20, 30, 60):
        expected = sharpness(network, data=(x, y), batch_size=60, group=group, **options).rise.item()
        small = sharpness(network, data=(x, y), batch_size=8, group=group, **options).rise.item()
        loaded = sharpness(network, data=uneven, group=group, **options).rise.item()
        assert [small, loaded] == pytest.approx([expected] * 2, rel=1e-9)


def test_groups_weigh_as_their_examples_do() -> None:
    torch.manual_seed(0)
    network, x, y = nn.Linear(4, 3).double(), torch.randn(30, 4).double(), torch.arange(3).repeat_interleave(10)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 2.0]))
    options = {"data": (x, y), "loss": loss, "measures": "worst", "radii": {"ball": 0.1}, "dtype": "float64",
               "progress": False}  # fmt: skip
    found = sharpness(network, group=10, batch_size=30, seed=5, **options)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5))
    x, y = x[order], y[order]
    weights = loss.weight.double()[y]
    parts = [
        float(sharpness(network, batch_size=10, **{**options, "data": (x[i : i + 10], y[i : i + 10])}).rise.item())
        for i in (0, 10, 20)
    ]
    expected = sum(r * float(weights[i : i + 10].sum()) for i, r in zip((0, 10, 20), parts, strict=True))
    assert found.rise.item() == pytest.approx(expected / float(weights.sum()), rel=1e-6)


def relu_network(factor: float = 1.0, last: float = 1.0) -> nn.Module:
    """A ReLU network whose layers are rescaled so that it computes the same, its outputs times ``last``."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        network[0].weight *= factor
        network[0].bias *= factor
        network[2].weight *= last / factor
        network[2].bias *= last
    return network


CLASSES = (torch.randn(50, 4, generator=torch.Generator().manual_seed(1)).double(), torch.arange(50) % 3)


def test_rescaling_layers_changes_no_adaptive_filterwise_or_relative_measure() -> None:
    kinds = ["ball", "adaptive", "filter", "adaptive-linf"]
    ds = sharpness(
        {"a": relu_network(), "b": relu_network(4.0)}, data=CLASSES, average_radii=dict.fromkeys(kinds, 0.1),
        dtype="float64", n_starts=1, progress=False,
    )  # fmt: skip
    for name in ("rise", "average", "rise_quadratic", "average_quadratic"):
        same = ds[name].sel(neighbourhood=["adaptive", "filter", "adaptive-linf"]).dropna("neighbourhood")
        np.testing.assert_allclose(same.sel(checkpoint="a"), same.sel(checkpoint="b"), rtol=1e-9)
        ball = ds[name].sel(neighbourhood="ball")
        assert abs(float(ball.sel(checkpoint="a") / ball.sel(checkpoint="b")) - 1) > 0.05
    a, b = ds.relative_flatness.values
    assert a == pytest.approx(b, rel=1e-9)


def test_with_normalised_logits_the_scale_of_the_last_layer_does_not_matter() -> None:
    nets = {"a": relu_network(), "b": relu_network(last=10.0)}
    options = {"data": CLASSES, "radii": {"adaptive": 0.3}, "n_directions": 4, "dtype": "float64", "progress": False}
    plain, normalised = (sharpness(nets, normalize_logits=flag, **options) for flag in (False, True))
    for name in ("loss", "rise", "average", "relative_flatness"):
        a, b = normalised[name].values.ravel()
        assert a == pytest.approx(b, rel=1e-9)
        a, b = plain[name].values.ravel()
        assert abs(a / b - 1) > 0.05
    logits = relu_network()(CLASSES[0]).detach()
    logits = logits - logits.mean(1, keepdim=True)
    expected = nn.functional.cross_entropy(logits / logits.norm(dim=1, keepdim=True), CLASSES[1])
    assert float(normalised.loss[0]) == pytest.approx(float(expected), rel=1e-12)
    assert normalised.attrs["normalize_logits"] == 1


def test_rises_grow_with_the_radius_and_all_methods_agree() -> None:
    radii = {"ball": [0.05, 0.2, 0.8], "filter": [0.1, 0.4, 1.6], "box": [0.003, 0.01, 0.03]}
    found = [
        sharpness(relu_network(), data=CLASSES, radii=radii, measures="worst", method=method, n_steps=50, n_starts=3,
                  second_order=False, dtype="float64", progress=False)
        for method in ("frank-wolfe", "apgd")
    ]  # fmt: skip
    np.testing.assert_allclose(found[0].rise, found[1].rise, rtol=2e-2)
    for ds in found:
        assert (ds.rise.diff("radius_index") > 0).all()
        assert (ds.rise_start.max("start") <= ds.rise * (1 + 1e-9)).all()
        assert ds.radius.values.tolist() == np.array(list(radii.values())).T.tolist()


def test_finished_parts_are_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, folder = relu_network(), tmp_path / "sharpness.unfinished"
    options = {"data": CLASSES, "radii": {"ball": 0.1}, "n_directions": 4, "progress": False}
    whole = sharpness(network, **options)
    with monkeypatch.context() as patch:
        patch.setattr(network_sharpness, "average_case", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sharpness(network, state=folder, **options)
    with monkeypatch.context() as patch:
        patch.setattr(network_sharpness, "worst_case", lambda *_: pytest.fail("it had been finished"))
        resumed = sharpness(network, state=folder, **options)
    xr.testing.assert_equal(whole, resumed)
    with pytest.raises(PnError, match="holds unfinished work with n_steps 10, not 3"):
        sharpness(network, state=folder, n_steps=3, **options)
    other = (CLASSES[0] + 1, CLASSES[1])  # other data, which settings do not name: nothing is taken over
    assert not sharpness(network, state=folder, **{**options, "data": other}).equals(resumed)


def test_a_comparison_has_all_radii_of_all_neighbourhoods(tmp_path: Path) -> None:
    nets = {name: relu_network(factor) for name, factor in (("a", 1.0), ("b", 1.3), ("same", 1.0))}
    data = torch.randn(60, 4), torch.randint(0, 3, (60,))
    radii = {"ball": [0.05, 0.2], "adaptive": [0.1, 0.4]}
    how: dict[str, Any] = {"radii": radii, "n": None, "n_steps": 2, "n_directions": 3, "second_order": False,
                           "measures": ("worst", "average")}  # fmt: skip
    ds = pn.compare(nets, data=data, sharpness=how, hessian=False, cka=False, saturation=False, progress=False)
    own = sharpness(nets, data=data, **how, progress=False)
    assert ds.rise.values.tolist() == ["ball 0.05", "ball 0.2", "adaptive 0.1", "adaptive 0.4"]
    for name, mine in (("worst_rise", "rise"), ("mean_rise", "average")):
        for end in ("", "_se"):
            values = own[f"{mine}{end}"].transpose("neighbourhood", "radius_index", "checkpoint").values.reshape(4, 3)
            np.testing.assert_allclose(ds[f"{name}{end}"], values, rtol=1e-5, atol=1e-9)
        difference = ds[f"{name}_difference"].values
        np.testing.assert_allclose(difference[:, 1, 0], (ds[name][:, 1] - ds[name][:, 0]), rtol=1e-5, atol=1e-9)
        np.testing.assert_array_equal(difference[:, 2, 0], 0.0)
        p = ds[f"{name}_difference_p"]
        assert p.dims == ("rise", "checkpoint", "other")
        np.testing.assert_array_equal(p[:, 2, 0], 1.0)
    keys = [row.key for row in diagnostics(ds)]
    assert {"worst_rise:ball 0.2", f"mean_rise:{ds.mean_radius.values[3]}"} <= set(keys)
    pn.plots.plot(pn.load(pn.save(ds, tmp_path / "c.nc")))


def test_networks_without_second_derivatives_have_the_rest(recwarn: pytest.WarningsRecorder) -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad

    class Net(nn.Linear):
        def forward(self, x):
            return Once.apply(super().forward(x))

    ds = sharpness(Net(4, 3).double(), data=CLASSES, radii={"ball": 0.1}, progress=False)
    assert np.isfinite(ds.rise).all()
    assert np.isfinite(ds.average).all()
    assert ds.rise_quadratic.isnull().all()
    assert ds.relative_flatness.isnull().all()
    assert any("no relative flatness" in str(one.message) for one in recwarn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radii": {"ball": [0.1, 0.2], "box": 0.1}}, "numbers of radii differ"),
        ({"radii": {"ball": 0.1}, "average_radii": {"box": 0.1}}, "average radii name box"),
        ({"radii": {"ball": 0.1}, "average_radii": {"ball": [0.1, 0.2]}}, "as many of both"),
        ({"measures": ()}, "no measure"),
        ({"measures": ("best",)}, "unknown measure"),
        ({"method": "newton"}, "unknown method"),
        ({"group": 0}, "group is 0"),
        ({"n_directions": 1}, "n_directions is 1"),
        ({"layer": "nowhere"}, "nowhere"),
        ({"radii": {"ball": 1e30}}, "not finite everywhere"),
    ],
)
def test_bad_options_are_one_clear_sentence(options: dict, message: str) -> None:
    with pytest.raises(PnError, match=message):
        sharpness(relu_network(), data=CLASSES, progress=False, **options)


def test_what_has_no_logits_or_filters_is_refused() -> None:
    network, data = least_squares()
    with pytest.raises(PnError, match="no logits"):
        sharpness(network, data=data, loss="mse", normalize_logits=True, progress=False)
    with pytest.raises(PnError, match="no parameter has filters"):
        sharpness(
            nn.BatchNorm1d(4).double(), data=(data[0], data[0]), loss="mse", radii={"filter": 0.1}, progress=False
        )


def test_a_first_batch_of_ignored_targets_counts_for_nothing() -> None:
    """As anywhere else among the batches: the order of examples makes no difference."""
    torch.manual_seed(0)
    net, x, y = nn.Linear(4, 3).double(), torch.randn(30, 4, dtype=torch.float64), torch.arange(30) % 3
    nothing = torch.randn(10, 4, dtype=torch.float64), torch.full((10,), -100)
    options: dict[str, Any] = {
        "loss": "cross_entropy", "n": None, "batch_size": 10, "n_steps": 3, "n_directions": 3, "dtype": "float64",
        "progress": False,
    }  # fmt: skip
    first, last = (
        sharpness(net, data=tuple(map(torch.cat, zip(*parts, strict=True))), **options)
        for parts in ((nothing, (x, y)), ((x, y), nothing))
    )
    alone = sharpness(net, data=(x, y), **options)
    for name in ("loss", "rise", "one_step", "average", "rise_quadratic", "relative_flatness"):
        assert first[name].notnull().any(), name
        np.testing.assert_allclose(first[name], last[name], rtol=1e-9, err_msg=name)
        np.testing.assert_allclose(first[name], alone[name], rtol=1e-6, err_msg=name)
    with pytest.raises(PnError, match="all targets are ignored"):
        sharpness(net, data=nothing, **options)

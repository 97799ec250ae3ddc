"""The local learning coefficient: closed forms, singular networks of known coefficient, errors, and refusals."""

from __future__ import annotations

import math
from contextlib import suppress
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

import pnanalysis as pn
from pnanalysis.analyses import learning_coefficient
from pnanalysis.errors import CurvatureError, PnError
from pnanalysis.io.unfinished import Unfinished

N = 60
QUIET: dict[str, Any] = {"progress": False, "dtype": "float64"}


def regression(seed: int = 0, n: int = N) -> tuple[nn.Module, tuple[Tensor, Tensor], Tensor]:
    """A linear model at its least squares, its data, and its design matrix."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 0.6, 0.3])
    y = x.sum(1, keepdim=True) + torch.randn(n, 1, generator=generator, dtype=torch.float64)
    design = torch.cat([x, torch.ones(n, 1, dtype=torch.float64)], 1)
    network = nn.Linear(3, 1).double()
    solution = torch.linalg.lstsq(design, y).solution[:, 0]
    with torch.no_grad():
        network.weight.copy_(solution[:3])
        network.bias.copy_(solution[3:])
    return network, (x, y), design


def gaussian(design: Tensor, nbeta: float, gamma: float) -> float:
    h = torch.linalg.eigvalsh(2 * design.T @ design / len(design))
    return float((h / (h + gamma / nbeta)).sum() / 2)


@pytest.mark.parametrize("sampler", ["full", "minibatch"])
def test_a_linear_model_has_that_of_its_gaussian(sampler: str) -> None:
    network, data, design = regression()
    ds = pn.learning_coefficient(
        network, data=data, loss="mse", localization=5.0, sampler=sampler, batch_size=20, n_chains=16, n_draws=800,
        data_error="none", **QUIET,
    ).squeeze("checkpoint")  # fmt: skip
    assert float(ds.nbeta) == pytest.approx(N / math.log(N))
    exact = gaussian(design, float(ds.nbeta), 5.0)
    assert float(ds.gaussian) == pytest.approx(exact, rel=1e-6)
    assert float(ds.converged) == 1
    assert abs(float(ds.learning_coefficient) - exact) < 4 * float(ds.learning_coefficient_chain_se) < 0.3
    assert float(ds.loss) == pytest.approx(nn.functional.mse_loss(network(data[0]), data[1]).item())


def exact_coefficient(
    network: nn.Module, data: tuple[Tensor, Tensor], design: Tensor, gamma: float, weights: Tensor
) -> Tensor:
    """Mean excess of the weighted loss of a linear model in its Gaussian posterior around the same point."""
    residual, nbeta = (network(data[0]) - data[1]).detach()[:, 0], N / math.log(N)
    h = 2 * (design.T * weights) @ design / N
    slope = 2 * (design.T @ (weights * residual)) / N
    precision = nbeta * h + gamma * torch.eye(4, dtype=torch.float64)
    mean = -torch.linalg.solve(precision, nbeta * slope)
    return nbeta * (torch.trace(torch.linalg.solve(precision, h)) / 2 + mean @ h @ mean / 2 + slope @ mean)


def exact_influence(network: nn.Module, data: tuple[Tensor, Tensor], design: Tensor, gamma: float) -> Tensor:
    """The derivative of :func:`exact_coefficient` with the weight of each example."""
    ones = torch.ones(N, dtype=torch.float64)
    return torch.func.grad(lambda weights: exact_coefficient(network, data, design, gamma, weights))(ones)


def exact_second(network: nn.Module, data: tuple[Tensor, Tensor], design: Tensor, gamma: float) -> Tensor:
    """The second derivatives with the weights of examples, for changes that keep their sum."""
    ones = torch.ones(N, dtype=torch.float64)
    found = torch.func.hessian(lambda weights: exact_coefficient(network, data, design, gamma, weights))(ones)
    return found - found.mean(0) - found.mean(1, keepdim=True) + found.mean()


@pytest.mark.parametrize("off", [0.0, 0.5])
def test_error_of_examples_is_the_infinitesimal_jackknife_of_second_order(off: float) -> None:
    """At the minimum of the examples the first order is a small part of it, and away from there nearly all."""
    network, data, design = regression()
    with torch.no_grad():
        network.weight.add_(off)
    gamma = 20.0
    first = float(exact_influence(network, data, design, gamma).std() * math.sqrt(N))
    second = float(exact_second(network, data, design, gamma).norm()) / math.sqrt(2)
    assert (first < 0.5 * second) if off == 0 else (first > 2 * second)
    expected = math.hypot(first, second)
    ds = pn.learning_coefficient(
        network, data=data, loss="mse", localization=gamma, batch_size=N, n_chains=32, n_draws=500, **QUIET
    ).squeeze("checkpoint")
    assert float(ds.learning_coefficient_data_se) == pytest.approx(expected, rel=0.25)
    total = math.hypot(float(ds.learning_coefficient_data_se), float(ds.learning_coefficient_chain_se))
    assert float(ds.learning_coefficient_se) == pytest.approx(total)
    assert float(ds.learning_coefficient_high - ds.learning_coefficient) == pytest.approx(1.96 * total, rel=1e-3)


def test_differences_of_coefficients_are_paired_by_examples() -> None:
    network, data, design = regression()
    other = deepcopy(network)
    with torch.no_grad():  # off the minimum, where examples matter more
        network.weight.add_(0.15)
        other.weight.add_(0.2)
    gamma = 20.0
    options = {"n": None, "localization": gamma, "n_chains": 24, "n_draws": 400, "batch_size": N}
    ds = pn.compare(
        {"a": network, "b": other}, data=data, loss="mse", hessian=False, saturation=False, cka=False,
        learning_coefficient=options, progress=False,
    )  # fmt: skip
    ones = torch.ones(N, dtype=torch.float64)
    exact = [float(exact_coefficient(one, data, design, gamma, ones)) for one in (network, other)]
    influences = [exact_influence(one, data, design, gamma) for one in (network, other)]
    seconds = [exact_second(one, data, design, gamma) for one in (network, other)]
    paired, single = (
        math.hypot(float(first.std()) * math.sqrt(N), float(second.norm()) / math.sqrt(2))
        for first, second in ((influences[1] - influences[0], seconds[1] - seconds[0]), (influences[1], seconds[1]))
    )
    alone = [
        pn.learning_coefficient(
            one, data=data, loss="mse", localization=gamma, n_chains=24, n_draws=400, batch_size=N, n=None,
            progress=False,
        ).squeeze("checkpoint")
        for one in (network, other)
    ]  # fmt: skip
    np.testing.assert_allclose(ds.learning_coefficient, [one.learning_coefficient for one in alone], rtol=1e-6)
    of_chains = math.hypot(*(float(one.learning_coefficient_chain_se) for one in alone))
    difference, se = (float(ds[f"learning_coefficient_difference{end}"][1, 0]) for end in ("", "_se"))
    assert abs(difference - (exact[1] - exact[0])) < 4 * of_chains
    assert math.sqrt(se**2 - of_chains**2) == pytest.approx(paired, rel=0.25)
    assert paired < 0.5 * single  # pairing makes a difference here
    assert 0 <= float(ds.learning_coefficient_difference_p[1, 0]) <= 1


def test_a_comparison_says_which_chains_have_not_converged() -> None:
    network, data, _ = regression()
    with pytest.warns(UserWarning, match=r"chains of a have not converged \(R-hat .*\), so that it has no learning"):
        ds = pn.compare(
            {"a": network, "b": regression(1)[0]}, data=data, loss="mse", hessian=False, saturation=False, cka=False,
            learning_coefficient={"n_draws": 8, "burn_in": 0}, progress=False,
        )  # fmt: skip
    assert np.isnan(ds.learning_coefficient).all()
    assert np.isnan(ds.learning_coefficient_difference_p[1, 0])
    with pytest.raises(PnError, match="takes one localization; calibrate"):
        pn.compare(network, network, data=data, loss="mse", learning_coefficient={"localization": [1.0, 2.0]})


def low_rank() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A linear network 5 -> 3 -> 4 at a target of rank one.

    Its coefficient is 7 of multiplicity 2 (M. Aoyagi, S. Watanabe, "Stochastic complexities of reduced rank regression
    in Bayesian estimation", Neural Networks 18 (2005) 924, case 1); half the number of parameters is 13.5.
    """
    generator = torch.Generator().manual_seed(0)
    x, u, v = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((100, 5), (4, 1), (1, 5)))
    network = nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(3, 4, bias=False)).double()
    with torch.no_grad():
        for layer in network:
            layer.weight.zero_()
        network[0].weight[:1] = v / v.norm()
        network[1].weight[:, :1] = u / u.norm()
    return network, (x, network(x).detach())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:part of the computation:UserWarning")
def test_a_singular_network_has_its_known_coefficient() -> None:
    network, data = low_rank()
    nbeta = 1e4
    ds = pn.learning_coefficient(
        network, data=data, loss="mse", localization=1.0, beta=nbeta / 100, batch_size=100, n_chains=32, burn_in=1500,
        n_draws=1500, data_error="none", **QUIET,
    ).squeeze("checkpoint")  # fmt: skip
    # of volume V(loss < c) ~ c^7 log(1/c), the mean is 7 - 1 / log(n beta); the prior's width takes a little more
    mean = float(ds.nbeta * ds.excess.isel(draw=slice(1500, None)).mean())
    assert 0.94 * (7 - 1 / math.log(nbeta)) < mean < 7
    assert float(ds.gaussian) == pytest.approx(4, abs=0.1)  # its Hessian has rank 8
    # chains have not been everywhere along its flat directions, and there is no estimate to quote
    assert float(ds.converged) == 0
    assert np.isnan(ds.learning_coefficient)


def test_several_settings_share_their_chains_and_make_dims() -> None:
    network, data, design = regression()
    steps = [0.01, 0.02]
    ds = pn.learning_coefficient(
        {"a": network, "b": network}, data=data, loss="mse", localization=[20.0, 50.0], step_size=steps, batch_size=N,
        n_chains=8, n_draws=800, burn_in=300, data_error="none", **QUIET,
    )  # fmt: skip
    assert ds.learning_coefficient.dims == ("checkpoint", "localization", "step_size")
    np.testing.assert_allclose(ds.epsilon.sel(checkpoint="a"), [steps, steps])
    for gamma in (20.0, 50.0):
        one = ds.sel(checkpoint="a", localization=gamma)
        exact = gaussian(design, float(one.nbeta.values.flat[0]), gamma)
        assert (abs(one.learning_coefficient - exact) < 4 * one.learning_coefficient_chain_se).all()
    xr.testing.assert_equal(ds.sel(checkpoint="a", drop=True), ds.sel(checkpoint="b", drop=True))


def test_settings_may_be_arrays_and_attributes_say_what_was_used() -> None:
    network, data, _ = regression()
    options = {"data": data, "loss": "mse", "n_draws": 20, "burn_in": 2, "step_size": 0.01, "data_error": "none"}
    listed, array = (
        pn.learning_coefficient(network, localization=values, **options, **QUIET)
        for values in ([20.0, 50.0], np.array([20.0, 50.0]))
    )
    xr.testing.assert_equal(listed, array)
    assert listed.attrs["n"] == N  # not the 2,048 that were asked for
    assert listed.attrs["beta"] == pytest.approx(1 / math.log(N))
    assert listed.attrs["all_examples"] == 1
    few = pn.learning_coefficient(network, n=32, beta=0.3, **options, **QUIET)
    assert (few.attrs["n"], few.attrs["beta"], few.attrs["all_examples"]) == (32, 0.3, 0)


class Stops(nn.Linear):
    """Is interrupted at some of its passes."""

    left = math.inf

    def forward(self, x: Tensor) -> Tensor:
        Stops.left -= 1
        if Stops.left < 0:
            Stops.left = math.inf
            raise KeyboardInterrupt
        return super().forward(x)


@pytest.mark.parametrize("sampler", [pytest.param("full", marks=pytest.mark.slow), "minibatch"])
def test_interrupted_chains_go_on_where_they_were(
    sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, data, _ = regression()
    torch.manual_seed(0)
    network = nn.Sequential(Stops(3, 40), nn.Tanh(), nn.Linear(40, 1))  # large enough for sums in different orders
    options = {
        "data": data, "loss": "mse", "sampler": sampler, "batch_size": 20, "n_chains": 3, "burn_in": 30, "n_draws": 60,
        **QUIET, "dtype": "float32",
    }  # fmt: skip
    whole = pn.learning_coefficient(network, **options)
    monkeypatch.setattr(Unfinished, "is_due", True)  # saved at every step, as if killed there
    states = set()
    for passes in (150, 250, 350, 30, 5):
        Stops.left = passes
        with suppress(KeyboardInterrupt):
            pn.learning_coefficient(network, state=tmp_path / "work", **options)
        states |= {path.name for path in tmp_path.glob("work/*/*")}
    assert states == {"stiff.safetensors", "steps.safetensors", "chains.safetensors"}
    Stops.left = math.inf
    resumed = pn.learning_coefficient(network, state=tmp_path / "work", **options)
    xr.testing.assert_equal(resumed, whole)
    assert not list(tmp_path.glob("work/*/*"))
    Stops.left = 20  # the finished network is not sampled once more
    xr.testing.assert_equal(pn.learning_coefficient(network, state=tmp_path / "work", **options), whole)
    Stops.left = math.inf
    with pytest.raises(CurvatureError, match="holds unfinished work with n_chains 3, not 4"):
        pn.learning_coefficient(network, state=tmp_path / "work", **options | {"n_chains": 4})


def test_some_parameters_move_and_others_stay() -> None:
    network, data, design = regression()
    ds = pn.learning_coefficient(
        network, data=data, loss="mse", params="bias", localization=5.0, n_chains=8, n_draws=600, batch_size=N,
        data_error="none", **QUIET,
    ).squeeze("checkpoint")  # fmt: skip
    exact = gaussian(design[:, 3:], float(ds.nbeta), 5.0)
    assert float(ds.gaussian) == pytest.approx(exact, rel=1e-6)
    assert abs(float(ds.learning_coefficient) - exact) < 4 * float(ds.learning_coefficient_chain_se)


class Branching(nn.Linear):
    """Cannot be vectorised."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out * 1.0 if float(out.sum()) > 0 else out


def test_networks_that_cannot_be_vectorised_give_the_same() -> None:
    network, data, _ = regression()
    other = Branching(3, 1).double()
    other.load_state_dict(network.state_dict())
    options = {"data": data, "loss": "mse", "n_draws": 20, "burn_in": 5, "batch_size": 25, "step_size": 0.01, **QUIET}
    one, two = pn.learning_coefficient(network, **options), pn.learning_coefficient(other, **options)
    np.testing.assert_allclose(one.excess, two.excess, rtol=1e-9, atol=1e-12)


def test_steps_that_diverge_give_no_number() -> None:
    network, data, _ = regression()
    ds = pn.learning_coefficient(network, data=data, loss="mse", step_size=10.0, n_draws=400, **QUIET)
    assert ds.converged.item() == 0
    assert np.isnan(ds.learning_coefficient).all()


def test_chains_that_are_too_short_give_no_number() -> None:
    network, data, _ = regression()
    ds = pn.learning_coefficient(network, data=data, loss="mse", localization=0.1, n_draws=20, burn_in=0, **QUIET)
    assert ds.converged.item() == 0
    assert np.isnan(ds.learning_coefficient_high).all()
    assert np.isfinite(ds.excess).all()


def test_chains_that_would_take_too_long_are_said_before_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_coefficient, "_MOST_STEPS", 40)
    network, data, _ = regression()
    with pytest.warns(UserWarning, match=r"30 draws are \d\.\d relaxations of its flattest .*; take a larger localiz"):
        pn.learning_coefficient(network, data=data, loss="mse", localization=0.5, data_error="none", **QUIET)


def test_ignored_targets_do_not_count() -> None:
    torch.manual_seed(0)
    network, x, y = nn.Linear(4, 3), torch.randn(40, 4), torch.randint(3, (40,))
    loss = nn.CrossEntropyLoss(ignore_index=-1)
    counts = torch.arange(40) % 4 > 0
    options = {"loss": loss, "beta": 0.5, "n_draws": 30, "burn_in": 0, "step_size": 0.01, "data_error": "none", **QUIET}
    data = x, torch.where(counts, y, torch.tensor(-1))
    part = pn.learning_coefficient(network, data=data, batch_size=7, **options)  # as many ignored as there are
    whole = pn.learning_coefficient(network, data=(x[counts], y[counts]), batch_size=30, **options)
    assert part.nbeta.item() == whole.nbeta.item() == 0.5 * 30
    assert part.attrs["n"] == whole.attrs["n"] == 30
    np.testing.assert_allclose(part.excess, whole.excess, rtol=1e-5, atol=1e-9)


@pytest.mark.slow
def test_a_run_is_analysed_like_its_networks(tiny_run: pn.Run) -> None:
    options = {"n": 100, "n_draws": 12, "burn_in": 4, "n_chains": 3, "progress": False}
    ds = pn.learning_coefficient(tiny_run, checkpoints=("plain",), **options)
    assert ds.attrs["kind"] == "learning_coefficient"
    assert ds.checkpoint.values.tolist() == ["plain"]
    xr.testing.assert_equal(ds, pn.learning_coefficient(tiny_run, checkpoints=("plain",), **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "hmc"}, "full or minibatch or sgld"),
        ({"data_error": "groups"}, "examples or none"),
        ({"n_chains": 1}, "n_chains is 1"),
        ({"localization": 0.0}, "localization"),
        ({"localization": []}, "no localization is given; give one, or leave localization out"),
        ({"localization": None}, "localization is nan"),
        ({"localization": np.array([10.0, math.nan])}, "localization is nan"),
        ({"step_size": -1.0}, "step_size"),
        ({"step_size": []}, "no step_size is given"),
        ({"step_size": [0.01, math.nan]}, "step_size is nan"),
        ({"step_size": [math.nan, 0.01]}, "step_size is nan"),
        ({"beta": 0.0}, "beta"),
        ({"params": "nowhere"}, "nowhere"),
        ({"n_draws": 3}, "n_draws is 3"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_bad_options_are_one_sentence(options: dict[str, Any], message: str) -> None:
    network, data, _ = regression()
    with pytest.raises(PnError, match=message):
        pn.learning_coefficient(network, data=data, loss="mse", **QUIET | options)


def test_without_a_hessian_steps_fit_the_curvature_that_chains_meet() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(super().forward(x))

    fitted, data, design = regression()
    network = Net(3, 1).double()
    network.load_state_dict(fitted.state_dict())
    options = {"data": data, "loss": "mse", "localization": 20.0, "batch_size": N, "data_error": "none", "n_draws": 400}
    with pytest.warns(UserWarning, match="no curvature"):
        ds = pn.learning_coefficient(network, **options, **QUIET).squeeze("checkpoint")
    exact = gaussian(design, float(ds.nbeta), 20.0)
    assert abs(float(ds.learning_coefficient) - exact) < 4 * float(ds.learning_coefficient_chain_se) < 0.5
    assert np.isnan(ds.gaussian).all()


@pytest.mark.slow
@pytest.mark.parametrize(("widths", "nbeta"), [((2, 3, 2), 20.0), ((2, 2, 2, 2), 10.0), ((2, 2, 2, 2, 2), 10.0)])
def test_deep_linear_networks_at_zero_have_their_exact_value(widths: tuple[int, ...], nbeta: float) -> None:
    """The Hessian vanishes there, and E[n beta L] is a mean over the normal density of the pull alone."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, widths[0], generator=generator, dtype=torch.float64)
    root = torch.linalg.cholesky(x.T @ x / len(x))
    weighted, total = [], []
    for _ in range(10):
        product = root.expand(300_000, -1, -1)
        for fan_in, fan_out in pairwise(widths):
            product = torch.randn(300_000, fan_out, fan_in, generator=generator, dtype=torch.float64) @ product
        energy = nbeta * product.square().sum((1, 2)) / widths[-1]
        weighted.append(float((energy * (-energy).exp()).mean()))
        total.append(float((-energy).exp().mean()))
    exact = np.mean(weighted) / np.mean(total)
    exact_se = np.std(np.divide(weighted, total), ddof=1) / math.sqrt(10)

    network = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(widths))).double()
    for layer in network:
        nn.init.zeros_(layer.weight)
    ds = pn.learning_coefficient(
        network, data=(x, network(x).detach()), loss="mse", n=None, localization=1.0, beta=nbeta / 200, batch_size=200,
        step_size=0.004, n_chains=16, n_draws=8000, data_error="none", **QUIET,
    ).squeeze("checkpoint")  # fmt: skip
    assert float(ds.converged) == 1
    se = math.hypot(float(ds.learning_coefficient_chain_se), exact_se)
    assert abs(float(ds.learning_coefficient) - exact) < 4 * se < 0.1 * exact


def test_chains_of_several_networks_may_differ_in_length() -> None:
    network, data, _ = regression()
    steep = nn.Linear(3, 1).double()
    with torch.no_grad():
        for mine, other in zip(steep.parameters(), network.parameters(), strict=True):
            mine.copy_(other)
    options = {"loss": "mse", "localization": 3.0, "data_error": "none", "n_draws": None, **QUIET}
    ds = pn.learning_coefficient(
        {"a": network, "b": nn.Sequential(steep, nn.Linear(1, 1).double())}, data=data, **options
    )
    counts = ds.excess.isel(chain=0).notnull().sum("draw")
    assert int(counts.max()) == ds.sizes["draw"]
    assert (counts > 400).all()

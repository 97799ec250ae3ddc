"""Chains in potentials whose moments are known: quadratic ones exactly, singular ones by numerical integration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

from pnanalysis.geometry.loss_surface import LossSurface
from pnanalysis.sampling.anchor import Anchor
from pnanalysis.sampling.convergence import effective_sample_size
from pnanalysis.sampling.langevin import Chains, Posterior, Stiff, spread_over_passes
from pnanalysis.sampling.local_learning import Plan, with_shorter_steps, with_steps_that_hold
from pnanalysis.sampling.local_learning import sample as sample_all
from pnanalysis.sampling.stacked_gradients import StackedGradients
from tests.cases import cases


class Potential(nn.Module):
    """A loss that is a function of the parameters alone; each row of the inputs gives it another weight."""

    def __init__(self, function: Callable[[Tensor], Tensor], size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0] * self.function(self.w)


def mean_output(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.mean()


def of(function: Callable[[Tensor], Tensor], size: int, at_once: int = 32) -> StackedGradients:
    network = Potential(function, size)
    surface = LossSurface(network, mean_output, dtype=torch.float64, at_once=at_once)
    return StackedGradients(surface, surface.anchor(network.state_dict()), ["w"])


def batches(*weights: float) -> list[tuple[Tensor, Tensor]]:
    return [(torch.full((2, 1), w, dtype=torch.float64), torch.zeros(2)) for w in weights]


CURVATURES = torch.tensor([9.0, 4.0, 1.0, 0.0], dtype=torch.float64)


def quadratic(w: Tensor) -> Tensor:
    return (CURVATURES * w.square()).sum() / 2


def expected(posterior: Posterior, sampler: str) -> float:
    """Mean excess of the quadratic loss, times ``n beta``, under the chains themselves."""
    stiffness = posterior.nbeta * CURVATURES + posterior.localization
    variance = 1 / stiffness if sampler != "sgld" else 1 / (stiffness * (1 - posterior.step_size * stiffness / 4))
    return float(posterior.nbeta * (CURVATURES * variance).sum() / 2)


def plan(posterior: Posterior, sampler: str = "full", stiff: Stiff | None = None, **options: int) -> Plan:
    sizes = {"n_chains": 200, "burn_in": 100, "n_draws": 200, "seed": 0} | options
    return Plan([posterior], sampler=sampler, stiff=stiff, with_examples=False, **sizes)


def sample(gradients: StackedGradients, data: list[Any], plan: Plan) -> xr.Dataset:
    return sample_all(Anchor(gradients, data), plan).squeeze("posterior")


def mean_and_se(ds: xr.Dataset, n_draws: int = 200) -> tuple[float, float]:
    """Mean excess of the last draws times ``n beta``, and its error by the scatter of independent chains."""
    means = float(ds.nbeta) * np.nanmean(ds.excess.values[:, -n_draws:], axis=1)
    return means.mean(), means.std(ddof=1) / math.sqrt(len(means))


@pytest.mark.parametrize(
    ("at_once", "sampler"), [(1, "full"), pytest.param(1, "sgld", marks=pytest.mark.slow), (32, "full"), (32, "sgld")]
)
def test_moments_of_a_quadratic_are_those_of_the_scheme(sampler: str, at_once: int) -> None:
    posterior = Posterior(nbeta=10.0, localization=5.0, step_size=0.02)  # 1.9 of 4 in the steepest direction
    n_chains = 200 if at_once > 1 else 16
    ds = sample(of(quadratic, 4, at_once), batches(1.0), plan(posterior, sampler, n_chains=n_chains))
    mean, se = mean_and_se(ds)
    assert abs(mean - expected(posterior, sampler)) < 4 * se < 0.25
    # the plain scheme is off by more than that
    assert abs(expected(posterior, "sgld") - expected(posterior, "full")) > 0.4


def test_standard_errors_of_chains_hold() -> None:
    posterior = Posterior(nbeta=10.0, localization=5.0, step_size=0.02)
    sizes = {"n_chains": 8, "burn_in": 100, "n_draws": 800, "seed": 0}
    several = Plan([posterior] * 24, sampler="full", stiff=None, with_examples=False, **sizes)
    ds = sample_all(Anchor(of(quadratic, 4), batches(1.0)), several)
    assert (ds.converged == 1).all()
    z = (ds.learning_coefficient - expected(posterior, "full")) / ds.learning_coefficient_chain_se
    # 24 squares of normal numbers lie between 10 and 43 with probability 0.98
    assert 10 < np.square(z).sum() < 43


def test_momentum_takes_chains_around_in_fewer_steps() -> None:
    """The same steps in the same posterior, with momentum and, by single batches of which there is one, without."""
    posterior = Posterior(nbeta=10.0, localization=0.5, step_size=0.02)
    sizes = {"n_chains": 100, "n_draws": 400}
    with_it, without = (
        sample(of(quadratic, 4), batches(1.0), plan(posterior, sampler, **sizes)) for sampler in ("full", "minibatch")
    )
    worth = [effective_sample_size(ds.distance.values[:, 100:]) for ds in (with_it, without)]
    # the squared distance, of which one direction has most, decorrelates in 2.5 / 0.1 and 2 / 0.01 steps
    assert 4 < worth[0] / worth[1] < 12
    for ds in (with_it, without):
        mean, se = mean_and_se(ds, 400)
        assert abs(mean - expected(posterior, "full")) < 4 * se < 0.1


def test_chains_that_diverge_late_start_again_with_shorter_steps() -> None:
    """Along the valleys of x^2 y^2 curvatures grow beyond what a step can take, which few chains come to see."""
    function, size, _ = SINGULAR["x^2 y^2"]
    chosen = plan(Posterior(200.0, 2.0, 4e-3, courant=1.0), burn_in=500, n_draws=500)
    anchor = Anchor(of(function, size), batches(1.0))
    diverged = sample_all(anchor, chosen)
    assert diverged.converged.item() == 0
    shorter = with_shorter_steps(chosen, diverged)
    assert shorter is not None
    assert shorter.steps == [1e-3]
    assert with_shorter_steps(shorter, sample_all(anchor, shorter)) is None
    own = plan(Posterior(200.0, 2.0, 4e-3), burn_in=500, n_draws=500)
    assert with_shorter_steps(own, sample_all(anchor, own)) is None  # steps that a user gave stay


def test_distances_of_many_parameters_may_differ_by_what_does_not_matter() -> None:
    """Of 20,000 flat directions distances fluctuate by half a per cent, and take long to do so."""
    posterior = Posterior(nbeta=10.0, localization=0.1, step_size=0.02)
    sizes = {"n_chains": 4, "burn_in": 200, "n_draws": 400}
    found = [
        sample(of(lambda w: quadratic(w[:4]), size), batches(1.0), plan(posterior, **sizes)) for size in (20, 20_000)
    ]
    for ds in found:
        assert float(ds.distance_rhat) > 1.1
        assert float(ds.rhat) < 1.05
        assert float(ds.effective_draws) > 100
    assert [float(ds.converged) for ds in found] == [0, 1]


def test_shorter_steps_along_stiff_directions_leave_the_distribution_as_it_is() -> None:
    posterior = Posterior(nbeta=10.0, localization=5.0, step_size=0.06)  # beyond 4 / 95 without them
    stiff = Stiff(np.array([9.0, 4.0, 1.0]), torch.eye(4, dtype=torch.float64)[:, :2])
    ds = sample(of(quadratic, 4), batches(1.0), plan(posterior, stiff=stiff))
    mean, se = mean_and_se(ds)
    assert abs(mean - expected(posterior, "full")) < 4 * se < 0.2
    unstable = sample(of(quadratic, 4), batches(1.0), plan(posterior))
    assert float(unstable.converged) == 0
    assert np.isnan(unstable.learning_coefficient)


def test_control_variates_take_the_noise_of_batches_away() -> None:
    """Batches of one quadratic each, about other minima: their mean is the quadratic, their gradients differ."""
    shifts = torch.tensor([3.0, -3.0], dtype=torch.float64)

    class Shifted(Potential):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 0] * self.w.sum() + quadratic(self.w)

    network = Shifted(quadratic, 4)
    surface = LossSurface(network, mean_output, dtype=torch.float64, at_once=8)
    gradients = StackedGradients(surface, surface.anchor(network.state_dict()), ["w"])
    data = batches(*shifts.tolist())
    posterior = Posterior(nbeta=10.0, localization=5.0, step_size=0.01)
    found = {name: sample(gradients, data, plan(posterior, name)) for name in ("minibatch", "sgld")}
    (mean, se), (plain, plain_se) = (mean_and_se(found[name]) for name in ("minibatch", "sgld"))
    assert abs(mean - expected(posterior, "minibatch")) < 4 * se < 0.2
    assert plain - 4 * plain_se > 1.5 * expected(posterior, "sgld")


class Unlike(nn.Module):
    """Each example brings the Hessian of its own loss."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.w) * self.w).sum(-1) / 2


def unlike_batches() -> list[tuple[Tensor, Tensor]]:
    """Batches of rank two each, so that each is stiff where the others are not."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 2, 5, generator=generator, dtype=torch.float64)
    return [((part.T @ part)[None], torch.zeros(1)) for part in rows]


def moments_of_turns(data: list[tuple[Tensor, Tensor]], posterior: Posterior) -> tuple[float, float, float]:
    """The exact coefficient; what chains by turns have over all examples; and over the batch that is to come."""
    hessians = [x[0] for x, _ in data]
    whole, identity = sum(hessians) / len(data), torch.eye(5, dtype=torch.float64)
    stiffness = posterior.nbeta * whole + posterior.localization * identity
    half, covariance = posterior.step_size / 2, torch.linalg.inv(stiffness)
    for _ in range(1000):  # of positions less half of their noise, until a pass changes them no more
        over_all, over_next = 0.0, 0.0
        for own in hessians:
            here = covariance + half / 2 * identity
            over_all += float((whole @ here).trace()) / len(data)
            over_next += float((own @ here).trace()) / len(data)
            step = identity - half * (posterior.nbeta * own + posterior.localization * identity)
            jolt = (identity + step) / 2
            covariance = step @ covariance @ step.T + posterior.step_size * jolt @ jolt.T
    exact = float((whole @ torch.linalg.inv(stiffness)).trace())
    return tuple(posterior.nbeta / 2 * value for value in (exact, over_all, over_next))


def test_batches_that_differ_much_bias_the_loss_of_the_next_one_and_hardly_that_of_all() -> None:
    data, posterior = unlike_batches(), Posterior(nbeta=10.0, localization=20.0, step_size=0.004)
    network = Unlike(5)
    surface = LossSurface(network, mean_output, dtype=torch.float64, at_once=256)
    gradients = StackedGradients(surface, surface.anchor(network.state_dict()), ["w"])
    exact, over_all, over_next = moments_of_turns(data, posterior)
    assert over_next / exact - 1 > 0.06
    assert abs(over_all / exact - 1) < 0.02
    ds = sample(gradients, data, plan(posterior, "minibatch", n_draws=300))
    mean, se = mean_and_se(ds, 300)
    assert abs(mean - over_all) < 4 * se
    assert over_next - mean > 6 * se
    # the stated error of batches is a quarter of what the next batch has too much
    assert float(ds.learning_coefficient_batch_se) == pytest.approx((over_next - over_all) / 4, rel=0.15)
    assert float(ds.learning_coefficient_se) > float(ds.learning_coefficient_chain_se)


def test_steps_are_chosen_so_short_that_the_noise_of_batches_is_small() -> None:
    data, posterior = unlike_batches(), Posterior(nbeta=10.0, localization=20.0, step_size=0.016, courant=0.8)
    network = Unlike(5)
    surface = LossSurface(network, mean_output, dtype=torch.float64, at_once=256)
    anchor = Anchor(StackedGradients(surface, surface.anchor(network.state_dict()), ["w"]), data)
    (chosen,) = with_steps_that_hold(anchor, plan(posterior, "minibatch")).posteriors
    exact, over_all, over_next = moments_of_turns(data, chosen)
    assert (over_next - over_all) / exact < 0.06
    assert abs(over_all / exact - 1) < 0.015


def test_measurements_meet_all_places_in_a_pass() -> None:
    for n_batches in (1, 2, 6, 8, 63, 64):
        every = spread_over_passes(n_batches, 4000)
        assert math.gcd(every, n_batches) == 1
        assert every <= n_batches
    assert spread_over_passes(64, 40) == 1


def test_the_checkpoint_is_looked_at_once_however_often_steps_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    data, posterior = batches(1.0, 1.0), Posterior(nbeta=10.0, localization=5.0, step_size=10.0, courant=1.0)
    anchor, looks = Anchor(of(quadratic, 4), data), []
    monkeypatch.setattr(Anchor, "__init__", lambda *_: looks.append(1))
    small = plan(posterior, n_chains=3, burn_in=60, n_draws=20)
    sample_all(anchor, with_steps_that_hold(anchor, small))
    assert not looks


SINGULAR = {
    "x^4": (lambda w: w.pow(4).sum(), 1, 1 / 4),
    "x^2 y^2": (lambda w: w.square().prod(), 2, 1 / 2),
    "x^2 + y^4": (lambda w: w[0] ** 2 + w[1] ** 4, 2, 3 / 4),
}


@pytest.mark.parametrize("name", cases({name: name for name in SINGULAR}, ("x^4",)))
def test_singular_potentials(name: str) -> None:
    function, size, _ = SINGULAR[name]
    posterior = Posterior(nbeta=200.0, localization=2.0, step_size=0.0)
    axis = np.linspace(-4, 4, 1601)
    grid = torch.from_numpy(np.stack(np.meshgrid(*[axis] * size)).reshape(size, -1))
    loss = torch.vmap(function, in_dims=1)(grid)
    log_density = -posterior.nbeta * loss - posterior.localization / 2 * grid.square().sum(0)
    exact = posterior.nbeta * float((torch.softmax(log_density, 0) * loss).sum())
    step = {"x^4": 4e-3, "x^2 y^2": 1e-3, "x^2 + y^4": 2e-3}[name]
    sizes = {"n_chains": 400, "burn_in": 500, "n_draws": 500}
    ds = sample(of(function, size), batches(1.0), plan(Posterior(200.0, 2.0, step), **sizes))
    mean, se = mean_and_se(ds, 500)
    assert 4 * se < 0.05
    assert mean == pytest.approx(exact, abs=4 * se + 0.01)  # 0.01: the scheme's own error where curvature varies


def test_more_data_bring_the_coefficient_to_that_of_the_singularity() -> None:
    """The exact integrals, which the test above compares chains with, tend to the known coefficients."""
    for function, size, known in SINGULAR.values():
        axis = np.linspace(-1.5, 1.5, 3001 if size == 1 else 1501)
        grid = torch.from_numpy(np.stack(np.meshgrid(*[axis] * size)).reshape(size, -1))
        loss = torch.vmap(function, in_dims=1)(grid)
        off = []
        for nbeta in (1e2, 1e4):
            weight = torch.softmax(-nbeta * loss - grid.square().sum(0) / 2, 0)
            off.append(abs(nbeta * float((weight * loss).sum()) - known))
        assert off[1] < off[0]


def test_noise_is_normal_and_depends_on_seed_and_step_only() -> None:
    posteriors = [Posterior(1.0, 1.0, 0.1)] * 3
    one, other = (Chains(of(quadratic, 4), batches(1.0), posteriors, seed=seed) for seed in (0, 1))
    draws = torch.stack([one._noise(step, torch.zeros(3, 4, dtype=torch.float64)) for step in range(4000)])
    flat = draws.reshape(4000, -1)
    assert float((flat.T @ flat / 4000 - torch.eye(12)).abs().max()) < 5 / math.sqrt(4000)
    assert float((flat[1:].T @ flat[:-1] / 4000).abs().max()) < 5 / math.sqrt(4000)
    assert torch.equal(draws[7], one._noise(7, draws[0]))
    assert not torch.equal(draws[7], other._noise(7, draws[0]))


def test_batches_of_unequal_weight_count_by_their_examples() -> None:
    data = [*batches(2.0), (torch.full((6, 1), 1.0, dtype=torch.float64), torch.zeros(6))]
    chains = Chains(of(quadratic, 4), data, [Posterior(1.0, 1.0, 0.1)])
    point = torch.full((1, 4), 0.5, dtype=torch.float64)
    excess, slope = chains._whole(point)
    assert float(excess) == pytest.approx(1.25 * float(quadratic(point[0])))
    torch.testing.assert_close(slope[0], 1.25 * CURVATURES * point[0])
    single = Chains(of(quadratic, 4), data, [Posterior(1.0, 1.0, 0.1)], "minibatch")._single()
    parts = [single(point) for _ in data]
    torch.testing.assert_close(sum(part[1] for part in parts) / 2, slope)
    assert sum(float(part[0]) for part in parts) / 2 == pytest.approx(float(excess))

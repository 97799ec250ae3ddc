"""Critical sharpness of quadratic losses is the curvature along the gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pnanalysis as pn
from pnanalysis.monitoring.critical_sharpness import critical_scale


@pytest.mark.parametrize("place", [0.013, 0.7, 1.0, 3.3, 900.0])
def test_the_place_is_in_the_interval(place: float) -> None:
    low, high = critical_scale(lambda s: 5 + s * (s - place))
    assert low <= place * (1 + 1e-12)
    assert place <= high <= 1.05 * low


def test_a_loss_that_always_or_never_rises_has_none() -> None:
    assert np.isnan(critical_scale(lambda s: s)).all()
    assert np.isnan(critical_scale(lambda s: -s)).all()


def test_an_adaptive_step_on_a_quadratic_loss() -> None:
    """2 / eta_c is the directional sharpness of the update, at most the largest preconditioned eigenvalue."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(40, k, dtype=torch.float64, generator=generator) for k in (5, 2))
    torch.manual_seed(0)
    model = nn.Linear(5, 2, bias=False).double()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01)
    hessian = pn.HessianOperator(model, F.mse_loss, [(x, y)], expected_products=10).to_dense()
    options = {"every": 1, "expected_products": 10, "batch_size": 40}
    with pn.CurvatureMonitor(model, optimizer, (x, y), F.mse_loss, **options) as monitor:
        before = model.weight.detach().flatten().clone()
        F.mse_loss(model(x), y).backward()
        g = model.weight.grad.flatten().clone()
        optimizer.step()
        ds = monitor.dataset().sel(step=1)
    update = (before - model.weight.detach().flatten()) / 0.01
    exact = float(update @ hessian @ update / (update @ g))
    assert float(ds.critical_sharpness_low) <= exact <= float(ds.critical_sharpness_high)
    assert exact <= float(ds.preconditioned_lambda_max) * (1 + 1e-3)


@pytest.mark.parametrize("rate", [0.05, 0.4])
def test_gradient_descent_on_a_quadratic_loss(rate: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, k, dtype=torch.float64, generator=generator) for k in (5, 2))
    torch.manual_seed(0)
    model = nn.Linear(5, 2, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    options = {"every": 1, "expected_products": 10, "batch_size": 40}
    hessian = pn.HessianOperator(model, F.mse_loss, [(x, y)], expected_products=10).to_dense()
    with pn.CurvatureMonitor(model, optimizer, (x, y), F.mse_loss, **options) as monitor:
        for step in (1, 2):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            g = model.weight.grad.flatten().clone()
            optimizer.step()
            ds = monitor.dataset().sel(step=step)
            exact = float(g @ hessian @ g / (g @ g))
            assert float(ds.critical_sharpness_low) <= exact <= float(ds.critical_sharpness_high)
            assert float(ds.critical_sharpness_high / ds.critical_sharpness_low) <= 1.05
            assert float(ds.critical_sharpness) == pytest.approx(exact, rel=0.03)


def test_a_step_with_learning_rates_of_its_own_for_each_group() -> None:
    """Groups of other networks, and of frozen parameters, take no part in the step nor in the learning rate."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, k, dtype=torch.float64, generator=generator) for k in (5, 2))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 2)).double().requires_grad_(False)
    weight, bias = (one.requires_grad_() for one in model[1].parameters())
    groups = [
        {"params": [weight], "lr": 0.1}, {"params": [bias], "lr": 0.3},
        {"params": [model[0].weight], "lr": 2.0}, {"params": [nn.Parameter(torch.ones(3))], "lr": 5.0},
    ]  # fmt: skip
    optimizer = torch.optim.SGD(groups)
    options: dict[str, Any] = {"every": 1, "expected_products": 10, "batch_size": 40, "tolerance": 1e-6}
    hessian = pn.HessianOperator(model, F.mse_loss, [(x, y)], expected_products=10).to_dense()
    with pn.CurvatureMonitor(model, optimizer, (x, y), F.mse_loss, **options) as monitor:
        F.mse_loss(model(x), y).backward()
        g = torch.cat([weight.grad.flatten(), bias.grad])
        optimizer.step()
    ds = monitor.dataset().sel(step=1)
    rates = torch.cat([torch.full((10,), 0.1), torch.full((2,), 0.3)]).double()
    step = rates * g  # the loss is as before where s g'd = s^2 d'Hd / 2, at the learning rate 0.3 s of the larger
    exact = float(step @ hessian @ step / (step @ g)) / 0.3
    assert float(ds.critical_sharpness_low) <= exact <= float(ds.critical_sharpness_high)
    assert (float(ds.learning_rate), float(ds.threshold)) == pytest.approx((0.3, 2 / 0.3))
    inner = torch.diag((rates / 0.3).sqrt())
    largest = float(torch.linalg.eigvalsh(inner @ hessian @ inner)[-1])
    assert float(ds.preconditioned_lambda_max) == pytest.approx(largest, rel=1e-4)
    assert exact <= largest


def test_round_off_is_no_rise_of_the_loss() -> None:
    """Below the round-off the loss scatters; what is found is right, or nothing is."""
    scatter = np.random.default_rng(0)

    def rough(drop: float, place: float) -> Any:
        return lambda s: 5 + 4 * drop / place**2 * s * (s - place) + scatter.uniform(-1e-7, 1e-7)

    for place in (0.01, 0.4, 1.0, 30.0, 3e5):
        low, high = critical_scale(rough(1e-5, place), 2e-7)
        assert low <= place <= high <= 1.2 * low
        assert np.isnan(critical_scale(rough(1e-8, place), 2e-7)).all()


def test_steps_far_below_the_critical_one_have_one_too() -> None:
    low, high = critical_scale(lambda s: 5 + 1e-9 * s * (s - 3e6), 1e-9)
    assert low <= 3e6 <= high <= 1.05 * low


def test_near_a_minimum_in_single_precision_it_is_never_above_the_largest_eigenvalue() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    y = x @ torch.ones(4, 1) + 0.5 * torch.randn(64, 1)
    model = nn.Linear(4, 1)
    found = []
    for rate, steps, every in ((0.1, 60, 6), (0.01, 2, 1)):
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        options: dict[str, Any] = {"every": every, "expected_products": 10, "trace_probes": 0}
        with pn.CurvatureMonitor(model, optimizer, (x, y), "mse", **options) as monitor:
            for _ in range(steps):
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
        found.append(monitor.dataset())
    for ds in found:
        ratio = (ds.critical_sharpness_low / ds.lambda_max).values
        assert np.nanmax(ratio, initial=0.0) <= 1
    assert np.isfinite(found[0].critical_sharpness[1:4]).all()
    assert found[1].critical_sharpness.isnull().all()  # the loss is as low as it can be


@pytest.mark.parametrize("rate", [1e-3, 1e-4, 1e-5])
def test_small_learning_rates_have_the_sharpness_of_large_ones(rate: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 6, generator=generator), torch.randint(3, (50,), generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    options: dict[str, Any] = {"every": 1, "expected_products": 10, "trace_probes": 0}
    weights = [p.detach().double() for p in model.parameters()]
    with pn.CurvatureMonitor(model, optimizer, (x, y), **options) as monitor:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    ds = monitor.dataset().sel(step=1)
    slopes = [p.grad.double() for p in model.parameters() if p.grad is not None]

    def loss(s: float) -> float:
        names = [name for name, _ in model.named_parameters()]
        moved = {name: w - s * g for name, w, g in zip(names, weights, slopes, strict=True)}
        return float(F.cross_entropy(torch.func.functional_call(model, moved, (x.double(),)), y).detach())

    low, high = critical_scale(loss)
    exact = 2 / (low * high) ** 0.5
    assert float(ds.critical_sharpness) == pytest.approx(exact, rel=0.1)

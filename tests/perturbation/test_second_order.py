"""Trust regions by hand and by search, and second-order values against dense Hessians."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn
from torch.nn import functional as F

from pnanalysis.curvature.operators import HessianOperator
from pnanalysis.perturbation.neighbourhoods import direction
from pnanalysis.perturbation.second_order import (
    example_half_forms,
    half_forms,
    largest_rises,
    rise_influences,
    trust_region,
)
from pnanalysis.spectra.data_error import Influence
from tests.curvature.conftest import NETWORKS, dense_hessian, images, squared_error


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shift", [0.0, -10.0])
def test_no_point_of_the_ball_has_a_larger_value(seed: int, shift: float) -> None:
    rng = np.random.default_rng(seed)
    values, along, radius = np.sort(rng.normal(size=4)) + shift, rng.normal(size=4), 0.3 + seed

    def below(y: np.ndarray) -> float:
        y = y * min(1.0, radius / np.linalg.norm(y))
        return -float(along @ y + (values * y**2).sum() / 2)

    best = min(minimize(below, rng.normal(size=4) * radius, method="Nelder-Mead",
                        options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000}).fun for _ in range(6))  # fmt: skip
    assert trust_region(values, along, radius) == pytest.approx(-best, rel=1e-6)


def test_without_a_slope_the_top_eigenvector_counts() -> None:
    values = np.array([-1.0, 1.0, 3.0])
    assert trust_region(values, np.zeros(3), 2.0) == pytest.approx(3.0 * 2.0**2 / 2)
    hard = trust_region(values, np.array([0.4, 0.0, 0.0]), 2.0)  # nothing of the slope along the top
    y = 0.4 / (3.0 + 1.0)
    assert hard == pytest.approx(0.4 * y - y**2 / 2 + 3 * (4 - y**2) / 2)


def test_small_and_negative_curvature_leave_the_centre_or_a_point_inside() -> None:
    assert trust_region(np.array([-2.0, -1.0]), np.array([0.0, 0.0]), 1.0) == pytest.approx(0.0, abs=1e-12)
    assert trust_region(np.array([-2.0, -1.0]), np.array([0.2, 0.1]), 1.0) == pytest.approx(0.2**2 / 4 + 0.1**2 / 2)


@pytest.mark.parametrize(
    "name",
    [
        "conv",
        "layernorm",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("linear", "tanh", "maxpool", "batchnorm")),
    ],
)
def test_values_of_six_networks_are_those_of_dense_hessians(name: str) -> None:
    loss, model, batches = squared_error if name == "linear" else F.cross_entropy, NETWORKS[name](), images((20, 12))
    op = HessianOperator(model, loss, batches)
    matrix, gradient = dense_hessian(model, batches, loss).numpy(), op.gradient()
    scale = torch.ones_like(gradient)
    values, vectors = np.linalg.eigh(matrix)
    radii = [0.01, 0.1, 1.0]
    expected = [trust_region(values, vectors.T @ gradient.numpy(), radius) for radius in radii]
    found, points = largest_rises(op, gradient, "ball", scale, radii, seed=0)
    # a lower bound, from a Krylov space of 16 dims of up to 160
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert (found <= np.array(expected) * (1 + 1e-9)).all()
    np.testing.assert_allclose(points.norm(dim=0), radii, rtol=1e-9)
    at = gradient @ points + (points * (torch.from_numpy(matrix) @ points)).sum(0) / 2
    np.testing.assert_allclose(found, at, rtol=1e-9)
    forms = half_forms(op, "ball", scale, 3, seed=0)
    directions = [direction("ball", len(scale), j, 0, scale).numpy() for j in range(3)]
    np.testing.assert_allclose(forms, [delta @ matrix @ delta / 2 for delta in directions], rtol=1e-9)


@pytest.mark.parametrize("kind", ["ball", "adaptive"])
def test_values_of_a_network_are_those_of_its_dense_hessian(kind: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    batches = [(torch.randn(30, 3, dtype=torch.float64), torch.randint(2, (30,)))]
    op = HessianOperator(net, F.cross_entropy, batches)
    theta = torch.cat([p.detach().flatten() for p in net.parameters()])
    scale = theta.abs() if kind == "adaptive" else torch.ones_like(theta)
    matrix = (scale[:, None] * op.to_dense() * scale).numpy()
    values, vectors = np.linalg.eigh(matrix)
    along = vectors.T @ (scale * op.gradient()).numpy()
    radii = [0.01, 0.1, 1.0]
    found, _ = largest_rises(op, op.gradient(), kind, scale, radii, seed=0)
    # a Krylov space of 16 of 20 dims holds all but nothing of the top
    np.testing.assert_allclose(found, [trust_region(values, along, radius) for radius in radii], rtol=1e-6)
    forms = half_forms(op, kind, scale, 400, seed=0)
    assert abs(forms.mean() - np.trace(matrix) / 2) < 4 * forms.std() / 20


def regression(n: int = 60) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A linear network beside its least squares, and heavy-tailed examples."""
    torch.manual_seed(1)
    x = torch.randn(n, 4, dtype=torch.float64) * torch.tensor([2.0, 1.5, 1.0, 0.5])
    net = nn.Linear(4, 1, bias=False).double()
    return net, x, net(x).detach() + 0.5 * torch.randn(n, 1, dtype=torch.float64) - 0.2 * x[:, :1]


def dense_rise(weights: np.ndarray, net: nn.Module, x: torch.Tensor, y: torch.Tensor, radius: float) -> float:
    """The largest rise of the loss in which examples have these weights."""
    design, residual = x.numpy(), (net(x) - y).detach().numpy()[:, 0]
    share = weights / weights.sum()
    values, vectors = np.linalg.eigh(2 * (design.T * share) @ design)
    return trust_region(values, vectors.T @ (2 * design.T @ (share * residual)), radius)


def test_what_examples_add_to_the_largest_rise_is_how_it_changes_with_their_weights() -> None:
    net, x, y = regression()
    op, radii = HessianOperator(net, F.mse_loss, [(x[:25], y[:25]), (x[25:], y[25:])]), [0.05, 0.3, 1.0]
    rises, points = largest_rises(op, op.gradient(), "ball", torch.ones(4, dtype=torch.float64), radii, seed=0)
    found = rise_influences(op, points, rises)
    ones, eps = np.ones(60), 1e-5
    for own, rise, radius in zip(found, rises, radii, strict=True):
        assert rise == pytest.approx(dense_rise(ones, net, x, y, radius), rel=1e-10)
        moved = [ones + eps * np.eye(60)[i] * sign for i in range(60) for sign in (1, -1)]
        each = np.array([dense_rise(one, net, x, y, radius) for one in moved]).reshape(60, 2)
        slopes = 60 * (each[:, 0] - each[:, 1]) / (2 * eps)
        np.testing.assert_allclose(own.form - own.form.mean(), slopes, rtol=1e-5, atol=1e-6 * np.abs(slopes).max())


def test_errors_of_largest_rises_are_their_scatter_over_bootstrap_samples() -> None:
    net, x, y = regression()
    op, radius, rng = HessianOperator(net, F.mse_loss, [(x, y)]), 0.3, np.random.default_rng(0)
    rises, points = largest_rises(op, op.gradient(), "ball", torch.ones(4, dtype=torch.float64), [radius], seed=0)
    (own,) = rise_influences(op, points, rises)
    samples = [dense_rise(np.bincount(rng.integers(60, size=60), minlength=60), net, x, y, radius) for _ in range(300)]
    # known to 4 %, and to first order in 1 / sqrt(60)
    assert own.se == pytest.approx(np.std(samples), rel=0.12)


def test_errors_of_mean_rises_weigh_examples_as_the_loss_does() -> None:
    torch.manual_seed(0)
    net, x, y = nn.Linear(3, 3).double(), torch.randn(40, 3).double(), torch.arange(40) % 3
    y[:4] = -100
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 2.0]).double())
    op = HessianOperator(net, loss, [(x[:16], y[:16]), (x[16:], y[16:])])
    scale = torch.ones(12, dtype=torch.float64)
    crossed = example_half_forms(op, "ball", scale, 5, seed=0)
    expected = half_forms(op, "ball", scale, 5, seed=0)
    np.testing.assert_allclose(crossed.by_direction, expected, rtol=1e-10)
    se, direction_se, data_se, _ = crossed.errors()
    assert float(direction_se) == pytest.approx(expected.std(ddof=1) / 5**0.5, rel=1e-10)
    deltas = torch.stack([direction("ball", 12, j, 0, scale) for j in range(5)], 1)
    forms = op.forms(deltas, deltas).numpy().mean(0) / 2
    influence = Influence(op.group_weights, forms, np.zeros(len(forms)))
    assert float(data_se) == pytest.approx(influence.se, rel=1e-10)
    assert max(direction_se, data_se) <= se <= np.hypot(direction_se, data_se)

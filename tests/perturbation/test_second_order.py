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
from pnanalysis.perturbation.second_order import half_forms, largest_rises, trust_region
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
    found = largest_rises(op, gradient, "ball", scale, radii, seed=0)
    # a lower bound, from a Krylov space of 16 dims of up to 160
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert (found <= np.array(expected) * (1 + 1e-9)).all()
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
    found = largest_rises(op, op.gradient(), kind, scale, radii, seed=0)
    # a Krylov space of 16 of 20 dims holds all but nothing of the top
    np.testing.assert_allclose(found, [trust_region(values, along, radius) for radius in radii], rtol=1e-6)
    forms = half_forms(op, kind, scale, 400, seed=0)
    assert abs(forms.mean() - np.trace(matrix) / 2) < 4 * forms.std() / 20

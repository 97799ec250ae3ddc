"""Ascents: the largest values of quadratics in balls and boxes, and APGD's check points."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pnanalysis.perturbation.ascent import METHODS, _check_points, ascend
from pnanalysis.perturbation.neighbourhoods import Neighbourhoods
from pnanalysis.perturbation.second_order import trust_region

MATRIX = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.3, 0.5], dtype=torch.float64))
SLOPE = torch.tensor([0.1, -0.3, 0.2, 0.4, 0.05], dtype=torch.float64)


def quadratic(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return points @ SLOPE + (points @ MATRIX * points).sum(1) / 2, SLOPE + points @ MATRIX


def within(radii: list[float], is_box: bool) -> Neighbourhoods:
    rho = torch.tensor(radii, dtype=torch.float64)[:, None]
    centre = torch.zeros(5, dtype=torch.float64)
    return Neighbourhoods(centre, rho.expand(-1, 5).clone(), torch.full_like(rho, is_box, dtype=torch.bool))


@pytest.mark.parametrize(("method", "relative"), [("frank-wolfe", 1e-9), ("apgd", 1e-5), ("gradient", 0.1)])
@pytest.mark.parametrize("is_box", [False, True])
def test_the_largest_value_of_a_quadratic_is_found(method: str, relative: float, is_box: bool) -> None:
    radii, values, along = [0.5, 2.0], MATRIX.diagonal().numpy(), SLOPE.numpy()
    found = ascend(quadratic, within(radii, is_box), torch.zeros(2, 5, dtype=torch.float64), 100, method)
    order = np.argsort(values)
    for radius, value, u in zip(radii, found.value, found.u, strict=True):
        corner = float(np.abs(along).sum() * radius + values.sum() * radius**2 / 2)
        expected = corner if is_box else trust_region(values[order], along[order], radius)
        assert float(u.abs().max() if is_box else u.norm()) <= 1 + 1e-12
        assert float(value) == pytest.approx(expected, rel=relative)
        assert float(value) <= expected * (1 + 1e-12)


def test_apgd_looks_at_its_progress_where_its_paper_says() -> None:
    assert sorted(_check_points(100)) == [22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize("method", METHODS)
def test_points_where_the_loss_is_not_finite_count_as_highest(method: str) -> None:
    def broken(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value, slope = quadratic(points)
        return torch.where(points.norm(dim=1) > 0.4, torch.nan, value), slope

    found = ascend(broken, within([0.5], False), torch.zeros(1, 5, dtype=torch.float64), 20, method)
    assert bool(found.value.isnan().all())

"""Basins of surfaces whose wells are known."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from trainers.problems.basins import basin_map
from trainers.problems.two_well import descend, two_well


def bowl(x: Tensor, y: Tensor) -> Tensor:
    return (x - 1) ** 2 + 2 * (y + 1) ** 2


def test_two_wells_have_two_basins() -> None:
    ds = basin_map(n=41)
    # where the gradient vanishes, by Newton's method on the formula
    minima = []
    for start in ((-2.0, -1.0), (2.0, -2.0)):
        point = torch.tensor(start, dtype=torch.float64)
        for _ in range(8):
            slope = torch.func.grad(lambda p: two_well(p[0], p[1]))(point)
            curvature = torch.func.hessian(lambda p: two_well(p[0], p[1]))(point)
            point = point - torch.linalg.solve(curvature, slope)
        minima.append(point.numpy())
    # the wide well has curvature 0.4: after time 50, e^(-20) of a distance up to 8 is left
    np.testing.assert_allclose(ds["minimum"], minima, atol=8 * math.exp(-20))
    assert ds["minimum_value"].values[0] < ds["minimum_value"].values[1]
    assert ds["basin"].sel(x=2, y=-2, method="nearest") == 1
    assert ds["basin"].sel(x=-2, y=-1, method="nearest") == 0
    assert ds["basin"].values[-1, 0] == -1  # the plateau in the corner
    counts = [(ds["basin"].values == well).mean() for well in (0, 1)]
    np.testing.assert_allclose(ds["share"], counts)


def test_basins_agree_with_single_descents_at_the_papers_rate() -> None:
    ds = basin_map(n=41)
    for row, column in ((17, 18), (30, 15), (33, 25), (13, 5), (3, 22)):
        start = float(ds["x"][column]), float(ds["y"][row])
        end = descend(two_well, start, iterations=1, samples=1)["end"].values[0]
        minimum = ds["minimum"][int(ds["basin"][row, column])]
        np.testing.assert_allclose(end, minimum, atol=8 * math.exp(-18))  # at most 5 of the 50 spent on the plateau


def test_a_surface_without_a_minimum_has_no_basin() -> None:
    ds = basin_map(lambda x, y: -(x**4) - y**2, n=11, lr=0.1, steps=500)
    assert ds.sizes["well"] == 0
    assert (ds["basin"].values == -1).all()


def test_one_bowl_is_one_basin() -> None:
    ds = basin_map(bowl, n=15, lr=0.05, steps=1000)
    np.testing.assert_allclose(ds["minimum"], [[1.0, -1.0]], atol=1e-12)
    assert float(ds["share"][0]) == 1.0

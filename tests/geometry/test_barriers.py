"""Barriers: their standard errors hold although the highest point has to be found in noise."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

import pnanalysis as pn
from pnanalysis.geometry.barriers import profile
from pnanalysis.geometry.loss_surface import ExampleValues

POSITION = np.array([0.0, 1.0, *np.linspace(0, 1, 13)[1:-1]])  # the ends first
N, SEEDS = 200, 400


def noisy(height: np.ndarray, seed: int, noise: np.ndarray) -> Iterator[ExampleValues]:
    """Examples' losses with this mean at each point and noise (factor, point), the same at no two examples."""
    rng = np.random.default_rng(seed)
    each = height + rng.normal(size=(N, len(noise))) @ noise
    for losses in each.T:
        yield ExampleValues(1.0 + losses, np.zeros(N))


def waves() -> np.ndarray:
    """Noise that changes slowly along the path, as that of a network does."""
    return np.stack([np.sin(np.pi * j * POSITION) / j for j in range(1, 6)])


@pytest.mark.parametrize(
    ("height", "smooth"),
    [
        (0.0, True), (0.05, False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((0.05, True), (0.5, True), (0.0, False), (0.5, False))
        ),
    ],
)  # fmt: skip
def test_the_interval_holds_the_true_barrier(height: float, smooth: bool) -> None:
    noise = waves() if smooth else np.eye(len(POSITION))
    mean = height * np.sin(np.pi * POSITION)
    found = [profile(POSITION, noisy(mean, seed, noise)) for seed in range(SEEDS)]
    barrier, se = (np.array([float(one[name]) for one in found]) for name in ("barrier", "barrier_se"))
    held = np.mean(np.abs(barrier - height) <= 1.96 * se)
    assert held >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / SEEDS)
    largest = np.array([float(one.excess.max()) for one in found])
    # the largest mean is biased upwards; this one only as far as it is not below 0
    assert barrier.mean() - height < 2 / 3 * (largest.mean() - height)


def test_a_barrier_that_both_halves_find_is_the_mean_of_all() -> None:
    rng = np.random.default_rng(0)
    losses = np.array([0.0, 0.0, 1.0, 3.0, 2.0])[:, None] + 0.1 * rng.normal(size=(5, N))
    ds = profile(np.array([0, 1, 0.25, 0.5, 0.75]), (ExampleValues(row, row) for row in losses))
    top = losses[3] - (losses[0] + losses[1]) / 2
    assert float(ds.barrier) == pytest.approx(top.mean(), rel=1e-12)
    # standard errors of the halves, whose variances differ by 1 / sqrt(N / 2) or so from that of all
    assert float(ds.barrier_se) == pytest.approx(top.std(ddof=1) / np.sqrt(N), rel=0.1)
    assert float(ds.barrier_position) == 0.5
    assert float(ds.error_barrier) == float(ds.barrier)


def test_an_overflow_is_a_barrier() -> None:
    rows = [np.zeros(4), np.zeros(4), np.full(4, np.nan)]
    ds = profile(np.array([0, 1, 0.5]), (ExampleValues(row, row) for row in rows))
    assert np.isnan(float(ds.barrier))
    assert float(ds.barrier_position) == 0.5


def test_a_line_is_as_long_as_all_that_moves_on_it() -> None:
    """Layers that are frozen in one of the networks move, too."""
    networks = {}
    for seed, frozen in ((0, True), (1, False)):
        torch.manual_seed(seed)
        networks[f"net{seed}"] = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        networks[f"net{seed}"][0].requires_grad_(not frozen)
    pairs = zip(*(net.parameters() for net in networks.values()), strict=True)
    length = sum(float((a - b).detach().square().sum()) for a, b in pairs) ** 0.5
    data = (torch.randn(20, 4), torch.arange(20) % 3)
    for order in (networks, dict(reversed(networks.items()))):
        ds = pn.landscape(order, data=data, loss="cross_entropy", n_points=3, progress=False).squeeze()
        np.testing.assert_allclose([float(ds.distance), float(ds.length)], length, rtol=1e-5)

"""Escape probabilities of made-up and of trained ensembles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import xarray as xr
from scipy.stats import binomtest

from pnanalysis.errors import TrainingError
from trainers.problems.escape import escape
from trainers.problems.kink_ensemble import train_chains, train_restarts
from trainers.zoo.kink import kink_data

X, Y = kink_data("kink6")


def made_up(losses: list[list[float]], lams: list[float]) -> xr.Dataset:
    """An ensemble with the given final losses (iteration, member)."""
    variables = {"final_loss": (("iteration", "member"), np.array(losses)), "data_x": ("point", X)}
    coords = {"lam": ("member", lams), "iteration": np.arange(len(losses))}
    return xr.Dataset({**variables, "data_y": ("point", Y)}, coords=coords)


def test_escape_counts_starts_that_have_left_so_far() -> None:
    chains = made_up([[4.2, 4.2, 4.2, 4.19], [0.1, 4.2, 4.2, 2.0], [4.2, 4.2, 1.0, 4.2]], [0.1, 0.1, 0.01, 0.01])
    restarts = made_up([[4.2, 0.5, 4.2], [4.2, 4.2, 4.2], [4.2, 4.2, 4.2]], [math.nan] * 3)
    ds = escape(chains, restarts)
    assert ds["strategy"].values.tolist() == ["persistent, λ = 0.01", "persistent, λ = 0.1", "restart"]
    np.testing.assert_allclose(ds["probability"], [[0, 0.5, 1], [0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]])
    assert ds["n_starts"].values.tolist() == [2, 2, 3]
    np.testing.assert_allclose(ds["best_loss"][0], [4.195, 3.1, 1.5])  # medians of (4.2, 4.19), (4.2, 2), (1, 2)
    assert ds.attrs["plateau"] == pytest.approx(4.2)
    interval = binomtest(1, 3).proportion_ci(0.95, method="wilson")
    assert float(ds["probability_low"][2, 0]) == pytest.approx(interval.low)
    assert float(ds["probability_high"][2, 0]) == pytest.approx(interval.high)
    np.testing.assert_array_equal(ds["lam"], [0.01, 0.1, math.nan])


def test_escape_accepts_one_strength_and_a_shorter_control() -> None:
    ds = escape(made_up([[4.2], [0.1]], [0.1]))
    assert ds["probability"].dims == ("strategy", "iteration")
    assert ds["lam"].values.tolist() == [0.1]
    both = escape(made_up([[4.2], [0.1]], [0.1]), made_up([[4.2]], [math.nan]))
    np.testing.assert_array_equal(both["probability"], [[0, 1], [0, math.nan]])


def test_escape_refuses_other_data() -> None:
    chains = made_up([[4.2]], [0.1])
    with pytest.raises(TrainingError, match="different data"):
        escape(chains, chains.assign(data_y=2 * chains["data_y"]))
    with pytest.raises(TrainingError, match="margin"):
        escape(chains, margin=1.5)


@pytest.mark.slow
def test_persistent_chains_leave_the_plateau_more_often_than_restarts() -> None:
    chains = train_chains(X, Y, seeds=range(6), lams=[0.01, 0.1], iterations=12, progress=False)
    ds = escape(chains, train_restarts(X, Y, seeds=range(6), iterations=12, progress=False))
    weak, strong, restart = (ds["probability"].values[k] for k in range(3))
    assert weak[-1] >= 5 / 6 > restart[-1]
    assert strong[2] > weak[2]
    assert strong[-1] >= 5 / 6

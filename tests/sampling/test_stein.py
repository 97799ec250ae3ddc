"""Stein's identity of draws, whose sides are known in closed form for quadratic potentials."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import pnanalysis as pn
from pnanalysis.sampling.langevin import Posterior
from pnanalysis.sampling.stein import is_large
from tests.sampling.test_langevin import CURVATURES, batches, of, plan, quadratic, sample

QUIET = {"progress": False, "data_error": "none"}


@pytest.mark.parametrize("sampler", ["full", "minibatch", "sgld"])
def test_what_a_scheme_adds_to_a_quadratic_is_seen(sampler: str) -> None:
    posterior = Posterior(nbeta=10.0, localization=5.0, step_size=0.02)
    ds = sample(of(quadratic, 4), batches(1.0), plan(posterior, sampler, n_chains=480, n_draws=500))
    excess, se = float(ds.stein_excess), float(ds.stein_excess_se)
    wider = 1 / (1 - posterior.step_size * (posterior.nbeta * CURVATURES + posterior.localization) / 4)
    exact = float((CURVATURES * wider).sum() / CURVATURES.sum()) - 1 if sampler == "sgld" else 0.0
    assert abs(excess - exact) < 4 * se < 0.08
    assert is_large(excess, se) == (sampler == "sgld")


def test_chains_that_have_not_spread_yet_are_seen() -> None:
    posterior = Posterior(nbeta=10.0, localization=5.0, step_size=1e-4)
    ds = sample(of(quadratic, 4), batches(1.0), plan(posterior, burn_in=0, n_draws=40))
    assert float(ds.stein_excess) < -0.5
    assert is_large(float(ds.stein_excess), float(ds.stein_excess_se))


def test_steps_that_are_too_long_are_said() -> None:
    torch.manual_seed(0)
    network = nn.Linear(4, 1).double()
    x = torch.randn(60, 4, dtype=torch.float64)
    y = network(x).detach() + 0.1 * torch.randn(60, 1, dtype=torch.float64)
    options = {"data": (x, y), "loss": "mse", "localization": 20.0, "n_chains": 8, "n_draws": 200} | QUIET
    with pytest.warns(UserWarning, match=r"off by \d\.\d+ ± .* take a step_size below"):
        ds = pn.learning_coefficient(network, sampler="sgld", step_size=0.02, **options).squeeze("checkpoint")
    assert float(ds.converged) == 1  # R-hat does not see it
    assert float(ds.learning_coefficient) > 1.1 * float(ds.gaussian)  # and this is exact for a linear model


def test_where_there_is_no_curvature_nothing_is_said() -> None:
    posterior = Posterior(nbeta=10.0, localization=5.0, step_size=0.02)
    ds = sample(of(lambda w: w.sum() * 0, 4), batches(1.0), plan(posterior, n_draws=20))
    assert math.isnan(float(ds.stein_excess))
    assert not is_large(float(ds.stein_excess), np.nan)

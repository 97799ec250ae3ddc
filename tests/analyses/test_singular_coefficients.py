"""Learning coefficients of deep linear networks of positive rank, whose minima are singular.

Two references that know nothing of Langevin chains: the closed form of the coefficient, which is the limit of many
examples, and for a finite number of them the mean loss in the local posterior itself. With all layers but the last
fixed the posterior is Gaussian, so that the mean over the last is a formula, and what is left is a mean over the normal
density of the pull, by simple sampling.
"""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

import pnanalysis as pn

#: Of the matrix that a network is, with as many ones on its diagonal; the coefficient does not depend on more of it.
RANK = 1
#: Examples, whose inputs have a second moment of exactly one.
N = 8


class Reference(NamedTuple):
    """A mean and its standard error."""

    value: float
    se: float


def closed_form(widths: tuple[int, ...]) -> float:
    """The learning coefficient of a linear network with these numbers of units at a target of rank one.

    M. Aoyagi, "Consideration on the learning efficiency of multiple-layered neural networks with linear units", Neural
    Networks 172 (2024) 106132; in the form of theorem 1 of E. Lau et al., arXiv:2308.12108.
    """
    rest = [width - RANK for width in widths]
    for size in range(2, len(rest) + 1):
        for chosen in combinations(range(len(rest)), size):
            own = [rest[i] for i in chosen]
            others = [rest[i] for i in range(len(rest)) if i not in chosen]
            total, factors = sum(own), size - 1
            if max(own) * factors < total and all(total <= factors * other for other in others):
                a = total - (math.ceil(total / factors) - 1) * factors
                pairs = sum(m * n for m, n in combinations(own, 2))
                regular = (RANK * (widths[0] + widths[-1]) - RANK**2) / 2
                correction = a * (factors - a) / (4 * factors) - factors * (factors - 1) / 4 * (total / factors) ** 2
                return regular + correction + pairs / 2
    raise AssertionError("some set of layers is always the one")


def diagonal(rows: int, columns: int) -> Tensor:
    return torch.eye(rows, columns, dtype=torch.float64) * (torch.arange(columns) < RANK)


def localised(widths: tuple[int, ...], nbeta: float, gamma: float, n: int, n_repeats: int = 4) -> Reference:
    r"""The mean of :math:`n\beta L` in the local posterior, with the error of ``n_repeats`` times ``n`` samples.

    A row :math:`w` of the last layer, normal around its centre :math:`c` with variance :math:`1/\gamma`, adds
    :math:`\tau \lVert wA - t\rVert^2` to the potential, where :math:`A` is what comes before, :math:`t` the row of the
    target and :math:`\tau = n\beta/d`. Its factor in the normalisation is
    :math:`\det(1+S)^{-1/2} e^{-\tau r^\top (1+S)^{-1} r}` with :math:`S = 2\tau A^\top A/\gamma` and
    :math:`r = A^\top c - t`, and its mean loss minus the derivative of the logarithm of that with :math:`\log\tau`.
    """
    generator = torch.Generator().manual_seed(0)
    tau, target, found = nbeta / widths[-1], diagonal(widths[-1], widths[0]), []
    for _ in range(n_repeats):
        before = torch.eye(widths[0], dtype=torch.float64).expand(n, -1, -1)
        for fan_in, fan_out in pairwise(widths[:-1]):
            noise = torch.randn(n, fan_out, fan_in, generator=generator, dtype=torch.float64) / math.sqrt(gamma)
            before = (diagonal(fan_out, fan_in) + noise) @ before
        value, vector = torch.linalg.eigh(2 * tau / gamma * before.mT @ before)
        off = ((diagonal(widths[-1], widths[-2]) @ before - target) @ vector).square().sum(1)
        log_weight = -widths[-1] / 2 * torch.log1p(value).sum(1) - tau * (off / (1 + value)).sum(1)
        loss = widths[-1] / 2 * (value / (1 + value)).sum(1) + tau * (off / (1 + value) ** 2).sum(1)
        weight = (log_weight - log_weight.max()).exp()
        found.append(float(weight @ loss / weight.sum()))
    return Reference(float(np.mean(found)), float(np.std(found, ddof=1)) / math.sqrt(n_repeats))


def sampled(widths: tuple[int, ...], nbeta: float, gamma: float, **options: Any) -> xr.Dataset:
    network = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(widths))).double()
    with torch.no_grad():
        for layer in network:
            layer.weight.copy_(diagonal(*layer.weight.shape))
    generator = torch.Generator().manual_seed(0)
    x = math.sqrt(N) * torch.linalg.qr(torch.randn(N, widths[0], generator=generator, dtype=torch.float64))[0]
    return pn.learning_coefficient(
        network, data=(x, network(x).detach()), loss="mse", n=None, beta=nbeta / N, localization=gamma, batch_size=N,
        data_error="none", dtype="float64", progress=False, **options,
    ).squeeze("checkpoint")  # fmt: skip


def test_the_references_agree() -> None:
    """Towards many examples the mean loss tends to the coefficient, by the next exponent: one half."""
    widths = (2, 4, 4, 2)
    assert closed_form(widths) == 2
    few, many = (localised(widths, nbeta, 1.0, n=60_000) for nbeta in (1e2, 1e3))
    assert few.value + 4 * few.se < many.value < 2 + 4 * many.se
    extrapolated = (math.sqrt(10) * many.value - few.value) / (math.sqrt(10) - 1)
    se = math.hypot(math.sqrt(10) * many.se, few.se) / (math.sqrt(10) - 1)
    assert abs(extrapolated - 2) < 4 * se < 0.1


@pytest.mark.filterwarnings("ignore:part of the computation:UserWarning")
def test_chains_find_what_the_hessian_does_not() -> None:
    widths, nbeta, gamma = (4, 4, 4, 4), 100.0, 10.0
    exact = localised(widths, nbeta, gamma, n=15_000)
    ds = sampled(widths, nbeta, gamma, n_chains=32, n_draws=700, burn_in=200)
    assert float(ds.converged) == 1
    value, se = float(ds.learning_coefficient), math.hypot(float(ds.learning_coefficient_se), exact.se)
    assert abs(value - exact.value) < 4 * se < 0.2
    assert value - float(ds.gaussian) > 10 * se  # 41 of 48 directions are flat to second order
    # the pull keeps chains from where the coefficient is: at this one, the number says nothing of the limit
    assert value < 0.65 * closed_form(widths) == pytest.approx(0.65 * 6.5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:part of the computation:UserWarning")
@pytest.mark.parametrize(
    ("widths", "gamma", "options"),
    [
        ((2, 2, 2, 2), 10.0, {"n_chains": 64, "n_draws": 3000}),
        ((3, 3, 3, 3, 3), 10.0, {"n_chains": 64, "n_draws": 3000}),
        ((2, 4, 4, 2), 3.0, {"n_chains": 32, "n_draws": 3000}),
        ((2, 4, 4, 2), 1.0, {"n_chains": 32, "n_draws": 6000}),
    ],
)
def test_long_chains_find_the_mean_of_the_local_posterior(
    widths: tuple[int, ...], gamma: float, options: dict[str, Any]
) -> None:
    exact = localised(widths, 100.0, gamma, n=200_000)
    ds = sampled(widths, 100.0, gamma, burn_in=options["n_draws"] // 4, **options)
    assert float(ds.converged) == 1
    value, se = float(ds.learning_coefficient), math.hypot(float(ds.learning_coefficient_se), exact.se)
    assert abs(value - exact.value) < 4 * se < 0.1 * exact.value
    assert value < closed_form(widths) + 4 * se
    if gamma <= 3:  # held this loosely, chains are near the coefficient, and their distance from it is the pull's
        assert closed_form(widths) - value < closed_form(widths) - exact.value + 4 * se < 0.1 * closed_form(widths)
        assert value - float(ds.gaussian) > 10 * se

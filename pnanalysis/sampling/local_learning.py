"""Estimates of the local learning coefficient from chains, with their errors and what shows their convergence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.errors import ModelError
from pnanalysis.estimates import Estimate
from pnanalysis.sampling.convergence import effective_sample_size, rank_normalised_rhat
from pnanalysis.sampling.influence import Influence
from pnanalysis.sampling.langevin import Chains, Posterior, Stiff
from pnanalysis.sampling.stacked_gradients import StackedGradients
from pnanalysis.terminal.progress import Advance

#: Chains count as converged below these R-hats of the loss and of the distance, and from this many effective draws on.
RHAT, DISTANCE_RHAT, LEAST_DRAWS = 1.05, 1.1, 100.0
#: Draws of each chain at which all examples are evaluated for their error.
_FULL_DRAWS = 100
#: Chains that come to larger losses or distances have diverged.
_LARGEST = 1e30
#: Steps between looks at whether chains are still finite, for which the host waits for the device.
_LOOK = 25
#: Step sizes are tried so often at most; how much shorter they get where chains diverge, and how far they may be above
#: the wanted fraction of the limit.
_ATTEMPTS, _SHORTER, _MARGIN = 12, 4.0, 1.5
#: How many standard errors the loss of batches may be from that of their examples, and how far relative to it.
_SIGMAS, _ROUND_OFF = 6.0, 1e-3


@dataclass(frozen=True)
class Plan:
    """Chains of several posteriors.

    Attributes
    ----------
    posteriors : sequence of Posterior
    n_chains : int
        Of each.
    burn_in, n_draws : int
    sampler : str
    stiff : Stiff or None
    seed : int
    with_examples : bool
        Whether to estimate the error of examples.
    """

    posteriors: Sequence[Posterior]
    n_chains: int
    burn_in: int
    n_draws: int
    sampler: str
    stiff: Stiff | None
    seed: int
    with_examples: bool


def sample(
    gradients: StackedGradients, batches: Iterable[Any], plan: Plan, advance: Advance | None = None
) -> xr.Dataset:
    """Run chains and estimate the coefficient of each posterior, along a dim ``posterior``.

    Raises
    ------
    ModelError
        If all chains of a posterior leave the region where the loss is finite, or the losses of the examples are not
        those of the batches.
    """
    n_steps = plan.burn_in + plan.n_draws
    chains = _chains(gradients, batches, plan)
    n_chains = len(plan.posteriors) * plan.n_chains
    excess = torch.full((n_chains, n_steps), torch.nan, dtype=torch.float64, device=gradients.centre.device)
    distance = excess.clone()
    full = _FullDraws(gradients, batches, plan)
    with torch.no_grad():
        for step, draw in enumerate(chains.draws(n_steps)):
            excess[:, step], distance[:, step] = draw.excess, draw.square_distance.sqrt()
            if step in full.steps:
                full.add(draw.points)
            if step % _LOOK == _LOOK - 1 and not bool((distance[:, step] < _LARGEST).any()):
                break  # all have diverged
            if advance is not None:
                advance()
    shape = (len(plan.posteriors), plan.n_chains, n_steps)
    traces = excess.cpu().numpy().reshape(shape), distance.cpu().numpy().reshape(shape)
    parts = [
        _estimate(one, plan, excess, distance, full.influences[i : i + 1], chains.n_batches)
        for i, (one, excess, distance) in enumerate(zip(plan.posteriors, *traces, strict=True))
    ]
    full.check(chains.loss, parts)
    return xr.concat(parts, dim="posterior").assign(loss=chains.loss)


def _chains(gradients: StackedGradients, batches: Iterable[Any], plan: Plan) -> Chains:
    everyone = [one for one in plan.posteriors for _ in range(plan.n_chains)]
    key = int(np.random.SeedSequence([plan.seed, 1]).generate_state(1, np.uint64)[0])
    return Chains(gradients, batches, everyone, plan.sampler, plan.stiff, key)


def with_steps_that_hold(gradients: StackedGradients, batches: Iterable[Any], plan: Plan) -> Plan:
    """The plan with step sizes that fit the curvature where chains are after half of the burn-in.

    That at the checkpoint says little of it in a singular minimum.
    """
    chosen = np.array([one.courant > 0 for one in plan.posteriors])
    for _ in range(_ATTEMPTS if chosen.any() else 0):
        chains = _chains(gradients, batches, plan)
        with torch.no_grad():
            points, held = _ends(chains, max(plan.burn_in // 2, _LOOK), plan.n_chains)
            met = chains.curvature(points).double().cpu().numpy().reshape(-1, plan.n_chains).max(axis=1)
        posteriors = []
        for one, curvature, good in zip(plan.posteriors, met, held, strict=True):
            longest = one.courant / curvature if good and np.isfinite(curvature) else one.step_size / _SHORTER
            too_long = one.courant > 0 and one.step_size > _MARGIN * longest
            posteriors.append(replace(one, step_size=longest) if too_long else one)
        if posteriors == list(plan.posteriors):
            break
        plan = replace(plan, posteriors=posteriors)
    return plan


def _ends(chains: Chains, n_steps: int, n_chains: int) -> tuple[Tensor, list[bool]]:
    """Where chains are after some steps, and of which posteriors all chains stayed finite; stops where none did."""
    draws = chains.draws(n_steps)
    for step, draw in enumerate(draws):
        last = draw
        if step % _LOOK == _LOOK - 1 and not bool((draw.square_distance < _LARGEST).all()):
            break
    held = (last.square_distance < _LARGEST).cpu().numpy().reshape(-1, n_chains)
    return last.points, [bool(one.all()) for one in held]


def _estimate(
    one: Posterior, plan: Plan, excess: Array, distance: Array, influences: Sequence[Influence], n_batches: int
) -> xr.Dataset:  # fmt: skip
    """What the chains of one posterior say."""
    drawn, far = excess[:, plan.burn_in :], distance[:, plan.burn_in :]
    finite = bool((np.abs(drawn) < _LARGEST).all() and (far < _LARGEST).all())  # False for NaN, too
    if plan.sampler != "full":  # means of whole passes: the noise of batches would hide how slowly chains move
        drawn, far = (_means(each, n_batches) for each in (drawn, far))
    effective = effective_sample_size(drawn) if finite else 0.0
    rhat, distance_rhat = (rank_normalised_rhat(each) if finite else math.nan for each in (drawn, far))
    converged = finite and rhat < RHAT and distance_rhat < DISTANCE_RHAT and effective >= LEAST_DRAWS
    value = one.nbeta * float(drawn.mean()) if finite else math.nan
    chain_se = one.nbeta * float(drawn.std(ddof=1)) / math.sqrt(effective) if effective else math.nan
    data_se = influences[0].standard_error() if influences and finite else math.nan
    se = math.hypot(chain_se, data_se) if influences else chain_se
    low, high = Estimate(value, se).interval()
    found = {
        "learning_coefficient": value, "learning_coefficient_se": se, "learning_coefficient_chain_se": chain_se,
        "learning_coefficient_data_se": data_se, "learning_coefficient_low": low, "learning_coefficient_high": high,
    }  # fmt: skip
    if not converged:  # nobody should quote what the chains have not settled on; it can be read off their draws
        found = dict.fromkeys(found, math.nan)
    found |= {
        "rhat": rhat, "distance_rhat": distance_rhat, "effective_draws": effective, "converged": float(converged),
        "epsilon": one.step_size, "nbeta": one.nbeta,
    }  # fmt: skip
    return xr.Dataset(found | {"excess": (("chain", "draw"), excess), "distance": (("chain", "draw"), distance)})


def _means(draws: Array, n_batches: int) -> Array:
    """Means of draws over whole passes of the batches; as they are where that leaves too few."""
    n = draws.shape[1] // n_batches
    return draws[:, : n * n_batches].reshape(len(draws), n, n_batches).mean(axis=2) if n >= 8 else draws


class _FullDraws:
    """All examples at some draws: for their influences, and to see that batches say the same of them."""

    def __init__(self, gradients: StackedGradients, batches: Iterable[Any], plan: Plan) -> None:
        self._gradients, self._batches, self._n_chains = gradients, batches, plan.n_chains
        self.influences: list[Influence] = []
        self.steps: frozenset[int] = frozenset()
        self._excess: list[list[float]] = [[] for _ in range(len(plan.posteriors) * plan.n_chains)]
        if not plan.with_examples:
            return
        (centre,) = self._losses(gradients.centre[None])
        self._mean = float(centre.mean())
        self.influences = [Influence(centre, plan.n_chains, one.nbeta) for one in plan.posteriors]
        places = np.linspace(plan.burn_in, plan.burn_in + plan.n_draws - 1, min(_FULL_DRAWS, plan.n_draws))
        self.steps = frozenset(places.round().astype(int).tolist())

    def _losses(self, points: Tensor) -> list[Array]:
        states, surface = self._gradients.states(points), self._gradients.surface
        return [values.loss for values in surface.example_values(states, len(points), self._batches)]

    def add(self, points: Tensor) -> None:
        for i, losses in enumerate(self._losses(points)):
            if np.isfinite(losses).all():
                mean = self.influences[i // self._n_chains].add(i % self._n_chains, losses)
                self._excess[i].append(mean)

    def check(self, loss: float, parts: Sequence[xr.Dataset]) -> None:
        """See that batches and examples tell the same loss, at the checkpoint and away from it.

        Raises
        ------
        ModelError
        """
        if not self.influences:
            return
        off = abs(self._mean - loss) > _ROUND_OFF * max(abs(loss), 1.0)
        for i, part in enumerate(parts):
            own = np.concatenate(self._excess[i * self._n_chains : (i + 1) * self._n_chains])
            if float(part.converged) and len(own) > 2:
                nbeta = float(part.nbeta)
                error = nbeta * own.std(ddof=1) / math.sqrt(len(own)) + float(part.learning_coefficient_chain_se)
                off |= abs(nbeta * own.mean() - float(part.learning_coefficient)) > _SIGMAS * error
        if off:
            raise ModelError(
                "the losses of batches are not those of their examples, so that there is no error for the choice of "
                'examples; leave it out (data_error="none")'
            )

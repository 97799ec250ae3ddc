"""Estimates of the local learning coefficient from chains, with their errors and what shows their convergence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.errors import ModelError
from pnanalysis.estimates import Estimate
from pnanalysis.io.unfinished import Unfinished
from pnanalysis.sampling.anchor import Anchor
from pnanalysis.sampling.convergence import effective_sample_size, rank_normalised_rhat, spread_of_halves
from pnanalysis.sampling.influence import Influence, standard_error
from pnanalysis.sampling.langevin import Chains, Draw, Posterior, Stiff, spread_over_passes
from pnanalysis.sampling.stein import SteinIdentity
from pnanalysis.terminal.progress import Advance

#: Chains count as converged below these R-hats of the loss and of the distance, and from this many effective draws on.
RHAT, DISTANCE_RHAT, LEAST_DRAWS = 1.05, 1.1, 100.0
#: Or where the halves of all chains are as far from the checkpoint, up to this fraction: of many parameters, distances
#: hardly fluctuate, and R-hat sees differences that are too small to matter.
_SAME_DISTANCE = 0.01
#: Draws of each chain at which all examples are evaluated for their error.
_FULL_DRAWS = 100
#: Chains that come to larger losses or distances have diverged.
_LARGEST = 1e30
#: Steps between looks at whether chains are still finite, for which the host waits for the device.
_LOOK = 25
#: Step sizes are tried so often at most; how much shorter they get where chains diverge, and how far they may be above
#: the wanted fraction of the limit.
_ATTEMPTS, _SHORTER, _MARGIN = 12, 4.0, 1.5
#: How far, relative to the coefficient, the loss of the next batch may be above that of all where steps are chosen
#: here; the coefficient of half a direction stands in for smaller ones.
_MOST_NOISE, _HALF_A_DIRECTION = 0.03, 0.5
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

    @property
    def n_steps(self) -> int:
        """Burn-in and draws."""
        return self.burn_in + self.n_draws

    @property
    def steps(self) -> list[float]:
        """Step sizes of the posteriors."""
        return [one.step_size for one in self.posteriors]

    @property
    def chosen(self) -> Array:
        """Of which posteriors the step size has been chosen, and may be lowered."""
        return np.array([one.courant > 0 for one in self.posteriors])

    def measure_every(self, n_batches: int) -> int:
        """Steps between measurements of the loss."""
        return spread_over_passes(n_batches, self.n_draws) if self.sampler == "minibatch" else 1


def sample(
    anchor: Anchor, plan: Plan, advance: Advance | None = None, state: Unfinished | None = None
) -> xr.Dataset:  # fmt: skip
    """Run chains and estimate the coefficient of each posterior, along a dim ``posterior``.

    Parameters
    ----------
    anchor : Anchor
        The checkpoint and its batches.
    plan : Plan
    advance : callable, optional
        Called with the number of each step's steps.
    state : Unfinished, optional
        Where unfinished chains are saved, now and then and when they are interrupted, and taken up again: they then
        end with the same numbers.

    Raises
    ------
    ModelError
        If all chains of a posterior leave the region where the loss is finite, or the losses of the examples are not
        those of the batches.
    """
    chains = _chains(anchor, plan)
    record = _Record(anchor, plan, chains)
    first, start = record.restore(state)
    if advance is not None and first:
        advance(first)
    with torch.no_grad(), record.saved_on_interrupt(state):
        for step, draw in enumerate(chains.draws(plan.n_steps, first, start), start=first):
            record.add(step, draw)
            if state is not None and state.is_due:
                record.save(state)
            if step % _LOOK == _LOOK - 1 and record.is_lost(step):
                break
            if advance is not None:
                advance(1)
        noise = _share_of_batches(chains, draw.points, plan) if plan.sampler == "minibatch" else None
    parts = [
        _estimate(one, plan, *record.traces(i), record.influences[i : i + 1], record.excess(i), len(anchor.factors))
        for i, one in enumerate(plan.posteriors)
    ]
    if noise is not None:
        parts = [_with_batch_error(part, float(share)) for part, share in zip(parts, noise, strict=True)]
    record.check(anchor.loss, parts)
    return xr.concat(parts, dim="posterior").assign(loss=anchor.loss)


def _chains(anchor: Anchor, plan: Plan, measured: bool = True) -> Chains:
    everyone = [one for one in plan.posteriors for _ in range(plan.n_chains)]
    key = int(np.random.SeedSequence([plan.seed, 1]).generate_state(1, np.uint64)[0])
    every = plan.measure_every(len(anchor.factors)) if measured else plan.n_steps
    return Chains(anchor.gradients, anchor.batches, everyone, plan.sampler, plan.stiff, key, every, anchor)


def with_steps_that_hold(anchor: Anchor, plan: Plan, state: Unfinished | None = None) -> Plan:
    """The plan with step sizes that fit the curvature where chains are after half of the burn-in.

    That at the checkpoint says little of it in a singular minimum. Single batches may need shorter steps than that,
    where they differ much: those that keep their noise small.
    """
    if not plan.chosen.any():
        return plan
    begun = 0
    if state is not None and (saved := state.load("steps")) is not None:
        begun = int(saved[1]["attempts"])
        plan = replace(plan, posteriors=_with_steps(plan.posteriors, saved[1]["steps"]))
    for attempt in range(begun, _ATTEMPTS):
        chains = _chains(anchor, plan, measured=False)
        with torch.no_grad():
            points, held = _ends(chains, max(plan.burn_in // 2, _LOOK), plan.n_chains)
            met = chains.curvature(points).double().cpu().numpy().reshape(-1, plan.n_chains).max(axis=1)
            noisy = _share_of_batches(chains, points, plan) if plan.sampler == "minibatch" else np.zeros(len(met))
        steps = []
        for one, curvature, good, share in zip(plan.posteriors, met, held, noisy, strict=True):
            longest = one.courant / curvature if good and np.isfinite(curvature) else one.step_size / _SHORTER
            if good and share > 0:
                longest = min(longest, one.step_size * _MOST_NOISE / share)
            too_long = one.courant > 0 and one.step_size > _MARGIN * longest
            steps.append(longest if too_long else one.step_size)
        done = steps == plan.steps
        plan = replace(plan, posteriors=_with_steps(plan.posteriors, steps))
        if state is not None:
            state.save("steps", {}, steps=steps, attempts=_ATTEMPTS if done else attempt + 1)
        if done:
            break
    return plan


def with_shorter_steps(plan: Plan, found: xr.Dataset, state: Unfinished | None = None) -> Plan | None:
    """The plan with shorter steps for posteriors whose chains diverged in steps that were chosen here.

    For rarely, and late, chains meet curvatures far above those that steps were chosen by. ``None`` if all have held.
    """
    lost = plan.chosen & ~(found.distance < _LARGEST).all(("chain", "draw")).values
    if not lost.any():
        return None
    steps = [step / _SHORTER if bad else step for step, bad in zip(plan.steps, lost, strict=True)]
    if state is not None:
        state.save("steps", {}, steps=steps, attempts=_ATTEMPTS)
    return replace(plan, posteriors=_with_steps(plan.posteriors, steps))


def _with_steps(posteriors: Sequence[Posterior], steps: Sequence[float]) -> list[Posterior]:
    return [replace(one, step_size=step) for one, step in zip(posteriors, steps, strict=True)]


def _share_of_batches(chains: Chains, points: Tensor, plan: Plan) -> Array:
    """The noise of single batches relative to the coefficient of each posterior, ``(posterior,)``."""
    noise, excess = (each.cpu().numpy().reshape(-1, plan.n_chains).mean(axis=1) for each in chains.batch_noise(points))
    found: Array = noise / np.maximum(np.abs(excess), _HALF_A_DIRECTION)
    return found


def _with_batch_error(part: xr.Dataset, share: float) -> xr.Dataset:
    """With the error that the noise of batches causes: half of it is taken for two standard errors."""
    value = float(part.learning_coefficient)
    batch_se = share * max(abs(value), _HALF_A_DIRECTION) / 4
    se = math.hypot(float(part.learning_coefficient_se), batch_se)
    low, high = Estimate(value, se).interval()
    return part.assign(
        learning_coefficient_batch_se=batch_se, learning_coefficient_se=se, learning_coefficient_low=low,
        learning_coefficient_high=high,
    )  # fmt: skip


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
    one: Posterior, plan: Plan, excess: Array, distance: Array, influences: Sequence[Influence], stein: Estimate,
    n_batches: int,
) -> xr.Dataset:  # fmt: skip
    """What the chains of one posterior say."""
    drawn, far = excess[:, plan.burn_in :], distance[:, plan.burn_in :]
    every = plan.measure_every(n_batches)
    drawn = drawn[:, -plan.burn_in % every :: every]
    finite = bool((np.abs(drawn) < _LARGEST).all() and (far < _LARGEST).all())  # False for NaN, too
    if plan.sampler == "sgld":  # means of whole passes: the noise of batches would hide how slowly chains move
        drawn, far = (_means(each, n_batches) for each in (drawn, far))
    effective = effective_sample_size(drawn) if finite else 0.0
    rhat, distance_rhat = (rank_normalised_rhat(each) if finite else math.nan for each in (drawn, far))
    settled = finite and (distance_rhat < DISTANCE_RHAT or spread_of_halves(far) < _SAME_DISTANCE)
    converged = settled and rhat < RHAT and effective >= LEAST_DRAWS
    value = one.nbeta * float(drawn.mean()) if finite else math.nan
    chain_se = one.nbeta * float(drawn.std(ddof=1)) / math.sqrt(effective) if effective else math.nan
    first, second = (influences[0].of_chains(), influences[0].of_changes()) if influences else (None, None)
    data_se = standard_error(first, second) if first is not None and second is not None and finite else math.nan
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
        "stein_excess": stein.value, "stein_excess_se": stein.se, "epsilon": one.step_size, "nbeta": one.nbeta,
    }  # fmt: skip
    ds = xr.Dataset(found | {"excess": (("chain", "draw"), excess), "distance": (("chain", "draw"), distance)})
    if first is None or second is None:
        return ds
    kept = ("chain", "change", "example"), second.astype(np.float32)
    return ds.assign(influence=(("chain", "example"), first), second_influence=kept)


def _means(draws: Array, n_batches: int) -> Array:
    """Means of draws over whole passes of the batches; as they are where that leaves too few."""
    n = draws.shape[1] // n_batches
    return draws[:, : n * n_batches].reshape(len(draws), n, n_batches).mean(axis=2) if n >= 8 else draws


class _Record:
    """What is kept of chains: traces, and all examples at some draws, for their influences and to check the batches."""

    def __init__(self, anchor: Anchor, plan: Plan, chains: Chains) -> None:
        self._anchor, self._plan, self._n_chains = anchor, plan, plan.n_chains
        self.influences: list[Influence] = []
        self._full_steps: list[int] = []
        n_chains = len(plan.posteriors) * plan.n_chains
        self._excess = torch.full((n_chains, plan.n_steps), torch.nan, dtype=torch.float64, device=anchor.point.device)
        self._distance = self._excess.clone()
        #: the step at which chains are, their points and velocities, and how many steps have been recorded
        self._at: tuple[int, tuple[Tensor, Tensor], int] | None = None
        if plan.with_examples:
            (centre,) = self._losses(anchor.point[None])
            self._mean = float(centre.mean())
            self.influences = [Influence(centre, plan.n_chains, one.nbeta) for one in plan.posteriors]
            places = np.linspace(plan.burn_in, plan.n_steps - 1, min(_FULL_DRAWS, plan.n_draws))
            self._full_steps = sorted(set(places.round().astype(int).tolist()))
        self._of_examples = np.full((n_chains, len(self._full_steps)), np.nan)
        n_passes = plan.n_steps / (1 if plan.sampler == "full" else len(anchor.factors))
        self._stein = SteinIdentity(chains, n_chains, plan.burn_in, plan.n_draws, n_passes)

    def add(self, step: int, draw: Draw) -> None:
        """Record a draw; one that has been recorded before an interruption stays as it is."""
        done = 0 if self._at is None else self._at[2]
        if step < done:
            return
        self._at = None  # of a step that is half recorded nothing can be saved
        self._excess[:, step], self._distance[:, step] = draw.excess, draw.square_distance.sqrt()
        if step in self._full_steps:
            for i, losses in enumerate(self._losses(draw.points)):
                if np.isfinite(losses).all():
                    mean = self.influences[i // self._n_chains].add(i % self._n_chains, losses)
                    self._of_examples[i, self._full_steps.index(step)] = mean
        self._stein.add(step, draw)
        self._at = step, (draw.points, draw.velocities), step + 1

    def is_lost(self, step: int) -> bool:
        """Whether all chains have diverged, or one whose steps may be shorter."""
        held = (self._distance[:, step] < _LARGEST).cpu().numpy().reshape(-1, self._n_chains)
        return not held.any() or not held[self._plan.chosen].all()

    def traces(self, posterior: int) -> tuple[Array, Array]:
        """Excess and distance of the chains of one posterior, ``(chain, step)``."""
        own = self._own(posterior)
        return self._excess[own].cpu().numpy(), self._distance[own].cpu().numpy()

    def excess(self, posterior: int) -> Estimate:
        """By how much the chains of one posterior are off Stein's identity."""
        return self._stein.excess(self._own(posterior))

    def _own(self, posterior: int) -> slice:
        return slice(posterior * self._n_chains, (posterior + 1) * self._n_chains)

    def save(self, state: Unfinished) -> None:
        """Write all that there is."""
        if self._at is None:
            return
        step, (points, velocities), done = self._at
        tensors = {"points": points, "velocities": velocities}
        tensors |= {"excess": self._excess[:, :done], "distance": self._distance[:, :done]}
        tensors |= {name: torch.from_numpy(array) for name, array in self._arrays().items()}
        state.save("chains", tensors, step=step, done=done, steps=self._plan.steps)

    def restore(self, state: Unfinished | None) -> tuple[int, tuple[Tensor, Tensor] | None]:
        """Take up what was saved: the step to go on with, and points and velocities of the chains before it."""
        saved = None if state is None else state.load("chains")
        if saved is None or saved[1].get("steps") != self._plan.steps:  # they may be those of chains that diverged
            return 0, None
        tensors, numbers = saved
        step, done = int(numbers["step"]), int(numbers["done"])
        self._excess[:, :done], self._distance[:, :done] = tensors["excess"], tensors["distance"]
        for name, array in self._arrays().items():
            array[...] = tensors[name].numpy()
        start = tensors["points"].to(self._anchor.point), tensors["velocities"].to(self._anchor.point)
        self._at = step, start, done
        return step, start

    @contextmanager
    def saved_on_interrupt(self, state: Unfinished | None) -> Iterator[None]:
        """Save what there is if the body ends early."""
        try:
            yield
        except BaseException:
            if state is not None:
                self.save(state)
            raise

    def _arrays(self) -> dict[str, Array]:
        every = {"examples": self._of_examples, "stein": self._stein.sides}
        for i, influence in enumerate(self.influences):
            every |= {f"{name}.{i}": array for name, array in influence.sums().items()}
        return every

    def _losses(self, points: Tensor) -> list[Array]:
        gradients = self._anchor.gradients
        states = gradients.states(points)
        return [one.loss for one in gradients.surface.example_values(states, len(points), self._anchor.batches)]

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
            own = self._of_examples[self._own(i)].ravel()
            own = own[np.isfinite(own)]
            if float(part.converged) and len(own) > 2:
                nbeta = float(part.nbeta)
                error = nbeta * own.std(ddof=1) / math.sqrt(len(own)) + float(part.learning_coefficient_chain_se)
                off |= abs(nbeta * own.mean() - float(part.learning_coefficient)) > _SIGMAS * error
        if off:
            raise ModelError(
                "the losses of batches are not those of their examples, so that there is no error for the choice of "
                'examples; leave it out (data_error="none")'
            )

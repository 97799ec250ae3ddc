r"""Langevin chains in the local posterior of a network: of high probability where the loss is low, near a checkpoint.

The density of parameters :math:`w` around a checkpoint :math:`w^*` is proportional to :math:`e^{-U(w)}` with

.. math:: U(w) = n\beta\,L(w) + \tfrac\gamma2\,\lVert w - w^*\rVert^2,

:math:`L` the mean loss over :math:`n` examples [1]_. A step goes down half the step size :math:`\varepsilon` times
the gradient of :math:`U`, and adds normal noise of variance :math:`\varepsilon`. Plain stochastic-gradient Langevin
dynamics (``"sgld"``) does just that with the gradient of one batch, and its draws are spread wider than the density: by
the step, and by the noise of batches. Four things make them closer to it, and let them get around faster:

- *noise of two steps* [2]_: each step adds half the noise of the last one and half of the next. In a quadratic
  :math:`U` of curvature :math:`a` the variance is then exactly :math:`1/a`; otherwise
  :math:`1/(a - \varepsilon a^2/4)`.
- *momentum* (``"full"``): of its velocity a step keeps :math:`e^{-2\sqrt{\varepsilon\gamma}}`, critical damping of
  directions that only the pull holds. These relax in :math:`1/\sqrt{\varepsilon\gamma}` steps rather than in
  :math:`2/(\varepsilon\gamma)`. Kicks, drifts and new velocities take turns as in the scheme BAOAB [2]_, with time
  steps of :math:`\sqrt\varepsilon`. It, too, has the exact variance in a quadratic :math:`U`, whatever the friction,
  and without momentum is the one above. The noise of single batches would heat chains with momentum.
- *shorter steps in stiff directions*: along the leading eigenvectors of the Hessian steps are scaled to the curvature
  of the next eigenvalue, which leaves the density as it is. The step size is then bounded by that curvature, and flat
  directions relax in fewer steps, by the ratio of the largest eigenvalue to it.
- *all examples* in each step (``"full"``), or one batch with *control variates* [3]_ (``"minibatch"``): the gradient of
  the batch at the checkpoint is replaced by that of all examples there, so that what is left of the noise of batches
  vanishes with the distance from the checkpoint.

Batches take turns. Where they differ by :math:`N_B` in the Hessian of :math:`U`, chains have just relaxed least along
the batch that comes next, so that its own loss is too large by :math:`\tfrac\varepsilon4\,\mathbb E\lVert N_B(w - w^*)
\rVert^2` (in units of :math:`U`; to first order in the step size, whatever the order of the batches, for the
differences of a pass add up to zero). ``"minibatch"`` therefore measures the loss over all examples, at steps that are
spread over the passes. What is left is that steps by turns contract a little more than steps by the mean, which takes
off no more than half of that number (and adds no more than that where a pass takes longer than chains do to relax).
:meth:`Chains.batch_noise` is this number, and the step size is chosen to keep it small.

References
----------
.. [1] E. Lau, Z. Furman, G. Wang, D. Murfet, S. Wei, "The Local Learning Coefficient: A Singularity-Aware Complexity
   Measure", AISTATS 2025, arXiv:2308.12108, eq. 16 and 17.
.. [2] B. Leimkuhler, C. Matthews, "Rational construction of stochastic numerical methods for molecular sampling",
   Applied Mathematics Research eXpress 2013, 34, arXiv:1203.5428.
.. [3] J. Baker, P. Fearnhead, E. Fox, C. Nemeth, "Control variates for stochastic gradient MCMC", Statistics and
   Computing 29 (2019) 599, arXiv:1706.05439.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.sampling.anchor import Anchor
from pnanalysis.sampling.stacked_gradients import StackedGradients
from pnanalysis.spectra.random_vectors import normal_pairs

#: What a step takes its gradient from, and how; see above.
SAMPLERS = ("full", "minibatch", "sgld")
#: How far the curvature that bounds steps is below the largest one at most.
_LEAST = 0.01
#: Steps of power iteration for the curvature that chains meet, and length of its differences, in distances from the
#: checkpoint.
_ITERATIONS, _DIFFERENCE = 8, 0.05
#: Steps between measurements of the loss, in passes over the data, and how many measurements there are at least.
_GOLDEN, _FEWEST = 0.618, 40


@dataclass(frozen=True)
class Posterior:
    """A local posterior, and the step its chains take.

    Attributes
    ----------
    nbeta : float
        Factor of the mean loss.
    localization : float
        ``gamma``, the strength of the pull towards the checkpoint.
    step_size : float
        ``epsilon``, the square of the time step; without momentum, the variance of the noise of a step.
    courant : float
        If not zero, the step size has been chosen and may be lowered: to this number over the largest curvature of the
        potential that chains meet.
    """

    nbeta: float
    localization: float
    step_size: float
    courant: float = 0.0


@dataclass(frozen=True)
class Stiff:
    """Directions of large curvature.

    Attributes
    ----------
    value : ndarray, shape (k + 1,)
        The largest eigenvalues of the Hessian of the mean loss, descending; negative ones count as zero.
    vector : Tensor, shape (P, k)
        Orthonormal eigenvectors of all but the last.
    """

    value: Array
    vector: Tensor

    @property
    def rest(self) -> float:
        """What eigenvalues all others may have: the last one, and not much less than the first.

        In a singular minimum the others may be zero, and grow with the distance from it.
        """
        return max(float(self.value[-1]), _LEAST * float(self.value[0]), 0.0)

    def scales(self, posterior: Posterior) -> Array:
        """Squares of the lengths of steps along each direction, ``(k,)``, relative to all others."""
        curvatures = posterior.nbeta * np.maximum(self.value, self.rest) + posterior.localization
        curvatures[-1] = posterior.nbeta * self.rest + posterior.localization
        scales: Array = curvatures[-1] / curvatures[:-1]
        return scales


class Draw(NamedTuple):
    """Where all chains are before a step, and the loss there.

    Attributes
    ----------
    points : Tensor, shape (chain, P)
    excess : Tensor, shape (chain,)
        Loss above that at the checkpoint: of all examples, or for ``"sgld"`` of a batch. NaN at steps of
        ``"minibatch"`` that do not measure it.
    square_distance : Tensor, shape (chain,)
        From the checkpoint.
    velocities : Tensor, shape (chain, P)
        In units in which the variance of each is one.
    """

    points: Tensor
    excess: Tensor
    square_distance: Tensor
    velocities: Tensor


class Chains:
    """Chains that start at the checkpoint, of one or several posteriors, which share their passes over the network.

    Parameters
    ----------
    gradients : StackedGradients
        Of the network around the checkpoint.
    batches : re-iterable of (inputs, targets)
        Taken in this order, again and again.
    posteriors : sequence of Posterior
        One for each chain.
    sampler : {"full", "minibatch", "sgld"}
    stiff : Stiff, optional
        Directions along which steps are shorter; none for ``"sgld"``.
    seed : int
        Of the noise, which does not depend on the device.
    measure_every : int
        Steps between measurements of the loss by ``"minibatch"``; others measure it at every step.
    anchor : Anchor, optional
        Of these batches, where it is known already.
    """

    def __init__(
        self,
        gradients: StackedGradients,
        batches: Iterable[Any],
        posteriors: Sequence[Posterior],
        sampler: str = "full",
        stiff: Stiff | None = None,
        seed: int = 0,
        measure_every: int = 1,
        anchor: Anchor | None = None,
    ) -> None:
        self._batches, self._sampler, self._seed, self._every = batches, sampler, seed, measure_every
        self._anchor = Anchor(gradients, batches) if anchor is None else anchor
        self._centre, self._factors = self._anchor.point, self._anchor.factors
        table = torch.tensor([[one.nbeta, one.localization, one.step_size] for one in posteriors], dtype=torch.float64)
        self._nbeta, self._localization, self._step = table.to(self._centre).T[:, :, None]
        retained = (-2 * (self._step * self._localization).sqrt()).exp()
        self._retained = retained if sampler == "full" else torch.zeros_like(retained)
        self._renewed = (1 - self._retained**2).sqrt()
        self._directions = None if stiff is None else stiff.vector.to(self._centre)
        if stiff is not None:
            scales = np.stack([stiff.scales(one) for one in posteriors])
            self._shortening = torch.from_numpy(np.sqrt(scales) - 1).to(self._centre)

    def draws(self, n_steps: int, first: int = 0, start: tuple[Tensor, Tensor] | None = None) -> Iterator[Draw]:
        """All chains before each of some steps.

        Parameters
        ----------
        n_steps : int
        first : int
            The step to go on with.
        start : tuple of Tensor, optional
            Points and velocities of the draw before it; at the checkpoint by default.
        """
        if start is None:
            points = self._centre.repeat(len(self._nbeta), 1)
            velocities = self._noise(first, points)
        else:
            points, velocities = start
        time_step = self._step.sqrt()
        evaluate = self._whole if self._sampler == "full" else self._single(first)
        for step in range(first, n_steps):
            moved = points - self._centre
            excess, slope = evaluate(points)
            if self._sampler == "minibatch":
                excess = self._anchor.excess(points) if step % self._every == 0 else torch.full_like(excess, math.nan)
            yield Draw(points, excess, moved.double().square().sum(1), velocities)
            down = self._nbeta * slope + self._localization * moved
            kicked = velocities - time_step * self._scaled(down)
            after = self._retained * kicked + self._renewed * self._noise(step + 1, points)
            drift = velocities + kicked if self._sampler == "sgld" else kicked + after
            points, velocities = points + time_step / 2 * self._scaled(drift), after

    def curvature(self, points: Tensor) -> Tensor:
        """The largest curvature of each chain's potential at a point of it, ``(chain,)``, roughly, after scaling."""
        moved = (points - self._centre).norm(dim=1, keepdim=True)
        vectors, size = self._noise(-1, points), torch.ones_like(moved)
        for _ in range(_ITERATIONS):
            vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(points.dtype).tiny)
            along = self._scaled(vectors)
            step = _DIFFERENCE * moved / along.norm(dim=1, keepdim=True)
            (_, ahead), (_, behind) = self._whole(points + step * along), self._whole(points - step * along)
            product = self._nbeta * (ahead - behind) / (2 * step) + self._localization * along
            vectors = self._scaled(product)
            size = vectors.norm(dim=1, keepdim=True)
        return size[:, 0]

    def stein_sides(self, points: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The gradient of the loss times that of the potential, and the trace of the loss' Hessian, both ``(chain,)``.

        Of all examples; the trace by one vector of random signs, which belongs to the step.
        """
        moved = points - self._centre
        _, slope = self._whole(points)
        down = self._nbeta * slope + self._localization * moved
        signs = self._noise(-2 - step, points).sign()
        length = _DIFFERENCE * moved.norm(dim=1, keepdim=True) / math.sqrt(points.shape[1])
        (_, ahead), (_, behind) = self._whole(points + length * signs), self._whole(points - length * signs)
        trace = ((ahead - behind).double() * signs.double()).sum(1) / (2 * length[:, 0].double())
        return (slope.double() * down.double()).sum(1), trace

    def batch_noise(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """What the noise of single batches does to each chain's loss, and that loss, both ``(chain,)``, in nats.

        By how much the loss of a batch that a step is about to take is above that of all examples: see above.
        """
        n, mean = len(self._factors), torch.zeros_like(points)
        square = torch.zeros(len(points), dtype=torch.float64, device=points.device)
        for index, (inputs, targets) in enumerate(self._batches):
            factor = self._factors[index]
            _, there = self._anchor.at_point(index, inputs, targets)
            _, slope = self._anchor.of_batch(points, inputs, targets, factor)
            off = self._scaled(factor * (slope - there))
            mean.add_(off, alpha=1 / n)
            square += off.double().square().sum(1) / n
        scatter = (square - mean.double().square().sum(1)).clamp_min(0)
        noise = self._step[:, 0].double() / 4 * self._nbeta[:, 0].double().square() * scatter
        return noise, self._nbeta[:, 0].double() * self._anchor.excess(points)

    def _scaled(self, vectors: Tensor) -> Tensor:
        """Steps ``(chain, P)`` with their parts along stiff directions shortened."""
        if self._directions is None:
            return vectors
        return vectors + ((vectors @ self._directions) * self._shortening) @ self._directions.T

    def _whole(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Excess and gradient of the loss over all batches."""
        excess, slope = torch.zeros(len(points), dtype=torch.float64, device=points.device), torch.zeros_like(points)
        for index, (inputs, targets) in enumerate(self._batches):
            share = self._factors[index] / len(self._factors)
            at_centre, _ = self._anchor.at_point(index, inputs, targets)
            loss, gradient = self._anchor.of_batch(points, inputs, targets, share)
            excess += share * (loss.double() - at_centre.double())
            slope.add_(gradient, alpha=share)
        return excess, slope

    def _single(self, first: int = 0) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """The same of one batch after the other, each with the mean of all if they come up equally often."""
        batches = self._cycle(first % len(self._factors))

        def evaluate(points: Tensor) -> tuple[Tensor, Tensor]:
            index, inputs, targets = next(batches)
            factor = self._factors[index]
            at_centre, slope_there = self._anchor.at_point(index, inputs, targets)
            loss, slope = self._anchor.of_batch(points, inputs, targets, factor)
            excess = factor * (loss.double() - at_centre.double())
            if self._sampler == "sgld":
                return excess, factor * slope
            return excess, factor * (slope - slope_there) + self._anchor.gradient

        return evaluate

    def _cycle(self, first: int) -> Iterator[tuple[int, Any, Any]]:
        """Batches in their order, again and again; the first pass begins with the batch of index ``first``."""
        while True:
            for index, (inputs, targets) in enumerate(self._batches):
                if index >= first:
                    yield index, inputs, targets
            first = 0

    def _noise(self, step: int, like: Tensor) -> Tensor:
        """Normal numbers of one step for all chains."""
        n = like.numel()
        start = step * (n // 2 + 1)
        counters = torch.arange(start, start + (n + 1) // 2, device=like.device)
        return normal_pairs(counters, self._seed, like.dtype).flatten()[:n].reshape(like.shape)


def spread_over_passes(n_batches: int, n_draws: int) -> int:
    """Steps between measurements of the loss, so that they meet all places in a pass equally often.

    Coprime to the number of batches, and near its golden section, by which few places are spread evenly, too.
    """
    wanted = min(_GOLDEN * n_batches, n_draws / _FEWEST)
    near = sorted(range(1, n_batches + 1), key=lambda steps: abs(steps - wanted))
    return next(steps for steps in near if math.gcd(steps, n_batches) == 1)

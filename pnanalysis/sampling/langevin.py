r"""Langevin chains in the local posterior of a network: of high probability where the loss is low, near a checkpoint.

The density of parameters :math:`w` around a checkpoint :math:`w^*` is proportional to :math:`e^{-U(w)}` with

.. math:: U(w) = n\beta\,L(w) + \tfrac\gamma2\,\lVert w - w^*\rVert^2,

:math:`L` the mean loss over :math:`n` examples [1]_. A step goes down half the step size :math:`\varepsilon` times
the gradient of :math:`U`, and adds normal noise of variance :math:`\varepsilon`. Plain stochastic-gradient Langevin
dynamics (``"sgld"``) does just that with the gradient of one batch, and its draws are spread wider than the density: by
the step, and by the noise of batches. Three things make them closer to it, and let them get around faster:

- *noise of two steps* [2]_: each step adds half the noise of the last one and half of the next. In a quadratic
  :math:`U` of curvature :math:`a` the variance is then exactly :math:`1/a`; otherwise
  :math:`1/(a - \varepsilon a^2/4)`.
- *shorter steps in stiff directions*: along the leading eigenvectors of the Hessian steps are scaled to the curvature
  of the next eigenvalue, which leaves the density as it is. The step size is then bounded by that curvature, and flat
  directions relax in fewer steps, by the ratio of the largest eigenvalue to it.
- *all examples* in each step (``"full"``), or one batch with *control variates* [3]_ (``"minibatch"``): the gradient of
  the batch at the checkpoint is replaced by that of all examples there, so that what is left of the noise of batches
  vanishes with the distance from the checkpoint.

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

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.errors import ModelError
from pnanalysis.evaluation.losses import example_weights
from pnanalysis.inputs.batches import leading_size
from pnanalysis.sampling.stacked_gradients import StackedGradients
from pnanalysis.spectra.random_vectors import normal_pairs

#: What a step takes its gradient from, and how; see above.
SAMPLERS = ("full", "minibatch", "sgld")
#: Numbers that gradients of single batches at the checkpoint may take in memory; beyond, they are computed anew.
_KEPT = 2**27
#: How far the curvature that bounds steps is below the largest one at most.
_LEAST = 0.01
#: Steps of power iteration for the curvature that chains meet, and length of its differences, in distances from the
#: checkpoint.
_ITERATIONS, _DIFFERENCE = 8, 0.05


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
        ``epsilon``, the variance of the noise of a step.
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
        Loss above that at the checkpoint: of all examples, or of a batch, whose mean over batches is that of all.
    square_distance : Tensor, shape (chain,)
        From the checkpoint.
    """

    points: Tensor
    excess: Tensor
    square_distance: Tensor


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

    Attributes
    ----------
    loss : float
        At the checkpoint, over all batches.
    """

    def __init__(
        self,
        gradients: StackedGradients,
        batches: Iterable[Any],
        posteriors: Sequence[Posterior],
        sampler: str = "full",
        stiff: Stiff | None = None,
        seed: int = 0,
    ) -> None:
        self._gradients, self._batches, self._sampler, self._seed = gradients, batches, sampler, seed
        self._centre = gradients.centre
        table = torch.tensor([[one.nbeta, one.localization, one.step_size] for one in posteriors], dtype=torch.float64)
        self._nbeta, self._localization, self._step = table.to(self._centre).T[:, :, None]
        self._directions = None if stiff is None else stiff.vector.to(self._centre)
        if stiff is not None:
            self._scales = torch.from_numpy(np.stack([stiff.scales(one) for one in posteriors])).to(self._centre)
        self._at_centre: list[tuple[Tensor, Tensor]] = []
        self._look()

    def _look(self) -> None:
        """Weights of batches, and loss and gradient over all of them at the checkpoint."""
        weights, losses, total = [], [], torch.zeros_like(self._centre, dtype=torch.float64)
        for inputs, targets in self._batches:
            weights.append(self._weight(inputs, targets))
            loss, gradient = self._of_batch(self._centre[None], inputs, targets, weights[-1])
            losses.append(float(loss[0]))
            total += weights[-1] * gradient[0].double()
            if (len(self._at_centre) + 1) * gradient.numel() <= _KEPT and len(self._at_centre) == len(weights) - 1:
                self._at_centre.append((loss, gradient))
        if not sum(weights):
            raise ModelError("no example counts in the loss, so that there is none to sample by")
        shares = [weight / sum(weights) for weight in weights]
        self.loss = sum(share * loss for share, loss in zip(shares, losses, strict=True))
        self._gradient = (total / sum(weights)).to(self._centre)
        #: what a batch's loss counts where each batch comes up equally often
        self._factors = [share * len(shares) for share in shares]

    def _weight(self, inputs: Any, targets: Any) -> float:
        loss = self._gradients.surface.loss
        if loss.torch_loss is None:
            return leading_size(targets, inputs)
        return float(example_weights(loss, targets).sum())

    @property
    def n_batches(self) -> int:
        """How many steps a pass over the data takes with single batches."""
        return len(self._factors)

    def draws(self, n_steps: int) -> Iterator[Draw]:
        """All chains before each of some steps."""
        points = self._centre.repeat(len(self._nbeta), 1)
        noise = self._noise(0, points)
        evaluate = self._whole if self._sampler == "full" else self._single()
        for step in range(n_steps):
            moved = points - self._centre
            excess, slope = evaluate(points)
            yield Draw(points, excess, moved.double().square().sum(1))
            after = self._noise(step + 1, points)
            jolt = noise if self._sampler == "sgld" else (noise + after) / 2
            down = self._nbeta * slope + self._localization * moved
            points = points - self._step / 2 * self._scaled(down, 1.0) + self._step.sqrt() * self._scaled(jolt, 0.5)
            noise = after

    def curvature(self, points: Tensor) -> Tensor:
        """The largest curvature of each chain's potential at a point of it, ``(chain,)``, roughly, after scaling."""
        moved = (points - self._centre).norm(dim=1, keepdim=True)
        vectors, size = self._noise(-1, points), torch.ones_like(moved)
        for _ in range(_ITERATIONS):
            vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(points.dtype).tiny)
            along = self._scaled(vectors, 0.5)
            step = _DIFFERENCE * moved / along.norm(dim=1, keepdim=True)
            (_, ahead), (_, behind) = self._whole(points + step * along), self._whole(points - step * along)
            product = self._nbeta * (ahead - behind) / (2 * step) + self._localization * along
            vectors = self._scaled(product, 0.5)
            size = vectors.norm(dim=1, keepdim=True)
        return size[:, 0]

    def _scaled(self, vectors: Tensor, power: float) -> Tensor:
        """Steps ``(chain, P)`` with their parts along stiff directions scaled."""
        if self._directions is None:
            return vectors
        return vectors + ((vectors @ self._directions) * (self._scales**power - 1)) @ self._directions.T

    def _whole(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Excess and gradient of the loss over all batches."""
        excess, slope = torch.zeros(len(points), dtype=torch.float64, device=points.device), torch.zeros_like(points)
        for index, (inputs, targets) in enumerate(self._batches):
            share = self._factors[index] / len(self._factors)
            at_centre, _ = self._of_centre(index, inputs, targets)
            loss, gradient = self._of_batch(points, inputs, targets, share)
            excess += share * (loss.double() - at_centre.double())
            slope.add_(gradient, alpha=share)
        return excess, slope

    def _single(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """The same of one batch after the other, each with the mean of all if they come up equally often."""
        batches = self._cycle()

        def evaluate(points: Tensor) -> tuple[Tensor, Tensor]:
            index, inputs, targets = next(batches)
            factor = self._factors[index]
            at_centre, slope_there = self._of_centre(index, inputs, targets)
            loss, slope = self._of_batch(points, inputs, targets, factor)
            excess = factor * (loss.double() - at_centre.double())
            if self._sampler == "sgld":
                return excess, factor * slope
            return excess, factor * (slope - slope_there) + self._gradient

        return evaluate

    def _cycle(self) -> Iterator[tuple[int, Any, Any]]:
        while True:
            for index, (inputs, targets) in enumerate(self._batches):
                yield index, inputs, targets

    def _of_centre(self, index: int, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Loss and gradient of a batch at the checkpoint."""
        if index < len(self._at_centre):
            return self._at_centre[index]
        return self._of_batch(self._centre[None], inputs, targets, self._factors[index])

    def _of_batch(self, points: Tensor, inputs: Any, targets: Any, weight: float) -> tuple[Tensor, Tensor]:
        if weight:
            return self._gradients(points, inputs, targets)
        return points.new_zeros(len(points)), torch.zeros_like(points)  # all is ignored, and the mean 0 / 0

    def _noise(self, step: int, like: Tensor) -> Tensor:
        """Normal numbers of one step for all chains."""
        n = like.numel()
        start = step * (n // 2 + 1)
        counters = torch.arange(start, start + (n + 1) // 2, device=like.device)
        return normal_pairs(counters, self._seed, like.dtype).flatten()[:n].reshape(like.shape)

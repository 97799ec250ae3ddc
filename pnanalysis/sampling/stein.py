r"""Whether chains are in the posterior they were made for, by an identity that every draw of it satisfies in the mean.

Integration by parts gives, for a density proportional to :math:`e^{-U}` and the gradient of the loss :math:`L` [1]_,

.. math:: \mathbb E[\nabla L \cdot \nabla U] = \mathbb E[\operatorname{tr} \nabla^2 L].

Steps that are too long, and the noise of single batches, spread draws wider than the density: the left side is then too
large by about the fraction by which the loss is. Where chains have not spread yet, it is too small. R-hat sees neither
as soon as all chains agree.

References
----------
.. [1] J. Gorham, L. Mackey, "Measuring Sample Quality with Stein's Method", NeurIPS 2015, arXiv:1506.03039.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student_t

from pnanalysis.arrays import Array
from pnanalysis.estimates import Estimate
from pnanalysis.sampling.convergence import effective_sample_size
from pnanalysis.sampling.langevin import Chains, Draw

#: Draws of each chain at which both sides are measured: at most, and at least.
_MOST_DRAWS, _FEWEST_DRAWS = 50, 2
#: Passes over the data that a measurement takes, and what share of those of all steps measurements may take.
_PASSES, _SHARE = 3, 0.1
#: Relative differences are worth a warning from this size on, and from this many standard errors.
_LARGE, _SIGMAS = 0.1, 3.5


class SteinIdentity:
    """Both sides of the identity at some steps of the chains.

    Parameters
    ----------
    chains : Chains
    n_chains : int
        Of all posteriors.
    burn_in, n_draws : int
    n_passes : float
        Over the data, by all steps of a chain.
    """

    def __init__(self, chains: Chains, n_chains: int, burn_in: int, n_draws: int, n_passes: float) -> None:
        self._chains = chains
        n = int(np.clip(_SHARE * n_passes / _PASSES, _FEWEST_DRAWS, _MOST_DRAWS))
        first = max(burn_in, 1)  # at the checkpoint itself there is no length to take differences by
        places = np.linspace(first, burn_in + n_draws - 1, min(n, n_draws))
        self._steps = sorted(set(places.round().astype(int).tolist()))
        #: gradients' product and trace, (side, chain, measurement)
        self.sides = np.full((2, n_chains, len(self._steps)), np.nan)

    def add(self, step: int, draw: Draw) -> None:
        """Measure both sides if this step is one of those."""
        if step in self._steps:
            sides = self._chains.stein_sides(draw.points, step)
            self.sides[:, :, self._steps.index(step)] = [side.cpu().numpy() for side in sides]

    def excess(self, own: slice) -> Estimate:
        """How far the left side is above the right one, relative to it, for some of the chains; NaN if unknown."""
        gradients, trace = self.sides[:, own]
        known = np.isfinite(self.sides[:, own]).all()
        mean = float(trace.mean()) if known else 0.0
        if mean <= 0 or trace.size < 2:
            return Estimate(math.nan, math.nan)
        excess = float(gradients.mean()) / mean - 1
        off: Array = (gradients - (1 + excess) * trace) / mean
        # very few are so far apart that they count as independent; that few look worth more is chance
        n_effective = min(effective_sample_size(off), off.size) if off.shape[1] >= 4 else off.size
        # of few, so wide that as many standard errors are as rare as of a normal distribution
        rare = norm.sf(_SIGMAS)
        stretch = float(student_t.isf(rare, max(n_effective - 1, 1))) / _SIGMAS
        return Estimate(excess, stretch * float(off.std(ddof=1)) / math.sqrt(n_effective))


def is_large(excess: float, se: float) -> bool:
    """Whether an excess is large, and no chance."""
    return abs(excess) > max(_LARGE, _SIGMAS * se)

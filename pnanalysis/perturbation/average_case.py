r"""Average-case sharpness: the mean rise of the loss over random perturbations, with errors of directions and examples.

Perturbations come in pairs of opposite sign, whose mean has no part of first order. With :math:`d_{ij}` the mean rise
of example :math:`i` along :math:`\pm\delta_j`, of ``N`` examples and ``J`` directions,

.. math:: \operatorname{var}\bar d = \frac{s^2_{\bar d_{\cdot j}}}{J} + \frac{s^2_{\bar d_{i\cdot}}}{N}
          - \frac{s^2_{ij}}{NJ},

for each of the first two terms holds the interaction of examples and directions, whose variance is the last.

References
----------
J. Cornfield and J. W. Tukey, "Average values of mean squares in factorials", Annals of Mathematical Statistics 27
(1956). J. M. Hammersley and K. W. Morton, "A new Monte Carlo technique: antithetic variates", Mathematical Proceedings
of the Cambridge Philosophical Society 52 (1956).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch

from pnanalysis.arrays import Array
from pnanalysis.errors import ModelError
from pnanalysis.estimates import Estimate
from pnanalysis.perturbation.neighbourhoods import direction, scale_of
from pnanalysis.perturbation.worst_case import Radii, example_losses
from pnanalysis.sampling.stacked_gradients import StackedGradients
from pnanalysis.terminal.progress import Advance


@dataclass(frozen=True)
class Crossed:
    """Mean over examples and directions of numbers ``(N, J)``, by their margins.

    Attributes
    ----------
    by_example : ndarray, shape (..., N)
        Means over directions.
    by_direction : ndarray, shape (..., J)
        Means over examples.
    squares : ndarray, shape (...)
        Sums of squares of all numbers.
    """

    by_example: Array
    by_direction: Array
    squares: Array

    @property
    def mean(self) -> Array:
        """The mean, ``(...)``."""
        found: Array = self.by_direction.mean(-1)
        return found

    def errors(self) -> tuple[Array, Array, Array, Array]:
        """Standard error, its parts of directions and of examples, and degrees of freedom, ``(...)`` each."""
        n, j = self.by_example.shape[-1], self.by_direction.shape[-1]
        of_directions = self.by_direction.var(-1, ddof=1) / j
        of_examples = self.by_example.var(-1, ddof=1) / n if n > 1 else np.full(self.squares.shape, np.nan)
        mean = self.mean
        rest = self.squares - j * (self.by_example**2).sum(-1) - n * (self.by_direction**2).sum(-1) + n * j * mean**2
        interaction = np.maximum(rest, 0.0) / max((n - 1) * (j - 1), 1) / (n * j)
        # never less than either part by itself
        total = np.maximum(of_directions + of_examples - interaction, np.maximum(of_directions, of_examples))
        with np.errstate(invalid="ignore", divide="ignore"):
            dof = total**2 / (of_directions**2 / (j - 1) + of_examples**2 / max(n - 1, 1))
        return np.sqrt(total), np.sqrt(of_directions), np.sqrt(of_examples), np.where(total > 0, dof, np.inf)

    def minus(self, other: Crossed) -> Crossed:
        """The difference, of the same examples and directions; without the interaction its errors are upper bounds."""
        return Crossed(
            self.by_example - other.by_example, self.by_direction - other.by_direction, np.zeros_like(self.squares)
        )

    def interval(self) -> tuple[Array, Array]:
        """Ends of 95 % intervals."""
        se, _, _, dof = self.errors()
        ends = [
            Estimate(float(m), float(s), dof=float(d)).interval()
            for m, s, d in zip(self.mean.flat, se.flat, dof.flat, strict=True)
        ]
        low, high = np.array(ends).T
        return low.reshape(se.shape), high.reshape(se.shape)


def average_case(
    gradients: StackedGradients, batches: Iterable[Any], radii: Radii, n_directions: int, seed: int = 0,
    advance: Advance | None = None,
) -> Crossed:  # fmt: skip
    """Rises of the loss around the state of ``gradients``, over the same directions for all kinds and radii.

    Returns
    -------
    Crossed
        Of shape (kind, radius).

    Raises
    ------
    ModelError
        If the loss is not finite somewhere.
    """
    centre, n = gradients.centre, len(gradients.centre)
    (here,) = example_losses(gradients, centre[None], batches)
    shape = (len(radii), len(next(iter(radii.values()))))
    by_example, squares = np.zeros((*shape, len(here))), np.zeros(shape)
    by_direction = np.zeros((*shape, n_directions))
    scales = [scale_of(kind, gradients.state, gradients.names) for kind in radii]
    places = list(product(range(shape[0]), range(shape[1])))
    sizes = [list(values) for values in radii.values()]
    at_once = max(gradients.surface.at_once // 2, 1)
    for j in range(n_directions):
        steps = [scale * direction(kind, n, j, seed, centre) for kind, scale in zip(radii, scales, strict=True)]
        for begin in range(0, len(places), at_once):
            some = places[begin : begin + at_once]
            delta = torch.stack([sizes[k][r] * steps[k] for k, r in some])
            losses = np.stack(example_losses(gradients, torch.cat([centre + delta, centre - delta]), batches))
            with np.errstate(invalid="ignore", over="ignore"):
                rises = (losses[: len(some)] + losses[len(some) :]) / 2 - here
            for place, rise in zip(some, rises, strict=True):
                if not np.isfinite(rise).all():
                    raise _not_finite(radii, place)
                by_example[place] += rise / n_directions
                by_direction[(*place, j)] = rise.mean()
                squares[place] += (rise**2).sum()
            if advance is not None:
                advance(len(some))
    return Crossed(by_example, by_direction, squares)


def _not_finite(radii: Radii, place: tuple[int, int]) -> ModelError:
    kind = list(radii)[place[0]]
    return ModelError(
        f"the loss is not finite at random points around the network ({kind} of average radius "
        f"{radii[kind][place[1]]:.4g}); choose a smaller average radius, or compute in float64"
    )

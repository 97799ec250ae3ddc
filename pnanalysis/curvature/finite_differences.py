r"""Hessian products by finite differences of the gradient, where torch has no second derivative or it takes too much.

A product along a ``v`` of length 1 is the central difference :math:`(g(\theta + h v) - g(\theta - h v)) / 2h`. Half of
what the differences ahead, :math:`(g(\theta + h v) - g(\theta)) / h`, and behind differ by is taken for its error: it
holds the round-off of the gradient, which grows as the step gets shorter, jumps of the gradient between the two points
(ReLU), and for smooth losses far more than the error of a central difference. To it comes how far the rounding of
:math:`\theta \pm h v`, which is alike on both sides, turns the direction. It takes no further pass and is measured for
every product, over all data. The step is the one for which it is smallest on the first batch, along a random vector,
one that products have turned towards the leading eigenvectors, and a unit vector.

What it cannot show are jumps of the same size on either side. Where torch has second derivatives, products are
therefore compared with exact ones on a few examples, and any difference that these errors do not explain counts as an
error, too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pnanalysis.curvature.gradients import Gradients
from pnanalysis.curvature.parameters import join_tensors, split_vector
from pnanalysis.errors import CurvatureError
from pnanalysis.spectra.linear_operator import contiguous_columns

if TYPE_CHECKING:
    from pnanalysis.curvature.base import CurvatureOperator
    from pnanalysis.curvature.network_loss import LossArguments

#: Factor between steps that are tried, and how far the search goes from the one expected.
_FACTOR, _FARTHEST = 4.0, 12
#: The longest step, as a part of the norm of the chosen parameters or, for a few small ones, of all parameters.
_OF_CHOSEN, _OF_ALL = 0.3, 0.1
#: Products by which a random vector is turned towards the leading eigenvectors.
_TURNS = 3
#: With a larger error, relative to the norm, hardly a digit of a product is right.
_USELESS = 0.3


class FiniteDifferences:
    """Products by differences, and what they are worth.

    Parameters
    ----------
    gradients : Gradients
        To whose first batch the step is fitted, and whose errors are then measured on all data along four vectors.
        Where several processes share them, all have the same step, and errors are those of the sum over all processes.

    Attributes
    ----------
    step : float
        Its length in the space of the parameters.
    unexplained : float
        Difference from exact products on a few examples that their errors do not explain, relative to the norm; NaN
        where torch has no exact ones.
    earlier : float
        Error of the products of an interrupted process that this one continues.

    Raises
    ------
    CurvatureError
        If no step gives products that mean anything.
    """

    def __init__(self, gradients: Gradients) -> None:
        self._of = gradients
        [self._here] = gradients.of_all([gradients.theta])
        # the largest so far of an error, a product of a unit vector, an error relative to its product, and a turn
        self._error, self._norm, self._relative, self._turn = torch.zeros(
            4, dtype=torch.float64, device=self._here.device
        )
        size = self._length(gradients.theta) or 1.0
        self.step, self.unexplained, self.earlier = size * math.sqrt(gradients.noise), math.nan, 0.0
        random = gradients.random_direction()
        leading = [torch.zeros_like(part) for part in random]

        def fitted() -> float:
            for part, found in zip(leading, self.turned(random), strict=True):
                part.copy_(found)
            longest = max(_OF_CHOSEN * size, _OF_ALL * math.hypot(size, gradients.others_length()))
            return self._best_step([random, leading, self._unit_vector(leading)], self.step, longest)

        self.step = gradients.from_first_batch(fitted)
        for part in leading:
            gradients.send(part)
        for v in (random, leading, self._unit_vector(leading), self._unit_vector(random)):
            self._product(v)
        self.unexplained = gradients.from_first_batch(lambda: gradients.unexplained(self, random))
        self.check()

    def check(self) -> None:
        """Refuse products that mean nothing.

        Raises
        ------
        CurvatureError
            If their errors are not small compared with the norm of the matrix, or they are not finite.
        """
        self._of.processes.by_first(self._check)

    def _check(self) -> None:
        if not bool(torch.isfinite(self._error + self._norm)):
            raise CurvatureError("differences of gradients are not finite; look at the loss and its data")
        if self.round_off > _USELESS:
            raise CurvatureError(
                f"finite differences of this gradient are wrong by {self.round_off:.0%} of the norm of the matrix; "
                f"{self._of.advice}, unless the chosen parameters have no curvature (here no product is longer than "
                f"{float(self._norm):.0e})"
            )

    @property
    def difference(self) -> float:
        """Largest error of the products so far, relative to their size."""
        return float(self._relative)

    @property
    def round_off(self) -> float:
        """Largest error of the products so far, relative to the norm of the matrix."""
        own = float(self._error / self._norm + self._turn) if float(self._norm) > 0 else 0.0
        return max(own, self.earlier, self.unexplained) if self.unexplained > 0 else max(own, self.earlier)

    def product(self, op: CurvatureOperator, at: LossArguments, v: list[Tensor]) -> list[Tensor]:
        """The Hessian of one batch times a vector of any length."""
        unit, length = self._normalised(v)
        names, theta = list(at.theta), list(at.theta.values())
        ahead, behind = (
            op._loss.gradient(at, dict(zip(names, moved(theta, unit, s), strict=True))) for s in (self.step, -self.step)
        )
        scale = length / (2 * self.step)
        return [(one - other).detach() * scale for one, other in zip(ahead, behind, strict=True)]

    def products(self, V: Tensor) -> Tensor:
        """The Hessian of the data times vectors ``(P, k)``, whose errors are noted; without waiting for the device."""
        shapes = [part.shape for part in self._of.theta]
        return contiguous_columns(torch.stack([self._product(split_vector(v, shapes)) for v in V.T], dim=1))

    def _product(self, v: list[Tensor]) -> Tensor:
        unit, length = self._normalised(v)
        there, back = moved(self._of.theta, unit, self.step), moved(self._of.theta, unit, -self.step)
        turn = self._turned_by(there, back, unit, self.step)
        ahead, behind = self._of.of_all([there, back])
        difference = ahead - behind
        bent = ahead.add_(behind).sub_(self._here, alpha=2)
        squares = torch.stack([_sum_of_squares(part) for part in (difference, bent)])
        norm, error = self._of.add(squares).sqrt() / (2 * self.step)
        self._norm, self._error = torch.maximum(self._norm, norm), torch.maximum(self._error, error)
        self._turn = torch.maximum(self._turn, turn)
        error = error + turn * self._norm
        self._relative = torch.maximum(self._relative, torch.where(norm > 0, error / norm, 0.0))
        return difference.mul_(length / (2 * self.step))

    def _of_first(self, v: list[Tensor], step: float) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of the first batch ahead and behind."""
        ahead, behind = (self._of.of_first(moved(self._of.theta, v, s)) for s in (step, -step))
        return ahead, behind

    def turned(self, v: list[Tensor]) -> list[Tensor]:
        """A vector that products with the matrix of the first batch have turned towards its leading eigenvectors."""
        for _ in range(_TURNS):
            ahead, behind = self._of_first(v, self.step)
            turned = [(one - other) / (2 * self.step) for one, other in zip(ahead, behind, strict=True)]
            if not 0 < self._length(turned) < math.inf:  # a loss that is linear in the parameters, for example
                break
            v = self._normalised(turned)[0]
        return v

    def _best_step(self, directions: list[list[Tensor]], expected: float, longest: float) -> float:
        """The step with the smallest error on one batch, relative to the largest product."""
        here = self._of.of_first(self._of.theta)
        known: dict[float, float] = {}

        def error(rung: float) -> float:
            step = expected * _FACTOR**rung
            if rung not in known and (rung <= 0 or step <= longest):
                sizes, errors = zip(
                    *(self.size_and_error(here, *self._of_first(v, step), v, step) for v in directions), strict=True
                )
                # steps that are too short to change anything in a half precision of the network's own give zeros
                known[rung] = max(errors) / max(sizes) if max(sizes) > 0 and math.isfinite(sum(errors)) else math.inf
            return known.get(rung, math.inf)

        low, high = -1, 1
        while True:
            best = min(range(low, high + 1), key=lambda rung: (error(rung), abs(rung)))
            if max(-low, high) >= _FARTHEST or (low < best < high and error(best) < _USELESS):
                # halfway between rungs, too: round-off grows as fast as the step shrinks, so that a whole rung counts
                return expected * math.pow(_FACTOR, min((best, best - 0.5, best + 0.5), key=error))
            if low < best < high or error(best) == math.inf:
                low, high = low - 1, high + 1
            else:
                low, high = (low - 1, high) if best == low else (low, high + 1)

    def size_and_error(
        self, here: list[Tensor], ahead: list[Tensor], behind: list[Tensor], v: list[Tensor], step: float
    ) -> tuple[float, float]:
        """Length of the product of one batch with a vector of length 1, and of its error."""
        there, back = moved(self._of.theta, v, step), moved(self._of.theta, v, -step)
        middle = [(one.double() + other.double()) / 2 for one, other in zip(ahead, behind, strict=True)]
        size = self.distance(ahead, behind) / (2 * step)
        turn = float(self._turned_by(there, back, v, step))
        # equal in all processes, for what is tried next depends on them
        return self._of.decided((size, self.distance(middle, here) / step + turn * size))

    def _turned_by(self, ahead: list[Tensor], behind: list[Tensor], v: list[Tensor], step: float) -> Tensor:
        """How far the difference of two places, which are rounded, is from ``2 step v``, relative to it."""
        squares = [
            _sum_of_squares((one - other) / (2 * step) - part)
            for one, other, part in zip(ahead, behind, v, strict=True)
        ]
        return self._of.add(torch.stack(squares).sum()).sqrt()

    def _unit_vector(self, v: list[Tensor]) -> list[Tensor]:
        """Along the largest coordinate of a vector."""
        flat = join_tensors(v)
        place = int(flat.abs().argmax()) if len(flat) else 0
        unit = torch.zeros_like(flat)
        if self._of.is_largest(float(flat[place].abs()) if len(flat) else -1.0):
            unit[place] = 1
        return split_vector(unit, [part.shape for part in v])

    def _normalised(self, v: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """A vector of length 1, zero if it is zero, and its length; squares neither overflow nor underflow."""
        own = [part.abs().amax() for part in v if part.numel()] or [v[0].new_zeros(())]
        largest = self._of.largest(torch.stack(own).amax())
        scaled = [part / torch.where(largest > 0, largest, 1) for part in v]
        length = self._of.add(torch.stack([_sum_of_squares(part) for part in scaled]).sum()).sqrt().to(largest.dtype)
        return [part / torch.where(length > 0, length, 1) for part in scaled], largest * length

    def _length(self, parts: list[Tensor]) -> float:
        squares = torch.stack([part.detach().double().square().sum() for part in parts]).sum()
        return math.sqrt(float(self._of.add(squares)))

    def distance(self, a: list[Tensor], b: list[Tensor]) -> float:
        """Length of the difference of two vectors."""
        return self._length([x.detach().double() - y.detach().double() for x, y in zip(a, b, strict=True)])


def moved(theta: list[Tensor], v: list[Tensor], step: float) -> list[Tensor]:
    """The parameters, a step along a vector away."""
    return [tensor + step * part for tensor, part in zip(theta, v, strict=True)]


def _sum_of_squares(part: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(part, dtype=torch.float64)
    return length.square()


__all__ = ["FiniteDifferences", "moved"]

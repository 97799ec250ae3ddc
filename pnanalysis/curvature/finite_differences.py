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

from pnanalysis.curvature.parameters import Named, join_tensors, split_vector
from pnanalysis.curvature.passes import plain_passes
from pnanalysis.curvature.product_check import check_products, moved, random_direction
from pnanalysis.errors import CurvatureError

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
#: Errors that two products of the same vector may be apart.
_EXPLAINED = 3.0


class FiniteDifferences:
    """Products by differences, and what they are worth.

    Parameters
    ----------
    op : CurvatureOperator
        Whose step is fitted to its first batch, and whose errors are then measured on all data along four vectors.

    Attributes
    ----------
    step : float
        Its length in the space of the parameters.
    unexplained : float
        Difference from exact products on a few examples that their errors do not explain, relative to the norm; NaN
        where torch has no exact ones.

    Raises
    ------
    CurvatureError
        If no step gives products that mean anything.
    """

    def __init__(self, op: CurvatureOperator) -> None:
        _, _, at = next(op._weighted())
        other = "" if op.dtype == torch.float64 and op.amp == "no" else "compute in float64, or "
        self._advice = f"{other}take exact products"
        self._here = op._sum_of_gradients()
        # the largest so far of an error, a product of a unit vector, an error relative to its product, and a turn
        self._error, self._norm, self._relative, self._turn = torch.zeros(4, dtype=torch.float64, device=op.device)
        size = _length(list(at.theta.values())) or 1.0
        self.step, self.unexplained = size * math.sqrt(_noise(op)), math.nan
        random = random_direction(at.theta)
        leading = self._turned(op, at, random)
        directions = [random, leading, _unit_vector(leading)]
        others = [p.detach() for p in op.model.parameters() if p.is_floating_point()]
        longest = max(_OF_CHOSEN * size, _OF_ALL * math.hypot(size, _length(others)))
        self.step = _best_step(op, at, directions, self.step, longest)
        for v in (random, leading, _unit_vector(leading), _unit_vector(random)):
            self.product_of_all(op, join_tensors(v))
        self.unexplained = self._from_exact(op, op._few, [random, self._turned(op, at, random)])
        self.check()

    def check(self) -> None:
        """Refuse products that mean nothing.

        Raises
        ------
        CurvatureError
            If their errors are not small compared with the norm of the matrix, or they are not finite.
        """
        if not bool(torch.isfinite(self._error + self._norm)):
            raise CurvatureError("differences of gradients are not finite; look at the loss and its data")
        if self.round_off > _USELESS:
            raise CurvatureError(
                f"finite differences of this gradient are wrong by {self.round_off:.0%} of the norm of the matrix; "
                f"{self._advice}"
            )

    @property
    def difference(self) -> float:
        """Largest error of the products so far, relative to their size."""
        return float(self._relative)

    @property
    def round_off(self) -> float:
        """Largest error of the products so far, relative to the norm of the matrix."""
        own = float(self._error / self._norm + self._turn) if float(self._norm) > 0 else 0.0
        return max(own, self.unexplained) if self.unexplained > 0 else own

    def product(self, op: CurvatureOperator, at: LossArguments, v: list[Tensor]) -> list[Tensor]:
        """The Hessian of one batch times a vector of any length."""
        unit, length = _normalised(v)
        ahead, behind = (op._loss.gradient(at, moved(at.theta, unit, s)) for s in (self.step, -self.step))
        scale = length / (2 * self.step)
        return [(one - other).detach() * scale for one, other in zip(ahead, behind, strict=True)]

    def product_of_all(self, op: CurvatureOperator, v: Tensor) -> Tensor:
        """The Hessian of the data times a vector ``(P,)``, whose error is noted; without waiting for the device."""
        unit, length = _normalised(split_vector(v, op.parameter_shapes))
        there, back = moved(op._theta, unit, self.step), moved(op._theta, unit, -self.step)
        turn = _turn(there, back, unit, self.step)
        ahead, behind = torch.zeros_like(self._here), torch.zeros_like(self._here)
        for i, weight, at in op._weighted():
            for place, into in ((there, ahead), (back, behind)):
                part = join_tensors(op._loss.gradient(at, place)).to(op.dtype)
                op._finite[i] &= part.sum().isfinite()
                into.add_(part, alpha=weight)
        difference = ahead - behind
        norm, error = (
            torch.linalg.vector_norm(part, dtype=torch.float64) / (2 * self.step)
            for part in (difference, ahead.add_(behind).sub_(self._here, alpha=2))
        )
        self._norm, self._error = torch.maximum(self._norm, norm), torch.maximum(self._error, error)
        self._turn = torch.maximum(self._turn, turn)
        error = error + turn * self._norm
        self._relative = torch.maximum(self._relative, torch.where(norm > 0, error / norm, 0.0))
        return difference.mul_(length / (2 * self.step))

    def _turned(self, op: CurvatureOperator, at: LossArguments, v: list[Tensor]) -> list[Tensor]:
        """A vector closer to the leading eigenvectors of a batch."""
        for _ in range(_TURNS):
            turned = self.product(op, at, v)
            if not 0 < _length(turned) < math.inf:  # a loss that is linear in the parameters, for example
                break
            v = _normalised(turned)[0]
        return v

    def _from_exact(self, op: CurvatureOperator, few: LossArguments, directions: list[list[Tensor]]) -> float:
        gaps, norms = [], []
        try:
            with plain_passes(op.device, op.amp, True):  # and not the fused kernels that differentiate once
                check, here = check_products(op, few), op._loss.gradient(few, few.theta)
                if math.isnan(check.difference):  # it could not be confirmed
                    return math.nan
                # torch leaves out of a derivative, without a word, what passes a function that is differentiable once
                exact = op._reverse_mode(few) if check.reverse else lambda v: op._forward_mode(few, v)
                for v in directions:
                    product, (size, error) = exact(v), _size_and_error(op, few, here, v, self.step)
                    gap = _distance(product, self.product(op, few, v))
                    if not math.isfinite(gap + error):
                        return math.inf
                    gaps.append(max(gap - _EXPLAINED * error, 0.0))
                    norms.append(max(size, _length(product)))
        except Exception:  # torch lacks the derivative, or there is no memory for it
            return math.nan
        return max(gaps) / max(norms) if max(norms) > 0 else 0.0


def _best_step(
    op: CurvatureOperator, at: LossArguments, directions: list[list[Tensor]], expected: float, longest: float
) -> float:
    """The step with the smallest error on one batch, relative to the largest product."""
    here = op._loss.gradient(at, at.theta)
    known: dict[int, float] = {}

    def error(rung: int) -> float:
        step = expected * _FACTOR**rung
        if rung not in known and (rung <= 0 or step <= longest):
            sizes, errors = zip(*(_size_and_error(op, at, here, v, step) for v in directions), strict=True)
            # steps that are too short to change anything in a half precision of the network's own give zeros
            known[rung] = max(errors) / max(sizes) if max(sizes) > 0 and math.isfinite(sum(errors)) else math.inf
        return known.get(rung, math.inf)

    low, high = -1, 1
    while True:
        best = min(range(low, high + 1), key=lambda rung: (error(rung), abs(rung)))
        if max(-low, high) >= _FARTHEST or (low < best < high and error(best) < _USELESS):
            return expected * _FACTOR**best
        if low < best < high or error(best) == math.inf:
            low, high = low - 1, high + 1
        else:
            low, high = (low - 1, high) if best == low else (low, high + 1)


def _size_and_error(
    op: CurvatureOperator, at: LossArguments, here: list[Tensor], v: list[Tensor], step: float
) -> tuple[float, float]:
    """Length of the product of one batch with a vector of length 1, and of its error."""
    there, back = moved(at.theta, v, step), moved(at.theta, v, -step)
    ahead, behind = op._loss.gradient(at, there), op._loss.gradient(at, back)
    middle = [(one.double() + other.double()) / 2 for one, other in zip(ahead, behind, strict=True)]
    size = _distance(ahead, behind) / (2 * step)
    return size, _distance(middle, here) / step + float(_turn(there, back, v, step)) * size


def _turn(ahead: Named, behind: Named, v: list[Tensor], step: float) -> Tensor:
    """How far the difference of two places, which are rounded, is from ``2 step v``, relative to it."""
    squares = [
        torch.linalg.vector_norm((one - other) / (2 * step) - part, dtype=torch.float64).square()
        for one, other, part in zip(ahead.values(), behind.values(), v, strict=True)
    ]
    return torch.stack(squares).sum().sqrt()


def _unit_vector(v: list[Tensor]) -> list[Tensor]:
    """Along the largest coordinate of a vector."""
    shapes, flat = [part.shape for part in v], join_tensors(v)
    unit = torch.zeros_like(flat)
    unit[flat.abs().argmax()] = 1
    return split_vector(unit, shapes)


def _normalised(v: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """A vector of length 1, zero if it is zero, and its length; squares neither overflow nor underflow."""
    largest = torch.stack([part.abs().amax() for part in v]).amax()
    scaled = [part / torch.where(largest > 0, largest, 1) for part in v]
    length = torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) for part in scaled]).square().sum().sqrt()
    length = length.to(largest.dtype)
    return [part / torch.where(length > 0, length, 1) for part in scaled], largest * length


def _noise(op: CurvatureOperator) -> float:
    """Relative round-off of a gradient, roughly."""
    return {"bf16": 4e-3, "tf32": 5e-4}.get(op.amp, torch.finfo(op.dtype).eps)


def _length(parts: list[Tensor]) -> float:
    return math.sqrt(sum(float(part.detach().double().square().sum()) for part in parts))


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    return _length([x.detach().double() - y.detach().double() for x, y in zip(a, b, strict=True)])


__all__ = ["FiniteDifferences"]

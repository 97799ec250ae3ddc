r"""Hessian products by finite differences of the gradient, where torch has no second derivative or it takes too much.

The central difference :math:`(g(\theta + h v) - g(\theta - h v)) / 2h`, for a ``v`` of length 1, is off by
:math:`h^2/6` times the third derivative, and by the round-off of the gradient over :math:`h`. The step that balances
the two is searched on the first batch, along a random vector and along one that products have turned towards the
leading eigenvectors, which is where third derivatives are largest. Neighbouring steps, 4 times as long and as short,
show both errors: a step of :math:`4h` has 16 times the first error, and a step of :math:`h/4` four times the second.

Where the gradient jumps (ReLU), a difference also counts the jumps that lie between its two points, to which the second
derivative is blind: few in double precision, where steps are short, and more in single precision. The two are compared
on a few examples where torch has both, and what they differ by counts as an error.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pnanalysis.curvature.product_check import check_products, moved, random_direction
from pnanalysis.errors import CurvatureError

if TYPE_CHECKING:
    from pnanalysis.curvature.base import CurvatureOperator
    from pnanalysis.curvature.network_loss import LossArguments

#: Factor between steps that are tried.
_FACTOR = 4.0
#: Steps that are tried: the one expected, and so many shorter and longer ones. Where the shortest is the best, a jump
#: of the gradient may lie within all others, and the search goes on; far longer ones leave the minimum.
_SHORTER, _LONGER = 2, 1
#: How many shorter ones there are at most.
_SHORTEST = 7
#: Products by which a random vector is turned towards the leading eigenvectors.
_TURNS = 3
#: With a larger error no digit of a product is right.
_USELESS = 0.5


class FiniteDifferences(NamedTuple):
    """How far to step, and what the products are then worth.

    Attributes
    ----------
    step : float
        Length of the step in the space of the parameters.
    difference : float
        Error of a product relative to its size, the larger one of two directions: what is estimated from other steps,
        or the difference from exact products if that is larger.
    round_off : float
        The error relative to the norm of the matrix.
    from_exact : float
        Difference from the second derivative on a few examples, relative to its size; NaN where torch has none.
    """

    step: float
    difference: float
    round_off: float
    from_exact: float

    def product(self, op: CurvatureOperator, at: LossArguments, v: list[Tensor]) -> list[Tensor]:
        """The Hessian of one batch times a vector of any length."""
        return _central(op, at, v, self.step)


def fitted(op: CurvatureOperator, at: LossArguments, few: LossArguments) -> FiniteDifferences:
    """Choose the step on one batch, and estimate the errors.

    Parameters
    ----------
    op : CurvatureOperator
    at, few : LossArguments
        A batch, and a few of its examples for the comparison with exact products.

    Raises
    ------
    CurvatureError
        If no step gives products that mean anything.
    """
    size = math.sqrt(sum(float(t.double().square().sum()) for t in at.theta.values())) or 1.0
    expected = size * _noise(op) ** (1 / 3)
    random = random_direction(at.theta)
    leading = random
    for _ in range(_TURNS):
        turned = _central(op, at, leading, expected)
        length = _length(turned)
        if not length > 0:  # a loss that is linear in the parameters, or is not finite
            break
        leading = [part / length for part in turned]
    ladder = _Ladder(op, at, [random, leading], expected)
    best = ladder.best()
    norm = max(ladder.sizes(best))
    errors, sizes = ladder.errors(best), ladder.sizes(best)
    if not all(math.isfinite(number) for number in (*errors, norm)):
        raise CurvatureError("differences of gradients are not finite; look at the loss and its data")
    difference = max(error / size for error, size in zip(errors, sizes, strict=True) if size) if norm else 0.0
    round_off = max(errors) / norm if norm else 0.0
    from_exact, jumps = _from_exact(op, few, [random, leading], ladder.step(best))
    round_off, difference = max(round_off, jumps), max(difference, from_exact if from_exact == from_exact else 0.0)
    if round_off > _USELESS:
        raise CurvatureError(
            f"finite differences of this gradient are wrong by {round_off:.0%} at the best step; use exact products, "
            "or dtype float64"
        )
    return FiniteDifferences(ladder.step(best), difference, round_off, from_exact)


class _Ladder:
    """Products along some directions at steps that differ by a factor, of which two at a time are in memory."""

    def __init__(
        self, op: CurvatureOperator, at: LossArguments, directions: list[list[Tensor]], expected: float
    ) -> None:
        self.op, self.at, self.directions, self.expected = op, at, directions, expected
        self._products: dict[int, list[list[Tensor]]] = {}
        self._sizes: dict[int, list[float]] = {}
        self._gaps: dict[int, list[float]] = {}

    def step(self, rung: int) -> float:
        """Length of the step: the expected one at 0."""
        return self.expected * _FACTOR**rung

    def best(self) -> int:
        """The rung with the smallest error; the shortest of equal ones."""
        for low in range(-_SHORTER, -_SHORTEST - 1, -1):
            best = min(range(low, _LONGER + 1), key=lambda rung: (max(self.errors(rung)), rung))
            if best > low:
                break
        return best

    def errors(self, rung: int) -> list[float]:
        """Estimated error along each direction: that of the step's length, and that of round-off."""
        pairs = zip(self._from_next(rung), self._from_next(rung - 1), strict=True)
        found = [longer / (_FACTOR**2 - 1) + shorter / math.hypot(1, _FACTOR) for longer, shorter in pairs]
        return [error if math.isfinite(error) else math.inf for error in found]

    def sizes(self, rung: int) -> list[float]:
        """Lengths of the products."""
        return self._sizes[rung]

    def _from_next(self, rung: int) -> list[float]:
        """How far the products at this step are from those at the next longer one."""
        if rung not in self._gaps:
            pairs = zip(self._at(rung), self._at(rung + 1), strict=True)
            self._gaps[rung] = [_distance(one, other) for one, other in pairs]
        return self._gaps[rung]

    def _at(self, rung: int) -> list[list[Tensor]]:
        if rung not in self._products:
            found = [_central(self.op, self.at, v, self.step(rung)) for v in self.directions]
            self._products = {near: held for near, held in self._products.items() if abs(near - rung) == 1}
            self._products[rung], self._sizes[rung] = found, [_length(product) for product in found]
        return self._products[rung]


def _central(op: CurvatureOperator, at: LossArguments, v: list[Tensor], step: float) -> list[Tensor]:
    """The central difference of the gradient along ``v``, times its length; without waiting for the device."""
    length = torch.stack([part.double().square().sum() for part in v]).sum().sqrt()
    unit = torch.where(length > 0, step / length, 0.0).to(v[0].dtype)
    ahead, behind = (op._loss.gradient(at, moved(at.theta, v, s)) for s in (unit, -unit))
    scale = (length / (2 * step)).to(v[0].dtype)
    return [(one - other).detach() * scale for one, other in zip(ahead, behind, strict=True)]


def _from_exact(
    op: CurvatureOperator, few: LossArguments, directions: list[list[Tensor]], step: float
) -> tuple[float, float]:
    """Largest difference from exact products, relative to each product and to the largest; NaN and 0 without any."""
    try:
        # torch leaves out of a second derivative, without a word, what passes a function that is differentiable once
        product = op._direct(few) if check_products(op, few).reverse else lambda v: op._product(few, v)
        exact = [[part.detach() for part in product(v)] for v in directions]
    except (CurvatureError, torch.OutOfMemoryError):
        return math.nan, 0.0
    sizes = [_length(one) for one in exact]
    gaps = [_distance(one, _central(op, few, v, step)) for one, v in zip(exact, directions, strict=True)]
    if not max(sizes):
        return 0.0, 0.0
    return max(gap / size for gap, size in zip(gaps, sizes, strict=True) if size), max(gaps) / max(sizes)


def _noise(op: CurvatureOperator) -> float:
    """Relative round-off of a gradient, roughly."""
    return {"bf16": 4e-3, "tf32": 5e-4}.get(op.amp, torch.finfo(op.dtype).eps)


def _length(parts: list[Tensor]) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts))


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    return math.sqrt(sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True)))


__all__ = ["FiniteDifferences", "fitted"]

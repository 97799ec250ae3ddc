"""Check products with a second, independent way of computing them, before any of them is used.

A product can be computed by forward-mode differentiation of the gradient, which can be traced, or by reverse mode
alone. They differ where torch's own rules do: forward mode sees through ``torch.no_grad()`` and ``.data``, and some
functions have a wrong or no second derivative in one of the modes. What is meant by the network's owner is what
training follows, the gradient by reverse mode; so where the two differ, and finite differences do not say otherwise,
reverse mode is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pnanalysis.curvature.parameters import split_vector
from pnanalysis.errors import CurvatureError, PnError, reason
from pnanalysis.spectra.random_vectors import random_unit_vector

if TYPE_CHECKING:
    from pnanalysis.curvature.base import CurvatureOperator
    from pnanalysis.curvature.network_loss import LossArguments

#: Largest difference between two ways of computing one product, relative to the product, by the type of the numbers.
#: In float64 it leaves room for networks that compute parts in float32 (norms, softmax), as some do by design.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3}
_OTHER_TOLERANCE = 0.1  # of bfloat16 and float16
#: What finite differences may differ by: their own error is far smaller where the loss is smooth.
_DIFFERENCES_TOLERANCE = 1e-4
#: Up to here two products that were computed in two ways count as confirmed by finite differences.
_AGREED = 1e-3
#: Steps of finite differences, relative to the parameters. Kinks (of ReLU) lie in the way of few of them.
_STEPS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
#: Beyond this norm of all parameters, steps of the size for a norm of 1 are tried, too.
_LARGE = 100.0
#: Seed of the directions that products are checked along.
_DIRECTIONS = 2**32 - 3
#: Examples to check on.
EXAMPLES = 8
#: Parameters beyond which the check is not made in float64, to save memory.
_MANY_PARAMETERS = 50_000_000
#: A part of the product counts as if it were at least this large relative to the whole.
_NEGLIGIBLE = 1e-3


class ProductCheck(NamedTuple):
    """Which ways of computing products are right for an operator, and how far they agree.

    Attributes
    ----------
    forward, reverse : bool
        Whether forward mode over reverse mode may be traced and used, and whether reverse mode alone may.
    difference : float
        Between the two ways, or the one that is right and finite differences, relative to the product; NaN where
        there was nothing to compare with.
    note : str
        What the user should know; empty if all is well.
    """

    forward: bool
    reverse: bool
    difference: float
    note: str = ""


def check_products(op: CurvatureOperator, at: LossArguments) -> ProductCheck:
    """Compute one product on a few examples in both ways, and by finite differences where they differ.

    Parameters
    ----------
    op : CurvatureOperator
    at : LossArguments
        A few examples.

    Raises
    ------
    CurvatureError
        If neither way works, or none agrees with finite differences of the gradient.
    """
    v = random_direction(at.theta)
    op, at, v = in_double(op, at, v) or (op, at, v)
    if not bool(op._loss_at_theta(at).detach().isfinite()):
        return ProductCheck(True, True, torch.nan)  # products will not be finite, and say so
    forward, no_forward = _attempt(lambda: op._forward_mode(at, v))
    reverse, no_reverse = _attempt(lambda: op._reverse_mode(at)(v))
    if forward is not None and reverse is not None:
        difference, where = largest_difference(forward, reverse, op.names)
        if difference <= tolerance(op.dtype, op.amp):
            if _both_wrong(op, at, v, reverse):
                raise _wrong(op, at, v, reverse)
            return ProductCheck(True, True, difference)
        return _decided(op, at, v, forward, reverse, difference, where)
    if forward is None and reverse is None:
        raise _impossible(op, no_reverse or no_forward) from no_reverse
    if op.dtype != torch.float64:
        return ProductCheck(True, reverse is not None, torch.nan)
    if not _loss_has_the_gradient(op, at, v):
        if reverse is None:
            raise _impossible(op, no_reverse) from no_reverse
        return ProductCheck(
            False, True, torch.nan,
            "part of the computation is hidden from the gradient, and only reverse mode can differentiate the rest, so "
            "that its products could not be checked",
        )  # fmt: skip
    product = forward if reverse is None else reverse
    assert product is not None
    difference = _from_differences(op, at, v, product)
    if difference > _DIFFERENCES_TOLERANCE:
        raise _wrong(op, at, v, product)
    # torch may lack a rule only where it is not traced, and a traced program is compared with reverse mode
    return ProductCheck(True, reverse is not None, difference)


def _decided(
    op: CurvatureOperator, at: LossArguments, v: list[Tensor], forward: list[Tensor], reverse: list[Tensor],
    difference: float, where: str,
) -> ProductCheck:  # fmt: skip
    """Which of two different products is right."""
    parts = f"forward-mode and reverse-mode derivatives differ by {difference:.2g}, most at {where!r}"
    if op.dtype != torch.float64 or not _loss_has_the_gradient(op, at, v):
        return ProductCheck(
            False, True, difference,
            f"{parts}: part of the computation is hidden from the gradient (torch.no_grad, .data, a "
            "custom autograd.Function); products are computed by reverse mode, which sees what the gradient sees",
        )  # fmt: skip
    errors = [_from_differences(op, at, v, product) for product in (forward, reverse)]
    right = [error <= _DIFFERENCES_TOLERANCE for error in errors]
    if not any(right):
        raise _wrong(op, at, v, reverse)
    which = "reverse" if right[1] else "forward"
    return ProductCheck(
        right[0], right[1], min(errors),
        f"{parts}: torch's rule for one of them is wrong there; finite differences agree with {which} mode, which is "
        "used",
    )  # fmt: skip


def random_direction(theta: dict[str, Tensor], seed: int = 0) -> list[Tensor]:
    """A random vector of length 1 in the shapes of the parameters, drawn where they lie.

    The same on every device, and not one of those that spectra start from.
    """
    tensors = list(theta.values())
    dtype = max((tensor.dtype for tensor in tensors), key=lambda dtype: dtype.itemsize)
    n = sum(tensor.numel() for tensor in tensors)
    flat = random_unit_vector(n, seed, _DIRECTIONS, dtype, tensors[0].device)
    parts = split_vector(flat, [tensor.shape for tensor in tensors])
    return [part.to(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def tolerance(dtype: torch.dtype, amp: str = "no") -> float:
    """What two ways of computing one product may differ by, through roundoff."""
    return _OTHER_TOLERANCE if amp != "no" else TOLERANCE.get(dtype, _OTHER_TOLERANCE)


def largest_difference(a: Sequence[Tensor], b: Sequence[Tensor], names: Sequence[str]) -> tuple[float, str]:
    """The largest relative difference of any parameter's part of two products, and the parameter's name."""
    sizes = [float(part.double().square().sum()) ** 0.5 for part in b]
    least = _NEGLIGIBLE * sum(size**2 for size in sizes) ** 0.5 or 1.0
    found = [
        float((one.double() - other.double()).square().sum()) ** 0.5 / max(least, size)  # NaN if the least is
        for one, other, size in zip(a, b, sizes, strict=True)
    ]
    worst = max(range(len(found)), key=lambda i: (found[i] != found[i], found[i]))  # NaN is worse than any number
    return (found[worst] if found[worst] == found[worst] else torch.inf), names[worst]


def moved(theta: dict[str, Tensor], v: list[Tensor], step: float | Tensor) -> dict[str, Tensor]:
    """The parameters, a step along a vector away."""
    return {name: tensor + step * part for (name, tensor), part in zip(theta.items(), v, strict=True)}


def in_double(op: CurvatureOperator, at: LossArguments, v: list[Tensor]) -> Any:
    """The operator, its arguments and a vector in float64, without autocast; ``None`` where the network refuses it."""
    if op.n_parameters > _MANY_PARAMETERS:
        return None
    try:
        twin, there = op._in_double(at)
        if bool(twin._loss_at_theta(there).detach().isfinite()):
            return twin, there, [part.double() for part in v]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a user's network may insist on float32
        pass
    return None


def _attempt(compute: Callable[[], list[Tensor]]) -> tuple[list[Tensor] | None, Exception | None]:
    try:
        return [part.detach() for part in compute()], None
    except (PnError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch lacks a derivative, or the user's code does not run under a transform
        return None, error


def _loss_has_the_gradient(op: CurvatureOperator, at: LossArguments, v: list[Tensor]) -> bool:
    """Whether the gradient is the derivative of the loss: not so where parts of it are hidden from the gradient."""
    slope = float(sum((g * part).sum() for g, part in zip(op._loss.gradient(at, at.theta), v, strict=True)))
    for step in _steps(at):
        ahead, behind = (float(op._loss(at, moved(at.theta, v, sign * step)).detach()) for sign in (1, -1))
        rise = (ahead - behind) / (2 * step)
        roundoff = 1e-14 * (abs(ahead) + abs(behind)) / step
        if abs(rise - slope) <= _DIFFERENCES_TOLERANCE * (abs(rise) + abs(slope)) + roundoff:
            return True
    return False


def _from_differences(op: CurvatureOperator, at: LossArguments, v: list[Tensor], product: list[Tensor]) -> float:
    """How far a product is from finite differences, relative to the product; the best of several steps.

    Differences ahead and behind differ from one another where kinks (of ReLU) lie between them. What that gap explains
    does not count; but where it is as large as the product it explains anything, and other steps say more.
    """
    return _best_gap(op, at, v, product)[1]


def _best_gap(
    op: CurvatureOperator, at: LossArguments, v: list[Tensor], product: list[Tensor]
) -> tuple[bool, float, int]:
    """The smallest gap of the steps that say something; see :func:`_gap`."""
    if _is_rightly_zero(op, at, v, product):
        return False, 0.0, 0
    return min(_gap(op, at, v, product, step) for step in _steps(at))


def _confirmed_by_differences(op: CurvatureOperator, at: LossArguments, v: list[Tensor], product: list[Tensor]) -> bool:
    """Whether the smallest gap of the steps is small; the first step that says so spares the others."""
    if _is_rightly_zero(op, at, v, product):
        return True
    gaps = []
    for step in sorted(_steps(at), key=_from_the_middle):
        says_nothing, gap, _ = _gap(op, at, v, product, step)
        if not says_nothing and gap <= _AGREED:
            return True
        gaps.append((says_nothing, gap))
    return min(gaps)[1] <= _AGREED


def _is_rightly_zero(op: CurvatureOperator, at: LossArguments, v: list[Tensor], product: list[Tensor]) -> bool:
    """Whether a product is zero, and differences approach zero as fast as their step does.

    So it is at a minimum of fourth order, where no difference is small beside the product.
    """
    if any(bool(part.any()) for part in product):
        return False
    found = []
    for step in (steps := _steps(at)[:2]):
        ahead, behind, _ = op._by_differences(at, v, product, step)
        found.append(math.sqrt(sum(_length(a + b) ** 2 for a, b in zip(ahead, behind, strict=True))))
    return found[1] <= 2 * found[0] * steps[1] / steps[0]


def _from_the_middle(step: float) -> float:
    """How far a step is from the one that most networks are content with."""
    return abs(math.log10(step) + 5)


def _gap(
    op: CurvatureOperator, at: LossArguments, v: list[Tensor], product: list[Tensor], step: float
) -> tuple[bool, float, int]:
    """Whether kinks would explain anything, the largest relative gap of any part of the product that they do not, and
    which part that is.
    """
    ahead, behind, ours = op._by_differences(at, v, product, step)
    sizes = [_length(part) for part in ours]
    least = _NEGLIGIBLE * sum(size**2 for size in sizes) ** 0.5
    found, says_nothing = [], False
    for a, b, own, size in zip(ahead, behind, ours, sizes, strict=True):
        says_nothing |= _length(a - b) > max(size, least)
        unexplained = max(_length((a + b) / 2 - own) - _length(a - b), 0.0)
        found.append(unexplained / max(size, _length(a), least, torch.finfo(torch.float64).tiny))
    worst = max(range(len(found)), key=lambda i: (found[i] != found[i], found[i]))
    return says_nothing, (found[worst] if found[worst] == found[worst] else torch.inf), worst


def _both_wrong(op: CurvatureOperator, at: LossArguments, v: list[Tensor], product: list[Tensor]) -> bool:
    """Whether the Hessian's products, although equal in both ways, are not the derivatives of the gradient.

    Differences of gradients tell nothing where part of the loss is hidden from the gradient. They then are not those
    of a gradient field, and asymmetric.
    """
    if op.dtype != torch.float64 or not op._differences_are_derivatives:
        return False
    if _confirmed_by_differences(op, at, v, product) or not _loss_has_the_gradient(op, at, v):
        return False
    u = random_direction(at.theta, seed=1)
    step = _steps(at)[2]
    (hv, *_), (hu, *_) = (op._by_differences(at, w, product, step) for w in (v, u))
    one, other = _inner(u, hv), _inner(v, hu)
    return abs(one - other) <= _AGREED * (abs(one) + abs(other))


def _length(part: Tensor) -> float:
    return math.sqrt(float(part.double().square().sum()))


def _inner(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((one * other).sum()) for one, other in zip(a, b, strict=True))


def _steps(at: LossArguments) -> list[float]:
    size = sum(float(t.square().sum()) for t in at.theta.values()) ** 0.5
    # a few large parameters are no measure for the others
    scales = [max(size, 1.0), *([1.0] if size > _LARGE else [])]
    return [step * scale for scale in scales for step in _STEPS]


def _impossible(op: CurvatureOperator, error: Exception | None) -> CurvatureError:
    others = ", or take method='finite_difference'" if op._differences_are_derivatives else ""
    return CurvatureError(
        f"{type(op).__name__} cannot be computed for this network and loss: {reason(error) if error else ''}; "
        f"choose params below that part, or write it by functions that can be differentiated twice{others}"
    )


def _wrong(op: CurvatureOperator, at: LossArguments, v: list[Tensor], product: list[Tensor]) -> CurvatureError:
    _, gap, part = _best_gap(op, at, v, product)
    where = f", most at {op.names[part]!r}" if op._differences_are_derivatives else ""
    others = "; or take method='finite_difference'" if op._differences_are_derivatives else ""
    return CurvatureError(
        f"torch's derivatives of this network and loss are wrong: products of {type(op).__name__} differ from finite "
        f"differences by {gap:.2g}, relative to their size{where}; look for functions without a derivative at some "
        f"example (a norm or a square root at zero, say), or with a wrong one, and rewrite them{others}"
    )

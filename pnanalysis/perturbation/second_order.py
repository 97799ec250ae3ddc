r"""What sharpness would be if the loss were its second-order expansion, from products with the Hessian.

In a ball that is scaled by :math:`c`, the largest rise is that of a trust-region problem with the gradient
:math:`c \odot g` and the matrix :math:`C H C`, where :math:`C` has :math:`c` on its diagonal. It is solved exactly in a
Krylov space of the gradient and a random vector, which gives a lower bound that converges as largest eigenvalues do.
The mean rise over directions of opposite signs is :math:`\tfrac12 \delta^\top H \delta`, by the very directions of
the average case: the two agree as radii go to zero, without any noise.

Example :math:`i` adds :math:`g_i^\top\delta + \tfrac12\delta^\top H_i\delta` to the largest rise, at the :math:`\delta`
where it is taken. To first order, that is how the largest rise changes with the weight of the example, too: where a
maximum is taken does not matter for its derivative (the envelope theorem). The scatter of these numbers makes the error
for the choice of examples; that of :math:`\tfrac12\delta_j^\top H_i\delta_j` over examples and directions makes that of
mean rises.

References
----------
J. J. Moré and D. C. Sorensen, "Computing a trust region step", SIAM J. Sci. Stat. Comput. 4 (1983). N. Gould, S.
Lucidi, M. Roma and P. Toint, "Solving the trust-region subproblem using the Lanczos method", SIAM J. Optim. 9 (1999).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.curvature.operators import HessianOperator
from pnanalysis.errors import CurvatureError
from pnanalysis.perturbation.average_case import Crossed
from pnanalysis.perturbation.neighbourhoods import KINDS, STARTS, direction
from pnanalysis.spectra.data_error import Influence, weights_of_groups
from pnanalysis.spectra.inner_products import orthogonalised
from pnanalysis.spectra.linear_operator import LinearOperator, empty_columns
from pnanalysis.spectra.random_vectors import normal_numbers

#: Steps of block Lanczos on the gradient and a random vector.
_STEPS = 8
#: Norm of what is left of a vector beyond a space, relative to its own, below which it belongs to it.
_INDEPENDENT = 1e-6
#: Index of that random vector, beyond those of ascents.
_RANDOM = 2**20
#: Numbers of the directions that are looked along at once.
_MOST_NUMBERS = 2**22
#: How far the parts of examples may be from adding up, relative to the sum of their sizes.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


def half_forms(op: LinearOperator, kind: str, scale: Tensor, n_directions: int, seed: int) -> Array:
    """Half the forms of the Hessian along the directions of the average case with radius 1, ``(J,)``."""
    forms = []
    for j in range(n_directions):
        delta = (scale * direction(kind, len(scale), j, seed, scale)).to(op.device, op.dtype)
        forms.append(float(delta.double() @ op.matvec(delta).double()) / 2)
    return np.array(forms)


def example_half_forms(op: HessianOperator, kind: str, scale: Tensor, n_directions: int, seed: int) -> Crossed:
    """The same with what each example adds: over groups of examples and directions, of equal weights all.

    Raises
    ------
    CurvatureError
        If there are fewer than eight groups of examples, or their forms are not finite or do not add up to that of a
        product.
    """
    weight = weights_of_groups(op)
    weight = weight / weight.sum()
    counts = weight > 0
    by_example, by_direction = np.zeros(int(counts.sum())), np.zeros(n_directions)
    squares = 0.0
    at_once = max(_MOST_NUMBERS // len(scale), 1)
    for begin in range(0, n_directions, at_once):
        some = range(begin, min(begin + at_once, n_directions))
        deltas = torch.stack([scale * direction(kind, len(scale), j, seed, scale) for j in some], dim=1)
        deltas = deltas.to(op.device, op.dtype)
        forms = op.forms(deltas, deltas).numpy() / 2
        if begin == 0:
            first = deltas[:, 0]
            whole = float(first.double() @ op.matvec(first).double()) / 2
            _check_sum(op, forms[0], weights_of_groups(op), whole)
        means = forms @ weight
        by_direction[begin : begin + at_once] = means
        # the numbers of equal weight whose mean, and its error, are those of the weighted ones
        each = means[:, None] + counts.sum() * weight[counts] * (forms[:, counts] - means[:, None])
        by_example += each.sum(0) / n_directions
        squares += float((each**2).sum())
    return Crossed(by_example, by_direction, np.array(squares))


def rise_influences(op: HessianOperator, points: Tensor, rises: Array) -> list[Influence]:
    """What groups of examples add to largest rises ``(radius,)`` at points ``(P, radius)``, away from the checkpoint.

    Raises
    ------
    CurvatureError
        If there are fewer than eight groups of examples, or what they add is not finite or does not add up to the
        rises.
    """
    weight = weights_of_groups(op)
    each = (op.slopes(points) + op.forms(points, points) / 2).numpy()
    for own, rise in zip(each, rises, strict=True):
        _check_sum(op, own, weight, float(rise))
    return [Influence(weight, own, np.zeros(len(weight))) for own in each]


def _check_sum(op: HessianOperator, each: Array, weight: Array, whole: float) -> None:
    """See that what examples add makes up the whole.

    Raises
    ------
    CurvatureError
    """
    found, size = float(weight @ each), float(weight @ np.abs(each))
    if not abs(found - whole) <= _TOLERANCE[op.dtype] * size:
        raise CurvatureError(f"the second-order rises of single examples add up to {found:.6g}, not to {whole:.6g}")


def largest_rises(op: LinearOperator, gradient: Tensor, kind: str, scale: Tensor, radii: Sequence[float],
                  seed: int) -> tuple[Array, Tensor]:  # fmt: skip
    """Lower bounds on the largest rises of the second-order expansion, ``(radius,)``, and where they are, ``(P,
    radius)``, away from the checkpoint; NaN in boxes.
    """
    if KINDS[kind].is_box:
        return np.full(len(radii), np.nan), torch.full((len(scale), len(radii)), torch.nan, dtype=op.dtype)
    scale = scale.to(op.device, op.dtype)
    slope = scale * gradient.to(op.device, op.dtype)
    random = normal_numbers(len(scale), _RANDOM, seed, scale.device, stream=STARTS).to(scale)
    basis, matrix, along = _projected(op, scale, [slope, torch.where(scale > 0, random, 0.0)], slope)
    values, vectors = np.linalg.eigh(matrix)
    along = vectors.T @ along
    highest = np.stack([highest_point(values, along, radius) for radius in radii], axis=1)
    points = scale[:, None] * (basis @ torch.from_numpy(vectors @ highest).to(basis))
    return along @ highest + values @ highest**2 / 2, points


def trust_region(values: Array, along: Array, radius: float) -> float:
    r"""The largest :math:`b^\top y + \tfrac12 y^\top \Lambda y` of :math:`\lVert y\rVert \le r`, at the point of
    :func:`highest_point`, which describes the parameters.
    """
    y = highest_point(values, along, radius)
    return float(along @ y + (values * y**2).sum() / 2)


def highest_point(values: Array, along: Array, radius: float) -> Array:
    r"""The :math:`y`, ``(m,)``, of the largest :math:`b^\top y + \tfrac12 y^\top \Lambda y` of :math:`\lVert y\rVert
    \le r`.

    Parameters
    ----------
    values : ndarray, shape (m,)
        The diagonal of :math:`\Lambda`, ascending.
    along : ndarray, shape (m,)
        :math:`b`.
    radius : float
    """
    size = float(np.linalg.norm(along))
    top = float(values[-1])
    inside = _inside(values, along, radius)
    if inside is not None:
        return inside
    # at the border y = b / (mu - Lambda) with a multiplier mu that is positive and above all eigenvalues
    least = max(top, 0.0)
    spread = max(abs(values[0]), abs(top), size / radius, 1e-300)

    def excess(mu: float) -> float:
        return float(np.linalg.norm(along / (mu - values))) - radius

    low, high = least + 1e-13 * spread, least + size / radius + 1e-12 * spread
    if excess(low) <= 0:  # the hard case: what is left of the radius goes along the top eigenvector
        gaps = least + 1e-13 * spread - values
        y = np.where(values < top - 1e-12 * spread, along / gaps, 0.0)
        rest = max(radius**2 - float(y @ y), 0.0) ** 0.5
        y[-1] += rest if along[-1] >= 0 else -rest
    else:
        mu = brentq(excess, low, high, xtol=1e-15 * spread, rtol=1e-14)
        y = along / (mu - values)
    found: Array = y
    return found


def _inside(values: Array, along: Array, radius: float) -> Array | None:
    """The highest point where that is inside the ball: the matrix is negative definite."""
    if values[-1] >= 0:
        return None
    y: Array = -along / values
    return y if float(np.linalg.norm(y)) <= radius else None


def _projected(
    op: LinearOperator, scale: Tensor, starts: Sequence[Tensor], slope: Tensor
) -> tuple[Tensor, Array, Array]:
    """An orthonormal basis ``(P, m)`` of a block Krylov space, the scaled matrix and the scaled gradient in it."""
    basis = empty_columns(len(scale), len(starts) * _STEPS, scale.dtype, scale.device)
    images: list[Tensor] = []
    block = list(starts)
    for _ in range(_STEPS):
        first = len(images)
        n = first
        for vector in block:
            rest, _ = orthogonalised(vector[:, None], [basis[:, :n]])
            before, own = float(vector.norm()), float(rest.norm())
            if own > _INDEPENDENT * before > 0:
                basis[:, n] = rest[:, 0] / own
                n += 1
        if n == first:
            break
        block = [scale * op.matvec(scale * v) for v in basis[:, first:n].T]
        images += block
    q, aq = basis[:, : len(images)].T.double(), torch.stack(images).double()
    matrix = (q @ aq.T).cpu().numpy()
    return q.T, (matrix + matrix.T) / 2, (q @ slope.double()).cpu().numpy()

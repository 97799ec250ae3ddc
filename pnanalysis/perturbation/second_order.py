r"""What sharpness would be if the loss were its second-order expansion, from products with the Hessian.

In a ball that is scaled by :math:`c`, the largest rise is that of a trust-region problem with the gradient
:math:`c \odot g` and the matrix :math:`C H C`, where :math:`C` has :math:`c` on its diagonal. It is solved exactly in a
Krylov space of the gradient and a random vector, which gives a lower bound that converges as largest eigenvalues do.
The mean rise over directions of opposite signs is :math:`\tfrac12 \delta^\top H \delta`, by the very directions of
the average case: the two agree as radii go to zero, without any noise.

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
from pnanalysis.perturbation.neighbourhoods import KINDS, STARTS, direction, gaussian
from pnanalysis.spectra.inner_products import orthogonalised
from pnanalysis.spectra.linear_operator import LinearOperator, empty_columns

#: Steps of block Lanczos on the gradient and a random vector.
_STEPS = 8
#: Norm of what is left of a vector beyond a space, relative to its own, below which it belongs to it.
_INDEPENDENT = 1e-6
#: Index of that random vector, beyond those of ascents.
_RANDOM = 2**20


def half_forms(op: LinearOperator, kind: str, scale: Tensor, n_directions: int, seed: int) -> Array:
    """Half the forms of the Hessian along the directions of the average case with radius 1, ``(J,)``."""
    forms = []
    for j in range(n_directions):
        delta = (scale * direction(kind, len(scale), j, seed, scale)).to(op.device, op.dtype)
        forms.append(float(delta.double() @ op.matvec(delta).double()) / 2)
    return np.array(forms)


def largest_rises(op: LinearOperator, gradient: Tensor, kind: str, scale: Tensor, radii: Sequence[float],
                  seed: int) -> Array:  # fmt: skip
    """Lower bounds on the largest rises of the second-order expansion, ``(radius,)``; NaN in boxes."""
    if KINDS[kind].is_box:
        return np.full(len(radii), np.nan)
    scale = scale.to(op.device, op.dtype)
    slope = scale * gradient.to(op.device, op.dtype)
    random = gaussian(len(scale), _RANDOM, seed, STARTS, scale.device).to(scale)
    matrix, along = _projected(op, scale, [slope, torch.where(scale > 0, random, 0.0)], slope)
    values, vectors = np.linalg.eigh(matrix)
    return np.array([trust_region(values, vectors.T @ along, radius) for radius in radii])


def trust_region(values: Array, along: Array, radius: float) -> float:
    r"""The largest :math:`b^\top y + \tfrac12 y^\top \Lambda y` of :math:`\lVert y\rVert \le r`.

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
    return float(along @ y + (values * y**2).sum() / 2)


def _inside(values: Array, along: Array, radius: float) -> float | None:
    """The largest value where that is inside the ball: the matrix is negative definite."""
    if values[-1] >= 0:
        return None
    y = -along / values
    return float(along @ y + (values * y**2).sum() / 2) if float(np.linalg.norm(y)) <= radius else None


def _projected(op: LinearOperator, scale: Tensor, starts: Sequence[Tensor], slope: Tensor) -> tuple[Array, Array]:
    """The scaled matrix and the scaled gradient in an orthonormal basis of a block Krylov space."""
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
    return (matrix + matrix.T) / 2, (q @ slope.double()).cpu().numpy()

r"""Lanczos without reorthogonalisation: copies of eigenvalues, and how they are put together again.

In exact arithmetic the three-term recurrence keeps its vectors orthogonal. In floating point they lose that as soon
as a Ritz value has converged, and the space is found again: the tridiagonal matrix gets further copies ("ghosts") of
that Ritz value. It is then, to within about the round-off of the products, the one that an exact computation would find
for a larger matrix, whose eigenvalues lie in tiny intervals about those of the operator and whose weights in each
interval add up to the weight of the eigenvalue there (Greenbaum 1989). Spectral densities, moments and bounds of the
ends are right as they are. Only what counts Ritz values is not, and is mended by adding up each cluster. A copy on its
way to its place is a Ritz value where there is no eigenvalue; it has next to no weight, and is left out.

References
----------
Paige, Accuracy and effectiveness of the Lanczos algorithm for the symmetric eigenproblem, Linear Algebra Appl. 34
(1980). Greenbaum, Behavior of slightly perturbed Lanczos and conjugate-gradient recurrences, Linear Algebra Appl. 113
(1989). Chen, Trogdon and Ubaru, arXiv 2105.06595, section 5 (quadrature without reorthogonalisation).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pnanalysis.arrays import Array
from pnanalysis.spectra.quadrature import jacobi_matrix, ritz

#: Of a Ritz value that is no eigenvalue's: far below what a random vector has of any, about ``1 / P``.
_NO_WEIGHT = 1e-14
#: Copies that are closer than this fraction of their residuals have a common eigenvector with a far smaller one.
#: Without copies, distances are of the size of residuals, or a tenth of that for a thousand steps.
_CLOSE = 0.02


def without_ghosts(alpha: Array, beta: Array, round_off: float) -> tuple[Array, Array]:
    """The tridiagonal matrix with each cluster of Ritz values replaced by one, with the weight of all.

    Parameters
    ----------
    alpha, beta : ndarray
        ``(m,)`` each, from Lanczos without reorthogonalisation.
    round_off : float
        Of the vectors and their sums, relative to the norm of the operator. Copies lie within three times that of each
        other, and one of them has converged, or all together: what else lies as close may be two eigenvalues.

    Returns
    -------
    alpha, beta : ndarray
        ``(k,)`` each, ``k <= m``. The residuals of Ritz values that have no copies keep their sum of squares.
    """
    value, weight, residual = ritz(alpha, beta)
    near = 3 * round_off * np.abs(value).max()
    on_its_way = (residual > near) & (weight < _NO_WEIGHT)
    value, weight, residual = value[~on_its_way], weight[~on_its_way], residual[~on_its_way]
    starts = _starts(value, residual, near)
    if not on_its_way.any() and len(starts) == len(value):
        return alpha, beta
    total = np.add.reduceat(weight, starts)
    middle = np.add.reduceat(weight * value, starts) / np.maximum(total, np.finfo(float).tiny)
    centre = np.where(total > 0, middle, value[starts])
    alone = np.diff(np.append(starts, len(value))) == 1
    merged_alpha, inner = jacobi_matrix(centre, total / total.sum())
    _, _, unscaled = ritz(merged_alpha, np.append(inner, 1.0))
    own, found = np.linalg.norm(residual[starts[alone]]), np.linalg.norm(unscaled[alone])
    return merged_alpha, np.append(inner, own / found if found > 0 else 0.0)


def _starts(value: Array, residual: Array, near: float) -> NDArray[np.intp]:
    """Where clusters of copies begin among ascending Ritz values; none is wider than ``near``."""
    starts = [0]
    for i in range(1, len(value)):
        converged = residual[starts[-1] : i + 1].min() <= near
        together = value[i] - value[i - 1] <= _CLOSE * residual[i - 1 : i + 1].min()
        if value[i] - value[starts[-1]] > near or not (converged or together):
            starts.append(i)
    return np.array(starts)

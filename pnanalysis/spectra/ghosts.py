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

from pnanalysis.arrays import Array
from pnanalysis.spectra.quadrature import jacobi_matrix, ritz


def without_ghosts(alpha: Array, beta: Array, round_off: float) -> tuple[Array, Array]:
    """The tridiagonal matrix with each cluster of Ritz values replaced by one, with the weight of all.

    Parameters
    ----------
    alpha, beta : ndarray
        ``(m,)`` each, from Lanczos without reorthogonalisation.
    round_off : float
        Of a product, relative to the norm of the operator. Copies lie within ten times that of each other; a Ritz value
        of less weight than its square is no eigenvalue's.

    Returns
    -------
    alpha, beta : ndarray
        ``(k,)`` each, ``k <= m``. The residuals of Ritz values that have no copies keep their sum of squares.
    """
    value, weight, residual = ritz(alpha, beta)
    starts = np.flatnonzero(np.diff(value, prepend=-np.inf) > 10 * round_off * np.abs(value).max())
    total = np.add.reduceat(weight, starts)
    real = total > round_off**2
    if real.all() and len(starts) == len(value):
        return alpha, beta
    centre = np.add.reduceat(weight * value, starts)[real] / total[real]
    alone = (np.diff(np.append(starts, len(value))) == 1)[real]
    merged_alpha, inner = jacobi_matrix(centre, total[real] / total[real].sum())
    _, _, unscaled = ritz(merged_alpha, np.append(inner, 1.0))
    own, found = np.linalg.norm(residual[starts[real][alone]]), np.linalg.norm(unscaled[alone])
    return merged_alpha, np.append(inner, own / found if found > 0 else 0.0)

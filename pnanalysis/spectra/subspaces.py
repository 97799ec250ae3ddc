r"""Spaces of eigenvectors: how well they are known, how far two of them coincide, and how much of a vector they hold.

Let :math:`V` hold orthonormal vectors, :math:`\Theta` their Ritz values and :math:`R = HV - V\Theta` the residuals.

- An eigenvalue lies within :math:`|r_i|` of each Ritz value, and as many eigenvalues as there are Ritz values lie, one
  to one, within :math:`\lVert R \rVert_2` of them (Kahan).
- The angle between :math:`v_i` and its eigenvector has :math:`\sin\angle \le |r_i| / \delta_i`, where
  :math:`\delta_i` is the distance of :math:`\theta_i` from all other eigenvalues (Davis and Kahan). For the space of
  several vectors it is :math:`\lVert R_c \rVert_2 / \delta_c`, with the distance of their Ritz values from all
  eigenvalues that do not belong to them: in a cluster, the space is known although its vectors are not.

The other eigenvalues are taken to be where their own Ritz values and bounds say.

References
----------
C. Davis and W. M. Kahan, The rotation of eigenvectors by a perturbation III, SIAM J. Numer. Anal. 7 (1970).
B. N. Parlett, The Symmetric Eigenvalue Problem (1998), ch. 11.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.errors import CurvatureError
from pnanalysis.spectra.inner_products import coordinates, inner_products

#: Neighbours belong to one cluster where the bound of the angle that they alone would leave is larger.
_LOOSE = 0.5


class AngleBounds(NamedTuple):
    """Bounds of the angles between Ritz vectors and eigenvectors.

    Attributes
    ----------
    vector : ndarray
        Of the sine of each vector's angle, ``(k,)``; 1 says nothing.
    cluster : ndarray
        The number of the cluster that each belongs to, from 0, ``(k,)``.
    space : ndarray
        Of the sine of the largest angle between the space of the cluster and the invariant one, ``(k,)``.
    """

    vector: Array
    cluster: NDArray[np.int64]
    space: Array


def angle_bounds(
    value: Array, residual_gram: Array, rest: tuple[float, float] | None, which: str, noise: float
) -> AngleBounds:
    """Bounds of the angles of Ritz vectors, alone and in clusters.

    Parameters
    ----------
    value : ndarray
        Ritz values ``(k,)``.
    residual_gram : ndarray
        Inner products of the residuals, ``(k, k)``.
    rest : (float, float) or None
        The most wanted Ritz value of the orthogonal complement and its residual; ``None`` where there is no complement.
    which : {"largest", "smallest", "magnitude"}
        Which end of the spectrum the values are of.
    noise : float
        Norm of the error of the operator's products.
    """
    k = len(value)
    residual = np.sqrt(np.diag(residual_gram)) + noise
    spread = _norm(residual_gram) + noise  # eigenvalues lie, one to one, within it
    to_rest = _distance_to_rest(value, rest, which, noise)
    between = np.abs(value[:, None] - value) - spread
    np.fill_diagonal(between, np.inf)
    vector = _ratio(residual, np.minimum(between.min(1), to_rest) if k else to_rest)
    order = np.argsort(value)
    cluster = np.zeros(k, dtype=np.int64)
    for before, at in pairwise(order):
        loose = _ratio(max(residual[before], residual[at]), between[before, at]) > _LOOSE
        cluster[at] = cluster[before] + (not loose)
    names = {name: i for i, name in enumerate(dict.fromkeys(cluster.tolist()))}  # numbered in the order of the pairs
    cluster = np.array([names[name] for name in cluster.tolist()], dtype=np.int64)
    space = np.ones(k)
    for name in range(len(names)):
        inside = cluster == name
        away = min(float(between[np.ix_(inside, ~inside)].min(initial=np.inf)), float(to_rest[inside].min()))
        space[inside] = _ratio(_norm(residual_gram[np.ix_(inside, inside)]) + noise, away)
    return AngleBounds(vector, cluster, space)


def overlap(V: Tensor, W: Tensor) -> float:
    r"""Mean squared cosine of the principal angles, :math:`\lVert V^\top W \rVert_F^2 / \min(a, b)`.

    Parameters
    ----------
    V, W : Tensor
        Orthonormal columns, ``(P, a)`` and ``(P, b)``.

    Returns
    -------
    float
        1 where one space holds the other, 0 where they are orthogonal.

    Raises
    ------
    CurvatureError
        If they are not spaces of as many dimensions.
    """
    if V.ndim != 2 or W.ndim != 2 or len(V) != len(W) or not (V.shape[1] and W.shape[1]):
        raise CurvatureError(f"spaces of the shapes {tuple(V.shape)} and {tuple(W.shape)} have no overlap; give (P, k)")
    cosines = coordinates(V, W.to(V))
    return min(float(cosines.square().sum()) / min(V.shape[1], W.shape[1]), 1.0)  # beyond it lies round-off


def chance_overlap(n_parameters: int, a: int, b: int) -> tuple[float, float]:
    """Mean and standard deviation of :func:`overlap` between two independent random spaces of ``a`` and ``b`` dims."""
    P, few, many = n_parameters, min(a, b), max(a, b)
    if P == 1:
        return 1.0, 0.0
    variance = 2 * a * b * (P - a) * (P - b) / (P**2 * (P - 1) * (P + 2))
    return many / P, float(np.sqrt(max(variance, 0.0))) / few


def chance_p(found: Array, mean: Array, sd: Array) -> Array:
    """Two-sided p-values of overlaps, if they were those of independent random spaces.

    By the Beta distribution with the mean and the standard deviation that :func:`chance_overlap` gives, which is the
    exact one where either space has one dimension. NaN where an overlap is not known or can have one value only.

    Parameters
    ----------
    found, mean, sd : ndarray
        Of one shape.
    """
    from scipy.stats import beta  # here, so that command lines start without SciPy

    with np.errstate(invalid="ignore", divide="ignore"):
        size = mean * (1 - mean) / sd**2 - 1
        law = beta(mean * size, (1 - mean) * size)
        p = 2 * np.minimum(law.sf(found), law.cdf(found))
    return np.where((sd > 0) & np.isfinite(found), np.minimum(p, 1.0), np.nan)


def squared_cosines(V: Tensor, vector: Tensor) -> Array:
    """Of a vector ``(P,)`` with each of the orthonormal columns ``(P, k)``: ``(k,)``; NaN for a zero vector.

    Their sum is the part of the vector's squared length that lies in the space.
    """
    vector = vector.to(V)[:, None]
    length = float(inner_products(vector, vector))
    inner: Array = coordinates(V, vector)[:, 0].cpu().numpy()
    return np.square(inner) / length if length > 0 else np.full(V.shape[1], np.nan)


def participation(V: Tensor) -> Array:
    r"""Inverse participation ratio of unit vectors ``(P, k)``: :math:`\sum_i v_i^4`, from 1/P to 1, ``(k,)``."""
    squares = (column.double().square()[:, None] for column in V.T)  # one at a time
    return np.array([float(inner_products(each, each) / each.sum().square()) for each in squares])


def _distance_to_rest(value: Array, rest: tuple[float, float] | None, which: str, noise: float) -> Array:
    """From each Ritz value to the nearest eigenvalue of the complement: all of these are wanted less."""
    if rest is None:
        return np.full(len(value), np.inf)
    if which == "magnitude":
        return np.abs(value) - (abs(rest[0]) + rest[1] + noise)
    sign = 1 if which == "largest" else -1
    return sign * (value - rest[0]) - rest[1] - noise


def _norm(gram: Array) -> float:
    """Spectral norm of the vectors with these inner products."""
    return float(np.sqrt(max(np.linalg.eigvalsh(gram)[-1], 0.0)))


def _ratio(residual: Array | float, gap: Array | float) -> Array:
    """The bound of a sine, 1 where the gap is none."""
    residual, gap = np.broadcast_arrays(residual, gap)
    return np.minimum(np.divide(residual, gap, out=np.ones(gap.shape), where=gap > residual), 1.0)


__all__ = [
    "AngleBounds",
    "angle_bounds",
    "chance_overlap",
    "chance_p",
    "overlap",
    "participation",
    "squared_cosines",
]

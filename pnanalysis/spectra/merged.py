"""Eigenvalues of one operator on several Krylov spaces together.

Each space ``V_i`` was built in the orthogonal complement of those before it. The products that built it say how it is
coupled to the later ones: ``H V_i = V_i T_i + beta_i w_i e' + (earlier spaces)``, where ``w_i`` is the Lanczos vector
that would have come next and ``e`` the last unit vector. Hence ``V_j' H V_i = beta_i (V_j' w_i) e'`` for ``j > i``, and
the Rayleigh-Ritz approximation on the sum of all spaces takes inner products with the ``w_i``, but no product of the
operator. It resolves eigenvalues that two spaces have a part in each.

References
----------
Parlett, The Symmetric Eigenvalue Problem (1998), section 11.3 (Rayleigh-Ritz approximations from a subspace).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.spectra.inner_products import coordinates, inner_products
from pnanalysis.spectra.lanczos import Lanczos


@dataclass
class Couplings:
    """How the vectors ``w_i`` lie to the spaces after their own, and to one another.

    Attributes
    ----------
    following : list of torch.Tensor
        ``w_i``, ``(P, 1)`` each; zero after a breakdown.
    parts : list of ndarray
        For each space the coordinates of ``w_i`` in all later ones together.
    products : ndarray
        Inner products of the ``w_i``.
    """

    following: list[Tensor] = field(default_factory=list)
    parts: list[Array] = field(default_factory=list)
    products: Array = field(default_factory=lambda: np.zeros((0, 0)))

    def add(self, lanczos: Lanczos) -> None:
        """One more space, that of the first start vector."""
        basis = lanczos.basis[0, :, : lanczos.sizes()[0]]
        self.parts = [
            np.append(part, coordinates(basis, vector, lanczos.part.add)[:, 0].double().cpu().numpy())
            for part, vector in zip(self.parts, self.following, strict=True)
        ]
        self.following.append(lanczos.following[:, :1])  # which further steps replace, and do not change
        self.parts.append(np.zeros(0))
        add = lanczos.part.add
        new = np.array([float(inner_products(vector, self.following[-1], add)) for vector in self.following])
        self.products = np.pad(self.products, (0, 1))
        self.products[-1] = self.products[:, -1] = new

    def overlaps(self) -> Array:
        """Inner products of what the ``w_i`` have outside all spaces, ``(i, i)``."""
        longest = max(map(len, self.parts))
        inside = np.stack([np.pad(part, (longest - len(part), 0)) for part in self.parts])
        return self.products - inside @ inside.T


@dataclass(frozen=True)
class MergedSpaces:
    """What :class:`Couplings` found, without the vectors."""

    parts: list[Array]
    overlaps: Array

    def eigenvalues(self, tridiagonal: list[tuple[Array, Array]]) -> tuple[Array, Array, float]:
        """Ritz values on the sum of all spaces.

        Parameters
        ----------
        tridiagonal : list of (ndarray, ndarray)
            ``alpha`` and ``beta`` of each space.

        Returns
        -------
        value : ndarray
            Descending.
        residual : ndarray
            Bounds on the distance of each to the nearest eigenvalue.
        coupling : float
            Frobenius norm of the operator's part between the sum of the spaces and the rest.
        """
        matrix = self._matrix(tridiagonal)
        ends = np.cumsum([len(alpha) for alpha, _ in tridiagonal])
        last_betas = np.array([beta[-1] for _, beta in tridiagonal])
        value, vector = np.linalg.eigh(matrix)
        outside = last_betas[:, None] * self.overlaps * last_betas
        last = vector[ends - 1]
        squared = np.einsum("in,ij,jn->n", last, outside, last)
        # what cancels in the overlaps is known to the round-off of a single-precision inner product at best
        residual = np.sqrt(np.maximum(squared, 0.0))
        return value[::-1], residual[::-1], float(np.sqrt(max(np.trace(outside), 0.0)))

    def correction(self, tridiagonal: list[tuple[Array, Array]], whole: Array, fractions: Array) -> tuple[Array, Array]:
        """What the coupling of the spaces to one another changes in an average of estimates, as a signed measure.

        An estimate that counts the Ritz values of the first ``k`` spaces, each by itself, and samples the rest of the
        space misses what couples these spaces to one another and to the later ones. For a function's sum over the
        spectrum that is the sum over the Ritz values of all spaces together, less those of the first ``k`` each by
        itself and of the later ones together.

        Parameters
        ----------
        tridiagonal : list of (ndarray, ndarray)
            ``alpha`` and ``beta`` of each of ``K`` spaces.
        whole : ndarray
            Ritz values of all spaces together: see :meth:`eigenvalues`.
        fractions : ndarray
            ``(K + 1,)``: of the average, that of estimates with ``k`` spaces.

        Returns
        -------
        node, weight : ndarray
            Weights are in eigenvalues, and add up to zero.
        """
        matrix, starts = self._matrix(tridiagonal), np.cumsum([0, *(len(alpha) for alpha, _ in tridiagonal)])
        later = [
            (np.linalg.eigvalsh(matrix[start:, start:]).astype(np.float64), -float(fraction))
            for start, fraction in zip(starts[1:-1], fractions[1:-1], strict=True)
            if fraction
        ]
        single: list[Array] = [eigh_tridiagonal(a, b[:-1], eigvals_only=True) for a, b in tridiagonal]
        pieces = [(whole, float(fractions[1:].sum()))]
        pieces += [(value, -float(fractions[k + 1 :].sum())) for k, value in enumerate(single)]
        pieces += later
        return (
            np.concatenate([value for value, _ in pieces]),
            np.concatenate([np.full(len(value), weight) for value, weight in pieces]),
        )

    def _matrix(self, tridiagonal: list[tuple[Array, Array]]) -> Array:
        """The operator on the sum of all spaces."""
        ends = np.cumsum([len(alpha) for alpha, _ in tridiagonal])
        matrix = np.zeros((ends[-1], ends[-1]))
        for end, (alpha, beta), part in zip(ends, tridiagonal, self.parts, strict=True):
            own = slice(end - len(alpha), end)
            matrix[own, own] = np.diag(alpha) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1)
            matrix[end - 1, end:] = matrix[end:, end - 1] = beta[-1] * part
        return matrix

r"""The diagonal of a symmetric matrix from products with random signs, with errors of every entry.

For random signs :math:`z`, the mean of :math:`z \circ (H - T) z` is the diagonal of :math:`H - T`, whatever the fixed
matrix :math:`T` is (Bekas, Kokiopoulou and Saad); its variance is the sum of the squares of the other entries of the
row. Taking off a :math:`T` that holds the large eigenvalues is what makes it small, as in XDiag of Epperly, Tropp and
Webber; here :math:`T` is made of a Krylov space, which takes one product for each of its vectors instead of two.

References
----------
C. Bekas, E. Kokiopoulou, Y. Saad, "An estimator for the diagonal of a matrix", Applied Numerical Mathematics 57 (2007).
E. Epperly, J. Tropp, R. Webber, "XTrace: making the most of every sample in stochastic trace estimation",
arXiv:2301.07825.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.spectra.data_error import variance_of_forms


@dataclass
class DiagonalSums:
    """Sums over the sign vectors so far, and what is made of them.

    Attributes
    ----------
    total, square : ndarray, shape (P,)
        Sums of ``z (H - T) z`` by entry, and of their squares.
    halves : ndarray, shape (group, 2, P)
        What each group adds to the sums of ``z H z``, over sign vectors of even and of odd number.
    value, probe_se, data_se : ndarray, shape (P,)
        The diagonal and its standard errors, after :meth:`finish`.
    """

    total: Array
    square: Array
    halves: NDArray[np.float32]
    value: Array
    probe_se: Array
    data_se: Array
    _pending: NDArray[np.float32]

    @classmethod
    def zeros(cls, n_parameters: int, n_groups: int) -> DiagonalSums:
        """Before the first."""
        each = [np.zeros(n_parameters) for _ in range(5)]
        halves, pending = (np.zeros((n_groups, 2, n_parameters), dtype=np.float32) for _ in range(2))
        return cls(each[0], each[1], halves, each[2], each[3], each[4], pending)

    def add_group(self, group: int, signs: Tensor, product: Tensor, first: int) -> None:
        """Note what a group adds to products ``(P, k)`` with the sign vectors from number ``first`` on."""
        each = (signs * product).cpu().numpy()
        for half in (0, 1):
            self._pending[group, half] = each[:, (half - first) % 2 :: 2].sum(1)

    def add_total(self, signs: Tensor, rest: Tensor) -> None:
        """Add products ``(P, k)`` with what is not known of the matrix, and what has been noted of the groups."""
        each = (signs * rest).double().cpu().numpy()
        self.halves += self._pending
        self.total += each.sum(1)
        self.square += np.square(each).sum(1)

    def finish(self, known: Array, n: int, share: Array) -> None:
        """Estimates from the sums over ``n`` sign vectors, and the diagonal of the known part."""
        mean = self.total / n
        self.value = known + mean
        self.probe_se = np.sqrt(np.maximum(self.square / n - mean**2, 0) / max(n - 1, 1))
        counts = np.array([n - n // 2, n // 2])[:, None]
        first, second = (self.halves / counts / share[:, None, None]).swapaxes(0, 1)
        variance, noise = (variance_of_forms(share, one) for one in ((first + second) / 2, (first - second) / 2))
        self.data_se = np.sqrt(np.maximum(variance - noise, variance / 4))

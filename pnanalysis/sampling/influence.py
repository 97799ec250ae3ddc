r"""How a mean over a local posterior depends on the weight of each example.

With weights :math:`\omega_i` of the examples, :math:`U = \frac{n\beta}{n}\sum_i \omega_i \ell_i(w) + \dots`, the
derivative of :math:`\hat\lambda = \langle\Delta U\rangle` is
:math:`\psi_i = \beta\,(\langle\Delta\ell_i\rangle - \operatorname{Cov}(\Delta\ell_i, \Delta U))`, with
:math:`\Delta` for what is above the value at the checkpoint. The variance of :math:`\hat\lambda` over data is about
:math:`\sum_i (\psi_i - \bar\psi)^2`, by the infinitesimal jackknife (Giordano and Broderick, arXiv:2305.06466).
"""

from __future__ import annotations

import math

import numpy as np

from pnanalysis.arrays import Array


class Influence:
    """Sums over draws of chains from which the influence of each example follows.

    Parameters
    ----------
    centre : ndarray, shape (n,)
        Loss of each example at the checkpoint.
    n_chains : int
    nbeta : float
        Factor of the mean loss.
    """

    def __init__(self, centre: Array, n_chains: int, nbeta: float) -> None:
        self._centre, self._nbeta = centre, nbeta
        self._n_draws = np.zeros(n_chains)
        self._of_examples = np.zeros((n_chains, len(centre)))
        self._of_all = np.zeros(n_chains)
        self._products = np.zeros((n_chains, len(centre)))

    def add(self, chain: int, losses: Array) -> float:
        """Take the losses of all examples ``(n,)`` at a draw of one chain; returns the mean's excess."""
        excess = losses - self._centre
        mean = float(excess.mean())
        self._n_draws[chain] += 1
        self._of_examples[chain] += excess
        self._of_all[chain] += mean
        self._products[chain] += excess * mean
        return mean

    def sums(self) -> dict[str, Array]:
        """All that has been taken so far, as arrays that can be filled with what was saved of them."""
        return {
            "n_draws": self._n_draws, "of_examples": self._of_examples, "of_all": self._of_all,
            "products": self._products,
        }  # fmt: skip

    def of_chains(self) -> Array:
        """What each chain gives for the influence of each example, ``(chain, n)``; NaN of fewer than two draws."""
        draws = np.where(self._n_draws > 1, self._n_draws, np.nan)[:, None]
        means, mean = self._of_examples / draws, self._of_all[:, None] / draws
        covariance = (self._products / draws - means * mean) * draws / (draws - 1)
        influences: Array = self._nbeta / len(self._centre) * (means - self._nbeta * covariance)
        return influences


def standard_error(influences: Array) -> float:
    """Standard error of a mean over the posterior for the choice of examples; NaN for fewer than three chains.

    Squares of noisy influences would add their noise to it; products of those of different chains do not. One standard
    error of the mean of these products is added, so that short chains do not give a smaller error.

    Parameters
    ----------
    influences : ndarray, shape (chain, n)
        What each chain gives for each example. For the difference of two posteriors over the same examples, these are
        the differences of influences.
    """
    n_chains, n = influences.shape
    if n_chains < 3 or n < 2:
        return math.nan
    found = influences - influences.mean(axis=1, keepdims=True)
    products = found @ found.T * (n / (n - 1))
    off = ~np.eye(n_chains, dtype=bool)
    mean = float(products[off].mean())
    # jackknife over chains: leaving one out leaves all products without it
    left = [float(products[np.ix_(keep, keep)][off[np.ix_(keep, keep)]].mean()) for keep in _all_but_one(n_chains)]
    noise = math.sqrt((n_chains - 1) / n_chains * float(np.square(np.array(left) - np.mean(left)).sum()))
    return math.sqrt(max(mean + noise, 0.0))


def _all_but_one(n: int) -> list[list[int]]:
    return [[i for i in range(n) if i != out] for out in range(n)]

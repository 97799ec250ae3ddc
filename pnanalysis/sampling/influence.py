r"""How a mean over a local posterior depends on the weight of each example.

With weights :math:`\omega_i` of the examples, :math:`U = \sum_i \omega_i u_i + \dots` with
:math:`u_i = \beta\,\Delta\ell_i`, :math:`\Delta` for what is above the value at the checkpoint, and
:math:`\Delta U = \sum_i u_i`, the derivatives of :math:`\hat\lambda = \langle\Delta U\rangle` at equal weights are

.. math::
    \psi_i = \langle u_i\rangle - \operatorname{Cov}(u_i, \Delta U), \qquad
    \Psi_{ij} = -2 \operatorname{Cov}(u_i, u_j) + \kappa_3(u_i, u_j, \Delta U)

with the third cumulant :math:`\kappa_3`. The variance of :math:`\hat\lambda` over data is about
:math:`\lVert P\psi\rVert^2 + \lVert P\Psi P\rVert_F^2 / 2`, where :math:`P` subtracts the mean: the infinitesimal
jackknife (Giordano and Broderick, arXiv:2305.06466), and its second order. At a minimum of these very examples the
former is small, while others have a gradient there; the latter is what that does. Its norm is estimated by random
signs.
"""

from __future__ import annotations

import math

import numpy as np

from pnanalysis.arrays import Array

#: Random changes of all weights, whose second order is followed.
N_PROBES = 8


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
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (N_PROBES, len(centre)))  # the same for all networks
        self._changes = signs - signs.mean(1, keepdims=True)  # the weights keep their sum
        self._of_changes, self._with_all = (np.zeros((n_chains, N_PROBES)) for _ in range(2))
        self._with_changes, self._with_both = (np.zeros((n_chains, N_PROBES, len(centre))) for _ in range(2))

    def add(self, chain: int, losses: Array) -> float:
        """Take the losses of all examples ``(n,)`` at a draw of one chain; returns the mean's excess."""
        excess = losses - self._centre
        mean = float(excess.mean())
        self._n_draws[chain] += 1
        self._of_examples[chain] += excess
        self._of_all[chain] += mean
        self._products[chain] += excess * mean
        changes = self._changes @ excess / len(excess)
        self._of_changes[chain] += changes
        self._with_all[chain] += changes * mean
        self._with_changes[chain] += np.outer(changes, excess)
        self._with_both[chain] += np.outer(changes * mean, excess)
        return mean

    def sums(self) -> dict[str, Array]:
        """All that has been taken so far, as arrays that can be filled with what was saved of them."""
        return {
            "n_draws": self._n_draws, "of_examples": self._of_examples, "of_all": self._of_all,
            "products": self._products, "of_changes": self._of_changes, "with_all": self._with_all,
            "with_changes": self._with_changes, "with_both": self._with_both,
        }  # fmt: skip

    def of_chains(self) -> Array:
        """What each chain gives for the influence of each example, ``(chain, n)``; NaN of fewer than two draws."""
        draws = np.where(self._n_draws > 1, self._n_draws, np.nan)[:, None]
        means, mean = self._of_examples / draws, self._of_all[:, None] / draws
        covariance = (self._products / draws - means * mean) * draws / (draws - 1)
        influences: Array = self._nbeta / len(self._centre) * (means - self._nbeta * covariance)
        return influences

    def of_changes(self) -> Array:
        """What each chain gives for the second derivatives along random changes of the weights,
        ``(chain, probe, n)``; NaN of fewer than two draws.
        """
        draws = np.where(self._n_draws > 1, self._n_draws, np.nan)[:, None, None]
        u, s, d = (self._of_examples[:, None] / draws, self._of_changes[:, :, None] / draws,
                   self._of_all[:, None, None] / draws)  # fmt: skip
        us, ud, sd, usd = (
            self._with_changes / draws, self._products[:, None] / draws, self._with_all[:, :, None] / draws,
            self._with_both / draws,
        )  # fmt: skip
        covariance = us - u * s
        cumulant = usd - u * sd - s * ud - d * us + 2 * u * s * d
        scale = self._nbeta**2 / len(self._centre)
        found: Array = scale * (-2 * covariance + self._nbeta * cumulant)
        return found


def standard_error(influences: Array, of_changes: Array) -> float:
    """Standard error of a mean over the posterior for the choice of examples; NaN for fewer than three chains.

    Squares of noisy influences would add their noise to it; products of those of different chains do not. One standard
    error of the mean of these products is added, so that short chains do not give a smaller error.

    Parameters
    ----------
    influences : ndarray, shape (chain, n)
        What each chain gives for each example. For the difference of two posteriors over the same examples, these are
        the differences of influences.
    of_changes : ndarray, shape (chain, probe, n)
        The same of second derivatives along random changes of the weights.
    """
    n_chains, n = influences.shape
    if n_chains < 3 or n < 2:
        return math.nan
    first, second = (found - found.mean(axis=-1, keepdims=True) for found in (influences, of_changes))
    products = (first @ first.T + np.einsum("cpn,dpn->cd", second, second) / (2 * second.shape[1])) * (n / (n - 1))
    off = ~np.eye(n_chains, dtype=bool)
    mean = float(products[off].mean())
    # jackknife over chains: leaving one out leaves all products without it
    left = [float(products[np.ix_(keep, keep)][off[np.ix_(keep, keep)]].mean()) for keep in _all_but_one(n_chains)]
    noise = math.sqrt((n_chains - 1) / n_chains * float(np.square(np.array(left) - np.mean(left)).sum()))
    return math.sqrt(max(mean + noise, 0.0))


def _all_but_one(n: int) -> list[list[int]]:
    return [[i for i in range(n) if i != out] for out in range(n)]

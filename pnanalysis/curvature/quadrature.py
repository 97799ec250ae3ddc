"""From Lanczos coefficients to a spectral measure, and from a measure to numbers with error bars."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr
from scipy.linalg import eigh_tridiagonal
from scipy.stats import t as student_t


def ritz(alpha: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ritz values, Gauss weights and residual bounds of one tridiagonal matrix.

    Parameters
    ----------
    alpha, beta : ndarray
        ``(m,)`` each; ``beta[-1]`` couples the Krylov space with the rest.

    Returns
    -------
    value, weight, residual : ndarray
        ``(m,)`` each, values ascending. The weights are the squared first components of the eigenvectors: nodes
        and weights of the Gauss rule of the start vector's spectral measure. Within ``residual`` of each value
        lies an eigenvalue of the operator.
    """
    value, vector = eigh_tridiagonal(alpha, beta[:-1])
    return value, vector[0] ** 2, beta[-1] * np.abs(vector[-1])


def averaged_rule(alpha: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Generalised averaged Gauss rule: ``2 m - 1`` nodes and weights from ``m`` Lanczos steps.

    The Jacobi matrix is continued with its own mirror image. The rule has positive weights, is exact wherever the
    Gauss rule is, and resolves a continuous bulk about twice as finely at no further product. Its outermost nodes
    may lie slightly outside the spectrum.

    References
    ----------
    Spalevic, On generalized averaged Gaussian formulas, Math. Comp. 76 (2007).
    Reichel and Spalevic, A new representation of generalized averaged Gauss quadrature rules, 2021.
    """
    m = len(alpha)
    if m == 1 or beta[-1] == 0:
        value, weight, _ = ritz(alpha, beta)
        return value, weight
    mirrored = np.concatenate([beta[: m - 1], beta[m - 1 :], beta[: m - 2][::-1]])
    value, vector = eigh_tridiagonal(np.concatenate([alpha, alpha[:-1][::-1]]), mirrored)
    return value, vector[0] ** 2


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error and the degrees of freedom behind that (``inf``: known, or very many)."""

    value: float
    se: float = 0.0
    dof: float = np.inf

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Two-sided Student interval."""
        half = student_t.ppf(0.5 + level / 2, self.dof) * self.se if self.se > 0 else 0.0
        return self.value - half, self.value + half


@dataclass(frozen=True)
class SpectralMeasure:
    """An estimated spectrum: weighted nodes, of which some are known and some sampled.

    Attributes
    ----------
    node, weight : ndarray
        ``(quadrature,)``; the weights sum to 1, one eigenvalue has weight ``1 / P``.
    sampled : ndarray of bool
        ``(quadrature,)``. Known nodes carry exactly ``1 / P`` each; sampled ones come from random probes of the
        orthogonal complement of the known directions.
    n_parameters, n_probes : int
        ``P`` and the number of probes behind the sampled nodes.

    Notes
    -----
    For a probe ``g`` uniform on the unit sphere of the ``n`` sampled dimensions and any function ``f``, with mean
    and variance over the ``n`` eigenvalues,

        E[g' f(B) g] = mean f,        Var[g' f(B) g] = 2 / (n + 2) * var f.

    The spectral measure itself thus tells the error of every average taken with it. That error bar uses all the
    eigenvalues, not the scatter of a handful of probes, so it holds for a single probe too. The variance is itself
    estimated; its uncertainty follows from the same formula and gives, matched to a chi-square distribution
    (Satterthwaite), the degrees of freedom of the interval: close to ``n_probes`` where one eigenvalue dominates,
    very large where many eigenvalues share.
    """

    node: np.ndarray
    weight: np.ndarray
    sampled: np.ndarray
    n_parameters: int
    n_probes: int

    @classmethod
    def from_dataset(cls, ds: xr.Dataset) -> SpectralMeasure:
        """The measure in a ``spectral_density`` dataset of one checkpoint (padding is dropped)."""
        keep = np.isfinite(ds["weight"].values)
        return cls(
            ds["node"].values[keep],
            ds["weight"].values[keep],
            ds["sampled"].values[keep].astype(bool),
            int(ds["n_parameters"]),
            int(ds["n_bulk_probes"]),
        )

    def mean(self, f: np.ndarray) -> Estimate:
        """Average of a function over the spectrum, given its values ``(quadrature,)`` at the nodes.

        The error is that of sampling; the rule's own (zero for polynomials of degree below twice the number of
        steps) is not in it.
        """
        value, se = self.means(f[None])
        return Estimate(float(value[0]), float(se[0]), self._degrees(f))

    def means(self, f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Averages and standard errors of many functions: values ``(n, quadrature)`` to ``(n,)`` and ``(n,)``."""
        value = f @ self.weight
        mass, share = self._sampled_mass()
        if mass <= 0 or self.n_probes == 0:
            return value, np.zeros_like(value)
        bulk = f[:, self.sampled]
        centre = bulk @ share
        variance = np.maximum((bulk - centre[:, None]) ** 2 @ share, 0)
        return value, mass * np.sqrt(self._sphere_factor() * variance)

    def total(self, f: np.ndarray) -> Estimate:
        """Sum of a function over all eigenvalues: ``P`` times :meth:`mean`."""
        mean = self.mean(f)
        return Estimate(self.n_parameters * mean.value, self.n_parameters * mean.se, mean.dof)

    def _sampled_mass(self) -> tuple[float, np.ndarray]:
        mass = float(self.weight[self.sampled].sum())
        return mass, self.weight[self.sampled] / mass if mass > 0 else self.weight[self.sampled]

    def _sphere_factor(self) -> float:
        n_known = int((~self.sampled).sum())
        return 2 / (self.n_parameters - n_known + 2) / self.n_probes

    def _degrees(self, f: np.ndarray) -> float:
        mass, share = self._sampled_mass()
        if mass <= 0 or self.n_probes == 0:
            return np.inf
        squared = (f[self.sampled] - f[self.sampled] @ share) ** 2
        first, second = squared @ share, squared**2 @ share
        spread = self._sphere_factor() * (second / first**2 - 1) if first > 0 else 0.0
        return 2 / spread if spread > 0 else np.inf


def wasserstein1(nodes_a: np.ndarray, weights_a: np.ndarray, nodes_b: np.ndarray, weights_b: np.ndarray) -> float:
    """Wasserstein-1 distance between two discrete measures on the line, in the nodes' unit.

    Parameters
    ----------
    nodes_a, weights_a : ndarray
        ``(n,)`` each; the weights are taken relative to their sum.
    nodes_b, weights_b : ndarray
        ``(m,)`` each.

    Returns
    -------
    float
        The integral of the absolute difference of the cumulative distributions.
    """
    nodes = np.concatenate([nodes_a, nodes_b])
    mass = np.concatenate([weights_a / np.sum(weights_a), -np.asarray(weights_b) / np.sum(weights_b)])
    order = np.argsort(nodes, kind="stable")
    return float(np.abs(np.cumsum(mass[order])[:-1]) @ np.diff(nodes[order]))

"""From Lanczos coefficients to a spectral measure, and from a measure to numbers with error bars."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal, hessenberg

from pnanalysis.arrays import Array
from pnanalysis.estimates import Estimate

#: Bounds on the factors by which calibration changes weights.
FACTORS = (0.2, 5.0)


#: Nodes and weights of a quadrature rule.
Rule = tuple[Array, Array]


class RitzPairs(NamedTuple):
    """What one tridiagonal matrix says about the spectrum, ``(m,)`` each, values ascending.

    ``weight``, the squared first components of the eigenvectors, makes ``value`` the nodes of the Gauss rule of the
    start vector's spectral measure. An eigenvalue of the operator lies within ``residual`` of each value.
    """

    value: Array
    weight: Array
    residual: Array


def ritz(alpha: Array, beta: Array) -> RitzPairs:
    """Ritz values, Gauss weights and residual bounds of one tridiagonal matrix.

    Parameters
    ----------
    alpha, beta : ndarray
        ``(m,)`` each; ``beta[-1]`` couples the Krylov space to the rest of the space.
    """
    value, vector = eigh_tridiagonal(alpha, beta[:-1])
    return RitzPairs(value, vector[0] ** 2, beta[-1] * np.abs(vector[-1]))


def averaged_rule(alpha: Array, beta: Array) -> tuple[Array, Array]:
    """Generalised averaged Gauss rule: ``2 m - 1`` nodes and weights from ``m`` Lanczos steps.

    The Jacobi matrix is continued with its own mirror image. The rule has positive weights, is exact wherever the
    Gauss rule is, and resolves a continuous bulk about twice as finely without further products. Its outermost nodes
    may lie slightly outside the spectrum.

    References
    ----------
    Spalevic, On generalized averaged Gaussian formulas, Math. Comp. 76 (2007).
    Reichel and Spalevic, A new representation of generalized averaged Gauss quadrature rules, 2021.
    """
    m = len(alpha)
    if beta[-1] == 0:  # the Krylov space is invariant and the Gauss rule exact
        value, weight, _ = ritz(alpha, beta)
        return value, weight
    if m == 1:  # the two points with this mean and variance
        return alpha[0] + beta[0] * np.array([-1.0, 1.0]), np.array([0.5, 0.5])
    mirrored = np.concatenate([beta[: m - 1], beta[m - 1 :], beta[: m - 2][::-1]])
    value, vector = eigh_tridiagonal(np.concatenate([alpha, alpha[:-1][::-1]]), mirrored)
    return value, vector[0] ** 2


def rule_with_node(point: float, value: Array, weight: Array, residual: Array) -> Rule:
    """The rule of ``m + 1`` nodes with one at a given point that has all the moments known after ``m`` steps.

    Parameters
    ----------
    point : float
    value, weight, residual : ndarray
        ``(m,)`` each, of the Gauss rule; residuals in the space that the start vector was drawn from.

    Returns
    -------
    node, weight : ndarray
        ``(m + 1,)`` each, ascending. Exact for polynomials up to degree ``2 m``. The nodes below the point hold the
        least mass that any measure with these moments has below it, and together with the node itself the most
        (Chebyshev, Markov, Stieltjes). Where the residuals are zero the node has no weight: the Gauss rule is exact.

    References
    ----------
    Akhiezer, The Classical Moment Problem (1965), section 2.5. Golub, Some modified matrix eigenvalue problems, SIAM
    Review 15 (1973), for the rule with a given node.
    """
    [rule] = rules_with_node([point], value, weight, residual)
    return rule


def rules_with_node(points: Iterable[float], value: Array, weight: Array, residual: Array) -> list[Rule]:
    """Likewise with a node at each of several points, one rule each."""
    alpha, beta = jacobi_matrix(value, weight)
    smallest = np.finfo(float).eps * (np.abs(value).max() or 1.0)
    off_diagonal = np.append(beta, np.linalg.norm(residual))
    rules = []
    for point in points:
        distance = value - point
        distance = np.where(np.abs(distance) < smallest, smallest, distance)
        last = point + np.sum(residual**2 / distance)
        node, vector = eigh_tridiagonal(np.append(alpha, last), off_diagonal)
        rules.append((node, vector[0] ** 2))
    return rules


def mass_below(point: float, value: Array, weight: Array, residual: Array) -> tuple[float, float]:
    """Mass of a start vector's spectral measure below a point, and half of what its moments leave open.

    Halfway between the least and the most that :func:`rule_with_node` says; parameters as there.
    """
    node, mass = rule_with_node(point, value, weight, residual)
    at = int(np.argmin(np.abs(node - point)))
    return float(mass[:at].sum() + mass[at] / 2), float(mass[at] / 2)


def jacobi_matrix(value: Array, weight: Array) -> tuple[Array, Array]:
    """Diagonal ``(m,)`` and off-diagonal ``(m - 1,)`` of the tridiagonal matrix with this Gauss rule."""
    bordered = np.diag(np.concatenate([[0.0], value]))
    bordered[0, 1:] = bordered[1:, 0] = np.sqrt(weight)
    tridiagonal = hessenberg(bordered)  # the transformation leaves the first axis as it is
    return np.diag(tridiagonal)[1:].copy(), np.abs(np.diag(tridiagonal, 1)[1:])


@dataclass(frozen=True)
class Extremes:
    """The outermost Ritz values, ``min_high`` and ``max_low``, and how far beyond them their residuals reach."""

    min_low: float
    min_high: float
    max_low: float
    max_high: float


def extremes(value: Array, residual: Array) -> Extremes:
    """Bounds of the spectrum from Ritz values and residual bounds of any shape, padded with NaN.

    Ritz values lie within the spectrum, and an eigenvalue lies within the residual of each. That there is none beyond
    the outermost holds with high probability for random start vectors, once the residual is small compared with the
    spacing of the Ritz values there.
    """
    top, bottom = int(np.nanargmax(value)), int(np.nanargmin(value))
    value, residual = value.ravel(), residual.ravel()
    return Extremes(
        float(value[bottom] - residual[bottom]),
        float(value[bottom]),
        float(value[top]),
        float(value[top] + residual[top]),
    )


def own_residuals(ds: xr.Dataset) -> Array:
    """Residuals ``(probe, lanczos)`` of the Ritz values in the space that was left when their probe ran.

    In the whole space, ``ritz_residual``, they also hold the probe's coupling to what was deflated before.
    """
    whole, coupling = ds["ritz_residual"].values, ds["ritz_coupling"].values
    own: Array = np.sqrt(np.maximum(whole**2 - coupling[:, None] ** 2, 0.0))
    return own


def gauss_rules(ds: xr.Dataset) -> list[RitzPairs]:
    """Each probe's Ritz values, weights and own residuals, without padding."""
    columns = zip(ds["ritz_value"].values, ds["ritz_weight"].values, own_residuals(ds), strict=True)
    return [RitzPairs(*(column[np.isfinite(rule[0])] for column in rule)) for rule in columns]


def all_ritz_values(ds: xr.Dataset, own: bool) -> tuple[Array, Array]:
    """Ritz values ``(n,)`` of all spaces and their residuals; those of merged spaces are of all these together.

    Parameters
    ----------
    ds : xarray.Dataset
    own : bool
        Give spaces that were not merged the residuals of :func:`own_residuals`: most of what couples them to the space
        deflated before belongs to eigenvalues far from theirs.
    """
    value, residual = ds["ritz_value"].values, own_residuals(ds) if own else ds["ritz_residual"].values
    known = np.isfinite(value)
    if "ritz_merged" in ds:
        known &= ds["ritz_merged"].values[:, None] != 1
    merged_value, merged_residual = merged_ritz_values(ds)
    return np.append(value[known], merged_value), np.append(residual[known], merged_residual)


def merged_ritz_values(ds: xr.Dataset) -> tuple[Array, Array]:
    """Ritz values ``(n,)`` of all merged spaces together, descending, and their residuals; empty without such."""
    if "ritz_merged" not in ds or not (ds["ritz_merged"].values == 1).any():
        return np.empty(0), np.empty(0)
    known = np.isfinite(ds["deflated_value"].values)
    return ds["deflated_value"].values[known], ds["deflated_residual"].values[known]


def coupling_of(ds: xr.Dataset, f: Callable[[Array], Array]) -> float:
    """What the coupling of deflated spaces adds to the sum of a function over the spectrum; 0 where it is not known.

    See :meth:`pnanalysis.spectra.merged.MergedSpaces.correction`.
    """
    if "coupled_node" not in ds:
        return 0.0
    return float(np.nansum(ds["coupled_weight"].values * f(ds["coupled_node"].values)))


@dataclass(frozen=True)
class SpectralMeasure:
    """An estimated spectrum: weighted nodes, some of them counted exactly and some sampled.

    Attributes
    ----------
    node, weight : ndarray
        ``(quadrature,)``; the weights sum to 1, one eigenvalue has weight ``1 / P``.
    probe : ndarray of int
        ``(quadrature,)``. For a sampled node the probe it comes from, counted from 1. For the Ritz values of a
        deflated space, each of which stands for one eigenvalue, zero or minus the index of the deflating probe.
    n_before : ndarray of int
        ``(quadrature,)``. Directions that had been deflated when the node's probe ran.
    n_parameters : int
        ``P``.

    Notes
    -----
    For a probe ``g`` uniform on the unit sphere in ``n`` dimensions and any function ``f``, with mean and variance
    over the ``n`` eigenvalues there,

        E[g' f(B) g] = mean f,        Var[g' f(B) g] = 2 / (n + 2) * var f.

    The spectral measure itself thus gives the error of every average taken with it. Since that error bar uses all the
    eigenvalues rather than the scatter of a few probes, it holds for a single probe too. The variance is itself
    estimated. Its uncertainty follows from the same formula and gives, matched to a chi-square distribution
    (Satterthwaite), the degrees of freedom of the interval: close to the number of probes where one eigenvalue
    dominates, very large where many contribute.
    """

    node: Array
    weight: Array
    probe: NDArray[np.intp]
    n_before: NDArray[np.intp]
    n_parameters: int

    @classmethod
    def from_dataset(cls, ds: xr.Dataset) -> SpectralMeasure:
        """The measure in a ``spectral_density`` dataset of one checkpoint, without its padding."""
        keep = np.isfinite(ds["weight"].values)
        columns = (ds[name].values[keep] for name in ("node", "weight", "node_run", "node_n_before"))
        node, weight, probe, n_before = columns
        return cls(node, weight, probe.astype(int), n_before.astype(int), int(ds["n_parameters"]))

    def with_rules(self, rules: Sequence[Rule]) -> SpectralMeasure:
        """The same with other rules in place of the probes' averaged ones, of the same moments.

        Parameters
        ----------
        rules : sequence of (ndarray, ndarray)
            Nodes and weights, which sum to 1, of each probe, in order; those of probes without sampled nodes are
            ignored.
        """
        columns = (self.node, self.weight, self.probe, self.n_before)
        parts = [tuple(column[~self.sampled] for column in columns)]
        for index, (node, weight) in enumerate(rules):
            own = self.probe == index + 1
            if own.any():
                like = np.ones(len(node), dtype=int)
                mass = self.weight[own].sum() * weight
                parts.append((node, mass, (index + 1) * like, self.n_before[own][0] * like))
        node, weight, probe, n_before = (np.concatenate(column) for column in zip(*parts, strict=True))
        measure = SpectralMeasure(node, weight, probe, n_before, self.n_parameters)
        # both sets of rules give a probe's first two moments: what they differ by comes from a calibration
        return measure.calibrated(float(self.weight @ self.node), float(self.weight @ self.node**2))

    def calibrated(self, mean: float, mean_square: float) -> SpectralMeasure:
        """The measure with sampled weights that give it this mean and mean square.

        The weights of each probe are multiplied by a quadratic polynomial of the node, so that its mass stays the same.
        Factors are kept within :data:`FACTORS`, and the two means may then be missed by a little. Where they are known
        better than the measure knows them, this brings all of it nearer the spectrum.

        References
        ----------
        Deville and Sarndal, Calibration estimators in survey sampling, J. Am. Stat. Assoc. 87 (1992).
        """
        probes = [self.probe == probe for probe in np.unique(self.probe[self.sampled])]
        functions = np.zeros((2, len(self.node)))
        for own in probes:
            weight = self.weight[own] / self.weight[own].sum()
            centred = self.node[own] - weight @ self.node[own]
            functions[:, own] = centred, centred**2 - weight @ centred**2
        powers = np.stack([self.node, self.node**2])
        scale, size = np.abs(functions).max(axis=1), np.abs(powers).max(axis=1)
        if not (scale.all() and size.all()):
            return self
        functions /= scale[:, None]
        missing = (np.array([mean, mean_square]) - powers @ self.weight) / size
        response = (powers * self.weight) @ functions.T / size[:, None]
        factors = 1 + np.linalg.lstsq(response, missing, rcond=1e-10)[0] @ functions
        weights = self.weight * np.where(self.sampled, factors.clip(*FACTORS), 1.0)
        for own in probes:
            weights[own] *= self.weight[own].sum() / weights[own].sum()
        return replace(self, weight=weights)

    @property
    def sampled(self) -> NDArray[np.bool_]:
        """Which nodes are sampled, ``(quadrature,)`` of bool."""
        return self.probe > 0

    def mean(self, f: Array) -> Estimate:
        """Average of a function over the spectrum, given its values ``(quadrature,)`` at the nodes.

        The standard error is that of sampling. It does not include the error of the quadrature rule, which is zero
        for polynomials of degree below twice the number of steps.
        """
        value = float(f @ self.weight)
        variances, dofs = [], []
        for stage in self._stages:
            mean, square = stage.averages(np.stack([f, f**2]))
            variances.append(stage.factor * max(square - mean**2, 0.0))
            deviation = f - mean
            # in units of the largest deviation, so that its fourth power cannot underflow to zero
            squared_deviation = (deviation / (np.abs(deviation).max() or 1.0)) ** 2
            second, fourth = stage.averages(np.stack([squared_deviation, squared_deviation**2]))
            excess = fourth / second**2 - 1 if second > 1e-100 else 0.0
            relative_variance = 2 / (stage.n_free + 2) / stage.n_probes * excess  # of the variance's own estimate
            dofs.append(2 / relative_variance if relative_variance > 0 else np.inf)
        variance = float(np.sum(variances))
        if variance <= 0:
            return Estimate(value, 0.0)
        weighted = float(np.sum(np.square(variances) / np.array(dofs)))  # Satterthwaite's denominator
        # one probe is one degree of freedom, however little of its mass lies away from the mean
        return Estimate(value, variance**0.5, dof=max(variance**2 / weighted, 1.0) if weighted > 0 else np.inf)

    def means(self, f: Array) -> tuple[Array, Array]:
        """Averages and standard errors of many functions: values ``(n, quadrature)`` to ``(n,)`` and ``(n,)``."""
        variance = np.zeros(len(f))
        for stage in self._stages:
            centre = stage.averages(f)
            variance += stage.factor * np.maximum(stage.averages(f**2) - centre**2, 0)
        return f @ self.weight, np.sqrt(variance)

    def total(self, f: Array) -> Estimate:
        """Sum of a function over all eigenvalues: ``P`` times :meth:`mean`."""
        mean = self.mean(f)
        return Estimate(self.n_parameters * mean.value, self.n_parameters * mean.se, dof=mean.dof)

    def cumulative_variance(self, points: Array) -> tuple[Array, int]:
        """Sampling variance of the cumulative distribution at some points, from the scatter of the probes.

        Parameters
        ----------
        points : ndarray
            ``(n,)``, ascending.

        Returns
        -------
        variance : ndarray
            ``(n,)``.
        dof : int
            One less than the number of probes. For a single probe 0: there is no scatter, and the variance is that of
            :meth:`means`, which ignores that the places of the nodes are random too.

        Notes
        -----
        Each probe gives an estimate of the whole spectrum: what was deflated before it, and its own nodes. The
        estimates are averaged with weights ``t_i`` in proportion to their precision, and the variance of the average
        is ``sum t_i (F_i - F)^2 / (K - 1)``. It includes the randomness of the nodes' masses and of their places. The
        places matter for large matrices, where masses are known to ``P^(-1/2)`` while the nodes stay as far apart as
        the number of steps makes them.
        """
        precision, weights = self._of_each_probe()
        if len(precision) < 2:
            return self.means((self.node <= points[:, None]).astype(float))[1] ** 2, 0
        order = np.argsort(self.node)
        steps = np.cumsum(weights[:, order], axis=1)
        steps = np.concatenate([np.zeros((len(steps), 1)), steps], axis=1)
        distributions = steps[:, np.searchsorted(self.node[order], points, side="right")]
        return self._scatter(precision, distributions), len(precision) - 1

    def scatter(self, f: Array) -> Array:
        """Sampling variances ``(n,)`` of the averages of functions, from the scatter of the probes.

        The variance of :meth:`means` comes from the randomness of the nodes' masses alone; this one, of functions that
        vary between neighbouring nodes, also from that of their places. Zero for fewer than two probes.

        Parameters
        ----------
        f : ndarray
            ``(n, quadrature)``, the values at the nodes.
        """
        precision, weights = self._of_each_probe()
        return self._scatter(precision, weights @ f.T) if len(precision) > 1 else np.zeros(len(f))

    @staticmethod
    def _scatter(precision: Array, estimates: Array) -> Array:
        """Variance ``(n,)`` of the weighted average of the probes' estimates ``(probe, n)``."""
        variance: Array = precision @ (estimates - precision @ estimates) ** 2 / (len(precision) - 1)
        return variance

    def _of_each_probe(self) -> tuple[Array, Array]:
        """Each probe's estimate of the whole spectrum: weights of the nodes ``(probe, quadrature)``.

        Along with the weights ``(probe,)`` of these estimates in the average.
        """
        probes = np.unique(self.probe[self.sampled])
        precision, weights = np.zeros(len(probes)), np.zeros((len(probes), len(self.node)))
        for i, probe in enumerate(probes):
            own = self.probe == probe
            n_before, mass = self.n_before[own][0], self.weight[own].sum()
            free = 1 - n_before / self.n_parameters
            precision[i] = mass / free
            weights[i, own] = self.weight[own] * free / mass
            weights[i, ~self.sampled & (self.n_before < n_before)] = 1 / self.n_parameters
        return precision / precision.sum(), weights

    def trace_variances(self) -> dict[int, float]:
        """Variance of one probe's estimate of the trace, by the number of directions deflated before it."""
        return {
            stage.n_before: stage.n_free**2 * 2 / (stage.n_free + 2) * max(square - mean**2, 0.0)
            for stage in self._stages
            for mean, square in [stage.averages(np.stack([self.node, self.node**2]))]
        }

    @cached_property
    def _stages(self) -> list[_Stage]:
        """The stages at which probes ran, each with the best estimate of the spectrum that was left at that stage.

        That estimate joins the probes of this stage and of all later ones; for the later ones, what was deflated in
        between is known exactly.
        """
        sampled = self.sampled
        starts = np.unique(self.n_before[sampled])
        n_free = self.n_parameters - starts
        mass = np.array([self.weight[sampled & (self.n_before == start)].sum() for start in starts])
        stage_weight = mass * self.n_parameters / n_free  # of each stage's estimate in the average over the stages
        stages = []
        for i, start in enumerate(starts):
            later_weight = stage_weight[i:] / stage_weight[i:].sum()
            weight = np.zeros_like(self.weight)
            for later, w, n_left, total in zip(starts[i:], later_weight, n_free[i:], mass[i:], strict=True):
                own = sampled & (self.n_before == later)
                weight[own] += w * n_left / n_free[i] * self.weight[own] / total
                between = ~sampled & (self.n_before >= start) & (self.n_before < later)
                weight[between] += w / n_free[i]
            own = sampled & (self.n_before == start)
            probe_mass = np.array([self.weight[self.probe == probe].sum() for probe in np.unique(self.probe[own])])
            # Var of a weighted sum of independent probes: the squared masses times the variance of one
            factor = 2 / (n_free[i] + 2) * float(np.sum(probe_mass**2))
            n_probes = len(np.unique(self.probe[sampled & (self.n_before >= start)]))
            stages.append(_Stage(int(start), int(n_free[i]), weight, factor, n_probes))
        return stages


@dataclass(frozen=True)
class _Stage:
    """The spectrum as seen by the probes that ran when ``n_before`` directions had been deflated.

    ``weight`` ``(quadrature,)`` are the weights of all nodes in that spectrum, of ``n_free`` eigenvalues, which
    ``n_probes`` probes contribute to. ``factor`` times the variance of a function over it is the variance that the
    stage adds to the function's mean.
    """

    n_before: int
    n_free: int
    weight: Array
    factor: float
    n_probes: int

    def averages(self, f: Array) -> Array:
        """Averages of functions ``(n, quadrature)`` over the spectrum left at this stage."""
        averages: Array = f @ self.weight
        return averages

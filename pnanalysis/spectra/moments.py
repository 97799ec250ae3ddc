"""Trace and sum of squares of a spectrum: from its measure, and from probes of a single product.

A single product with a random unit vector ``g`` in the complement of ``k`` deflated directions gives ``g'Bg`` and
``|Bg|^2``: its part of the trace and of the sum of squares, and nothing else that is worth a product. It knows these
two better than a probe of many steps does, because all that is deflated by then is known exactly. Its estimate is
unbiased whatever was deflated, so its error is uncorrelated with that of the measure, and the two are averaged by
their precision. The measure is then calibrated: its sampled weights are changed as little as makes its own moments the
averaged ones (:meth:`pnanalysis.spectra.quadrature.SpectralMeasure.calibrated`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from pnanalysis.arrays import Array
from pnanalysis.estimates import Estimate
from pnanalysis.spectra.allocation import FEWEST_SINGLE
from pnanalysis.spectra.quadrature import SpectralMeasure, coupling_of

#: Beyond that, little is coupled together, and says little about the rest.
_MOST_LEFT = 3.0


@dataclass(frozen=True)
class Moments:
    """Sum of the eigenvalues, and of their squares.

    ``of_single`` is the weight of the single products in both; ``gain`` the larger of the two standard errors in units
    of what they would be without these.
    """

    trace: Estimate
    square: Estimate
    of_single: float = 0.0
    gain: float = 1.0

    @property
    def frobenius_norm(self) -> Estimate:
        """Root of the sum of squares."""
        norm = float(np.sqrt(max(self.square.value, 0.0)))
        return Estimate(norm, self.square.se / (2 * norm) if norm > 0 else 0.0, dof=self.square.dof)


def moments(ds: xr.Dataset, measure: SpectralMeasure) -> Moments:
    """Both sums, from all that a ``"spectral_density"`` dataset of one checkpoint knows."""
    trace, square = measure.total(measure.node), measure.total(measure.node**2)
    # |H|_F^2 = |T|_F^2 + |B|_F^2 + 2 beta^2, see pnanalysis.spectra.deflation
    whole = Moments(trace, replace(square, value=square.value + 2 * float(ds["coupling"]) ** 2))
    alpha = _present(ds["single_mean"]) if "single_mean" in ds else np.zeros(0)
    if len(alpha) < FEWEST_SINGLE or whole.trace.se == 0:
        return whole
    if "probe_trace" in ds:  # the measure is calibrated: what it was before
        whole = Moments(
            replace(whole.trace, value=float(ds["probe_trace"])),
            replace(whole.square, value=float(ds["probe_square"])),
        )
    single = _from_single_products(ds, alpha, _present(ds["single_mean_square"]), measure.n_parameters)
    # weighted by the precision of the trace, which is known better than that of the sum of squares
    of_single = whole.trace.se**2 / (whole.trace.se**2 + single.trace.se**2)
    of_single = float(ds["single_weight"]) if "single_weight" in ds else of_single
    trace, square = (
        _average(whole.trace, single.trace, of_single),
        _average(whole.square, single.square, of_single),
    )
    before = [(trace.se, whole.trace.se), (square.se, whole.square.se)]
    return Moments(trace, square, of_single, min(max(after / se for after, se in before if se > 0), 1.0))


def mean_beside_moments(f: Array, measure: SpectralMeasure, gain: float) -> Estimate:
    """Average of a function over a calibrated measure.

    Parameters
    ----------
    f : ndarray
        ``(quadrature,)``, its values at the nodes.
    measure : SpectralMeasure
    gain : float
        Of the two moments that it is calibrated to, see :class:`Moments`.

    Notes
    -----
    What a quadratic polynomial explains of the function has the error of the moments, the rest that of the measure
    (Deville and Sarndal 1992, on the variance of calibrated estimators).
    """
    sampled = measure.sampled
    if gain >= 1 or not sampled.any():
        return measure.mean(f)
    scaled = measure.node / (np.abs(measure.node).max() or 1.0)
    powers, root = np.stack([np.ones_like(scaled), scaled, scaled**2]), np.sqrt(measure.weight[sampled])
    polynomial = np.linalg.lstsq((powers[:, sampled] * root).T, f[sampled] * root, rcond=1e-10)[0] @ powers
    explained, rest = measure.mean(polynomial), measure.mean(f - polynomial)
    return _sum(replace(explained, se=gain * explained.se), rest)


def _from_single_products(ds: xr.Dataset, alpha: Array, square: Array, n_parameters: int) -> Moments:
    deflated = _present(ds["deflated_value"]) if "deflated_value" in ds else np.zeros(0)
    n, b = n_parameters - len(deflated), len(alpha)
    # Var[g'Bg] = 2 / (n + 2) * variance of the eigenvalues of B, whose mean square each product tells
    variance = max(float(square.mean() - alpha.mean() ** 2), 0.0)
    trace = Estimate(
        float(deflated.sum() + n * alpha.mean()),
        n * float(np.sqrt(2 / (n + 2) * variance / b)),
        dof=_dof(square - 2 * alpha * alpha.mean() + alpha.mean() ** 2),
    )
    rest = n * float(square.mean()) + 2 * float(ds["single_coupling"]) ** 2
    error = n * float(square.std(ddof=1)) / np.sqrt(b)
    return Moments(trace, Estimate(float((deflated**2).sum()) + rest, error, dof=b - 1))


def _dof(samples: Array) -> float:
    """Of a chi-square variable with the relative scatter that the mean of such samples has (Satterthwaite)."""
    mean, variance = float(samples.mean()), float(samples.var(ddof=1)) / len(samples)
    return 2 * mean**2 / variance if variance > 0 else np.inf


def _average(a: Estimate, b: Estimate, weight: float) -> Estimate:
    """Weighted mean of two uncorrelated estimates, ``b`` with ``weight``."""
    scaled = [replace(one, value=share * one.value, se=share * one.se) for one, share in ((a, 1 - weight), (b, weight))]
    return _sum(*scaled)


def _sum(a: Estimate, b: Estimate) -> Estimate:
    """Of two uncorrelated estimates."""
    variances = np.array([a.se**2, b.se**2])
    total = float(variances.sum())
    weighted = float(np.sum(variances**2 / [a.dof, b.dof]))  # Satterthwaite's denominator
    return Estimate(a.value + b.value, total**0.5, dof=total**2 / weighted if weighted > 0 else np.inf)


def _present(array: xr.DataArray) -> Array:
    """Without padding."""
    return np.asarray(array.values[np.isfinite(array.values)])


def coupling_left(ds: xr.Dataset, measure: SpectralMeasure, sums: Moments) -> float:
    """What couples the deflated spaces to the rest of the space, in squares, relative to what couples them together."""
    known = coupling_of(ds, np.square)
    whole = sums.square.value - measure.n_parameters * float(measure.node**2 @ measure.weight)
    return float(np.clip((whole - known) / known, 0.0, _MOST_LEFT)) if known > 0 else 0.0

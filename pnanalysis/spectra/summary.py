"""A spectrum in numbers, each with its error."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from pnanalysis.arrays import Array
from pnanalysis.estimates import Estimate
from pnanalysis.spectra.ends import bulk_edge, class_numbers, lambda_max_and_min, leading, ratio_of_bounds
from pnanalysis.spectra.moments import Moments, coupling_left, mean_beside_moments, moments
from pnanalysis.spectra.negative import negative_curvature, negative_mass
from pnanalysis.spectra.outliers import find_gap
from pnanalysis.spectra.quadrature import SpectralMeasure, coupling_of
from pnanalysis.spectra.rule_error import SameMoments

#: Two-sided level of every interval.
LEVEL = 0.95
#: Relative round-off where a dataset does not say what arithmetic its products had: that of single precision.
ROUND_OFF = 1e-6


def summarise(ds: xr.Dataset, *, top_k: int = 10, ridge: float = 1.0, n_classes: int | None = None) -> xr.Dataset:
    """Describe a spectrum.

    Parameters
    ----------
    ds : xarray.Dataset
        A ``"spectral_density"`` dataset of one checkpoint; only its nodes and Ritz values are used, and the attributes
        ``round_off`` (relative, of the products) and ``positive_semidefinite``.
    top_k : int
        Number of largest eigenvalues to list.
    ridge : float
        ``z`` in the effective dimension, in units of the eigenvalues.
    n_classes : int, optional
        ``C``, of a classifier; the attribute ``n_classes`` by default.

    Returns
    -------
    xarray.Dataset
        Scalars unless noted. ``NAME_se`` is a standard error, ``NAME_low`` and ``NAME_high`` are a 95 % interval:

        - ``trace``, ``frobenius_norm``: sum, and root of the sum of squares, of the eigenvalues;
        - ``lambda_max``, ``lambda_min``: the extreme Ritz values. Ritz values lie within the spectrum, so the interval
          is a bound that extends outwards, by the residual, and to both sides by the round-off of the products; it is
          not statistical;
        - ``top_value``, ``top_residual`` ``(top,)``: the largest Ritz values, descending, and bounds on their
          distances to the nearest eigenvalue;
        - ``negative_curvature``: magnitudes of the negative eigenvalues in the sum of all magnitudes, and
          ``negative_mass``: fraction of the eigenvalues below ``-1e-3`` of the largest magnitude (see
          :mod:`pnanalysis.spectra.negative`). Both exactly zero for positive semidefinite operators;
        - ``effective_rank``: ``(sum |lambda|)^2 / sum lambda^2``;
        - ``effective_dimension``: sum of ``lambda / (lambda + z)`` over the positive eigenvalues;
        - ``n_outliers``, ``n_outliers_negative``: eigenvalues above and below a significant gap, without interval, and
          ``outlier_p``, ``outlier_negative_p`` of the gap, or of the most significant one where none is (see
          :mod:`pnanalysis.spectra.outliers`);
        - ``bulk_edge_high``, ``bulk_edge_low``: largest and smallest eigenvalue that is not an outlier, with bounds, or
          none where the Ritz values have not converged, and ``gap_ratio``: ``lambda_max / bulk_edge_high``;
        - ``class_ratio``, ``class_gap``, ``class_trace``: of the ``C`` largest eigenvalues, see
          :func:`pnanalysis.spectra.ends.class_numbers`; NaN without ``n_classes``.

        The intervals of ``negative_curvature``, ``negative_mass``, ``effective_rank`` and ``effective_dimension``
        include, besides the sampling error, what the quadrature leaves open: all of it in the first two, which makes
        them bounds. The values include what couples the deflated spaces to one another. What couples these spaces to
        the rest of the space is included in the intervals of ``effective_rank`` and ``effective_dimension``. All four
        are NaN where products are finite differences, whose errors are as large as most eigenvalues.

    References
    ----------
    Ghorbani et al., arXiv 1901.10159 (outliers and bulk; the class ratios). Maddox, Benton and Wilson, arXiv 2003.02139
    (effective dimension). Roy and Vetterli, EUSIPCO 2007 (effective rank; here its participation-ratio form).
    """
    spectrum = SameMoments(ds)
    measure = spectrum.measure
    n_classes = int(ds.attrs.get("n_classes") or 0) if n_classes is None else n_classes
    largest = float(np.abs(measure.node).max())
    relative = float(ds.attrs.get("round_off", ROUND_OFF))
    slack = relative * largest
    semidefinite = bool(ds.attrs.get("positive_semidefinite", False))
    sums = moments(ds, measure)
    norm, stored = sums.frobenius_norm.value, float(ds.attrs.get("basis_round_off", 0.0))
    top, bottom = lambda_max_and_min(ds, slack)
    found = {
        "trace": _rounded(sums.trace, stored * norm),
        "frobenius_norm": _without_noise(_rounded(sums.frobenius_norm, stored * norm), ds, slack),
        "lambda_max": top,
        "lambda_min": bottom,
        "negative_mass": Estimate(0.0, 0.0) if semidefinite else negative_mass(ds, LEVEL),
        "negative_curvature": Estimate(0.0, 0.0) if semidefinite else negative_curvature(spectrum, LEVEL, slack),
        "effective_rank": _rank_with_interval(spectrum, sums, relative),
        "effective_dimension": _dimension_with_interval(spectrum, ridge, sums, relative),
    }
    if ds.attrs.get("finite_differences"):  # most of these sums is of eigenvalues that are smaller than the error
        names = "negative_mass", "negative_curvature", "effective_rank", "effective_dimension"
        found |= dict.fromkeys(names, Estimate(np.nan))
    counts: dict[str, float] = {}
    for side, suffix, edge in ((1, "", "bulk_edge_high"), (-1, "_negative", "bulk_edge_low")):
        gap = find_gap(ds, side, max(relative, ROUND_OFF) * largest)
        counts |= {f"n_outliers{suffix}": gap.n_outliers, f"outlier{suffix}_p": gap.p}
        found[edge] = bulk_edge(ds, gap, side, slack)
    found["gap_ratio"] = ratio_of_bounds(top, found["bulk_edge_high"])
    found |= class_numbers(ds, n_classes, sums.trace, LEVEL, slack)
    value, residual = leading(ds)
    data: dict[str, Any] = {key: number for name, one in found.items() for key, number in _stored(name, one).items()}
    off = residual + slack if ds.attrs.get("finite_differences") else residual
    data |= counts | {"top_value": ("top", value[:top_k]), "top_residual": ("top", off[:top_k])}
    return xr.Dataset({name: value if isinstance(value, tuple) else ((), value) for name, value in data.items()})


def _rounded(estimate: Estimate, error: float) -> Estimate:
    """With what rounding the vectors of the basis may change as a part of the standard error."""
    return replace(estimate, se=math.hypot(estimate.se, error)) if error else estimate


def _without_noise(norm: Estimate, ds: xr.Dataset, error: float) -> Estimate:
    """With the norm that is left if all products by finite differences are off by their error, independently."""
    if not ds.attrs.get("finite_differences"):
        return norm
    low, high = norm.interval(LEVEL)
    return replace(norm, low=math.sqrt(max(low**2 - int(ds["n_parameters"]) * error**2, 0.0)), high=high)


def _stored(name: str, estimate: Estimate) -> dict[str, float]:
    """A number with its standard error, if it has one, and interval, by the names of a dataset."""
    low, high = estimate.low, estimate.high
    if math.isnan(low) and not math.isnan(estimate.se):
        low, high = estimate.interval(LEVEL)
    data = {name: estimate.value, f"{name}_low": low, f"{name}_high": high}
    return data if math.isnan(estimate.se) else data | {f"{name}_se": estimate.se}


def _rank_with_interval(spectrum: SameMoments, sums: Moments, round_off: float) -> Estimate:
    """With what couples the deflated spaces to one another; what else couples them is part of the interval.

    In sums of squares all of it is known, in those of magnitudes where no eigenvalue is negative.
    """
    measure, n = spectrum.measure, spectrum.measure.n_parameters
    coupled = [coupling_of(spectrum.ds, f) / n for f in (np.abs, np.square)]
    whole = [coupled[0], sums.square.value / n - float(measure.node**2 @ measure.weight)]
    if not (measure.node < -round_off * np.abs(measure.node).max()).any():
        coupled = whole
    value, with_all = (effective_rank(measure, sums.gain, tuple(each)).value for each in (coupled, whole))
    estimate = partial(effective_rank, gain=sums.gain, coupled=tuple(coupled))
    return spectrum.interval(estimate, LEVEL, more=abs(value - with_all) + round_off * value)


def _dimension_with_interval(spectrum: SameMoments, ridge: float, sums: Moments, round_off: float) -> Estimate:
    """Likewise, but what else couples the spaces is judged by sums of squares, and all of it counts as an error."""
    ds, measure = spectrum.ds, spectrum.measure
    coupled = coupling_of(ds, partial(_in_dimension, ridge)) * (1 + coupling_left(ds, measure, sums))
    # each eigenvalue's part is at most one
    unknown = abs(coupled) + round_off * measure.n_parameters
    return spectrum.interval(partial(_effective_dimension, ridge, sums.gain, coupled), LEVEL, more=unknown)


def effective_rank(measure: SpectralMeasure, gain: float = 1.0, coupled: tuple[float, ...] = (0.0, 0.0)) -> Estimate:
    """Ratio of two averages, with its error by linearisation, which takes their correlation into account.

    ``gain`` is that of the moments (:func:`pnanalysis.spectra.moments.mean_beside_moments`), and ``coupled`` what is to
    be added to the mean magnitude and the mean square.
    """
    absolute, square = np.abs(measure.node), measure.node**2
    first, second = (float(f @ measure.weight) + more for f, more in zip((absolute, square), coupled, strict=True))
    if second == 0:
        return Estimate(0.0, 0.0)
    value = measure.n_parameters * first**2 / second
    slope = mean_beside_moments(value * (2 * absolute / first - square / second), measure, gain)
    return Estimate(value, slope.se, dof=slope.dof)


def _effective_dimension(ridge: float, gain: float, coupled: float, measure: SpectralMeasure) -> Estimate:
    mean, n = mean_beside_moments(_in_dimension(ridge, measure.node), measure, gain), measure.n_parameters
    return Estimate(n * mean.value + coupled, n * mean.se, dof=mean.dof)


def _in_dimension(ridge: float, eigenvalue: Array) -> Array:
    """The part of eigenvalues in the effective dimension."""
    positive = np.maximum(eigenvalue, 0)
    return positive / (positive + ridge)

"""A spectrum in numbers, each with its error, and the difference of two spectra."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from scipy.special import gammaln
from scipy.stats import wasserstein_distance

from pnanalysis import schema
from pnanalysis.errors import CurvatureError
from pnanalysis.estimates import Estimate
from pnanalysis.spectra.ends import bulk_edge, class_numbers, lambda_max_and_min, leading, ratio_of_bounds
from pnanalysis.spectra.negative import negative_curvature, negative_mass
from pnanalysis.spectra.outliers import find_gap
from pnanalysis.spectra.quadrature import SpectralMeasure
from pnanalysis.spectra.rule_error import with_rule_error

#: Two-sided level of every interval.
LEVEL = 0.95
#: Relative round-off where a dataset does not say what arithmetic its products had: that of single precision.
ROUND_OFF = 1e-6
#: Scalars that are compared by difference, with a standard error.
_WITH_SE = (
    "trace", "frobenius_norm", "negative_mass", "negative_curvature", "effective_rank", "effective_dimension",
)  # fmt: skip
#: Scalars that are known up to an interval.
_WITH_BOUNDS = ("lambda_max", "lambda_min", "bulk_edge_low", "bulk_edge_high", "gap_ratio")
#: Scalars whose differences have no error.
_WITHOUT_ERROR = ("n_outliers", "class_ratio", "class_gap", "class_trace")


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
        include, besides the sampling error, what the quadrature leaves open.

    References
    ----------
    Ghorbani et al., arXiv 1901.10159 (outliers and bulk; the class ratios). Maddox, Benton and Wilson, arXiv 2003.02139
    (effective dimension). Roy and Vetterli, EUSIPCO 2007 (effective rank; here its participation-ratio form).
    """
    measure = SpectralMeasure.from_dataset(ds)
    n_classes = int(ds.attrs.get("n_classes") or 0) if n_classes is None else n_classes
    largest = float(np.abs(measure.node).max())
    relative = float(ds.attrs.get("round_off", ROUND_OFF))
    slack = relative * largest
    semidefinite = bool(ds.attrs.get("positive_semidefinite", False))
    trace = measure.total(measure.node)
    top, bottom = lambda_max_and_min(ds, slack)
    found = {
        "trace": trace,
        "frobenius_norm": _frobenius(measure, float(ds["coupling"])),
        "lambda_max": top,
        "lambda_min": bottom,
        "negative_mass": Estimate(0.0, 0.0) if semidefinite else negative_mass(ds, LEVEL),
        "negative_curvature": Estimate(0.0, 0.0) if semidefinite else negative_curvature(ds, LEVEL, slack),
        "effective_rank": with_rule_error(ds, _effective_rank, LEVEL),
        "effective_dimension": with_rule_error(ds, partial(_effective_dimension, ridge), LEVEL),
    }
    counts: dict[str, float] = {}
    for side, suffix, edge in ((1, "", "bulk_edge_high"), (-1, "_negative", "bulk_edge_low")):
        gap = find_gap(ds, side, max(relative, ROUND_OFF) * largest)
        counts |= {f"n_outliers{suffix}": gap.n_outliers, f"outlier{suffix}_p": gap.p}
        found[edge] = bulk_edge(ds, gap, side, slack)
    found["gap_ratio"] = ratio_of_bounds(top, found["bulk_edge_high"])
    found |= class_numbers(ds, n_classes, trace, LEVEL, slack)
    value, residual = leading(ds)
    data: dict[str, Any] = {key: number for name, one in found.items() for key, number in _stored(name, one).items()}
    data |= counts | {"top_value": ("top", value[:top_k]), "top_residual": ("top", residual[:top_k])}
    return xr.Dataset({name: value if isinstance(value, tuple) else ((), value) for name, value in data.items()})


def _stored(name: str, estimate: Estimate) -> dict[str, float]:
    """A number with its standard error, if it has one, and interval, by the names of a dataset."""
    low, high = estimate.low, estimate.high
    if math.isnan(low) and not math.isnan(estimate.se):
        low, high = estimate.interval(LEVEL)
    data = {name: estimate.value, f"{name}_low": low, f"{name}_high": high}
    return data if math.isnan(estimate.se) else data | {f"{name}_se": estimate.se}


def _frobenius(measure: SpectralMeasure, coupling: float) -> Estimate:
    # |H|_F^2 = |T|_F^2 + |B|_F^2 + 2 beta^2, see pnanalysis.spectra.deflation
    squares = measure.total(measure.node**2)
    norm = float(np.sqrt(max(squares.value + 2 * coupling**2, 0)))
    return Estimate(norm, squares.se / (2 * norm) if norm > 0 else 0.0, dof=squares.dof)


def _effective_rank(measure: SpectralMeasure) -> Estimate:
    """Ratio of two averages, with its error by linearisation, which takes their correlation into account."""
    absolute, square = np.abs(measure.node), measure.node**2
    first, second = float(absolute @ measure.weight), float(square @ measure.weight)
    if second == 0:
        return Estimate(0.0, 0.0)
    value = measure.n_parameters * first**2 / second
    slope = measure.mean(value * (2 * absolute / first - square / second))
    return Estimate(value, slope.se, dof=slope.dof)


def _effective_dimension(ridge: float, measure: SpectralMeasure) -> Estimate:
    positive = np.maximum(measure.node, 0)
    return measure.total(positive / (positive + ridge))


def compare_spectra(ds_a: xr.Dataset, ds_b: xr.Dataset) -> xr.Dataset:
    r"""How two spectra differ: B minus A, each difference with its error.

    Parameters
    ----------
    ds_a, ds_b : xarray.Dataset
        ``"spectral_density"`` datasets of one checkpoint each, sampled with different seeds. With the same probes
        their errors are not independent, and the errors given here are too large.

    Returns
    -------
    xarray.Dataset
        Of kind ``"spectrum_comparison"``: for each scalar of :func:`summarise` its difference as ``NAME``, with
        ``NAME_low`` and ``NAME_high`` and, for sampled quantities, ``NAME_se``. ``wasserstein1`` is the distance of
        the two spectra and ``wasserstein1_noise`` its expected value for two estimates of one spectrum: a distance
        well above it is real. ``wasserstein1_se`` is an upper bound on its standard error. See Notes.

    Raises
    ------
    CurvatureError
        If a dataset holds more than one checkpoint.

    Notes
    -----
    *Noise.* The distance is the integral of the absolute difference of two cumulative distributions. For equal spectra
    that difference is noise of mean zero. Its variance at each point is estimated from the scatter of the probes
    (:meth:`pnanalysis.spectra.quadrature.SpectralMeasure.cumulative_variance`), and for a normal distribution its
    mean absolute value is :math:`\sqrt{2/\pi}` standard deviations. The scatter includes the randomness of the nodes'
    masses and places, but not what all probes have in common, the space that was deflated first: with very many probes
    of a large matrix, two estimates differ by up to 1.5 times the noise given here. With a single sampled probe
    (besides one that was deflated) there is no scatter, and only the randomness of the masses is included.
    """
    data: dict[str, Any] = {}
    for ds in (ds_a, ds_b):
        if ds["node"].ndim != 1:
            raise CurvatureError(
                f"a comparison takes one checkpoint on each side, but a dataset has the dims {ds['node'].dims[:-1]}; "
                "select one first"
            )
    for name in _WITH_SE:
        difference = float(ds_b[name] - ds_a[name])
        data[name] = difference
        data[f"{name}_se"] = float(np.hypot(ds_a[f"{name}_se"], ds_b[f"{name}_se"]))
        # Independent errors add in squares (the intervals need not be symmetric)...
        below, above = _half_widths(ds_a, ds_b, name)
        data[f"{name}_low"] = difference - float(np.hypot(*below))
        data[f"{name}_high"] = difference + float(np.hypot(*above))
    for name in _WITH_BOUNDS:
        data[name] = float(ds_b[name] - ds_a[name])
        # ... while bounds that are not statistical add up.
        data[f"{name}_low"] = float(ds_b[f"{name}_low"] - ds_a[f"{name}_high"])
        data[f"{name}_high"] = float(ds_b[f"{name}_high"] - ds_a[f"{name}_low"])
    for name in _WITHOUT_ERROR:
        data[name] = float(ds_b[name] - ds_a[name])
    data |= _distance(SpectralMeasure.from_dataset(ds_a), SpectralMeasure.from_dataset(ds_b))
    labels = {"method_a": ds_a.attrs.get("method"), "method_b": ds_b.attrs.get("method")}
    return schema.finish(
        xr.Dataset({name: ((), value) for name, value in data.items()}), "spectrum_comparison", **labels
    )


def _half_widths(ds_a: xr.Dataset, ds_b: xr.Dataset, name: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """For B minus A: the two half-widths by which the difference may be lower, and those by which it may be higher."""
    a, a_low, a_high = (float(ds_a[f"{name}{end}"]) for end in ("", "_low", "_high"))
    b, b_low, b_high = (float(ds_b[f"{name}{end}"]) for end in ("", "_low", "_high"))
    return (b - b_low, a_high - a), (b_high - b, a - a_low)


def _distance(a: SpectralMeasure, b: SpectralMeasure) -> dict[str, float]:
    """The Wasserstein-1 distance of two spectra, and its noise."""
    points = np.unique(np.concatenate([a.node, b.node]))
    (var_a, dof_a), (var_b, dof_b) = (measure.cumulative_variance(points[:-1]) for measure in (a, b))
    variance = var_a + var_b
    # Satterthwaite's degrees of freedom of the sum of two variances; infinite where neither has any
    weighted = sum(np.square(part) / dof for part, dof in ((var_a, dof_a), (var_b, dof_b)) if dof)
    dof = np.divide(variance**2, weighted, out=np.full(variance.shape, np.inf), where=weighted > 0)
    # Standard errors at the points are added, as if fully correlated: a bound for the integral from above, while the
    # mean of its absolute value is such a sum whatever the correlation.
    se = float((np.sqrt(variance) / _mean_root_factor(dof)) @ np.diff(points))
    return {
        "wasserstein1": float(wasserstein_distance(a.node, b.node, a.weight, b.weight)),
        "wasserstein1_noise": float(np.sqrt(2 / np.pi)) * se,
        "wasserstein1_se": se,
    }


def _mean_root_factor(dof: np.ndarray) -> np.ndarray:
    """Mean of a normal sample's standard deviation over the true one (the factor c4), by degrees of freedom."""
    # gammaln of larger numbers differ by less than their round-off, and the factor is 1 to six digits
    finite = np.minimum(dof, 1e6)
    return np.asarray(np.sqrt(2 / finite) * np.exp(gammaln((finite + 1) / 2) - gammaln(finite / 2)))

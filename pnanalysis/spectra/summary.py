"""A spectrum in numbers, each with its error, and the difference of two spectra."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from scipy.special import gammaln
from scipy.stats import wasserstein_distance

from pnanalysis import schema
from pnanalysis.errors import CurvatureError
from pnanalysis.estimates import Estimate
from pnanalysis.spectra.moments import moments
from pnanalysis.spectra.quadrature import SpectralMeasure, extremes

#: An eigenvalue is an outlier if it lies further than this many standard deviations of the others from their mean.
OUTLIER_SIGMAS = 10.0
#: Two-sided level of every interval.
LEVEL = 0.95
#: Scalars that are compared by difference, with a standard error.
_WITH_SE = ("trace", "frobenius_norm", "negative_mass", "effective_rank", "effective_dimension")
#: Scalars that are known up to an interval.
_WITH_BOUNDS = ("lambda_max", "lambda_min", "n_outliers", "bulk_edge_low", "bulk_edge_high", "gap_ratio")


def summarise(ds: xr.Dataset, *, top_k: int = 10, ridge: float = 1.0) -> xr.Dataset:
    """Describe a spectrum.

    Parameters
    ----------
    ds : xarray.Dataset
        A ``"spectral_density"`` dataset of one checkpoint; only its nodes and Ritz values are used.
    top_k : int
        Number of largest eigenvalues to list.
    ridge : float
        ``z`` in the effective dimension, in units of the eigenvalues.

    Returns
    -------
    xarray.Dataset
        Scalars unless noted. ``NAME_se`` is a standard error, ``NAME_low`` and ``NAME_high`` are a 95 % interval:

        - ``trace``, ``frobenius_norm``: sum, and root of the sum of squares, of the eigenvalues;
        - ``lambda_max``, ``lambda_min``: the extreme Ritz values. Ritz values lie within the spectrum, so the interval
          extends outwards only, by the residual bound; it is not statistical;
        - ``top_value``, ``top_residual`` ``(top,)``: the largest Ritz values, descending, and bounds on their
          distances to the nearest eigenvalue;
        - ``negative_mass``: fraction of the eigenvalues below zero by more than round-off (one millionth of the
          largest magnitude). Its interval includes, besides the sampling error, what the quadrature leaves open: the
          mass between the two nodes on either side of zero (Chebyshev, Markov, Stieltjes);
        - ``effective_rank``: ``(sum |lambda|)^2 / sum lambda^2``;
        - ``effective_dimension``: sum of ``lambda / (lambda + z)`` over the positive eigenvalues;
        - ``n_outliers``, ``bulk_edge_low``, ``bulk_edge_high``: see Notes;
        - ``gap_ratio``: ``lambda_max / bulk_edge_high``.

    Notes
    -----
    *Outliers.* An eigenvalue is an outlier if it lies further than ten standard deviations from the mean, both
    taken over the eigenvalues that are not outliers (found by repeated clipping, starting from the full spectrum).
    The rule does not depend on the scale or the origin of the spectrum. Uniform and semicircular spectra (at most 1.7
    and 2 deviations wide) and Marchenko-Pastur spectra with up to 64 parameters per observation have no outliers.
    Outliers of similar size are recognised as long as they are fewer than one in a hundred; in a power-law tail the
    threshold is a convention.

    *Bulk.* Its edges are the outermost nodes that are not outliers and have at least half an eigenvalue between them
    and the threshold. The intervals follow from shifting the threshold by its own standard error, and from the
    sampling error of the mass beyond it.

    References
    ----------
    Ghorbani et al., arXiv 1901.10159 (outliers and bulk). Maddox, Benton and Wilson, arXiv 2003.02139 (effective
    dimension). Roy and Vetterli, EUSIPCO 2007 (effective rank; here its participation-ratio form). Golub and
    Meurant, Matrices, Moments and Quadrature (2010), for the bounds on the mass left of a point.
    """
    measure = SpectralMeasure.from_dataset(ds)
    data: dict[str, Any] = {}
    sums = moments(ds, measure)
    _put(data, "trace", sums.trace)
    _put(data, "frobenius_norm", sums.frobenius_norm)
    data |= _extremes(ds, top_k)
    data |= _negative_mass(ds, measure)
    _put(data, "effective_rank", effective_rank(measure))
    positive = np.maximum(measure.node, 0)
    _put(data, "effective_dimension", measure.total(positive / (positive + ridge)))
    data |= _bulk(measure, data)
    return xr.Dataset({name: value if isinstance(value, tuple) else ((), value) for name, value in data.items()})


def _put(data: dict[str, Any], name: str, estimate: Estimate) -> None:
    """Store an estimate under a name, with its standard error and interval."""
    data[name], data[f"{name}_se"] = estimate.value, estimate.se
    data[f"{name}_low"], data[f"{name}_high"] = estimate.interval(LEVEL)


def effective_rank(measure: SpectralMeasure) -> Estimate:
    """Ratio of two averages, with its error by linearisation, which takes their correlation into account."""
    absolute, square = np.abs(measure.node), measure.node**2
    first, second = float(absolute @ measure.weight), float(square @ measure.weight)
    if second == 0:
        return Estimate(0.0, 0.0)
    value = measure.n_parameters * first**2 / second
    slope = measure.mean(value * (2 * absolute / first - square / second))
    return Estimate(value, slope.se, dof=slope.dof)


def _extremes(ds: xr.Dataset, top_k: int) -> dict[str, Any]:
    bounds = extremes(ds["ritz_value"].values, ds["ritz_residual"].values)
    if "deflated_value" in ds:
        top_value, top_residual = ds["deflated_value"].values, ds["deflated_residual"].values
    else:
        # Several probes find the same eigenvalue, one probe finds it once: take the probe with the largest value.
        best = int(np.argmax((ds["ritz_value"].values == bounds.max_low).any(axis=1)))
        keep = np.isfinite(ds["ritz_value"].values[best])
        top_value = ds["ritz_value"].values[best][keep][::-1]
        top_residual = ds["ritz_residual"].values[best][keep][::-1]
    return {
        "lambda_max": bounds.max_low,
        "lambda_max_low": bounds.max_low,
        "lambda_max_high": bounds.max_high,
        "lambda_min": bounds.min_high,
        "lambda_min_low": bounds.min_low,
        "lambda_min_high": bounds.min_high,
        "top_value": ("top", top_value[:top_k]),
        "top_residual": ("top", top_residual[:top_k]),
    }


def _negative_mass(ds: xr.Dataset, measure: SpectralMeasure) -> dict[str, Any]:
    threshold = -_resolution(measure)
    estimate = measure.mean((measure.node < threshold).astype(float))
    low, high = estimate.interval(LEVEL)
    below, above = 0.0, 0.0
    for index, (value, weight) in enumerate(zip(ds["ritz_value"].values, ds["ritz_weight"].values, strict=True)):
        mass = float(measure.weight[measure.probe == index + 1].sum())
        left, right = _adjacent_weights(threshold, value[np.isfinite(value)], weight[np.isfinite(weight)])
        below, above = below + mass * left, above + mass * right
    return {
        "negative_mass": estimate.value,
        "negative_mass_se": estimate.se,
        "negative_mass_low": max(low - below, 0.0),
        "negative_mass_high": min(high + above, 1.0),
    }


def _adjacent_weights(point: float, value: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    """Gauss weights of the nodes next to a point on either side: by so much the mass below it may be wrong."""
    split = int(np.searchsorted(value, point))
    return float(weight[split - 1]) if split else 0.0, float(weight[split]) if split < len(value) else 0.0


class _Bulk(NamedTuple):
    """Mean and standard deviation of the eigenvalues that are not outliers, and the standard errors of both."""

    centre: float
    spread: float
    centre_se: float
    spread_se: float


def _clipped_bulk(measure: SpectralMeasure) -> _Bulk:
    """Clip at ten standard deviations until no more nodes are outside."""
    inside = np.ones(len(measure.node), dtype=bool)
    while True:
        weight = np.where(inside, measure.weight, 0) / measure.weight[inside].sum()
        centre = float(weight @ measure.node)
        spread = float(np.sqrt(weight @ (measure.node - centre) ** 2))
        kept = inside & (np.abs(measure.node - centre) <= max(OUTLIER_SIGMAS * spread, _resolution(measure)))
        if kept.sum() == inside.sum() or not kept.any():
            break
        inside = kept
    mass = float(measure.weight[inside].sum())
    deviation = np.where(inside, measure.node - centre, 0.0)
    centre_se = measure.mean(deviation / mass).se
    spread_se = measure.mean(np.where(inside, deviation**2 - spread**2, 0.0) / (2 * spread * mass)).se if spread else 0
    return _Bulk(centre, spread, centre_se, float(spread_se))


def _resolution(measure: SpectralMeasure) -> float:
    """One millionth of the largest magnitude: smaller differences are round-off in single precision."""
    return 1e-6 * float(np.abs(measure.node).max())


def _bulk(measure: SpectralMeasure, data: dict[str, Any]) -> dict[str, Any]:
    bulk = _clipped_bulk(measure)
    half = OUTLIER_SIGMAS * bulk.spread
    half_se = float(np.hypot(bulk.centre_se, OUTLIER_SIGMAS * bulk.spread_se))
    if half < _resolution(measure):
        half, half_se = _resolution(measure), 0.0
    counts, lows, highs = [], [], []
    for width in (half, half - 1.96 * half_se, half + 1.96 * half_se):  # the best one first, then its 95 % interval
        outside = np.abs(measure.node - bulk.centre) > width
        counts.append(measure.total(outside.astype(float)))
        low, high = _edges(measure, outside, bulk.centre)
        lows.append(low)
        highs.append(high)
    ratios = [data["lambda_max"] / value if value > 0 else np.nan for value in highs]
    return {
        "n_outliers": counts[0].value,
        "n_outliers_low": max(min(count.interval(LEVEL)[0] for count in counts), 0.0),
        "n_outliers_high": max(count.interval(LEVEL)[1] for count in counts),
        "bulk_edge_low": lows[0],
        "bulk_edge_low_low": min(lows),
        "bulk_edge_low_high": max(lows),
        "bulk_edge_high": highs[0],
        "bulk_edge_high_low": min(highs),
        "bulk_edge_high_high": max(highs),
        "gap_ratio": ratios[0],
        "gap_ratio_low": min(ratios),
        "gap_ratio_high": max(ratios) * data["lambda_max_high"] / data["lambda_max"] if data["lambda_max"] else np.nan,
    }


def _edges(measure: SpectralMeasure, outside: np.ndarray, centre: float) -> tuple[float, float]:
    """The outermost nodes inside with at least half an eigenvalue at or beyond them.

    A node of less mass may be a rounding of the quadrature; the edge would depend on it alone.
    """
    order = np.argsort(measure.node)
    node, weight = measure.node[order], np.where(outside, 0, measure.weight)[order]
    enough = 0.5 / measure.n_parameters
    low = node[int(np.argmax(np.cumsum(weight) >= enough))]
    high = node[::-1][int(np.argmax(np.cumsum(weight[::-1]) >= enough))]
    return float(min(low, centre)), float(max(high, centre))


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

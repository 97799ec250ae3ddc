"""The ends of a spectrum: extreme eigenvalues, edges of the bulk, and what classes make of the largest ones.

All are Ritz values. These lie within the spectrum, and an eigenvalue lies within the residual of each, so that their
intervals are bounds which extend outwards by the residual, and to both sides by round-off. They are not statistical.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from pnanalysis.arrays import Array
from pnanalysis.estimates import Estimate
from pnanalysis.spectra.outliers import Gap
from pnanalysis.spectra.quadrature import all_ritz_values, extremes

#: A Ritz value whose residual is below this fraction of it is known well enough for a ratio.
RESOLVED = 0.01


def leading(ds: xr.Dataset) -> tuple[Array, Array]:
    """The largest Ritz values in one space, descending, and their residual bounds."""
    if "deflated_value" in ds:
        return ds["deflated_value"].values, ds["deflated_residual"].values
    # Several probes find the same eigenvalue, one probe finds it once: take the probe with the largest value.
    value, residual = ds["ritz_value"].values, ds["ritz_residual"].values
    best = int(np.argmax(np.where(np.isfinite(value), value, -np.inf).max(axis=1)))
    known = np.isfinite(value[best])
    return value[best][known][::-1], residual[best][known][::-1]


def lambda_max_and_min(ds: xr.Dataset, slack: float) -> tuple[Estimate, Estimate]:
    """Largest and smallest eigenvalue, with bounds; ``slack`` is the round-off of an eigenvalue."""
    bounds = extremes(*all_ritz_values(ds, own=False))
    return (
        Estimate(bounds.max_low, low=bounds.max_low - slack, high=bounds.max_high + slack),
        Estimate(bounds.min_high, low=bounds.min_low - slack, high=bounds.min_high + slack),
    )


def bulk_edge(ds: xr.Dataset, gap: Gap, side: int, slack: float) -> Estimate:
    """The outermost eigenvalue that is not an outlier.

    Without outliers that is the extreme eigenvalue. There is no interval where the residuals reach into the gap, or the
    number of outliers is not certain, and no edge where every Ritz value is an outlier.
    """
    value, residual = all_ritz_values(ds, own=True)
    value = side * value
    inside = value < side * gap.middle
    if not inside.any():
        return Estimate(np.nan)
    edge = float(value[inside].max())
    reach = float((value + residual)[inside].max())
    if reach >= side * gap.middle or not gap.is_counted:
        return Estimate(side * edge)
    # what has not converged of outliers may raise a Ritz value beyond the edge
    below = slack + (float(residual[value == edge].max()) if gap.n_outliers else 0.0)
    low, high = sorted((side * (edge - below), side * (reach + slack)))
    return Estimate(side * edge, low=low, high=high)


def ratio_of_bounds(above: Estimate, below: Estimate) -> Estimate:
    """A ratio of two positive numbers that are known up to bounds; NaN if one may not be positive."""
    if not (above.value > 0 and below.value > 0) or below.low <= 0:
        return Estimate(np.nan)
    return Estimate(above.value / below.value, low=above.low / below.high, high=above.high / below.low)


def class_numbers(ds: xr.Dataset, n_classes: int, trace: Estimate, level: float, slack: float) -> dict[str, Estimate]:
    """How far as many eigenvalues as there are classes stand out, and how much of the trace is theirs.

    Parameters
    ----------
    ds : xarray.Dataset
        Nodes and Ritz values of one checkpoint.
    n_classes : int
        ``C``.
    trace : Estimate
    level : float
        Of the interval of a part of the trace.
    slack : float
        Round-off of an eigenvalue.

    Returns
    -------
    dict of str to Estimate
        ``class_ratio``, ``lambda_1 / lambda_C``; ``class_gap``, ``lambda_1 / lambda_(C+1)``; and ``class_trace``, the
        sum of the ``C`` largest over the trace. NaN where these Ritz values have not converged (to within
        :data:`RESOLVED` of their size), or are not positive, and where the trace may not be.
    """
    value, residual = (column[: n_classes + 1] for column in leading(ds))
    if n_classes < 1 or len(value) <= n_classes or not (residual < RESOLVED * value).all():
        return {name: Estimate(np.nan) for name in ("class_ratio", "class_gap", "class_trace")}
    # an eigenvalue that the steps have passed over hides in the residual of a lower Ritz value
    all_values, reach = all_ritz_values(ds, own=True)
    reach = all_values + reach
    top = [
        Estimate(v, low=v - slack, high=max(float(reach[all_values <= v].max()), v + r) + slack)
        for v, r in zip(value.tolist(), residual.tolist(), strict=True)
    ]
    return {
        "class_ratio": ratio_of_bounds(top[0], top[n_classes - 1]),
        "class_gap": ratio_of_bounds(top[0], top[n_classes]),
        "class_trace": _share(_sum(top[:-1]), trace, level),
    }


def _sum(parts: list[Estimate]) -> Estimate:
    """Of numbers that are known up to bounds."""
    value, low, high = (sum(ends) for ends in zip(*((one.value, one.low, one.high) for one in parts), strict=True))
    return Estimate(value, low=low, high=high)


def _share(part: Estimate, trace: Estimate, level: float) -> Estimate:
    """A part, known up to bounds, of the trace; NaN where the trace may not be positive."""
    low, high = trace.interval(level)
    if not low > 0:
        return Estimate(np.nan)
    return Estimate(
        part.value / trace.value, part.value * trace.se / trace.value**2, part.low / high, part.high / low, trace.dof
    )

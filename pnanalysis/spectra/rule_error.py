"""Averages of functions with a kink, such as the magnitude, which no quadrature rule gives exactly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xarray as xr

from pnanalysis.estimates import Estimate
from pnanalysis.spectra.quadrature import SpectralMeasure

#: How far beyond the averaged rule's value the true one may lie, in units of its distance from the Gauss rule's value:
#: the averaged rule has twice the nodes, and this much is left if they reduce the error by a third.
_BEYOND = 2.0


def with_rule_error(
    ds: xr.Dataset, average: Callable[[SpectralMeasure], Estimate], level: float, within_spectrum: bool = False
) -> Estimate:
    """A number of the spectrum whose interval includes the error of the quadrature rule.

    Parameters
    ----------
    ds : xarray.Dataset
        Nodes and Ritz values of one checkpoint, as :func:`pnanalysis.spectra.summary.summarise` takes them.
    average : callable
        The number with its sampling error, from a measure.
    level : float
        Of the interval.
    within_spectrum : bool
        Take the value of the Gauss rules, whose nodes lie within the spectrum, instead of the averaged rules' value.

    Returns
    -------
    Estimate
        The standard error is that of sampling alone.

    References
    ----------
    Laurie, Anti-Gaussian quadrature formulas, Math. Comp. 65 (1996), for the difference as an estimate of the error.
    """
    averaged, gauss = average(SpectralMeasure.from_dataset(ds)), average(SpectralMeasure.gauss(ds))
    found = gauss if within_spectrum else averaged
    difference = abs(averaged.value - gauss.value)
    low, high = found.interval(level)
    half = float(np.hypot((high - low) / 2, (_BEYOND + within_spectrum) * difference))
    return Estimate(found.value, found.se, found.value - half, found.value + half, found.dof)

"""The negative part of a spectrum: how many eigenvalues, and how much of the curvature."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import xarray as xr

from pnanalysis.arrays import Array
from pnanalysis.estimates import Estimate
from pnanalysis.spectra.quadrature import (
    SpectralMeasure,
    all_ritz_values,
    coupling_of,
    extremes,
    gauss_rules,
    mass_below,
)
from pnanalysis.spectra.rule_error import SameMoments

#: Eigenvalues this far below zero, in units of the largest magnitude, count as negative.
THRESHOLD = 1e-3


def negative_mass(ds: xr.Dataset, level: float) -> Estimate:
    """Fraction of the eigenvalues below ``-THRESHOLD`` times the largest magnitude.

    Parameters
    ----------
    ds : xarray.Dataset
        Nodes and Ritz values of one checkpoint, as :func:`pnanalysis.spectra.summary.summarise` takes them.
    level : float
        Of the interval.

    Returns
    -------
    Estimate
        The standard error is that of sampling. The interval also includes what the moments of each probe leave open
        (:func:`pnanalysis.spectra.quadrature.mass_below`): a bound, which is wide where the threshold lies within a
        cluster of eigenvalues that the nodes do not resolve. And each coupling of a deflated space to the rest, a
        perturbation of rank two with one eigenvalue of either sign, may move one eigenvalue across the threshold.
    """
    measure = SpectralMeasure.from_dataset(ds)
    largest = float(np.abs(measure.node).max())
    point = -THRESHOLD * largest
    bounds = extremes(*all_ritz_values(ds, own=False))
    if bounds.min_low >= point or bounds.max_high < point:
        return Estimate(float(bounds.max_high < point), 0.0)
    is_below = (measure.node < point).astype(float)
    value, left_open = float(is_below[~measure.sampled] @ measure.weight[~measure.sampled]), 0.0
    for index, rule in enumerate(gauss_rules(ds)):
        mass = float(measure.weight[measure.probe == index + 1].sum())
        if mass > 0:
            below, uncertainty = mass_below(point, *rule)
            value, left_open = value + mass * below, left_open + mass * uncertainty
    coupled = coupling_of(ds, lambda node: (node < point).astype(float)) / measure.n_parameters
    value = float(np.clip(value + coupled, 0.0, 1.0))
    sampling = measure.mean(is_below)
    low, high = sampling.interval(level)
    n_couplings = np.count_nonzero(np.unique(ds["ritz_coupling"].values))
    half = float(np.linalg.norm([(high - low) / 2, left_open, n_couplings**0.5 / measure.n_parameters]))
    return _fraction(Estimate(value, sampling.se, value - half, value + half, sampling.dof))


def negative_curvature(spectrum: SameMoments, level: float, round_off: float = 0.0) -> Estimate:
    """Sum of the negative eigenvalues' magnitudes, divided by the sum of all magnitudes.

    It is 0 at a minimum, and 1/2 for a spectrum symmetric about zero.

    Parameters
    ----------
    spectrum : SameMoments
        Of one checkpoint.
    level : float
        Of the interval, which includes all that the moments of the probes leave open, and the coupling of the deflated
        space: a bound rather than a statistical interval.
    round_off : float
        Negative nodes of at most this magnitude count as zero.
    """

    def negative_part(node: Array) -> Array:
        return np.where(node < -round_off, np.abs(node), 0.0)

    ds, measure = spectrum.ds, spectrum.measure
    coupled = [coupling_of(ds, f) / measure.n_parameters for f in (negative_part, np.abs)]

    def share(measure: SpectralMeasure) -> Estimate:
        magnitude, negative = np.abs(measure.node), negative_part(measure.node)
        total = float(magnitude @ measure.weight) + coupled[1]
        if total <= 0:
            return Estimate(0.0, 0.0)
        value = min(max((float(negative @ measure.weight) + coupled[0]) / total, 0.0), 1.0)
        slope = measure.mean((negative - value * magnitude) / total)  # of the ratio of two correlated averages
        return Estimate(value, slope.se, dof=slope.dof)

    total = measure.n_parameters * float(np.abs(measure.node) @ measure.weight)
    # a perturbation of rank two, with eigenvalues c and -c, moves the negative part by at most c
    coupling = float(ds["coupling"]) / total if total > 0 else 0.0
    return _fraction(spectrum.interval(share, level, as_bound=True, more=coupling))


def _fraction(estimate: Estimate) -> Estimate:
    """With an interval between 0 and 1."""
    return replace(estimate, low=max(estimate.low, 0.0), high=min(estimate.high, 1.0))

r"""Outliers: eigenvalues beyond a gap that is wider than the spacings below it explain.

Of the ordered distances ``x_1 >= x_2 >= ...`` of eigenvalues from the median, the normalised spacings
``T_k = k ln(x_k / x_{k+1})`` of a power-law tail are independent and exponentially distributed with one mean (Rényi),
and those of lighter tails and of bulks with an edge decrease with ``k`` only slowly. A spacing far above the mean of
those that follow sets ``k`` outliers apart. Neither the scale of the spectrum nor eigenvalues at the median, such as
those of parameters without influence, change the spacings.

References
----------
Rényi, On the theory of order statistics, Acta Math. Hungar. 4 (1953). Pisarenko and Sornette, Robust statistical tests
of dragon-kings beyond power law distributions, Eur. Phys. J. Special Topics 205 (2012). Ghorbani, Krishnan and Xiao,
arXiv 1901.10159, for outliers of Hessians.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import xarray as xr
from scipy.stats import f as f_distribution

from pnanalysis.arrays import Array
from pnanalysis.spectra.quadrature import SpectralMeasure, all_ritz_values, merged_ritz_values

#: Gaps after each of so many eigenvalues are tested; a p-value is multiplied by their number (Bonferroni).
MOST_OUTLIERS = 50
#: A spacing is compared with the mean of so many after it.
N_SPACINGS = 15
#: With fewer spacings to compare with, nothing is tested.
FEWEST_SPACINGS = 5
#: A gap is at least this ratio of distances from the median, however small the other spacings are.
SMALLEST_RATIO = 1.2
#: Chance of a false claim.
LEVEL = 0.05


@dataclass(frozen=True)
class Gap:
    """The gap between outliers and bulk on one side of a spectrum.

    Attributes
    ----------
    n_outliers : int
        Eigenvalues beyond it; 0 where no gap is significant.
    p : float
        Of the most significant gap, corrected for the number of gaps tested.
    middle : float
        A point within it; infinite, on the side of the outliers, where there are none.
    is_counted : bool
        Whether their number is certain: there is a Ritz value for each, and the mass beyond the gap allows no other.
    """

    n_outliers: int
    p: float
    middle: float
    is_counted: bool = True


def find_gap(ds: xr.Dataset, side: int, round_off: float) -> Gap:
    """Whether a gap sets outliers apart.

    Parameters
    ----------
    ds : xarray.Dataset
        Nodes and Ritz values of one checkpoint, as :func:`pnanalysis.spectra.summary.summarise` takes them.
    side : {1, -1}
        Large or small eigenvalues.
    round_off : float
        Distances from the median up to this one count as none; 0 for the zero matrix.

    Notes
    -----
    The ``x_k`` are read off the estimated measure, where its mass beyond is ``k - 1/2`` eigenvalues. Where nodes stand
    for many eigenvalues, or none, steps between them are no gaps. A gap therefore ends at the highest point that an
    eigenvalue near a Ritz value below it can have: the value plus its residual.
    """
    measure = SpectralMeasure.from_dataset(ds)
    n = measure.n_parameters // 2  # outliers are few: only one half of the spectrum is looked at
    n_spacings = min(N_SPACINGS, n // 2)
    n_tested = min(MOST_OUTLIERS, n - n_spacings)
    none = Gap(0, 1.0, side * np.inf)
    if n_spacings < FEWEST_SPACINGS or round_off == 0:
        return none
    median = _median(measure)
    distance = _ordered(measure, median, side, n_tested + n_spacings + 1)
    # Ritz values in one space never lie beyond the eigenvalues of their rank
    merged = -np.sort(-side * (merged_ritz_values(ds)[0] - median))[: len(distance)]
    distance[: len(merged)] = np.maximum(distance[: len(merged)], merged)
    reach, place = _reaches(ds, median, side)
    best, log_p = none, np.inf
    for k in range(1, n_tested + 1):
        upper, lower = np.maximum(distance[k - 1 : k + 1], round_off)
        if upper < SMALLEST_RATIO * lower:
            continue
        middle = float(np.sqrt(upper * lower))
        end = float(reach[place < middle].max(initial=lower))
        if upper < SMALLEST_RATIO * end:
            continue
        spacing = k * np.log(upper / end)
        others = _spacings_after(distance, k, n_spacings, round_off)
        this = f_distribution.logsf(spacing / others, 2, 2 * n_spacings) if others > 0 else -np.inf
        if this < log_p:
            log_p = this
            best = Gap(k, min(n_tested * float(np.exp(this)), 1.0), median + side * middle)
    if best.p > LEVEL:
        return Gap(0, best.p, none.middle)
    return _counted(ds, measure, best, side)


def _median(measure: SpectralMeasure) -> float:
    order = np.argsort(measure.node)
    cumulative = np.cumsum(measure.weight[order])
    return float(measure.node[order][np.searchsorted(cumulative, 0.5).clip(max=len(order) - 1)])


def _ordered(measure: SpectralMeasure, median: float, side: int, n: int) -> Array:
    """Distances of the outermost eigenvalues from the median, ``(n,)``, descending."""
    order = np.argsort(-side * measure.node)
    cumulative = np.cumsum(measure.weight[order])
    mass = (np.arange(n) + 0.5) / measure.n_parameters
    node: Array = measure.node[order][np.searchsorted(cumulative, mass).clip(max=len(order) - 1)]
    return np.maximum(side * (node - median), 0.0)


def _reaches(ds: xr.Dataset, median: float, side: int) -> tuple[Array, Array]:
    """Distances from the median of all Ritz values plus their residuals, and without."""
    value, residual = all_ritz_values(ds, own=True)
    place = side * (value - median)
    return place + residual, place


def _spacings_after(distance: Array, k: int, n: int, round_off: float) -> float:
    """Mean of the ``n`` normalised spacings after the ``k``-th.

    Round-off hides those of a point at the median. They count as those before, or as one, the mean spacing of a tail
    ``1 / k``, if that is more: the end of a spectrum that decays into round-off is no gap.
    """
    seen = np.maximum(distance, round_off)
    spacing = np.arange(1, len(seen)) * np.log(seen[:-1] / seen[1:])
    after, hidden = spacing[k : k + n], distance[k + 1 : k + n + 1] <= round_off
    before = spacing[max(k - 1 - n, 0) : k - 1]
    return float(np.where(hidden, max(1.0, before.mean() if len(before) else 0.0), after).mean())


def _counted(ds: xr.Dataset, measure: SpectralMeasure, gap: Gap, side: int) -> Gap:
    """A gap with the number of eigenvalues beyond it.

    The mass there is a whole number of eigenvalues but for its error. Ritz values in orthogonal spaces, or in one
    space, stand for different ones: unless the mass contradicts it, as many are there.
    """
    beyond = side * (measure.node - gap.middle) > 0
    mass = measure.total(beyond.astype(float))
    spaces = ds["deflated_value"].values[None] if "deflated_value" in ds else ds["ritz_value"].values
    found = int((side * (spaces - gap.middle) > 0).sum(axis=1).max())
    if not found or abs(found - mass.value) > 0.5 + 2 * mass.se:
        return replace(gap, n_outliers=max(round(mass.value), 1), is_counted=False)
    return replace(gap, n_outliers=found, is_counted=abs(found - mass.value) + 2 * mass.se <= 0.5)

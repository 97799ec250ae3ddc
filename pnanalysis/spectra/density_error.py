"""The standard error of a smoothed density for the choice of probes."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from pnanalysis.arrays import Array
from pnanalysis.spectra.quadrature import SpectralMeasure

#: The scatter of the probes' densities is averaged over so many kernel widths.
AVERAGED_WIDTHS = 4.0
#: A counted Ritz value has its place if its residual is below this fraction of the kernel width.
SETTLED = 0.25
#: Densities below this fraction of the largest are round-off.
_SMALLEST = 1e-9


def density_with_error(ds: xr.Dataset, kernel: Array, grid: Array, width: float) -> tuple[Array, Array]:
    """Smoothed density and its standard error, ``(eigenvalue,)`` each.

    Parameters
    ----------
    ds : xarray.Dataset
        Nodes and Ritz values of one checkpoint.
    kernel : ndarray
        ``(eigenvalue, quadrature)``: its values at the grid's points, by node.
    grid : ndarray
        ``(eigenvalue,)``, ascending.
    width : float
        Standard deviation of the kernel.

    Notes
    -----
    The formula of :meth:`pnanalysis.spectra.quadrature.SpectralMeasure.means` gives the error that random masses of the
    nodes cause. Their places differ from probe to probe too, so that the error oscillates between nodes. At single
    points the scatter of a few probes is too noisy, and near its zeros too small; its average over a few kernel widths
    is not. A peak raises the average around it, and an average of variances relative to the density of the part that is
    uncertain (sampled nodes, and counted Ritz values that have not converged) may be raised at a peak by what is around
    it: the smaller of the two is taken.
    """
    measure = SpectralMeasure.from_dataset(ds)
    density, se = measure.means(kernel)
    scatter = measure.scatter(kernel)
    if not scatter.any():
        return density, se
    open_nodes = ~_settled(ds, measure, SETTLED * width)
    uncertain = kernel[:, open_nodes] @ measure.weight[open_nodes]
    spacing = np.gradient(grid) if len(grid) > 1 else np.ones(1)
    nearby = np.exp(-0.5 * ((grid[:, None] - grid) / (AVERAGED_WIDTHS * width)) ** 2) * spacing
    nearby /= nearby.sum(axis=1, keepdims=True)
    variance = np.maximum(scatter, se**2)
    relative = nearby @ (variance / np.maximum(uncertain, _SMALLEST * uncertain.max())) * uncertain
    return density, np.sqrt(np.maximum(np.minimum(nearby @ variance, relative), se**2))


def _settled(ds: xr.Dataset, measure: SpectralMeasure, tolerance: float) -> NDArray[np.bool_]:
    """Which nodes are counted Ritz values with residuals below the tolerance, ``(quadrature,)`` of bool."""
    settled = np.zeros(len(measure.node), dtype=bool)
    for index, residual in enumerate(ds["ritz_residual"].values):
        counted = ~measure.sampled & (measure.probe == -index)
        if counted.any():
            settled[counted] = residual[np.isfinite(residual)] < tolerance
    return settled

"""What is measured of a finished run while its weights exist, reduced to what tables and figures need.

Every function takes the run as a source with its data, its options and the device, and returns a small dataset.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import xarray as xr

from pnanalysis.analyses.gradients import gradient_split
from pnanalysis.analyses.hessian import hessian
from pnanalysis.analyses.saturation import saturation
from pnanalysis.inputs.sources import Source
from pnanalysis.reproduce.end_points import end_points

Measure = Callable[..., xr.Dataset]

_SPECTRUM = ("lambda_max", "trace", "class_ratio", "class_gap", "class_trace", "gap_ratio", "bulk_edge_high")
_PARTS = ("", "_se", "_low", "_high", "_data_se", "_probe_se", "_bound_low", "_bound_high")
_GRID = 400  # points of a spectral density that are kept
_BINS = 50  # of histograms
_ACTIVITY = (
    "percentile", "abs_percentile", "saturated_share", "saturated_share_se", "saturation_measure",
    "saturation_measure_se",
)  # fmt: skip


def measure_end_points(source: Source, device: torch.device) -> xr.Dataset:
    """Errors, distances, disagreement and ensembles: see :func:`pnanalysis.reproduce.end_points.end_points`."""
    return end_points(source, device)


def measure_hessian(source: Source, device: torch.device, *, checkpoints: str, n: int, n_hvp: int) -> xr.Dataset:
    """Spectra of the end points: their numbers, ten eigenvalues, and the densities of plain model and champion."""
    assert source.run is not None
    ds = hessian(
        source, checkpoints=tuple(checkpoints.split(",")), n=n, n_hvp=n_hvp, device=str(device), progress=False
    )
    kept = [f"{name}{end}" for name in _SPECTRUM for end in _PARTS]
    kept += ["n_outliers", "outlier_p", "top_value", "top_residual", "kernel_width"]
    found = ds[[name for name in kept if name in ds]].drop_vars("eigenvalue", errors="ignore")
    iterations = ds.iteration.values.tolist()
    rows = [iterations.index(i) for i in (0, source.run.manifest["champion"])]
    every = max(ds.sizes["eigenvalue"] // _GRID, 1)
    for name in ("density", "density_se"):
        values = ds[name].values[rows, ::every]
        found[f"contender_{name}"] = (("contender", "eigenvalue"), values, ds[name].attrs)
    found = found.assign_coords(eigenvalue=ds.eigenvalue.values[::every], contender=["plain", "champion"])
    return found.assign_attrs(products=int(ds.attrs["n_hvp"]) * ds.sizes["checkpoint"])


def measure_saturation(source: Source, device: torch.device, *, n: int, histograms: bool = True) -> xr.Dataset:
    """Percentiles and saturation by iteration, epoch and layer; histograms half-way and at the end."""
    ds = saturation(source, n=n, bins=_BINS, device=str(device), progress=False)
    kept = ds[list(_ACTIVITY)].drop_vars("bin", errors="ignore")
    if not histograms:
        return kept
    epochs = ds.epoch.values
    stages = [epochs[int(np.abs(epochs - epochs.max() / 2).argmin())], epochs[-1]]
    kept["stage_histogram"] = xr.concat([ds.histogram.sel(epoch=epoch, drop=True) for epoch in stages], dim="stage")
    return kept.assign_coords(stage_epoch=("stage", stages), bin=ds.bin.values)


def measure_gradients(source: Source, device: torch.device, *, n: int) -> xr.Dataset:
    """The split of the persistent gradient by iteration, layer and epoch."""
    return gradient_split(source, n=n, device=str(device), progress=False)


#: By the names that the settings use.
MEASURES: dict[str, Measure] = {
    "end_points": measure_end_points,
    "hessian": measure_hessian,
    "saturation": measure_saturation,
    "gradients": measure_gradients,
}

"""Single values out of datasets, for tables: the end of training, the lowest point of a plane, norms over a window."""

from __future__ import annotations

import xarray as xr


def at_last_epoch(ds: xr.Dataset, variable: str | None = None) -> xr.Dataset:
    """The dataset at the last epoch where ``variable``, by default any, is not NaN: runs have different lengths."""
    return ds.dropna("epoch", how="all", subset=None if variable is None else [variable]).isel(epoch=-1)


def lowest_point(ds: xr.Dataset) -> xr.Dataset:
    """The point of a plane, dims (y, x), with the lowest loss."""
    return ds.isel(ds.loss.argmin(("y", "x")))


def rms_fluctuation(ds: xr.Dataset, window: int) -> float:
    """Root mean square of the norms of the persistent gradient's fluctuations, over the epochs from ``window`` on."""
    return float((ds.fluctuation_norm.sel(epoch=slice(window, None)) ** 2).mean() ** 0.5)

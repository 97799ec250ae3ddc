"""Datasets as NetCDF4 files."""

from __future__ import annotations

import os
from pathlib import Path

import xarray as xr

from pnanalysis.errors import SchemaError, reason
from pnanalysis.io.atomic import atomic_path
from pnanalysis.schema import validate


def save(data: xr.Dataset | xr.DataTree, path: str | os.PathLike[str]) -> Path:
    """Write a dataset, or a tree of them, as compressed NetCDF4, atomically."""
    path = Path(path)
    with atomic_path(path) as temporary:
        if isinstance(data, xr.DataTree):
            data.to_netcdf(temporary, engine="h5netcdf")
        else:
            # HDF5 compresses chunks of arrays: scalars have none, and strings of variable length do not shrink.
            numeric = [name for name, array in data.variables.items() if array.dtype.kind in "fiu" and array.ndim]
            data.to_netcdf(temporary, engine="h5netcdf", encoding={name: {"zlib": True} for name in numeric})
    return path


def load(path: str | os.PathLike[str]) -> xr.Dataset:
    """Read one dataset into memory and check it.

    Raises
    ------
    SchemaError
        If there is no such file, it is not NetCDF4, or does not hold a pnanalysis dataset.
    """
    path = Path(path)
    if not path.is_file():
        raise SchemaError(f"{path}: no such file")
    try:
        with xr.open_dataset(path, engine="h5netcdf") as ds:
            loaded = ds.load()
    except (OSError, ValueError, KeyError) as error:
        raise SchemaError(f"{path}: not a readable NetCDF4 file ({reason(error)})") from error
    return validate(loaded)

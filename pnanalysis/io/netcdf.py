"""Datasets as NetCDF4 files."""

from __future__ import annotations

import os
from pathlib import Path

import xarray as xr

from pnanalysis.errors import SchemaError, reason
from pnanalysis.io.atomic import atomic_path
from pnanalysis.schema import validate


def save(data: xr.Dataset | xr.DataTree, path: str | os.PathLike[str]) -> Path:
    """Write a dataset, or a tree of them, as compressed NetCDF4, atomically.

    Raises
    ------
    OSError
        If it cannot be written; the disk may be full.
    """
    path, content = Path(path), serialised(data)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return path


def serialised(data: xr.Dataset | xr.DataTree) -> memoryview:
    """A dataset, or a tree of them, as the bytes of a file.

    Made in memory, because HDF5 does not survive a disk that fills up while it has a file open.
    """
    if isinstance(data, xr.DataTree):
        return memoryview(data.to_netcdf(None, engine="h5netcdf"))
    # HDF5 compresses chunks of arrays: scalars have none, and strings of variable length do not shrink.
    numeric = [name for name, array in data.variables.items() if array.dtype.kind in "fiu" and array.ndim]
    return memoryview(data.to_netcdf(None, engine="h5netcdf", encoding={name: {"zlib": True} for name in numeric}))


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

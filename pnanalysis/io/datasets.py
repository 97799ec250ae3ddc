"""Datasets on disk, NetCDF4 or Zarr by the suffix of their path; neither is ever left half written."""

from __future__ import annotations

import os
from pathlib import Path

import xarray as xr

from pnanalysis.checks import check_writable
from pnanalysis.errors import SchemaError
from pnanalysis.io import beside, netcdf, zarr_store

#: Suffixes that datasets are recognised by.
SUFFIXES = (".nc", ".h5", ".hdf5", zarr_store.SUFFIX)


def save(data: xr.Dataset | xr.DataTree, path: str | os.PathLike[str]) -> Path:
    """Write a dataset atomically: as a Zarr store if the path ends in ``.zarr``, else as compressed NetCDF4.

    Eigenvectors go beside it: see :mod:`pnanalysis.io.beside`.

    Parameters
    ----------
    data : xarray.Dataset or xarray.DataTree
        A tree is written as NetCDF4 only.
    path : path

    Raises
    ------
    SchemaError
        If there is anything but a dataset of pnanalysis where a Zarr store is to be written, or for a tree.
    """
    path = Path(path)
    if isinstance(data, xr.DataTree):
        if _is_zarr(path):
            raise SchemaError(f"{path}: a tree of datasets is saved as NetCDF4; choose a name that ends in .nc")
        return netcdf.save(data, path)
    rest = beside.split_off(data, path)
    saved = zarr_store.save(rest, path) if _is_zarr(path) else netcdf.save(rest, path)
    beside.remove_others(path, rest)
    return saved


def load(path: str | os.PathLike[str], within: Path | None = None, *, large: bool = True) -> xr.Dataset:
    """Read one dataset, a NetCDF4 file or a Zarr store, into memory and check it.

    Eigenvectors, which are stored beside their dataset, are read where they are used.

    Parameters
    ----------
    path : path
    within : Path, optional
        The run to which it belongs, whose links are not followed.
    large : bool
        Whether to open what is stored beside the dataset.

    Raises
    ------
    SchemaError
        If there is no such file, it cannot be read, or does not hold a pnanalysis dataset.
    """
    ds = zarr_store.load(path, within) if _is_zarr(path) else netcdf.load(path, within)
    return beside.attach(ds, Path(path), within) if large else ds


def check_destination(path: str | os.PathLike[str]) -> Path:
    """Refuse a path where no dataset can be written, before it is computed.

    Raises
    ------
    PnError
        If nothing can be written there, or there is something else where a Zarr store is to be written.
    """
    if _is_zarr(path) and Path(path).exists():
        return zarr_store.check_replaceable(path)
    return check_writable(path)


def _is_zarr(path: str | os.PathLike[str]) -> bool:
    return Path(path).suffix == zarr_store.SUFFIX

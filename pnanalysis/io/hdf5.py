"""Datasets from HDF5 files that follow the conventions of NetCDF4, each array looked up once.

xarray and h5netcdf look every array up some fifty times by its name, so that opening a hundred of them takes half a
second. What this module does not expect is left to them.

References
----------
The NetCDF-4 file format, Unidata: https://docs.unidata.ucar.edu/netcdf-c/current/file_format_specifications.html
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import h5py
import xarray as xr
from h5netcdf.attrs import Attributes

#: How the name of a scale begins that gives a dimension its length, but no coordinate.
_LENGTH_ALONE = b"This is a netCDF dimension but not a netCDF variable"


def read_arrays(file: h5py.File) -> xr.Dataset | None:
    """The dataset in the root group of a file, in memory; ``None`` where its structure is not one that xarray writes.

    Parameters
    ----------
    file : h5py.File
        Without links and arrays in other files.
    """
    items = {name: item for name, item in file.items() if isinstance(item, h5py.Dataset)}
    variables = {}
    for name, item in items.items():
        scale = item.attrs.get("NAME", b"") if item.attrs.get("CLASS") == b"DIMENSION_SCALE" else None
        if scale is not None and scale.startswith(_LENGTH_ALONE):
            continue
        dims = (name,) if scale is not None and item.ndim == 1 else _dimensions(file, item)
        if dims is None:
            return None
        string = h5py.check_string_dtype(item.dtype)
        if item.dtype.kind not in "fiu" and (string is None or string.length is not None):
            return None
        values = item[()] if string is None else item.asstr()[()]
        variables[name] = xr.Variable(dims, values, dict(_attributes(item)), {"dtype": str} if string else None)
    return xr.decode_cf(xr.Dataset(variables, attrs=dict(_attributes(file))))


def _dimensions(file: h5py.File, item: h5py.Dataset) -> tuple[str, ...] | None:
    if not item.ndim:
        return ()
    scales = item.attrs.get("DIMENSION_LIST")
    if scales is None or any(len(references) != 1 for references in scales):
        return None
    return tuple(file[references[0]].name.rpartition("/")[2] for references in scales)


def _attributes(item: h5py.HLObject) -> Iterator[tuple[str, Any]]:
    for name, value in Attributes(item.attrs, None, h5py).items():
        yield (
            name,
            value.decode() if isinstance(value, bytes) and name not in ("_FillValue", "missing_value") else value,
        )

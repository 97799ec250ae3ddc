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
#: How the name of an array begins that is called as a dimension that it does not have, or not alone.
_NOT_OF_ITS_DIMENSION = "_nc4_non_coord_"


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
        if dims is None or name.startswith(_NOT_OF_ITS_DIMENSION):
            return None
        string = h5py.check_string_dtype(item.dtype)
        if item.dtype.kind not in "fiu" and (string is None or string.length is not None):
            return None
        values = item[()] if string is None else item.asstr()[()]
        variables[name] = xr.Variable(dims, values, dict(_attributes(item)), {"dtype": str} if string else None)
    return xr.decode_cf(xr.Dataset(variables, attrs=dict(_attributes(file))))


def _dimensions(file: h5py.File, item: h5py.Dataset) -> tuple[str, ...] | None:
    """The names of an array's dimensions; ``None`` where they are not those of the root group, in their lengths."""
    if item.shape is None:  # it holds nothing, not even a number
        return None
    if not item.ndim:
        return ()
    references = item.attrs.get("DIMENSION_LIST")
    if references is None or any(len(own) != 1 for own in references):
        return None
    scales = [file[own[0]] for own in references]
    if any(scale.name.count("/") != 1 for scale in scales) or tuple(map(len, scales)) != item.shape:
        return None
    return tuple(scale.name[1:] for scale in scales)


def _attributes(item: h5py.HLObject) -> Iterator[tuple[str, Any]]:
    for name, value in Attributes(item.attrs, None, h5py).items():
        yield (
            name,
            value.decode() if isinstance(value, bytes) and name not in ("_FillValue", "missing_value") else value,
        )

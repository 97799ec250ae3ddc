"""Datasets from and to HDF5 files that follow the conventions of NetCDF4, each array looked up once.

xarray and h5netcdf look every array up some fifty times by its name, so that reading or writing a hundred of them takes
half a second. What this module does not expect is left to them.

References
----------
The NetCDF-4 file format, Unidata: https://docs.unidata.ucar.edu/netcdf-c/current/file_format_specifications.html
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import h5py
import numpy as np
import xarray as xr
from h5netcdf.attrs import Attributes
from xarray import conventions

#: How the name of a scale begins that gives a dimension its length, but no coordinate.
_LENGTH_ALONE = b"This is a netCDF dimension but not a netCDF variable."
#: How the name of an array begins that is called as a dimension that it does not have, or not alone.
_NOT_OF_ITS_DIMENSION = "_nc4_non_coord_"
#: Kinds of arrays and attributes that are written here: floats, integers, texts.
_KINDS = "fiuU"
_RESERVED = {
    "CLASS", "NAME", "DIMENSION_LIST", "REFERENCE_LIST", "_Netcdf4Dimid", "_Netcdf4Coordinates", "_NCProperties",
    "_nc3_strict",
}  # fmt: skip


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


def write_arrays(data: xr.Dataset, file: h5py.File) -> bool:
    """Write a dataset into a new file as xarray does, if it is one of numbers and texts.

    Parameters
    ----------
    data : xarray.Dataset
    file : h5py.File
        Empty, with ``track_order=True``. Arrays of numbers are compressed, and every chunk has a checksum; HDF5 does
        that to chunks, so scalars have neither, and strings of variable length would not shrink.

    Returns
    -------
    bool
        False, and nothing is written, where the dataset has what only xarray can write, or refuses with a reason.
    """
    all_attributes = [data.attrs, *(variable.attrs for variable in data.variables.values())]
    if data.encoding.get("unlimited_dims") or not all(map(_are_plain, all_attributes)):
        return False
    variables, attributes = conventions.cf_encoder(*conventions.encode_dataset_coordinates(data.drop_encoding()))
    names = [*variables, *data.sizes]
    if not all(isinstance(name, str) and name and "/" not in name for name in names):
        return False
    for name, variable in variables.items():
        is_of_its_dimension = name not in data.sizes or variable.dims == (name,)
        if not (is_of_its_dimension and variable.size and variable.dtype.kind in _KINDS):
            return False
    ids = {dim: np.int32(k) for k, dim in enumerate(data.sizes)}
    items = {dim: _write_length(file, str(dim), ids[dim], n) for dim, n in data.sizes.items() if dim not in variables}
    for name, variable in variables.items():
        items[name] = item = _write_array(file, name, variable)
        if name in ids:
            item.make_scale(name)
        if variable.dims:
            item.attrs["_Netcdf4Coordinates"] = np.array([ids[dim] for dim in variable.dims])
            item.attrs["_Netcdf4Dimid"] = ids[variable.dims[0]]
    for name, variable in variables.items():
        if name not in ids:  # a scale has none itself
            for axis, dim in enumerate(variable.dims):
                items[name].dims[axis].attach_scale(items[dim])
    _write_attributes(file, attributes)
    versions = {
        "pnanalysis": metadata.version("pnanalysis"),
        "hdf5": h5py.version.hdf5_version,
        "h5py": h5py.__version__,
    }
    made_by = ",".join(f"{name}={version}" for name, version in {"version": 2, **versions}.items())
    file.attrs["_NCProperties"] = np.bytes_(made_by)
    return True


def _are_plain(attributes: Mapping[Any, Any]) -> bool:
    """Whether attributes are numbers and texts, alone or in lists, and none has a name that NetCDF uses itself."""
    return all(
        isinstance(name, str) and name and name not in _RESERVED and np.asarray(value).dtype.kind in _KINDS
        for name, value in attributes.items()
    )


def _write_length(file: h5py.File, name: str, number: np.int32, length: int) -> h5py.Dataset:
    """A dimension without a coordinate: an array in which nothing is written."""
    item = file.create_dataset(name, (length,), ">f4", track_order=True)
    item.attrs["_Netcdf4Dimid"] = number
    item.make_scale(_LENGTH_ALONE + b"%10d" % length)
    return item


def _write_array(file: h5py.File, name: str, variable: xr.Variable) -> h5py.Dataset:
    attributes = dict(variable.attrs)
    fill = attributes.pop("_FillValue", None)
    is_text = variable.dtype.kind == "U"
    filters = {} if is_text or not variable.ndim else {"compression": "gzip", "fletcher32": True}
    item: h5py.Dataset = file.create_dataset(
        name, data=variable.values.astype(object) if is_text else variable.values,
        dtype=h5py.string_dtype() if is_text else variable.dtype, fillvalue=fill, track_order=True, **filters,
    )  # fmt: skip
    if fill is not None:
        item.attrs["_FillValue"] = np.atleast_1d(variable.dtype.type(fill))
    _write_attributes(item, attributes)
    return item


def _write_attributes(item: h5py.HLObject, attributes: Mapping[Any, Any]) -> None:
    for name, value in attributes.items():
        is_number = np.isscalar(value) and not isinstance(value, str)
        item.attrs[name] = np.atleast_1d(value) if is_number else value

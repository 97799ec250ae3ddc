"""Datasets as NetCDF4 files, read and written through memory.

A file is read as a whole, and looked through, before xarray sees it: HDF5 can name other files to read from, run in
circles, and expand to any size. Writing through memory keeps a full disk away from the HDF5 library.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import xarray as xr

from pnanalysis.errors import SchemaError, reason
from pnanalysis.io.atomic import atomic_path
from pnanalysis.io.digest import check_trailer, with_trailer
from pnanalysis.io.files import read_regular
from pnanalysis.io.hdf5 import read_arrays, write_arrays
from pnanalysis.schema import validate

#: Bytes of a file and of its arrays in memory, and numbers of arrays and of attributes of each. What is larger was not
#: written by this project.
_LARGEST = 2**32
_MOST_ARRAYS, _MOST_ATTRIBUTES = 5_000, 1_000
_FILTERS = {"gzip", "shuffle", "fletcher32"}


def save(data: xr.Dataset | xr.DataTree, path: str | os.PathLike[str]) -> Path:
    """Write a dataset, or a tree of them, as compressed NetCDF4 with checksums, atomically.

    Raises
    ------
    OSError
        If it cannot be written; the disk may be full.
    """
    path, content = Path(path), as_bytes(data)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return path


def as_bytes(data: xr.Dataset | xr.DataTree) -> bytes:
    """The content of the file that :func:`save` writes."""
    return with_trailer(_serialised(data))


def load(path: str | os.PathLike[str], within: Path | None = None) -> xr.Dataset:
    """Read one dataset into memory and check it.

    Parameters
    ----------
    path : path
    within : Path, optional
        The run to which the file belongs: see :func:`pnanalysis.io.files.open_regular`.

    Raises
    ------
    SchemaError
        If there is no such file, it is damaged or not NetCDF4, or does not hold a pnanalysis dataset.
    """
    return read(path, within)[0]


def read(path: str | os.PathLike[str], within: Path | None = None) -> tuple[xr.Dataset, bool]:
    """The dataset as :func:`load` gives it, and whether a digest in the file has confirmed its content."""
    raw = read_regular(path, _LARGEST, SchemaError, within)
    is_confirmed = check_trailer(raw, path, SchemaError)
    with _one_error(path):
        with h5py.File(io.BytesIO(raw), "r") as file:
            _check_contents(file)
            loaded = read_arrays(file)
        if loaded is None:  # written by another program
            with xr.open_dataset(io.BytesIO(raw), engine="h5netcdf") as ds:
                loaded = ds.load()
        return validate(loaded), is_confirmed


def _serialised(data: xr.Dataset | xr.DataTree) -> memoryview:
    buffer = io.BytesIO()
    if isinstance(data, xr.DataTree):
        data.to_netcdf(buffer, engine="h5netcdf")
        return buffer.getbuffer()
    with h5py.File(buffer, "w", track_order=True) as file:
        is_written = write_arrays(data, file)
    if is_written:
        return buffer.getbuffer()
    # HDF5 compresses chunks of arrays: scalars have none, and strings of variable length do not shrink.
    numeric = [name for name, array in data.variables.items() if array.dtype.kind in "fiu" and array.size]
    encoding = {name: {"zlib": True, "fletcher32": True} for name in numeric if data.variables[name].ndim}
    data.to_netcdf(buffer := io.BytesIO(), engine="h5netcdf", encoding=encoding)
    return buffer.getbuffer()


@contextmanager
def _one_error(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever the libraries raise on bytes that they cannot read into one sentence."""
    try:
        yield
    except SchemaError as error:
        message = str(error)
        raise SchemaError(message if message.startswith(str(path)) else f"{path}: {message}") from error
    except Exception as error:  # of many types, depending on what is damaged
        raise SchemaError(f"{path}: not a readable NetCDF4 file ({reason(error)})") from error


def _check_contents(file: h5py.File) -> None:
    """Refuse what no dataset of this project has: links, data in other files, unknown filters, excessive sizes."""
    size = 0
    names = list(file)
    if len(names) > _MOST_ARRAYS:
        raise SchemaError(f"holds {len(names):,} arrays, more than any dataset of pnanalysis")
    _check_attributes(file, "the file")
    for name in names:
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise SchemaError(f"{name!r} is a link, and these are not followed; write the dataset anew without links")
        item = file[name]
        if isinstance(item, h5py.Group):
            continue  # xarray reads the root group alone
        _check_attributes(item, repr(name))
        if not isinstance(item, h5py.Dataset):
            continue
        if item.external or item.is_virtual:
            raise SchemaError(f"{name!r} lies in another file, and these are not opened; write it into the dataset")
        if not set(item._filters) <= _FILTERS:
            raise SchemaError(f"{name!r} is packed in an unknown way; use zlib")
        size += item.nbytes
        if size > _LARGEST:
            raise SchemaError(f"its arrays need more than {_LARGEST:,} bytes of memory; it is no result of pnanalysis")


def _check_attributes(item: h5py.HLObject, name: str) -> None:
    if len(item.attrs) > _MOST_ATTRIBUTES:
        raise SchemaError(f"{name} has {len(item.attrs):,} attributes, more than any dataset of pnanalysis")
    for key in item.attrs:
        attribute = item.attrs.get_id(key)
        if attribute.get_storage_size() > 2**24:
            raise SchemaError(f"{name} has an attribute {key!r} that is too large for any dataset of pnanalysis")

"""Datasets on disk: NetCDF4 files that are never left half written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xarray as xr

from pnanalysis.errors import SchemaError
from pnanalysis.schema import validate


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; on success sync it to disk and rename it over ``path``.

    If the body raises, ``path`` is untouched and the temporary file is removed.

    Raises
    ------
    OSError
        If the folder cannot be created or written (a full disk, say).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def save(data: xr.Dataset | xr.DataTree, path: str | os.PathLike[str]) -> Path:
    """Write a dataset, or a tree of them, as compressed NetCDF4, atomically."""
    path = Path(path)
    with atomic_path(path) as temporary:
        if isinstance(data, xr.DataTree):
            data.to_netcdf(temporary, engine="h5netcdf")
        else:
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
        raise SchemaError(f"{path}: not a readable NetCDF4 file ({error})") from error
    return validate(loaded)

"""Datasets as Zarr stores, which are written row by row and read lazily: for long trajectories and large sweeps.

Stores are of Zarr format 2, whose strings and consolidated metadata are part of its specification. Chunks end in a
checksum (CRC-32, which all readers of Zarr compare), and the consolidated metadata hold a digest of themselves.
"""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr

from pnanalysis.errors import SchemaError, reason
from pnanalysis.io import digest
from pnanalysis.io.atomic import atomic_directory, atomic_path
from pnanalysis.io.files import check_inside, check_tree, read_regular
from pnanalysis.schema import SCHEMAS, validate

SUFFIX = ".zarr"
_CONSOLIDATED, _ATTRIBUTES, _CHECKSUM = ".zmetadata", ".zattrs", "crc32"
_FORMAT: Literal[2] = 2
_CHUNK_BYTES = 2**18
#: Bytes in memory above which a store is not loaded as a whole, and attempts while others replace it.
_LARGEST, _ATTEMPTS = 2**34, 5
#: Bytes of a file of attributes.
_LARGEST_TEXT = 2**24
#: Strings of fixed length, of any length, and as objects.
_STRING_KINDS = "UTO"


def save(
    ds: xr.Dataset, path: str | os.PathLike[str], chunks: Mapping[Hashable, tuple[int, ...]] | None = None
) -> Path:
    """Write a dataset as a Zarr store, atomically. A dataset of pnanalysis that is there already is replaced.

    ``chunks`` are the sizes of the pieces of some variables, all of which are written.

    Raises
    ------
    SchemaError
        If it is not a dataset of pnanalysis, or there is anything else at ``path``.
    """
    path = _check_writing(ds, path)
    with atomic_directory(path) as temporary:
        ds = ds.drop_encoding()
        encoding = _checked(ds)
        for name, sizes in (chunks or {}).items():
            encoding[name]["chunks"] = sizes
        empty = True if chunks else None  # those of NaN alone, too
        ds.to_zarr(
            temporary, mode="w", zarr_format=_FORMAT, consolidated=True, encoding=encoding, write_empty_chunks=empty
        )
        _sign(temporary)
    return path


def load(path: str | os.PathLike[str], within: Path | None = None) -> xr.Dataset:
    """Read a dataset into memory and check it.

    Parameters
    ----------
    path : path
    within : Path, optional
        The run to which it belongs, whose links are not followed.

    Raises
    ------
    SchemaError
        If there is no such store, or it does not hold a pnanalysis dataset.
    """
    path = Path(path)
    if within is not None:
        check_inside(path, within, SchemaError)
    for _ in range(_ATTEMPTS):
        before = identity(path)
        try:
            ds = _loaded(path)
        except SchemaError:
            if identity(path) == before:
                raise
            continue
        if identity(path) == before:
            return ds
    raise SchemaError(f"{path}: is being replaced by another process again and again; read it when that has ended")


def _loaded(path: Path) -> xr.Dataset:
    ds = open_store(path)
    try:
        if ds.nbytes > _LARGEST:
            raise SchemaError(f"{path}: its arrays need {ds.nbytes:,} bytes of memory; open it with open_store")
        return validate(ds.load())
    except SchemaError:
        raise
    except Exception as error:  # a chunk that cannot be read or decompressed; of many types
        raise SchemaError(f"{path}: not a readable Zarr store ({reason(error)})") from error


def identity(path: Path) -> tuple[int, int] | None:
    """What differs once another store has taken this one's place; ``None`` where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def open_store(path: str | os.PathLike[str]) -> xr.Dataset:
    """Open a dataset lazily: variables are read where they are used. Its kind alone is checked.

    Raises
    ------
    SchemaError
        If there is no such store, or it was not written by pnanalysis.
    """
    path = Path(path)
    if not path.exists():
        raise SchemaError(f"{path}: no such Zarr store")
    if not is_store(path):
        raise SchemaError(f"{path}: not a Zarr store of pnanalysis")
    check_tree(path, SchemaError)
    attrs = _metadata(path).get(_ATTRIBUTES, {})
    try:
        # chunks=None indexes lazily without Dask
        ds: xr.Dataset = xr.open_zarr(path, chunks=None, consolidated=True, zarr_format=_FORMAT)
        # Appended strings have no fixed length on disk. In memory they get one again, which NumPy finds from objects.
        strings = [name for name, array in ds.variables.items() if array.dtype.kind in _STRING_KINDS]
        ds = ds.assign({name: ds[name].astype(object).astype(np.str_) for name in strings})
        if attrs:  # those with the digest, by their names there; xarray has taken "coordinates" for itself
            ds.attrs = {name: value for name, value in attrs.items() if name != "coordinates"}
        return ds
    except Exception as error:  # of many types, depending on what is damaged
        raise SchemaError(f"{path}: not a readable Zarr store ({reason(error)})") from error


def append(ds: xr.Dataset, path: str | os.PathLike[str], dim: str) -> Path:
    """Append rows to the store at ``path``, or begin it with them.

    A kill at any moment leaves a store of all rows whose call has returned: readers see the consolidated metadata,
    which is replaced as the last step. Rows of a call that was killed are dropped by the next one. Only one process
    at a time may append.

    Parameters
    ----------
    ds : xarray.Dataset
        One or more rows along ``dim``. Variables without that dim are stored by the first call.
    path : path
    dim : str
        ``checkpoint`` for a trajectory, ``run`` for a sweep.

    Raises
    ------
    SchemaError
        If the rows are not a dataset of pnanalysis, have no ``dim`` or do not fit the store (other variables, sizes,
        dtypes or coordinates), or there is anything else at ``path``.

    Examples
    --------
    >>> for k in range(n):  # doctest: +SKIP
    ...     append(ds.isel(checkpoint=[k]), "trajectory.zarr", "checkpoint")
    """
    path = _check_writing(ds, path)
    if dim not in ds.dims:
        raise SchemaError(f"nothing to append to {path}: the dataset has no dim {dim!r}")
    ds = _with_objects_for_strings(ds.drop_encoding())
    if not path.exists():
        encoding = _checked(ds)
        for name, array in ds.variables.items():
            if dim in array.dims:
                encoding[name]["chunks"] = _chunks(array, dim)
        with atomic_directory(path) as temporary:
            ds.to_zarr(temporary, mode="w", zarr_format=_FORMAT, consolidated=True, encoding=encoding)
            _sign(temporary)
        return path
    with open_store(path) as stored:
        _check_fits(ds, stored, path, dim)
    _drop_unfinished_rows(path)
    rows = ds.drop_vars([name for name, array in ds.variables.items() if dim not in array.dims])
    rows.to_zarr(path, append_dim=dim, zarr_format=_FORMAT, consolidated=True)
    _sign(path)
    return path


def is_confirmed(path: Path) -> bool:
    """Whether a store that has been read carries a digest of its metadata, and checksums in all of its chunks."""
    metadata = _metadata(path)
    arrays = [entry for name, entry in metadata.items() if name.endswith("/.zarray")]
    checked = all(any(step["id"] == _CHECKSUM for step in array["filters"] or ()) for array in arrays)
    return checked and digest.KEY in _consolidated(path)


def is_store(path: Path) -> bool:
    """Whether this directory is a Zarr store that holds a dataset of pnanalysis."""
    try:
        attrs = json.loads(read_regular(path / _ATTRIBUTES, _LARGEST_TEXT, SchemaError, within=path))
    except (ValueError, RecursionError):
        return False
    kind = attrs.get("kind") if isinstance(attrs, dict) else None
    return (path / ".zgroup").is_file() and isinstance(kind, str) and kind in SCHEMAS


def check_replaceable(path: str | os.PathLike[str]) -> Path:
    """Refuse a path where there is anything but a Zarr store of pnanalysis.

    Raises
    ------
    SchemaError
    """
    path = Path(path)
    if path.exists() and not is_store(path):
        raise SchemaError(f"{path}: exists and is not a Zarr store of pnanalysis; choose another name")
    return path


def _check_writing(ds: xr.Dataset, path: str | os.PathLike[str]) -> Path:
    """:func:`check_replaceable`, for a dataset whose store could be replaced and read again itself."""
    kind = ds.attrs.get("kind")
    if kind not in SCHEMAS:
        raise SchemaError(f"{path}: not saved, not a pnanalysis dataset (kind {kind!r}); save it with ds.to_zarr")
    return check_replaceable(path)


def _with_objects_for_strings(ds: xr.Dataset) -> xr.Dataset:
    """The dataset with strings of any length: later rows may have longer ones than the first."""
    strings = [name for name, array in ds.variables.items() if array.dtype.kind in _STRING_KINDS]
    return ds.assign({name: ds[name].astype(object) for name in strings})


def _checked(ds: xr.Dataset) -> dict[Hashable, dict[str, Any]]:
    """How to pack the variables: compressed, and then with a checksum."""
    from numcodecs import CRC32, Blosc  # here, because they are slow to import and few commands need them
    from numcodecs.vlen import VLenUTF8

    packed = [Blosc(cname="lz4"), CRC32()]
    return {
        name: {"filters": [VLenUTF8(), *packed] if array.dtype == object else packed, "compressors": None}
        for name, array in ds.variables.items()
    }


def _sign(path: Path) -> None:
    """Add their digest to the consolidated metadata."""
    metadata = _consolidated(path)
    metadata[digest.KEY] = digest.of_entries(metadata)
    with atomic_path(path / _CONSOLIDATED) as temporary:
        temporary.write_text(json.dumps(metadata))


def _metadata(path: Path) -> dict[str, Any]:
    """The metadata of a store and its arrays, by the names of their files.

    Raises
    ------
    SchemaError
        If they cannot be read, or are not what was written.
    """
    consolidated = _consolidated(path)
    digest.check_entries(consolidated, path / _CONSOLIDATED, SchemaError)
    metadata = consolidated.get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def _consolidated(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_regular(path / _CONSOLIDATED, _LARGEST_TEXT, SchemaError, within=path))
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"{path}: not a readable Zarr store ({reason(error)})") from error
    if not isinstance(found, dict):
        raise SchemaError(f"{path}: not a readable Zarr store ({_CONSOLIDATED} holds no metadata)")
    return found


def _chunks(array: xr.Variable, dim: str) -> tuple[int, ...]:
    """Whole rows, as many as make up a chunk that is cheap to write again with the next row in it."""
    row = {other: max(size, 1) for other, size in array.sizes.items() if other != dim}
    n_rows = max(1, _CHUNK_BYTES // (array.dtype.itemsize * int(np.prod([*row.values()], dtype=np.int64))))
    return tuple(row.get(other, n_rows) for other in array.dims)


def _check_fits(ds: xr.Dataset, stored: xr.Dataset, path: Path, dim: str) -> None:
    """Refuse rows that xarray would broadcast, convert or write over what is there."""
    if set(ds.variables) != set(stored.variables):
        differing = sorted(map(str, set(ds.variables) ^ set(stored.variables)))
        raise SchemaError(f"{path}: rows to append differ from those stored in {', '.join(differing)}")
    for name, array in ds.variables.items():
        there = stored[name].variable
        both_strings = array.dtype.kind in _STRING_KINDS and there.dtype.kind in _STRING_KINDS
        fits = array.dims == there.dims and (both_strings or array.dtype == there.dtype)
        if fits and dim in array.dims:
            fits = all(array.sizes[other] == there.sizes[other] for other in array.dims if other != dim)
        elif fits:
            fits = xr.DataArray(array).equals(xr.DataArray(there))
        if not fits:
            raise SchemaError(
                f"{path}: {name!r} of the rows to append does not fit the one stored; "
                f"without the dim {dim!r} its values, with it its dtype and other dims must be the same"
            )


def _drop_unfinished_rows(path: Path) -> None:
    """Cut arrays back to the lengths in the consolidated metadata: a killed append leaves some of them longer."""
    import zarr  # here, because it is slow to import and few commands append

    for leftover in path.rglob("*.partial"):  # zarr's temporary files, which it would take for foreign objects
        leftover.unlink()
    finished = zarr.open_group(path, mode="r", zarr_format=_FORMAT, use_consolidated=True)
    present = zarr.open_group(path, mode="r+", zarr_format=_FORMAT, use_consolidated=False)
    shapes = {name: array.shape for name, array in finished.arrays()}
    for name, array in present.arrays():
        if array.shape != shapes[name]:
            array.resize(shapes[name])

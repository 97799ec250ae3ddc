"""Large variables beside their dataset: a NetCDF file without them, and a folder of a Zarr store that is read lazily.

``eigenpairs.nc`` has its vectors in ``eigenpairs.vectors/DIGEST.zarr``. The digest is that of their values, and an
attribute of the file: whatever moment a process is killed at, the file names the vectors that belong to it. Folders of
earlier ones are removed once the file that names the new ones is in place.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from pnanalysis.arrays import Array
from pnanalysis.errors import SchemaError
from pnanalysis.io import zarr_store
from pnanalysis.io.files import check_inside
from pnanalysis.kinds import LAZY
from pnanalysis.schema import stamp

#: What the folder of the store is called after the dataset's file, the attribute that names the store, and the kind of
#: what is in it.
SUFFIX, DIGEST = ".vectors", "vectors_digest"
_STORED = {"vector": "eigenvectors", "diagonal": "diagonals"}
#: Numbers of a vector that are read at a time, and attempts to read them while others save the same once more.
_CHUNK, _ATTEMPTS = 2**22, 3


def large_variable(ds: xr.Dataset) -> str | None:
    """The name of the variable that is stored beside a dataset; ``None`` where there is none."""
    name = LAZY.get(str(ds.attrs.get("kind")))
    return name if name in ds else None


def split_off(ds: xr.Dataset, path: Path) -> xr.Dataset:
    """Write the large variable of a dataset that is to be saved at ``path``; the rest, which names it.

    Raises
    ------
    SchemaError
        If something else is where it is to be written.
    """
    name = large_variable(ds)
    if name is None:
        ds = ds.copy(deep=False)
        ds.attrs.pop(DIGEST, None)  # of vectors that it no longer has
        return ds
    key = _digest(ds[name])
    store = _store(path, key)
    if not zarr_store.is_store(store):
        own = stamp(ds[[name]].drop_vars(list(ds[name].coords)).drop_attrs(deep=False), _STORED[name], **{DIGEST: key})
        *_, length = own[name].shape
        zarr_store.save(own, store, {name: (*[1] * (own[name].ndim - 1), min(max(length, 1), _CHUNK))})
    return ds.drop_vars(name).assign_attrs({DIGEST: key})


def remove_others(path: Path, ds: xr.Dataset) -> None:
    """Remove the stores beside ``path`` that are not those of the dataset that has been saved there."""
    own = _store(path, str(ds.attrs.get(DIGEST, "")))
    folder = own.parent
    if folder.is_symlink() or not folder.is_dir():
        return
    for other in folder.glob(f"*{zarr_store.SUFFIX}"):
        if other != own and not other.is_symlink() and zarr_store.is_store(other):
            shutil.rmtree(other, ignore_errors=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def attach(ds: xr.Dataset, path: Path, within: Path | None = None) -> xr.Dataset:
    """The dataset with what lies beside its file, which is read where it is used.

    Raises
    ------
    SchemaError
        If the vectors that the file names are not there, damaged, or of another dataset.
    """
    name, key = LAZY.get(str(ds.attrs.get("kind"))), ds.attrs.get(DIGEST)
    if name is None or key is None:
        return ds
    if not (isinstance(key, str) and key.isalnum()):
        raise SchemaError(f"{path}: its attribute {DIGEST} is no digest; compute it again")
    store = _store(path, key)
    if within is not None:
        check_inside(store.parent, within, SchemaError)
        check_inside(store, within, SchemaError)
    if not store.exists():
        raise SchemaError(
            f"{path}: its vectors, {store.parent.name}/{store.name}, are not beside it; copy them too, or compute it "
            "again"
        )
    beside = zarr_store.open_store(store.absolute())  # read later, wherever the process has gone by then
    if beside.attrs.get(DIGEST) != key or name not in beside or not _fits(beside[name], ds):
        raise SchemaError(f"{store}: holds the vectors of another dataset; compute it again")
    there = beside[name].variable
    lazy: Any = indexing.LazilyIndexedArray(_Stored(store, name, there))
    cached: Any = indexing.MemoryCachedArray  # as xarray does with what it opens itself
    kept = cached(indexing.CopyOnWriteArray(lazy))
    return ds.assign({name: xr.Variable(there.dims, kept, there.attrs, there.encoding)})


class _Stored(BackendArray):
    """A variable of a store, which is seen to be whole whenever it is read: Zarr reads pieces that are gone as NaN.

    Raises
    ------
    SchemaError
        Now or later, if the store is not whole, or no longer there.
    """

    def __init__(self, store: Path, name: str, variable: xr.Variable) -> None:
        self._store, self._name, self._variable = store.absolute(), name, variable
        self.shape, self.dtype = variable.shape, variable.dtype
        missing, n = _n_missing(self._store, name)
        if missing:
            raise SchemaError(f"{store}: {missing} of {n} pieces of the vectors are gone; compute it again")

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> Array:
        for _ in range(_ATTEMPTS):
            before = zarr_store.identity(self._store)
            values: Array = self._variable[key].values
            # another call may have saved the same values once more meanwhile
            if before == zarr_store.identity(self._store) is not None and not _n_missing(self._store, self._name)[0]:
                return values
            if before is None:
                break
        raise SchemaError(
            f"{self._store}: the vectors that were opened here have been replaced, moved or removed since; load the "
            "dataset again"
        )


def check_unit(vector: np.ndarray, origin: str = "the dataset") -> np.ndarray:
    """Eigenvectors ``(k, P)`` as they were read, if they have unit length.

    Raises
    ------
    SchemaError
        If they do not: chunks that were removed after the file was opened read as NaN.
    """
    lengths = np.sqrt(np.einsum("kp,kp->k", vector, vector, dtype=np.float64))
    if not np.all(np.abs(lengths - 1) < 1e-2):
        raise SchemaError(f"{origin}: its eigenvectors are not of unit length; they are damaged, compute them again")
    return vector


def _store(path: Path, key: str) -> Path:
    return path.with_name(path.stem + SUFFIX) / f"{key}{zarr_store.SUFFIX}"


def _digest(array: xr.DataArray) -> str:
    """Of shape, type and values, row by row: the array may be larger than memory."""
    found = hashlib.sha256(f"{array.dims}{array.shape}{array.dtype}".encode())
    for index in np.ndindex(*array.shape[:-1]):
        found.update(np.ascontiguousarray(array[index].values).tobytes())
    return found.hexdigest()[:32]


def _fits(array: xr.DataArray, ds: xr.Dataset) -> bool:
    return all(ds.sizes.get(dim, size) == size for dim, size in array.sizes.items())


def _n_missing(store: Path, name: str) -> tuple[int, int]:
    """How many pieces of a variable are not there, and how many there should be."""
    try:
        layout: dict[str, Any] = json.loads((store / name / ".zarray").read_text())
        there = sum(file.name[0] != "." for file in (store / name).iterdir())
    except FileNotFoundError:
        return 1, 1
    n = math.prod(-(-size // chunk) for size, chunk in zip(layout["shape"], layout["chunks"], strict=True))
    return max(n - there, 0), n

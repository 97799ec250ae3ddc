"""The runs of a sweep as one dataset: in memory along the settings that differ, or in a Zarr store row by row."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from pnanalysis.errors import RunError
from pnanalysis.io import datasets, zarr_store
from pnanalysis.io.atomic import atomic_directory
from pnanalysis.io.runs import MANIFEST, Run, open_run

#: Runs that are in memory at once while they are collected.
_BATCH = 16


def open_runs(directory: str | os.PathLike[str], kind: str = "history") -> xr.Dataset:
    """Open one dataset of all the runs in a folder, or of a store that :func:`collect_runs` has written.

    Parameters
    ----------
    directory : path
        Its subfolders that hold a run are read, such as those that ``pntrain --sweep`` writes. Of a store, variables
        are read where they are used.
    kind : str
        ``history``, or an analysis whose results every run has (``hessian``, ``saturation``...). A store holds one
        kind only, so this is ignored.

    Returns
    -------
    xarray.Dataset
        Of a folder: with one more dim for each setting that differs between the runs, named after it; NaN where a
        combination is missing. If two runs have the same settings, the dim is ``run`` instead. Of a store: with the
        dim ``run``, and those settings as coordinates along it.

    Raises
    ------
    RunError
        If there are no runs, or none with this dataset.
    SchemaError
        If it is a store that cannot be read.

    Examples
    --------
    >>> ds = open_runs("runs/sweep")  # doctest: +SKIP
    >>> ds.validation_error.isel(epoch=-1).min("iteration").mean("seed")  # doctest: +SKIP
    """
    directory = Path(directory)
    if zarr_store.is_store(directory):
        return zarr_store.open_store(directory)
    found = _find(directory, kind)
    settings = differing_settings(run for run, _ in found)
    places = [{name: values[i] for name, values in settings.items()} for i in range(len(found))]
    if not settings or len({tuple(place.values()) for place in places}) < len(places):
        places = [{"run": run.path.name} for run, _ in found]
    parts = padded([datasets.load(file, within=run.path, large=False) for run, file in found])
    parts = [_placed(ds, place) for ds, place in zip(parts, places, strict=True)]
    return xr.merge(parts, join="outer", compat="no_conflicts", combine_attrs="drop_conflicts")


def collect_runs(directory: str | os.PathLike[str], kind: str, path: str | os.PathLike[str]) -> Path:
    """Write the datasets of all the runs in a folder to one Zarr store, with only a few of them in memory.

    Parameters
    ----------
    directory : path
        Its subfolders that hold a run are read.
    kind : str
        ``history``, or an analysis whose results the runs have; runs without it are left out.
    path : path
        The store. It is replaced, once complete, if it is there already.

    Returns
    -------
    pathlib.Path
        ``path``; :func:`open_runs` opens it. Its dim is ``run``, with each setting that differs between the runs as a
        coordinate. Where runs differ in their epochs, checkpoints or numbers of nodes there is NaN (strings are empty),
        and integers become floats.

    Raises
    ------
    RunError
        If there are no runs, or none with this dataset.
    SchemaError
        If there is anything but a dataset of pnanalysis at ``path``.

    Examples
    --------
    >>> ds = open_runs(collect_runs("runs/sweep", "history", "sweep.zarr"))  # doctest: +SKIP
    >>> ds.validation_error.isel(epoch=-1).min("iteration").groupby("lam").mean()  # doctest: +SKIP
    """
    path = zarr_store.check_replaceable(path)
    found = _find(Path(directory), kind)
    settings = differing_settings(run for run, _ in found)
    # Every dataset is read twice: the first time to learn the shape that all rows must have.
    frame = _Frame()
    for run, file in found:
        frame.widen(datasets.load(file, within=run.path, large=False))
    with atomic_directory(path) as temporary:
        # An append takes about as long for one row as for many, so several runs are appended at once.
        for begin in range(0, len(found), _BATCH):
            batch = slice(begin, begin + _BATCH)
            parts = [frame.fill(datasets.load(file, within=run.path, large=False)) for run, file in found[batch]]
            dim = _free_name(parts[0], "run")
            coords = {_free_name(parts[0], name): (dim, np.array(values)[batch]) for name, values in settings.items()}
            rows = [_placed(ds, {"run": run.path.name}) for ds, (run, _) in zip(parts, found[batch], strict=True)]
            together = xr.concat(rows, dim, data_vars="minimal", coords="minimal", compat="override", join="exact")
            zarr_store.append(together.assign_coords(coords), temporary, dim)
    return path


def _find(directory: Path, kind: str) -> list[tuple[Run, Path]]:
    """The runs of a folder that have this dataset, and where it is."""
    runs = [open_run(path.parent) for path in sorted(directory.glob(f"*/{MANIFEST}"))]
    found = [(run, run.files[kind]) for run in runs if kind in run.files]
    if not runs:
        raise RunError(f"{directory}: holds no runs; name the folder whose subfolders are the runs")
    if not found:
        raise RunError(f"{directory}: none of its {len(runs)} runs has {kind} results; run that analysis on each first")
    return found


def differing_settings(runs: Iterable[Run]) -> dict[str, list[int | float | str]]:
    """The settings in which runs differ, with the value of each run."""
    configs = [run.manifest["config"] for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    values = {name: [_as_coordinate(config.get(name)) for config in configs] for name in names}
    return {name: own for name, own in values.items() if len(set(own)) > 1}


def _as_coordinate(value: Any) -> int | float | str:
    return value if isinstance(value, int | float | str) else str(value)


def padded(parts: Sequence[xr.Dataset]) -> list[xr.Dataset]:
    """The datasets with dims that have no coordinate (nodes, probes) brought to the longest length with NaN."""
    longest: dict[Hashable, int] = {}
    for ds in parts:
        longest |= {dim: max(size, longest.get(dim, 0)) for dim, size in ds.sizes.items() if dim not in ds.indexes}
    return [ds.pad({dim: (0, longest[dim] - n) for dim, n in ds.sizes.items() if dim in longest}) for ds in parts]


def _placed(ds: xr.Dataset, place: Mapping[str, int | float | str]) -> xr.Dataset:
    """The dataset with a dim of length one for each setting."""
    # Coordinates that are no index, such as the champion's iteration, differ between runs: they get the dims too.
    loose = [name for name in ds.coords if name not in ds.indexes]
    expanded = ds.reset_coords(loose).expand_dims({_free_name(ds, name): [value] for name, value in place.items()})
    return expanded.set_coords(loose)


def _free_name(ds: xr.Dataset, setting: str) -> str:
    """What a setting is called along a dataset that may have a variable or dim of the same name."""
    return f"{setting}_setting" if setting in ds.variables or setting in ds.dims else setting


@dataclass
class _Frame:
    """The shape in which the datasets of all runs fit: a store's rows must agree in variables, sizes and dtypes."""

    indexes: dict[Hashable, pd.Index] = field(default_factory=dict)
    sizes: dict[Hashable, int] = field(default_factory=dict)
    #: Dims, dtype and attributes of each variable.
    variables: dict[Hashable, tuple[tuple[Hashable, ...], np.dtype[Any], dict[Any, Any]]] = field(default_factory=dict)
    coords: set[Hashable] = field(default_factory=set)
    attrs: dict[Any, Any] = field(default_factory=dict)
    n: int = 0
    has_gaps: bool = False

    def widen(self, ds: xr.Dataset) -> None:
        """Make room for one more dataset."""
        indexes = {dim: self.indexes.get(dim, index).union(index) for dim, index in ds.indexes.items()}
        sizes = {dim: max(size, self.sizes.get(dim, 0)) for dim, size in ds.sizes.items()}
        sizes |= {dim: len(index) for dim, index in indexes.items()}
        if self.n:
            alike = sizes == self.sizes == dict(ds.sizes) and set(ds.variables) == set(self.variables)
            self.has_gaps |= not alike
            self.attrs = {key: value for key, value in self.attrs.items() if _same(value, ds.attrs.get(key))}
        else:
            self.attrs = dict(ds.attrs)
        for name, array in ds.variables.items():
            dtype = np.dtype(object) if array.dtype.kind in "UO" else array.dtype
            dims, earlier, attrs = self.variables.get(name, (array.dims, dtype, array.attrs))
            if dims != array.dims:
                raise RunError(
                    f"the runs cannot be collected: {name!r} has dims {dims} in one and {array.dims} in another"
                )
            self.variables[name] = dims, np.result_type(earlier, dtype), attrs
        self.indexes |= indexes
        self.sizes |= sizes
        self.coords |= set(ds.coords)
        self.n += 1

    def fill(self, ds: xr.Dataset) -> xr.Dataset:
        """The dataset in this shape, with NaN (or empty strings) where it has nothing."""
        places = {
            dim: self.indexes[dim].get_indexer(ds.indexes[dim]) if dim in ds.indexes else np.arange(size)
            for dim, size in ds.sizes.items()
        }
        filled: dict[Hashable, xr.Variable] = {}
        for name, (dims, dtype, attrs) in self.variables.items():
            if name in self.indexes:
                filled[name] = xr.Variable(dims, self.indexes[name], attrs)
                continue
            if self.has_gaps and dtype.kind in "iub":  # counts have no NaN
                dtype = np.dtype(np.float64)
            empty = {"O": "", "f": np.nan, "c": np.nan}.get(dtype.kind, 0)
            values = np.full([self.sizes[dim] for dim in dims], empty, dtype)
            if name in ds.variables:
                values[np.ix_(*(places[dim] for dim in dims))] = ds[name].values
            filled[name] = xr.Variable(dims, values, attrs)
        return xr.Dataset(filled, attrs=self.attrs).set_coords(self.coords)


def _same(one: Any, other: Any) -> bool:
    """Whether two attributes are equal; they may be arrays."""
    return np.array_equal(one, other)

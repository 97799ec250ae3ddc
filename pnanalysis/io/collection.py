"""Many runs as one dataset: what a sweep made, along the settings that differ."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import xarray as xr

from pnanalysis.errors import RunError
from pnanalysis.io import netcdf
from pnanalysis.io.runs import ANALYSIS, HISTORY, MANIFEST, Run, open_run


def open_runs(directory: str | os.PathLike[str], kind: str = "history") -> xr.Dataset:
    """One dataset of all the runs in a folder.

    Parameters
    ----------
    directory : path
        Its subfolders that hold a run are read; what ``pntrain --sweep`` wrote, for one.
    kind : str
        ``history``, or an analysis that every run has been given (``hessian``, ``saturation``...).

    Returns
    -------
    xarray.Dataset
        With one more dim for each setting that differs between the runs, named after it; NaN where a combination is
        missing. Runs whose settings do not tell them apart stand along ``run`` instead.

    Raises
    ------
    RunError
        If there are no runs, or none with this dataset.

    Examples
    --------
    >>> ds = open_runs("runs/sweep")  # doctest: +SKIP
    >>> ds.validation_error.isel(epoch=-1).min("iteration").mean("seed")  # doctest: +SKIP
    """
    directory = Path(directory)
    runs = [open_run(path.parent) for path in sorted(directory.glob(f"*/{MANIFEST}"))]
    found = [(run, file) for run in runs for file in [_file(run, kind)] if file.is_file()]
    if not found:
        raise RunError(
            f"{directory}: none of its {len(runs)} runs has {kind} results" if runs else f"{directory}: holds no runs"
        )
    configs = [run.manifest["config"] for run, _ in found]
    names = list(dict.fromkeys(name for config in configs for name in config))
    differing = [name for name in names if len({_plain(config.get(name)) for config in configs}) > 1]
    places = [{name: _plain(config.get(name)) for name in differing} for config in configs]
    if not differing or len({tuple(place.values()) for place in places}) < len(places):
        places = [{"run": run.path.name} for run, _ in found]
    parts = _padded([netcdf.load(file) for _, file in found])
    parts = [_placed(ds, place) for ds, place in zip(parts, places, strict=True)]
    return xr.merge(parts, join="outer", compat="no_conflicts", combine_attrs="drop_conflicts")


def _padded(parts: list[xr.Dataset]) -> list[xr.Dataset]:
    """Dims that only count (nodes, probes) brought to the length of the longest with NaN."""
    longest: dict[Any, int] = {}
    for ds in parts:
        longest |= {dim: max(size, longest.get(dim, 0)) for dim, size in ds.sizes.items() if dim not in ds.indexes}
    return [ds.pad({dim: (0, longest[dim] - n) for dim, n in ds.sizes.items() if dim in longest}) for ds in parts]


def _placed(ds: xr.Dataset, place: dict[str, Any]) -> xr.Dataset:
    """The dataset with a dim of length one for each setting, along which every run's own coordinates lie too."""
    renamed = {name: f"{name}_setting" for name in place if name in ds.variables or name in ds.dims}
    loose = [name for name in ds.coords if name not in ds.indexes]  # the champion's iteration, say
    own = ds.reset_coords(loose).expand_dims({renamed.get(name, name): [value] for name, value in place.items()})
    return own.set_coords(loose)


def _file(run: Run, kind: str) -> Path:
    return run.path / HISTORY if kind == "history" else run.path / ANALYSIS / f"{kind}.nc"


def _plain(value: Any) -> Any:
    """A setting as a coordinate's value."""
    return value if isinstance(value, int | float | str) else str(value)

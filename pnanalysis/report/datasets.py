"""What is known of a run, as far as it can be read: one odd file shall not cost the whole report."""

from __future__ import annotations

import xarray as xr

from pnanalysis.errors import PnError, SchemaError
from pnanalysis.io.datasets import load
from pnanalysis.io.runs import Run

#: What comes of datasets that do not hold what their kinds do.
ODD = (PnError, AttributeError, LookupError, TypeError, ValueError)


def datasets(run: Run) -> tuple[dict[str, xr.Dataset], dict[str, str]]:
    """Every dataset of the run by kind, its history first; and why others cannot be read."""
    found: dict[str, xr.Dataset] = {}
    odd: dict[str, str] = {}
    for kind, file in run.files.items():
        try:
            found[kind] = load(file)
        except SchemaError as error:
            odd[kind] = str(error)
    return found, odd


def dataset(run: Run, kind: str) -> xr.Dataset | None:
    """One dataset of the run, where it has it and it can be read."""
    try:
        return load(run.files[kind])
    except (KeyError, SchemaError):
        return None


def own_rows(run: Run, ds: xr.Dataset) -> xr.Dataset:
    """The rows along ``checkpoint`` that are the run's, under the names that they have within it.

    An analysis of several runs puts the run's name in front of each checkpoint's.
    """
    front = f"{ds.attrs.get('run', run.path.name)}/"
    names = [str(name) for name in ds.checkpoint.values]
    own = [i for i, name in enumerate(names) if name.startswith(front)]
    if not own:
        return ds
    return ds.isel(checkpoint=own).assign_coords(checkpoint=[names[i].removeprefix(front) for i in own])

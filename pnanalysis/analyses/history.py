"""Training histories: loss, penalty and errors by iteration and epoch."""

from __future__ import annotations

from typing import Any

import xarray as xr

from pnanalysis import schema
from pnanalysis.errors import RunError
from pnanalysis.inputs.networks import is_path
from pnanalysis.inputs.selection import Given, distinct_labels, flattened
from pnanalysis.io.runs import Run, open_run
from pnanalysis.schema import error_kind


def history(*given: Given) -> xr.Dataset:
    """The history of a run, or of several side by side along ``run``.

    Parameters
    ----------
    *given : Run, path, or mapping or sequence of these
        Names in a mapping become labels.

    Returns
    -------
    xarray.Dataset
        Kind ``history``, dims ([run,] iteration, epoch); NaN where a run has no such iteration or epoch yet. Of
        several runs, the coordinates ``champion``, ``strategy`` and ``error`` (see :func:`error_kind`) lie along
        ``run``.

    Raises
    ------
    RunError
        If no run is given or one has not been trained for an epoch.
    """
    # runs, not sources: a history needs no code of the run's, so a run of a custom model needs no --model here
    named = [(name, _opened(item)) for name, item in flattened(given)]
    runs = [run for _, run in named]
    if not runs:
        raise RunError("no run given")
    if len(runs) == 1:
        return schema.validate(runs[0].history, "history")
    labels = distinct_labels([name or run.path.name for name, run in named])
    joined = xr.concat([run.history for run in runs], dim="run", join="outer", combine_attrs="drop_conflicts")
    champions = [run.manifest["champion"] for run in runs]
    strategies = [run.manifest.get("strategy", "") for run in runs]
    kinds = [error_kind(run.history) for run in runs]
    if len(set(kinds)) > 1:  # runs written by an older version do not record it
        joined.attrs.pop("error", None)
    along = {"run": labels, "champion": ("run", champions), "strategy": ("run", strategies), "error": ("run", kinds)}
    return schema.finish(joined.assign_coords(along), "history")


def _opened(item: Any) -> Run:
    if isinstance(item, Run):
        return item
    if not is_path(item):
        raise RunError(f"a {type(item).__name__} has no history; give a run or the path of one")
    return open_run(item)

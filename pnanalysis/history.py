"""Training histories: loss, penalty and errors by iteration and epoch."""

from __future__ import annotations

import xarray as xr

from pnanalysis import schema
from pnanalysis.errors import RunError
from pnanalysis.runs import Run


def history(*runs: Run) -> xr.Dataset:
    """The history of a run, or of several side by side along ``run``.

    Parameters
    ----------
    *runs : Run

    Returns
    -------
    xarray.Dataset
        Kind ``history``, dims ([run,] iteration, epoch); NaN where a run has no such iteration or epoch yet.

    Raises
    ------
    RunError
        If no run is given or one has not been trained for an epoch.
    """
    if not runs:
        raise RunError("no run given")
    if len(runs) == 1:
        return schema.validate(runs[0].history, "history")
    names = [run.path.name for run in runs]
    labels = names if len(set(names)) == len(names) else [str(run.path) for run in runs]
    joined = xr.concat([run.history for run in runs], dim="run", join="outer", combine_attrs="drop_conflicts")
    return schema.finish(joined.assign_coords(run=labels), "history")

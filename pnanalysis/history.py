"""Training histories: loss, penalty and errors by iteration and epoch."""

from __future__ import annotations

import xarray as xr

from pnanalysis import schema
from pnanalysis.errors import RunError
from pnanalysis.runs import Run
from pnanalysis.sources import as_sources


def history(*runs: Run) -> xr.Dataset:
    """The history of a run, or of several side by side along ``run``.

    Parameters
    ----------
    *runs : Run

    Returns
    -------
    xarray.Dataset
        Kind ``history``, dims ([run,] iteration, epoch); NaN where a run has no such iteration or epoch yet. Of
        several runs, the coordinates ``champion`` and ``strategy`` lie along ``run``.

    Raises
    ------
    RunError
        If no run is given or one has not been trained for an epoch.
    """
    if not runs:
        raise RunError("no run given")
    if len(runs) == 1:
        return schema.validate(runs[0].history, "history")
    labels = [source.label for source in as_sources(runs)]
    joined = xr.concat([run.history for run in runs], dim="run", join="outer", combine_attrs="drop_conflicts")
    champions = [run.manifest["champion"] for run in runs]
    strategies = [run.manifest.get("strategy", "") for run in runs]
    along = {"run": labels, "champion": ("run", champions), "strategy": ("run", strategies)}
    return schema.finish(joined.assign_coords(along), "history")

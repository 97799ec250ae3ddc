"""What curvature monitors saw of the trainings of several checkpoints, for a comparison."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from pnanalysis.analyses.monitored_curvature import KIND, monitored
from pnanalysis.analyses.stacking import independent_differences
from pnanalysis.errors import SchemaError
from pnanalysis.inputs.selection import SelectedCheckpoint, Selection
from pnanalysis.inputs.sources import Source
from pnanalysis.io.datasets import load
from pnanalysis.io.runs import Checkpoint

#: Numbers that are compared: of the last measurement on the way to each checkpoint.
NUMBERS = ("last_lambda_max", "last_threshold_ratio")


def monitored_differences(selection: Selection) -> xr.Dataset:
    """Last measurements along ``checkpoint``, and the differences of all pairs along ``other``.

    Nothing is measured: they are those of the runs that have been trained with a monitor, NaN elsewhere, and there are
    none where no run has.
    """
    saved = {source.label: _saved(source) for source in selection.sources}
    return differences_of([_of(item, saved[item.source.label]) for item in selection])


def differences_of(found: Sequence[xr.Dataset | None]) -> xr.Dataset:
    """Numbers of checkpoints, and how they differ between all pairs.

    Parameters
    ----------
    found : sequence of xarray.Dataset or None
        What :func:`pnanalysis.analyses.monitored_curvature.monitored` gives of each.

    Returns
    -------
    xarray.Dataset
        ``last_lambda_max`` and ``last_threshold_ratio`` (checkpoint) and ``NAME_difference`` (checkpoint, other),
        checkpoint minus other, with standard errors for the choice of examples: those of differences are of independent
        numbers, which are too large where both were measured on the same examples.
    """
    variables: dict[str, Any] = {}
    for name in NUMBERS:
        value, se = (
            np.array([np.nan if ds is None else float(ds.get(f"{name}{end}", np.nan)) for ds in found])
            for end in ("", "_se")
        )
        if np.isfinite(value).any():
            variables |= independent_differences(name, value, se)
    return xr.Dataset(variables)


def _saved(source: Source) -> xr.Dataset | None:
    """The file of a run's monitor; ``None`` where there is none, or it cannot be read."""
    if source.run is None or KIND not in source.run.files:
        return None
    try:
        ds = load(source.run.files[KIND], within=source.run.path)
    except SchemaError as error:
        warnings.warn(f"{source.label} is compared without its curvature along training: {error}", stacklevel=3)
        return None
    return ds if ds.attrs.get("kind") == KIND else None


def _of(item: SelectedCheckpoint, saved: xr.Dataset | None) -> xr.Dataset | None:
    if saved is None or item.source.run is None or not isinstance(item.checkpoint, Checkpoint):
        return None
    return monitored(saved, item.source.run, item.checkpoint)


__all__ = ["NUMBERS", "differences_of", "monitored_differences"]

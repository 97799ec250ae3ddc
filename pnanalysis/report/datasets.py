"""The datasets of a run for a report: each file is read once, and a damaged one costs only its own figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import xarray as xr

from pnanalysis.errors import PnError, SchemaError
from pnanalysis.io.datasets import load
from pnanalysis.io.runs import HISTORY, Run

#: Exceptions raised while drawing from a dataset that passes validation but lacks coordinates or values.
BAD_DATASET = (PnError, AttributeError, LookupError, TypeError, ValueError)


class RunDatasets:
    """A run and its datasets; each file is read at its first use and kept.

    Parameters
    ----------
    run : Run
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._read: dict[str, xr.Dataset | SchemaError] = {}

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.run.path.name

    def get(self, kind: str) -> xr.Dataset | None:
        """The dataset of a kind; None if the run has none or it cannot be read."""
        found = self._load(kind) if kind in self.run.files else None
        return None if isinstance(found, SchemaError) else found

    def readable(self) -> dict[str, xr.Dataset]:
        """Every dataset that can be read, by kind, the history first."""
        return {kind: ds for kind in self.run.files if (ds := self.get(kind)) is not None}

    def unreadable(self) -> dict[str, str]:
        """Why the other files cannot be read, by kind."""
        found = {kind: self._load(kind) for kind in self.run.files}
        return {kind: str(error) for kind, error in found.items() if isinstance(error, SchemaError)}

    def _load(self, kind: str) -> xr.Dataset | SchemaError:
        if kind not in self._read:
            file = self.run.files[kind]
            try:
                # the run keeps its own history, which the tables use too
                self._read[kind] = self.run.history if file.name == HISTORY else load(file, within=self.run.path)
            except SchemaError as error:
                self._read[kind] = error
        return self._read[kind]


class Study(NamedTuple):
    """A run and, where there is one, its restart control."""

    main: RunDatasets
    control: RunDatasets | None = None


def studies(runs: Sequence[Run]) -> list[Study]:
    """Each run with its restart control: the restart run of the same recipe, model and data, where one is given."""
    datasets = [RunDatasets(run) for run in runs]
    controls = [one for one in datasets if one.run.manifest.get("strategy") == "restart"]
    others = [one for one in datasets if one not in controls]
    paired = [Study(one, next((c for c in controls if one.run.has_setting_of(c.run)), None)) for one in others]
    unpaired = [Study(c) for c in controls if all(c is not study.control for study in paired)]
    return paired + unpaired


def own_rows(run: Run, ds: xr.Dataset) -> xr.Dataset:
    """The rows along ``checkpoint`` that belong to the run, under their names within it.

    An analysis of several runs puts the run's name in front of each checkpoint's name.
    """
    prefix = f"{ds.attrs.get('run', run.path.name)}/"
    names = [str(name) for name in ds.checkpoint.values]
    own = [i for i, name in enumerate(names) if name.startswith(prefix)]
    if not own:
        return ds
    return ds.isel(checkpoint=own).assign_coords(checkpoint=[names[i].removeprefix(prefix) for i in own])

"""What a report is about: runs with their datasets, and datasets of networks that belong to no run.

The files of a run are read once, and a damaged one costs only its own figures.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import xarray as xr

from pnanalysis.errors import PnError, RunError, SchemaError
from pnanalysis.io import zarr_store
from pnanalysis.io.datasets import SUFFIXES, load
from pnanalysis.io.runs import HISTORY, Run, open_run

#: Exceptions raised while drawing from a dataset that passes validation but lacks coordinates or values.
BAD_DATASET = (PnError, AttributeError, LookupError, TypeError, ValueError)

#: Networks that a heading names.
_MOST_NAMES = 3


class GivenDatasets:
    """Datasets of networks that belong to no run, such as those of files of weights or networks in memory.

    Parameters
    ----------
    datasets : mapping of str to Dataset
        By kind, or by another name where there are several of a kind.
    """

    def __init__(self, datasets: Mapping[str, xr.Dataset]) -> None:
        self._datasets = dict(datasets)

    @property
    def name(self) -> str:
        """The names of the first networks."""
        names = dict.fromkeys(
            str(name) for ds in self._datasets.values() if "checkpoint" in ds.dims for name in ds.checkpoint.values
        )
        shown = ", ".join(list(names)[:_MOST_NAMES]) or "networks"
        return shown if len(names) <= _MOST_NAMES else f"{shown} and {len(names) - _MOST_NAMES} more"

    def get(self, kind: str) -> xr.Dataset | None:
        """The dataset of a kind, or None."""
        return self._datasets.get(kind)

    def readable(self) -> dict[str, xr.Dataset]:
        """Every dataset, by kind."""
        return dict(self._datasets)

    def unreadable(self) -> dict[str, str]:
        """None: what cannot be read is refused beforehand."""
        return {}

    def is_store(self, kind: str) -> bool:
        """Whether a dataset is a folder rather than a file."""
        return False


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

    def is_store(self, kind: str) -> bool:
        """Whether a dataset is a folder rather than a file."""
        return self.run.files[kind].suffix == zarr_store.SUFFIX

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
    """A run and, where there is one, its restart control; or datasets that belong to no run."""

    main: RunDatasets | GivenDatasets
    control: RunDatasets | None = None


#: What a report takes: a run, its folder, a file of a dataset, or a dataset.
Given = Run | xr.Dataset | str | os.PathLike[str]


def studies(given: Iterable[Given]) -> list[Study]:
    """Each run with its restart control: the restart run of the same recipe, model and data, where one is given.

    All that belongs to no run is one study, the last.

    Raises
    ------
    RunError, SchemaError
        If a path is neither a run nor a dataset.
    """
    runs: list[Run] = []
    datasets: dict[str, xr.Dataset] = {}
    for one in given:
        if isinstance(one, Run):
            runs.append(one)
        elif isinstance(one, xr.Dataset):
            _add(datasets, one, f"{one.attrs.get('kind', 'dataset')}")
        elif Path(one).suffix in SUFFIXES:
            _add(datasets, load(one), Path(one).stem)
        elif Path(one).is_file():
            raise RunError(
                f"{one} is neither a run nor a dataset; analyse it first, and give the report what was saved"
            )
        else:
            runs.append(open_run(one))
    return _of_runs(runs) + ([Study(GivenDatasets(datasets))] if datasets else [])


def _add(datasets: dict[str, xr.Dataset], ds: xr.Dataset, name: str) -> None:
    """Keep a dataset under its kind, or under a name that is free where there is one of this kind already."""
    kind = ds.attrs.get("kind")
    if kind is None:
        raise RunError("a dataset has no kind; give the report datasets that an analysis has returned")
    free = (f"{kind}-{name}", *(f"{kind}-{name}-{i}" for i in range(2, len(datasets) + 3)))
    datasets[next(key for key in (kind, *free) if key not in datasets)] = ds


def _of_runs(runs: Sequence[Run]) -> list[Study]:
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

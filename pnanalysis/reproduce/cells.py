"""Cells: the smallest results that are kept, one for each training of an experiment with one seed.

A cell is a folder ``cells/ID`` with ``cell.json`` (settings, status, versions, cost), ``history.json`` and a dataset
for each measure, without weights. It appears whole or not at all, and is never made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pnanalysis.errors import RunError, reason
from pnanalysis.io.atomic import atomic_directory
from pnanalysis.io.files import read_regular
from pnanalysis.reproduce import numbers
from pnanalysis.reproduce.settings import Setting

FORMAT, VERSION = "pnanalysis-cell", 1
CELLS, RECORD = "cells", "cell.json"
#: In the folder of a training that does not time its steps, what it has taken.
SECONDS = "seconds.json"
FINISHED = "finished"
_LARGEST = 2**20  # bytes of a record

#: Attributes of datasets that tell of one machine, or of one moment, and say nothing about a result.
_LOCAL = ("command", "created", "data", "run", "run_id", "note")


@dataclass(frozen=True, order=True)
class Cell:
    """One training of an experiment: a variant, an arm and a seed."""

    experiment: str
    variant: str
    seed: int
    arm: str

    @property
    def id(self) -> str:
        """The name of its folder, such as ``S3-init1-seed0-persistent``."""
        return "-".join(part for part in (self.experiment, self.variant, f"seed{self.seed}", self.arm) if part)


@dataclass(frozen=True)
class Result:
    """A finished or failed cell, read from its folder."""

    cell: Cell
    path: Path
    record: Mapping[str, Any]

    @property
    def is_finished(self) -> bool:
        """Whether its training ended well; otherwise :attr:`failure` says why."""
        return bool(self.record["status"] == FINISHED)

    @property
    def failure(self) -> str:
        """The sentence of the training's error; empty if there was none."""
        return str(self.record.get("failure") or "")

    @cached_property
    def history(self) -> xr.Dataset:
        """Loss and errors, dims (iteration, epoch)."""
        return self.dataset("history")

    @property
    def config(self) -> Mapping[str, Any]:
        """The settings of its training, its recipe's included, as far as it has recorded them."""
        if "config" in self.record:
            return dict(self.record["config"])
        if not self.has("ensemble"):
            return {}
        ds = self.dataset("ensemble")  # of S2, whose trainings have no manifest
        found = {name: ds.attrs[name] for name in ("lr", "momentum") if name in ds.attrs}
        return found | ({"lam": float(ds.lam[0])} if "lam" in ds.coords and ds.lam.size else {})

    def dataset(self, name: str) -> xr.Dataset:
        """One of its datasets.

        Raises
        ------
        SchemaError
            If there is none of this name.
        """
        return numbers.load(self.path / f"{name}.json")

    def has(self, name: str) -> bool:
        """Whether there is such a dataset."""
        return (self.path / f"{name}.json").is_file()

    def final_errors(self, split: str) -> np.ndarray:
        """The error of every iteration after its last epoch, shape (iteration,)."""
        return np.asarray(self.history[f"{split}_error"].isel(epoch=-1).values, dtype=float)

    @property
    def champion(self) -> int:
        """The iteration with the lowest validation error."""
        return int(self.record["champion"])


class Store:
    """The cells below a folder."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def path(self, cell: Cell) -> Path:
        """The cell's folder, whether or not it exists."""
        return self.out / CELLS / cell.id

    def has(self, cell: Cell) -> bool:
        """Whether the cell is done."""
        return (self.path(cell) / RECORD).is_file()

    def load(self, cell: Cell, scale: str, setting: Setting) -> Result | None:
        """A cell, or ``None`` if it is not done.

        Raises
        ------
        RunError
            If it was made with other settings, or its record is damaged.
        """
        path = self.path(cell)
        if not self.has(cell):
            return None
        record = read_record(path)
        expected = planned(cell, scale, setting)
        for name, value in expected.items():
            if record.get(name) != value:
                raise RunError(
                    f"{path}: was made with {name} {record.get(name)!r}, not {value!r}; "
                    "give another --out, or remove it"
                )
        return Result(cell, path, record)

    def save(self, cell: Cell, record: Mapping[str, Any], datasets: Mapping[str, xr.Dataset]) -> Path:
        """Write a cell."""
        with atomic_directory(self.path(cell)) as folder:
            folder.mkdir()
            for name, ds in datasets.items():
                (folder / f"{name}.json").write_text(numbers.as_text(portable(ds)))
            entries = {"format": FORMAT, "version": VERSION, "id": cell.id, **record}
            (folder / RECORD).write_text(json.dumps(entries, indent=1, allow_nan=False) + "\n")
        return self.path(cell)


def check_alike(results: Iterable[Result]) -> None:
    """Check that cells of an experiment, which are compared, had the same defaults and the same data.

    What a cell's own settings say is theirs, and each is checked when it is loaded. What they do not say is the
    recipe's: another version may have changed it since. Of data the fingerprints are compared, as JPEG copies and
    originals have different ones, and the split.

    Raises
    ------
    RunError
        The message names two cells that differ, and in what.
    """
    first: dict[str, tuple[Result, Any]] = {}
    for result in results:
        own = {"seed", "strategy", "layers", "data", *result.record["options"]}
        config = {f"the recipe's {k}": v for k, v in result.config.items() if k not in own}
        data = result.record.get("data", {})
        traits = config | {f"the {k} of the data": data[k] for k in ("fingerprint", "split_hash") if data.get(k)}
        for name, value in traits.items():
            other, before = first.setdefault(name, (result, value))
            if value != before:
                raise RunError(
                    f"{result.path}: was made with {value!r} for {name}, and {other.cell.id} with {before!r}; cells of "
                    "one experiment must agree: give another --out, or remove one of them"
                )


def planned(cell: Cell, scale: str, setting: Setting) -> dict[str, Any]:
    """What a record says of its settings, as JSON gives it back."""
    entries = {
        "experiment": cell.experiment,
        "variant": cell.variant,
        "arm": cell.arm,
        "seed": cell.seed,
        "scale": scale,
        "recipe": setting.recipe,
        "options": setting.training(cell.variant, cell.arm),
        "measures": {name: dict(options) for name, options in setting.measures.items()},
        "n_train": setting.n_train,
    }
    found: dict[str, Any] = json.loads(json.dumps(entries))
    return found


def read_record(path: Path) -> dict[str, Any]:
    """The record of a cell's folder.

    Raises
    ------
    RunError
        If it is not one.
    """
    file = path / RECORD
    try:
        record = json.loads(read_regular(file, _LARGEST, RunError))
    except (ValueError, RecursionError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{file}: unreadable ({reason(error)}); restore it, or remove its folder") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("version") != VERSION:
        raise RunError(f"{file}: not the record of a cell; restore it, or remove its folder")
    return record


def portable(ds: xr.Dataset) -> xr.Dataset:
    """A dataset without what tells of one machine: paths, the command, the time."""
    ds = ds.drop_attrs(deep=False).assign_attrs({k: v for k, v in ds.attrs.items() if k not in _LOCAL})
    names = [name for name in ("run",) if name in ds.coords and not ds[name].ndim]
    return ds.drop_vars(names)

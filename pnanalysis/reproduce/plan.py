"""Which cells there are, in which order they are made, and how long those that are left will take."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pnanalysis.checks import at_least, duration
from pnanalysis.errors import PnError
from pnanalysis.io.runs import open_run
from pnanalysis.reproduce.cells import SECONDS, Cell, Result, Store, check_alike
from pnanalysis.reproduce.settings import SCALES, Setting, find_experiments, find_scale


@dataclass(frozen=True)
class Plan:
    """A study at one scale: its experiments, how many seeds, and where its cells are.

    Attributes
    ----------
    scale : str
    experiments : tuple of str
    seeds : int
    store : Store
    """

    scale: str
    experiments: tuple[str, ...]
    seeds: int
    store: Store

    def setting(self, experiment: str) -> Setting:
        """How an experiment is done at this scale."""
        return SCALES[self.scale].settings[experiment]

    def n_seeds(self, experiment: str) -> int:
        """How many seeds of an experiment are planned."""
        return min(self.seeds, self.setting(experiment).most_seeds or self.seeds)

    @cached_property
    def cells(self) -> list[Cell]:
        """All cells: by rank, then seed after seed, so that what is done at any time is balanced."""
        found = []
        for place, experiment in enumerate(self.experiments):
            setting = self.setting(experiment)
            for v, variant in enumerate(setting.variants):
                for a, arm in enumerate(setting.arms_of(variant)):
                    for seed in range(self.n_seeds(experiment)):
                        found.append(((setting.rank, seed, place, v, a), Cell(experiment, variant, seed, arm)))
        return [cell for _, cell in sorted(found)]

    def results(self, experiment: str, variant: str, arm: str) -> list[Result]:
        """The cells of an experiment's arm that are done, by seed.

        Raises
        ------
        RunError
            If one was made with other settings.
        """
        cells = [c for c in self.cells if (c.experiment, c.variant, c.arm) == (experiment, variant, arm)]
        found = [self.store.load(cell, self.scale, self.setting(experiment)) for cell in sorted(cells)]
        return [result for result in found if result is not None]

    def check(self) -> None:
        """Check that the cells that are done can be compared.

        Raises
        ------
        RunError
            If one was made with other settings, or two of an experiment with different defaults or data.
        """
        for experiment in self.experiments:
            setting = self.setting(experiment)
            pairs = [(variant, arm) for variant in setting.variants for arm in setting.arms_of(variant)]
            check_alike(result for variant, arm in pairs for result in self.results(experiment, variant, arm))

    def left(self) -> list[Cell]:
        """The cells that are not done yet."""
        return [cell for cell in self.cells if not self.store.has(cell)]


def make_plan(names: Sequence[str], scale: str, seeds: int | None, out: Path) -> Plan:
    """The plan of a study.

    Parameters
    ----------
    names : sequence of str
        Experiments, or ``all``.
    scale : str
    seeds : int or None
        By default the scale's.
    out : Path

    Raises
    ------
    PnError
        If an experiment or the scale is unknown.
    """
    chosen = find_scale(scale)
    at_least(1, seeds=seeds)
    experiments = find_experiments(list(names), chosen)
    return Plan(scale, tuple(experiments), seeds or chosen.seeds, Store(out))


def chosen_cells(plan: Plan, only: Iterable[str]) -> list[Cell]:
    """Cells by id; all if there is no id.

    Raises
    ------
    PnError
        If there is no such cell.
    """
    by_id = {cell.id: cell for cell in plan.cells}
    wanted = list(only)
    for name in wanted:
        if name not in by_id:
            raise PnError(f"no cell {name!r}; there are {len(by_id)}, such as {next(iter(by_id))}")
    return [by_id[name] for name in wanted] if wanted else plan.cells


class Forecast:
    """How long cells take, by those that are done and by the epochs of those that have begun.

    Parameters
    ----------
    plan : Plan
    work : Path
        Folder of the trainings.
    """

    def __init__(self, plan: Plan, work: Path) -> None:
        self.plan, self.work = plan, work
        self._done: dict[tuple[str, str], list[float]] = {}
        for cell in plan.cells:
            result = plan.store.load(cell, plan.scale, plan.setting(cell.experiment))
            if result is not None and result.is_finished:
                self._add(cell, _seconds(result.record))

    def add(self, cell: Cell, seconds: float) -> float:
        """Note how long a cell took, and return it: by its record, which counts all calls, or else ``seconds``."""
        result = self.plan.store.load(cell, self.plan.scale, self.plan.setting(cell.experiment))
        recorded = math.nan if result is None else _seconds(result.record)
        self._add(cell, seconds if math.isnan(recorded) else recorded)
        return self._done[cell.experiment, cell.arm][-1]

    def _add(self, cell: Cell, seconds: float) -> None:
        self._done.setdefault((cell.experiment, cell.arm), []).append(seconds)

    def spent(self, cell: Cell) -> float:
        """What a training that has begun has taken so far, as far as it has been saved."""
        folder = self.work / cell.id
        with suppress(OSError, PnError):
            if (folder / "history.nc").is_file():
                history = open_run(folder).history
                return float(np.nansum(history.seconds.values)) if "seconds" in history else 0.0
        return noted_seconds(folder)

    def progress(self, cell: Cell) -> str:
        """How far a cell has come."""
        expected = self.seconds(cell)
        return f"{cell.id} {min(100 * self.spent(cell) / expected, 99):.0f} %" if expected > 0 else cell.id

    def seconds(self, cell: Cell) -> float:
        """What is expected of a cell; NaN where nothing is known."""
        same = self._done.get((cell.experiment, cell.arm)) or [
            each for (experiment, _), times in self._done.items() if experiment == cell.experiment for each in times
        ]
        return float(np.mean(same)) if same else self._by_epochs(cell)

    def _by_epochs(self, cell: Cell) -> float:
        """From the measured epochs of any training of the same experiment that has begun."""
        for other in self.plan.cells:
            if other.experiment == cell.experiment and (self.work / other.id / "history.nc").is_file():
                run = open_run(self.work / other.id)
                if "seconds" not in run.history:  # S1, whose steps are not timed
                    return math.nan
                per_epoch = float(run.history.seconds.mean())
                config = run.manifest["config"]
                return per_epoch * config["iterations"] * config["epochs"]
        return math.nan

    def left(self, cells: Sequence[Cell], jobs: int) -> str:
        """How long these cells take, in words."""
        times = np.array([np.maximum(self.seconds(cell) - self.spent(cell), 0) for cell in cells])
        unknown = int(np.isnan(times).sum())
        known = duration(float(np.nansum(times)) / max(min(jobs, len(cells)), 1))
        if not unknown:
            return f"about {known} left"
        beyond = f"{unknown} cells of unknown length"
        return beyond if unknown == len(times) else f"about {known} left, and {beyond}"


def noted_seconds(folder: Path) -> float:
    """What a training that does not time its steps has taken so far; 0 where nothing is noted."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return float(json.loads((folder / SECONDS).read_text())["training_seconds"])
    return 0.0


def _seconds(record: Mapping[str, object]) -> float:
    cost = record.get("cost")
    if not isinstance(cost, dict):
        return math.nan
    return float(cost.get("training_seconds") or 0.0) + float(cost.get("measuring_seconds") or 0.0)

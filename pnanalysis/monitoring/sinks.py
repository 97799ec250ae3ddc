"""Where measurements go besides the dataset: CSV, TensorBoard, Weights & Biases, or any function."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pnanalysis.checks import check_writable
from pnanalysis.errors import PnError
from pnanalysis.io.atomic import atomic_path

#: Called with the step and the numbers of a measurement by name.
Sink = Callable[[int, Mapping[str, float]], None]


class CSVSink:
    """A table, one row a measurement, which is complete after each.

    Parameters
    ----------
    path : path
        A file that is there is replaced at the first measurement, unless a training is resumed.
    first_step : int
        Steps made before, in a training that is resumed: the rows up to this step stay, with the columns of the table.

    Raises
    ------
    PnError
        If nothing can be written there, or what is to be continued is no such table.
    """

    def __init__(self, path: str | os.PathLike[str], first_step: int = 0) -> None:
        self.path = check_writable(path)
        self._names: list[str] | None = None
        self._before: list[list[str]] | None = []  # rows to write before the first one
        if first_step and self.path.is_file():
            self._names, self._before = _read_table(self.path, first_step)

    def __call__(self, step: int, numbers: Mapping[str, float]) -> None:
        self._names = self._names or list(numbers)
        row = [step, *(numbers.get(name, float("nan")) for name in self._names)]
        if self._before is None:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerow(row)
            return
        with atomic_path(self.path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([["step", *self._names], *self._before, row])
        self._before = None


def _read_table(path: Path, last: int) -> tuple[list[str], list[list[str]]]:
    """The names of the numbers in a table, and its rows up to a step."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            (first, *names), *rows = csv.reader(file)
        if first == "step":
            return names, [row for row in rows if len(row) == len(names) + 1 and int(row[0]) <= last]
    except (OSError, ValueError, csv.Error):
        pass
    raise PnError(f"{path}: is no table of a curvature monitor that could be continued; choose another path")


class TensorBoardSink:
    """Scalars ``curvature/NAME`` in TensorBoard, which has to be installed.

    Parameters
    ----------
    writer : SummaryWriter or path
        The writer of the training, or a folder for one of its own.

    Raises
    ------
    PnError
        If a folder is given and TensorBoard is not installed.
    """

    def __init__(self, writer: Any) -> None:
        if isinstance(writer, str | os.PathLike):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise PnError("TensorBoard is not installed: pip install tensorboard") from error
            writer = SummaryWriter(str(writer))
        self.writer = writer

    def __call__(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(f"curvature/{name}", value, step)
        self.writer.flush()


class WandbSink:
    """Numbers ``curvature/NAME`` in a run of Weights & Biases, over a step of their own, ``curvature/step``.

    Parameters
    ----------
    run : wandb.Run
        What ``wandb.init()`` returned: ``wandb.init(mode="offline")`` needs no network.
    commit : bool
        Whether each measurement is a row of its own, which moves the run's own step on. A run drops what a training
        logs for a step that has passed, so a training that numbers its rows, ``run.log(..., step=epoch)``, takes False:
        each of its rows then has the last measurement before the next row.
    """

    def __init__(self, run: Any, commit: bool = True) -> None:
        self.run, self.commit = run, commit
        # the step of the run itself only grows, and belongs to the training
        run.define_metric("curvature/step")
        run.define_metric("curvature/*", step_metric="curvature/step")

    def __call__(self, step: int, numbers: Mapping[str, float]) -> None:
        row = {"curvature/step": step, **{f"curvature/{name}": value for name, value in numbers.items()}}
        self.run.log(row, commit=self.commit)


def as_sink(given: Any, first_step: int = 0) -> Sink:
    """A sink from a function, or the path of a CSV file, which is continued from a step on.

    Raises
    ------
    PnError
        If it is neither.
    """
    if isinstance(given, str | os.PathLike):
        if Path(given).suffix.lower() != ".csv":
            raise PnError(
                f"{os.fspath(given)}: a path among the sinks is that of a .csv file; the dataset is saved by path="
            )
        return CSVSink(given, first_step)
    if callable(given):
        sink: Sink = given
        return sink
    raise PnError(
        f"a {type(given).__name__} is no sink; give a function of step and numbers, or the path of a CSV file"
    )

"""Where measurements go besides the dataset: CSV, TensorBoard, Weights & Biases, or any function."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pnanalysis.checks import check_writable
from pnanalysis.errors import PnError

#: Called with the step and the numbers of a measurement by name.
Sink = Callable[[int, Mapping[str, float]], None]


class CSVSink:
    """A table, one row a measurement, which is complete after each; a file that is there is replaced.

    Parameters
    ----------
    path : path

    Raises
    ------
    PnError
        If nothing can be written there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = check_writable(path)
        self._names: list[str] | None = None

    def __call__(self, step: int, numbers: Mapping[str, float]) -> None:
        first = self._names is None
        self._names = self._names or list(numbers)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w" if first else "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if first:
                writer.writerow(["step", *self._names])
            writer.writerow([step, *(numbers.get(name, float("nan")) for name in self._names)])


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
    """

    def __init__(self, run: Any) -> None:
        self.run = run
        # the step of the run itself only grows, and belongs to the training
        run.define_metric("curvature/step")
        run.define_metric("curvature/*", step_metric="curvature/step")

    def __call__(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log({"curvature/step": step, **{f"curvature/{name}": value for name, value in numbers.items()}})


def as_sink(given: Any) -> Sink:
    """A sink from a function, or the path of a CSV file.

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
        return CSVSink(given)
    if callable(given):
        sink: Sink = given
        return sink
    raise PnError(
        f"a {type(given).__name__} is no sink; give a function of step and numbers, or the path of a CSV file"
    )

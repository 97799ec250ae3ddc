"""Sinks pass on every number, under its name, at its step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pnanalysis.errors import PnError
from pnanalysis.monitoring.sinks import TensorBoardSink, WandbSink, as_sink

NUMBERS = {"lambda_max": 2.5, "loss": 0.5}


class Writer:
    """What the sinks use of a SummaryWriter, and of a run of Weights & Biases."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def add_scalar(self, *given: Any) -> None:
        self.calls.append(given)

    def flush(self) -> None:
        self.calls.append("flush")

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.calls.append((name, step_metric))

    def log(self, numbers: dict[str, float]) -> None:
        self.calls.append(numbers)


def test_tensorboard() -> None:
    writer = Writer()
    TensorBoardSink(writer)(7, NUMBERS)
    assert writer.calls == [("curvature/lambda_max", 2.5, 7), ("curvature/loss", 0.5, 7), "flush"]


def test_tensorboard_writes_a_folder_of_its_own(tmp_path: Any) -> None:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(PnError, match="pip install tensorboard"):
            TensorBoardSink(tmp_path)
        return
    TensorBoardSink(tmp_path)(1, NUMBERS)
    assert list(tmp_path.glob("events*"))


def test_weights_and_biases_has_a_step_of_its_own() -> None:
    run = Writer()
    WandbSink(run)(7, NUMBERS)
    assert run.calls == [
        ("curvature/step", None),
        ("curvature/*", "curvature/step"),
        {"curvature/step": 7, "curvature/lambda_max": 2.5, "curvature/loss": 0.5},
    ]


def test_tables_of_something_else_are_not_continued(tmp_path: Path) -> None:
    table = tmp_path / "numbers.csv"
    for text in ("a,b\n1,2\n", "step,loss\nx,1\n"):
        table.write_text(text)
        with pytest.raises(PnError, match="is no table of a curvature monitor"):
            as_sink(table, 3)
        assert table.read_text() == text
    as_sink(table)(0, NUMBERS)
    as_sink(table, 4)(5, NUMBERS | {"more": 1.0})
    assert table.read_text() == "step,lambda_max,loss\n0,2.5,0.5\n5,2.5,0.5\n"


def test_what_is_no_sink_is_refused() -> None:
    with pytest.raises(PnError, match="a int is no sink"):
        as_sink(3)

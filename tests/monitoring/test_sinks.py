"""Sinks pass on every number, under its name, at its step."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import pnanalysis as pn
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

    def log(self, numbers: dict[str, float], commit: bool) -> None:
        assert commit
        self.calls.append(numbers)


def test_tensorboard() -> None:
    writer = Writer()
    TensorBoardSink(writer)(7, NUMBERS)
    assert writer.calls == [("curvature/lambda_max", 2.5, 7), ("curvature/loss", 0.5, 7), "flush"]


def test_tensorboard_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(PnError, match="pip install tensorboard"):
        TensorBoardSink(tmp_path)


def watched(*sinks: Any) -> xr.Dataset:
    """Measurements of a short training, which the sinks took too."""
    torch.manual_seed(0)
    net, (x, y) = nn.Linear(3, 2), (torch.randn(20, 3), torch.arange(20) % 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    options: dict[str, Any] = {"every": 2, "expected_products": 10, "data_error": "none"}
    with pn.CurvatureMonitor(net, optimizer, (x, y), "cross_entropy", sinks=sinks, **options) as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    return monitor.dataset()


def test_tensorboard_reads_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ds = watched(TensorBoardSink(tmp_path))
    events = EventAccumulator(str(tmp_path)).Reload()
    for name in ("lambda_max", "preconditioned_lambda_max", "threshold", "trace", "loss", "gradient_norm"):
        found = events.Scalars(f"curvature/{name}")
        assert [one.step for one in found] == ds.step.values.tolist() == [0, 2, 4]
        np.testing.assert_allclose([one.value for one in found], ds[name], rtol=1e-6)


def records(path: Path) -> Iterator[bytes]:
    """What a file of a W&B run holds: pieces in blocks of 32 KiB, as in the log of LevelDB, after 7 bytes."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # no room for another head in this block
            at += 2**15 - at % 2**15
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield parts
            parts = b""


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run of Weights & Biases that needs no network."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return wandb.init(mode="offline", dir=str(tmp_path), project="curvature")


def history(tmp_path: Path) -> tuple[list[dict[str, float]], dict[str, str]]:
    """The rows of the finished run, and the step of each metric that has one of its own."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # ends the process that writes the file
    rows, steps = [], {}
    for data in records(next(tmp_path.glob("wandb/offline-run-*/*.wandb"))):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        elif record.WhichOneof("record_type") == "metric":
            steps[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    return rows, steps


def test_weights_and_biases_holds_what_was_measured(tmp_path: Path, offline: Any) -> None:
    offline.log({"training": 1.0})
    ds = watched(WandbSink(offline))
    offline.log({"training": 0.5})
    offline.finish()
    rows, steps = history(tmp_path)
    assert steps["curvature/*"] == "curvature/step"
    measured = [row for row in rows if "curvature/step" in row]
    assert [row["curvature/step"] for row in measured] == ds.step.values.tolist() == [0, 2, 4]
    for name in ("lambda_max", "preconditioned_lambda_max", "threshold", "trace", "loss", "gradient_norm"):
        np.testing.assert_allclose([row[f"curvature/{name}"] for row in measured], ds[name])
    assert [row["training"] for row in rows if "training" in row] == [1.0, 0.5]


def test_a_training_that_numbers_its_rows_loses_none(tmp_path: Path, offline: Any) -> None:
    sink = WandbSink(offline, commit=False)
    for epoch in range(3):
        for step in (2 * epoch, 2 * epoch + 1):
            sink(step, NUMBERS)
        offline.log({"training": 0.5 * epoch}, step=epoch)
    offline.finish()
    rows, _ = history(tmp_path)
    assert [row["training"] for row in rows] == [0.0, 0.5, 1.0]
    # a row is complete when the next one begins: it has the last measurement before that
    assert [row.get("curvature/step") for row in rows] == [3, 5, None]


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

"""Output that commands have in common: tables, JSON, help, and what ``info`` and ``report`` print."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from pnanalysis.cli import app
from pnanalysis.io import netcdf
from pnanalysis.io.runs import Run
from pnanalysis.terminal.console import make_table, print_table
from tests.cli.conftest import TINY

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_info_and_report_describe_a_run(run, tiny_run: Run, tmp_path: Path) -> None:
    assert "finished, 3 of 3 iterations" in run("pnanalysis", "info", tiny_run.path).out
    done = run("pnanalysis", "report", tiny_run.path, "-o", tmp_path / "r.html")
    assert done.status == 0, done.err
    assert "<svg" in (tmp_path / "r.html").read_text()


def test_info_lists_weights(run, tiny_run: Run) -> None:
    done = run("pnanalysis", "info", tiny_run.champion.path, "--json")
    rows = json.loads(done.out)["tables"][0]["rows"]
    state = tiny_run.champion.load()
    assert {row["tensor"]: row["numbers"] for row in rows} == {name: value.numel() for name, value in state.items()}


def test_info_verifies_every_file(run, own_run: Run) -> None:
    done = run("pnanalysis", "info", own_run.path, "--verify", "--json")
    assert done.status == 0, done.err
    rows = json.loads(done.out)["tables"][0]["rows"]
    n = len(own_run.checkpoints) + 1  # the history
    assert len(rows) == n
    assert {row["result"] for row in rows} == {"intact"}
    file = own_run.champion.path
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    done = run("pnanalysis", "info", own_run.path, "--verify")
    assert done.status == 2
    assert f"1 of {n} files cannot be read as they were written, such as {file.relative_to(own_run.path)}" in done.err
    done = run("pnanalysis", "info", file, "--verify")
    assert (done.status, done.err.count("\n")) == (2, 1)


def test_info_describes_a_run_whose_results_are_damaged_or_unfinished(run, own_run: Run) -> None:
    folder = own_run.path / "analysis"
    folder.mkdir(exist_ok=True)
    (folder / ".hessian.nc.host.1.aa.partial").write_bytes(b"half")
    (folder / "hessian.nc").write_bytes(b"half")
    done = run("pnanalysis", "info", own_run.path)
    assert done.status == 0, done.err
    assert "hessian" in done.out


def test_quiet_prints_nothing(run, own_run: Run) -> None:
    done = run("pnanalysis", "saturation", own_run.path, "--quiet")
    assert (done.status, done.out, done.err) == (0, "", "")
    assert np.isfinite(netcdf.load(own_run.path / "analysis/saturation.nc").percentile).any()


def test_json_output_has_files_tables_and_errors(run, tiny_run: Run, tmp_path: Path) -> None:
    out = json.loads(run("pnanalysis", "history", tiny_run.path, "--json", "-o", tmp_path / "h.nc").out)
    assert out["files"] == [str(tmp_path / "h.nc")]
    row = out["tables"][0]["rows"][0]
    assert row["iteration"] == 0
    assert row["test error"]["value"] == pytest.approx(float(tiny_run.history.test_error[0, -1]))
    described = json.loads(run("pnanalysis", "info", tiny_run.path, "--json").out)["tables"][0]["rows"]
    assert {"entry": "status", "value": "finished, 3 of 3 iterations"} in described
    failed = run("pnanalysis", "info", "/no/such/run", "--json")
    assert failed.status == 2
    assert "no such run" in json.loads(failed.out)["error"]
    tiny = ("--iterations", 1, "--epochs", 1, "--out", tmp_path / "net", "--json")
    table = json.loads(run("pntrain", "tanh7", *TINY, *tiny).out)["tables"][0]
    assert 0 <= table["rows"][0]["validation error"]["value"] <= 1
    assert table["rows"][0]["role"] == "plain, champion"


def test_names_have_columns_of_their_own(run, tiny_run: Run, tmp_path: Path) -> None:
    done = run("pnanalysis", "saturation", tiny_run.path, "-c", "ends", "--json", "-o", tmp_path / "s.nc")
    rows = json.loads(done.out)["tables"][0]["rows"]
    assert {row["iteration"] for row in rows} == set(range(len(tiny_run.ends)))
    assert {row["layer"] for row in rows} == set(netcdf.load(tmp_path / "s.nc").layer.values)


@pytest.mark.parametrize("program", ["pnanalysis", "pntrain"])
def test_version_help_and_completion(run, program: str, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(program, "--version").out.strip() == metadata.version("pnanalysis")
    shown = run(program, "--help")
    assert shown.status == 0
    assert "--install-completion" in shown.out


@pytest.mark.parametrize("command", [command.name for command in app.registered_commands])
def test_every_command_shows_examples(run, command: str) -> None:
    shown = run("pnanalysis", command, "--help")
    assert shown.status == 0
    assert "Example" in shown.out
    assert f"pnanalysis {command} " in " ".join(shown.out.split("Example", 1)[1].split())


def test_the_help_is_printed_without_a_command(run) -> None:
    assert "hessian" in run("pnanalysis").out
    assert "RECIPE" in run("pntrain").out


def test_tables_of_a_hundred_thousand_rows_are_cut_but_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    table = make_table("tensors", ["name"], [[f"w{i}"] for i in range(100_000)])
    print_table(table)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 1010
    assert "w999 " in lines[-3]
    assert lines[-1] == "and 99,000 more rows; --json gives all of them"
    assert len(table.rows) == 100_000

"""``benchmarks/language_model.py`` with a tiny network: that it runs, and goes on where it was stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "language_model.py"


@pytest.mark.zoo
@pytest.mark.slow
def test_rows_are_measured_once(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    output, picture = tmp_path / "found.md", tmp_path / "spectra.png"
    options = ["--small", "--tokens=16", "--rounds=1", "--n-hvp=6", "--basis-n-hvp=6"]
    command = [sys.executable, str(SCRIPT), *options, f"--output={output}", f"--picture={picture}"]
    subprocess.run(command, check=True, timeout=900)
    rows = json.loads(output.with_suffix(".json").read_text())["rows"]
    assert len(rows) == 11
    assert picture.stat().st_size > 0
    assert len([line for line in output.read_text().splitlines() if line.startswith(("| Hessian", "| Gauss"))]) == 11

    output.with_suffix(".json").write_text(json.dumps({"rows": rows[:-1]}))
    again = subprocess.run(command, check=True, timeout=300, stdout=subprocess.PIPE, text=True)
    assert again.stdout.count("'part'") == 1
    assert json.loads(output.with_suffix(".json").read_text())["rows"][:-1] == rows[:-1]

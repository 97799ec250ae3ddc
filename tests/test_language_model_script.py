"""Benchmarks of language models with tiny networks: that they run, and go on where they were stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPT = FOLDER / "language_model.py"


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


@pytest.mark.zoo
@pytest.mark.slow
def test_a_network_is_trained_and_analysed(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    output, kept = tmp_path / "found.md", tmp_path / "kept"
    kept.mkdir()
    options = [
        "--small",
        "--steps=3",
        "--tokens=16",
        "--n=16",
        "--n-hvp=16",
        f"--images={tmp_path}",
        f"--folder={kept}",
    ]
    command = [sys.executable, str(FOLDER / "trained_language_model.py"), *options, f"--output={output}"]
    subprocess.run(command, check=True, timeout=900)
    found = json.loads(output.with_suffix(".json").read_text())
    assert found["training"]["topics"][1] < found["training"]["topics"][0]  # three steps down
    assert len(found["values"]["lambda_max"]) == 2
    assert {path.name for path in tmp_path.glob("*.png")} == {"gpt2-trained.png", "gpt2-blocks.png"}
    assert len([line for line in output.read_text().splitlines() if line.startswith("| `pnanalysis")]) == 2

"""``benchmarks/gpu.py`` on the CPU with tiny sizes: what it measures is for a GPU, that it runs is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, with one tiny network."""
    monkeypatch.syspath_prepend(FOLDER)
    import gpu

    torch.manual_seed(0)
    model, batch = (
        nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval(),
        (torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])),
    )
    monkeypatch.setattr(gpu, "networks", lambda setup: {"missing": _missing, "tiny": lambda: (model, batch)})
    monkeypatch.setattr(gpu, "build_model", lambda name: model)
    monkeypatch.setattr(gpu, "images", lambda *_: batch)
    return gpu


def _missing() -> None:
    raise ImportError("no such package")


def _endless(*_: object) -> Any:
    return lambda: time.sleep(60)


@pytest.mark.slow
def test_stages_write_what_they_find(gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours = {"pnanalysis": gpu._ours, "endless": _endless, "not installed": lambda *_: __import__("not_installed")}
    monkeypatch.setattr(gpu, "CONTENDERS", ours)
    output = tmp_path / "gpu.md"
    stages = ["products", "arithmetic", "recurrent", "syncs", "memory"]
    gpu.main(["--device", "cpu", "--small", "--longest", "1", "--output", str(output), "--only", *stages])
    found = json.loads(output.with_suffix(".json").read_text())
    missing, product, endless = found["stages"]["products"]
    assert missing == {"what": "missing", "failed": "ImportError: no such package"}  # and the other networks go on
    assert product["gradients"] > 0
    assert endless["failed"] == "TimeoutError: more than 1 s"
    assert [row["arithmetic"] for row in found["stages"]["arithmetic"]] == ["float64", "float32", "bfloat16"]
    assert max(row["w1"] for row in found["stages"]["arithmetic"]) < 0.1
    assert found["stages"]["recurrent"][0]["relative_error"] < 1e-5
    assert found["environment"]["packages"]["numpy"]
    assert "endless" in output.read_text()
    assert "density" not in output.read_text()
    for name in ("gpu.png", "gpu_spectra.png"):
        assert (tmp_path / name).stat().st_size > 1000


def test_every_contender_that_is_installed_computes_a_product(gpu: Any) -> None:
    model, batch = gpu.networks(None)["tiny"]()
    for name, make in gpu.CONTENDERS.items():
        if "compiled" not in name:
            try:
                call = make(model, batch)
            except ModuleNotFoundError:
                continue
            assert call() is not None, name


def test_the_networks_of_the_script_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    import gpu

    made = gpu.networks(gpu.Setup(torch.device("cpu"), small=True))
    for make in made.values():
        model, batch = make()
        assert len(gpu.gradient(model, batch)) == len(list(model.parameters()))


@pytest.mark.slow
def test_files_with_cuda_tests_are_named(gpu: Any) -> None:
    command = gpu.tests_command()
    files = [each for each in command if each.endswith(".py")]
    assert "tests/spectra/test_lanczos.py" in files
    assert len(files) < 8
    for file in files:
        assert "import dask" not in (FOLDER.parent / file).read_text()
    here = os.environ | {"PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run(
        [*command, "--collect-only", "-p", "no:randomly"], cwd=FOLDER.parent, capture_output=True, text=True, env=here
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sys.executable == command[0]

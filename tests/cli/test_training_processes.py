"""``torchrun ... -m -- trainers RECIPE``: one run, and an end for all processes where one dies or a signal comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pnanalysis.io.runs import CHECKPOINTS, open_run

OPTIONS = [
    "tanh7", "--data", "digits", "--model-option", "input_shape=[1,8,8]", "--model-option", "width=16", "--batch-size",
    "64", "--strategy", "plain", "--device", "cpu",
]  # fmt: skip


def started(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Two processes with a cross-entropy that ends the second one at a certain step where ``DIE`` is set."""
    (folder / "dying.py").write_text(
        "import os, torch\n"
        "calls = 0\n"
        "def loss(outputs, targets):\n"
        "    global calls\n"
        "    calls += outputs.requires_grad\n"
        "    if os.environ.get('DIE') and os.environ['RANK'] == '1' and calls > 50: os._exit(7)\n"
        "    return torch.nn.functional.cross_entropy(outputs, targets)\n"
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--", "trainers"]
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, *launcher, *OPTIONS, "--loss", "dying:loss", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | (env or {}),
    )  # fmt: skip


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    job = started(tmp_path, "--epochs", "200", "--out", "run", env={"DIE": "1"})
    _, errors = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "another process has ended" in errors or "resume with: torchrun --nproc-per-node 2 -m -- trainers" in errors
    assert open_run(tmp_path / "run").status == "interrupted"


@pytest.mark.slow
def test_an_interrupted_job_ends_as_one_at_a_stretch(tmp_path: Path) -> None:
    arguments = ["--epochs", "100", "--checkpoint-every", "1"]
    whole = started(tmp_path, *arguments, "--out", "whole")
    output, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors
    assert output.count("whole (plain)") == 1  # one of them prints
    stopped = started(tmp_path, *arguments, "--out", "parts")
    checkpoint = tmp_path / "parts" / CHECKPOINTS / "iter00" / "epoch003.safetensors"
    while not checkpoint.exists():
        assert stopped.poll() is None
        time.sleep(0.01)
    stopped.send_signal(signal.SIGTERM)
    _, errors = stopped.communicate(timeout=60)
    assert stopped.returncode != 0
    assert "--resume" in errors
    assert open_run(tmp_path / "parts").status == "interrupted"
    resumed = started(tmp_path, *arguments, "--out", "parts", "--resume")
    _, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    runs = [open_run(tmp_path / name) for name in ("whole", "parts")]
    for a, b in zip(*(run.checkpoints for run in runs), strict=True):
        own, other = a.load(), b.load()
        assert all(torch.equal(own[name], other[name]) for name in own)

"""``torchrun ... -m pnanalysis hessian``: several processes give what one gives, and end together."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pnanalysis.io import netcdf
from pnanalysis.io.runs import Run

OPTIONS = ["-c", "plain", "--n", "101", "--batch-size", "40", "--n-hvp", "24", "--device", "cpu"]


def own_loss(folder: Path, at_call: str) -> list[str]:
    """Options for a cross-entropy of one's own that does something at a certain call."""
    (folder / "own.py").write_text(
        "import os, signal, torch\n"
        "calls = 0\n"
        "def loss(outputs, targets):\n"
        "    global calls\n"
        "    calls += 1\n"
        f"    {at_call}\n"
        "    return torch.nn.functional.cross_entropy(outputs, targets)\n"
    )
    return ["--loss", "own:loss", "--weight", "examples"]


def launched(
    n: int, *arguments: str, env: dict[str, str] | None = None, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pnanalysis", "hessian"]
    if n > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
        # without the dashes, torchrun takes --n for the beginning of one of its own options
        command = [sys.executable, *launcher, "-m", "--", "pnanalysis", "hessian"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=environment, cwd=folder, timeout=300
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance", "n_processes", "options"),
    [
        pytest.param("float32", 1e-5, 2, ["--shard-basis"], marks=pytest.mark.slow),
        pytest.param("float32", 1e-5, 2, [], marks=pytest.mark.slow),
        pytest.param("float64", 1e-10, 3, ["--shard-basis"], marks=pytest.mark.slow),
        pytest.param("float64", 1e-10, 4, [], marks=pytest.mark.slow),
        pytest.param("float64", 1e-10, 4, ["--shard-basis", "--per-layer"], marks=pytest.mark.slow),
    ],
)
def test_processes_agree_with_one(
    tiny_run: Run, tmp_path: Path, dtype: str, tolerance: float, n_processes: int, options: list[str]
) -> None:
    found = {}
    for n in (1, n_processes):
        done = launched(n, str(tiny_run.path), *OPTIONS, "--dtype", dtype, *options, "-o", str(tmp_path / f"{n}.nc"))
        assert done.returncode == 0, done.stderr
        found[n] = netcdf.load(tmp_path / f"{n}.nc").squeeze()
        assert done.stdout.count("hessian over 101 examples") == 1  # one of them prints
    one, many = found[1], found[n_processes]
    assert many.attrs["n_processes"] == n_processes
    assert many.attrs["n"] == one.attrs["n"] == 101
    scale = float(one.lambda_max.max())
    for name in ("trace", "lambda_max", "lambda_min", "frobenius_norm", "ritz_value", "trace_se", "lambda_max_data_se"):
        of = max(scale, float(np.abs(one[name]).max()))
        np.testing.assert_allclose(many[name], one[name], rtol=0, atol=tolerance * of, err_msg=name)
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_a_sentence(tiny_run: Run, tmp_path: Path) -> None:
    dying = own_loss(tmp_path, "if os.environ.get('RANK') == '1' and calls > 20: open('died', 'w'), os._exit(7)")
    arguments = [str(tiny_run.path), *OPTIONS, *dying, "--shard-basis", "-o", str(tmp_path / "x.nc")]
    done = launched(2, *arguments, env={"PYTHONPATH": str(tmp_path)}, folder=tmp_path)
    assert done.returncode != 0
    assert time.time() - (tmp_path / "died").stat().st_mtime < 60
    assert not (tmp_path / "x.nc").exists()
    assert "run the same command again" in done.stderr  # the other process saves and says so


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--shard-basis"]])
@pytest.mark.parametrize("ending", ["os._exit(7)", "os.kill(os.getpid(), signal.SIGSTOP)"])
def test_after_a_process_has_died_or_hung_the_same_command_goes_on(
    tiny_run: Run, tmp_path: Path, ending: str, options: list[str]
) -> None:
    lost = own_loss(tmp_path, f"if os.environ.get('LOSE') == os.environ['RANK'] and calls == 60: {ending}")
    here = {"PYTHONPATH": str(tmp_path), "PNANALYSIS_PATIENCE": "12"}
    arguments = [str(tiny_run.path), *OPTIONS, *lost, *options]
    whole = launched(2, *arguments, "-o", str(tmp_path / "whole.nc"), env=here)
    assert whole.returncode == 0, whole.stderr
    stopped = launched(2, *arguments, "-o", str(tmp_path / "a.nc"), env=here | {"LOSE": "1"})
    assert stopped.returncode != 0
    assert "run the same command again" in stopped.stderr
    if "SIGSTOP" in ending:
        assert "process 1 gives no sign of life" in stopped.stderr
    assert not (tmp_path / "a.nc").exists()
    again = launched(2, *arguments, "-o", str(tmp_path / "a.nc"), env=here)
    assert again.returncode == 0, again.stderr
    expected, found = (netcdf.load(tmp_path / name) for name in ("whole.nc", "a.nc"))
    scale = float(expected.lambda_max.max())
    for name in ("ritz_value", "node", "trace", "lambda_max", "lambda_min"):
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5 * scale, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("options", "n_later"), [([], 2), (["--shard-basis"], 3)])
def test_an_interrupted_job_goes_on(tiny_run: Run, tmp_path: Path, options: list[str], n_later: int) -> None:
    stopping = own_loss(tmp_path, "if os.environ.get('STOP') and calls == 60: os.kill(os.getpid(), signal.SIGTERM)")
    here = {"PYTHONPATH": str(tmp_path)}
    arguments = [str(tiny_run.path), *OPTIONS, *stopping, *options]
    expected = launched(2, *arguments, "-o", str(tmp_path / "whole.nc"), env=here)
    assert expected.returncode == 0, expected.stderr
    stopped = launched(2, *arguments, "-o", str(tmp_path / "a.nc"), env=here | {"STOP": "1"})
    assert stopped.returncode != 0
    assert list(tmp_path.glob("a.unfinished/*/*.safetensors"))
    resumed = launched(n_later, *arguments, "-o", str(tmp_path / "a.nc"), env=here)
    assert resumed.returncode == 0, resumed.stderr
    whole, again = (netcdf.load(tmp_path / name) for name in ("whole.nc", "a.nc"))
    scale = float(whole.lambda_max.max())
    np.testing.assert_allclose(again.ritz_value, whole.ritz_value, rtol=1e-6, atol=1e-5 * scale)

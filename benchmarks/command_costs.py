"""What each command costs on a LeNet-5: CPU and wall time of the commands that the README lists.

``PNANALYSIS_CIFAR10=PATH python benchmarks/command_costs.py [--only hessian blocks]``. Trains a run of two iterations
and one of two restarts, three epochs each, in a temporary folder, then runs every command with one thread. Writes
``results/command_costs.md`` and ``.json``; with ``--only`` the other rows stay.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from pnanalysis.io.hardware import cpu_name

RESULTS = Path(__file__).parent / "results" / "command_costs.json"
#: Commands, and whether they read data.
COMMANDS = {
    "hessian runs/lenet5": True,
    "eigenpairs runs/lenet5": True,
    "blocks runs/lenet5 --bits 4": True,
    "saturation runs/lenet5": True,
    "trajectory runs/lenet5 --per-layer": False,
    "landscape runs/lenet5 --view curve --align": True,
    "landscape runs/lenet5 --view plane": True,
    "sharpness runs/lenet5": True,
    "learning-coefficient runs/lenet5 --n 512": True,
    "gradients runs/lenet5": True,
    "champion runs/lenet5 --restarts runs/lenet5-restart --quick": True,
    "compare runs/lenet5 runs/lenet5-restart": True,
    "correlate runs/sweep --compute sharpness --with test_error": True,
    "report runs/lenet5 runs/lenet5-restart -o report.html": False,
}


def timed(arguments: list[str], folder: Path) -> tuple[float, float]:
    """CPU and wall seconds of a command, with one thread.

    Raises
    ------
    subprocess.CalledProcessError
        If it fails.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", *arguments], cwd=folder, env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.perf_counter() - start


def measure(only: list[str], folder: Path, data: str) -> Iterator[tuple[str, dict[str, float]]]:
    """Each of the commands whose names are given, or of all, and its seconds."""
    runs = {"lenet5": [], "lenet5-restart": ["--strategy", "restart"]}
    runs |= {f"sweep/seed{seed}": ["--seed", f"{seed}", "--epochs", "1", "--iterations", "1"] for seed in range(4)}
    for name, more in runs.items():
        if not only or "correlate" in only or not name.startswith("sweep"):
            common = ["--data", data, "--iterations", "2", "--epochs", "3", "--device", "cpu", "--quiet"]
            timed(["trainers", "lenet5", *common, *more, "--out", f"runs/{name}"], folder)
    for command, reads in COMMANDS.items():
        name, *rest = command.split()
        if only and name not in only:
            continue
        cpu, wall = timed(["pnanalysis", name, *rest, *(["--data", data, "--device", "cpu"] if reads else [])], folder)
        print(f"{command}: {cpu:.0f} s of CPU time, {wall:.0f} s in all", flush=True)
        yield command, {"cpu_seconds": cpu, "wall_seconds": wall}


def in_words(seconds: float) -> str:
    """Seconds, or minutes where these are many."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def table(found: dict[str, dict[str, float]], machine: str) -> list[str]:
    """What was measured, in Markdown."""
    return [
        "# What commands cost on LeNet-5",
        "",
        "A run with a plain model and one persistent iteration, and one of as many restarts, of three epochs on "
        "CIFAR-10 (JPEG copy); defaults unless options are shown, with `--data` and `--device cpu`. One thread, "
        f"{machine}.",
        "",
        "| `pnanalysis ...` | CPU time | wall time |",
        "|---|---|---|",
        *(
            f"| `{command}` | {in_words(row['cpu_seconds'])} | {in_words(row['wall_seconds'])} |"
            for command, row in found.items()
        ),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], metavar="COMMAND")
    only = parser.parse_args().only
    data = f"imagefolder:{Path(os.environ['PNANALYSIS_CIFAR10']).resolve()}"
    found = json.loads(RESULTS.read_text()) if only and RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        for command, row in measure(only, Path(folder), data):
            found[command] = row
            found = {name: found[name] for name in COMMANDS if name in found}
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    machine = f"{cpu_name()}, torch {torch.__version__}"
    RESULTS.with_suffix(".md").write_text("\n".join(table(found, machine)))


if __name__ == "__main__":
    main()

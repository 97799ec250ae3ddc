"""Time and memory of trajectories of 2,000 checkpoints of LeNet-5 and 200 of ResNet-18.

    OMP_NUM_THREADS=1 python benchmarks/trajectory_memory.py [--networks lenet5 resnet18] [--folder FOLDER]

The checkpoints are a random walk from the initial weights; they are written first (0.5 GB and 9 GB) and removed
afterwards. Each analysis runs in its own process, whose peak resident memory is recorded by the system; "above
import" is that without the memory of the imported libraries.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import pnanalysis as pn
from pnanalysis.inputs.models import build_model

CHECKPOINTS = {"lenet5": 2000, "resnet18": 200}


def write(name: str, n: int, folder: Path) -> list[Path]:
    """Write a random walk from the initial parameters of the named network; returns the files."""
    torch.manual_seed(0)
    state = build_model(name).state_dict()
    files = []
    for i in range(n):
        for tensor in state.values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor), alpha=1e-3)
        files.append(folder / f"{i:04d}.safetensors")
        save_file(state, files[-1])
    return files


def _peak() -> float:
    """Peak resident memory of this process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def analyse(name: str, files: list[Path], per_layer: bool) -> None:
    """Compute one trajectory and print a line of the table."""
    build_model(name)
    before, start, cpu_start = _peak(), time.perf_counter(), time.process_time()
    ds = pn.trajectory(
        pn.open_files(name, files),
        projections=("plane", "pca", "pca_end", "random"),
        per_layer=per_layer,
        progress=False,
    )
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    parameters = sum(parameter.numel() for parameter in build_model(name).parameters())
    n, peak = ds.sizes["checkpoint"], _peak()
    print(
        f"{name}, {n:,} checkpoints of {parameters:,} parameters{', per layer' if per_layer else ''}: {seconds:.1f} s "
        f"({cpu_seconds:.1f} s of CPU), peak {peak:.2f} GB ({peak - before:.2f} GB above import)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(CHECKPOINTS))
    parser.add_argument(
        "--folder", type=Path, help="Where to write the checkpoints; default: the system's temporary folder."
    )
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for name in options.networks:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            files = write(name, CHECKPOINTS[name], Path(folder))
            for per_layer in (False, True):
                process = context.Process(target=analyse, args=(name, files, per_layer))
                process.start()
                process.join()


if __name__ == "__main__":
    main()

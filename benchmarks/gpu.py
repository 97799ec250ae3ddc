"""All that is to be measured on a GPU, in one command that fits into a few minutes.

    python benchmarks/gpu.py --minutes 8 [--only products syncs] [--networks LeNet-5 ResNet-18] [--output FILE.md]

A machine without network needs what lies in ``wheels`` (about 50 MB, for Python 3.12 on Linux) after the first of
these commands, which is for one with a network. The second is for the machine itself, in this folder's parent; it
leaves torch as it is, and what is there and recent enough::

    make gpu-wheels
    python -m pip install --no-index --no-deps --find-links wheels -r benchmarks/gpu_requirements.txt pnanalysis

tests
    The tests that need a GPU, and their outcomes.
syncs
    How often steps of Lanczos wait for the device.
memory
    By how much the memory in use grows over 100 products.
products
    A Hessian product over the gradient of the same loss, for networks from LeNet-5 to GPT-2, eager and compiled, beside
    PyHessian, hessian-eigenthings and curvlinops (also compiled); those of them that are installed. All compute in
    float32, without TensorFloat-32. PyHessian keeps the graph of one batch, so that a product is a backward pass alone;
    with a data loader it computes all of it. Each network has an equal part of the time, in which our compiled products
    and curvlinops' come first.
training
    An epoch by the trainer and by a ``DataLoader`` loop; twenty LeNet-5 as one program and one after the other; a step
    with twenty earlier end points and without.
recurrent
    A product of an LSTM, whose cuDNN kernels differentiate once only.
arithmetic
    One spectrum in float32, TensorFloat-32 and bfloat16: times, and distances from that in float64, and a figure of
    all of them.
bases
    One spectrum with each way to keep the basis: times, peak memory, and errors of the trace.
whole
    Ghorbani et al.'s setting, 50,000 images and 90 steps of 10 probes, for as long as its share of the time lasts.

Every stage has a share of the time and stops between two rows when it is used up; a product may take ``--longest``
seconds, compilation included. What fails is a row, and the others go on. The table ends with verdicts on the targets,
which are missed by one counterexample, and met when all that they speak of was measured.

Rows are written as they come, as JSON beside the table, and stay there: a row replaces the earlier one of the same
measurement, and all outcomes of tests are replaced together. Nothing is mixed: if device, driver, torch, Python or the
version of a package is another than that of the file, its rows are dropped. After a change of the code within a version
measure again what it concerns, or delete the file. ``--device cpu --small`` tries the script, with results in the
folder for temporary files.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "benchmarks" / "gpu_requirements.txt"
#: Packages whose versions are noted.
_PACKAGES = (
    "pnanalysis", "numpy", "torchvision", "transformers", "triton", "pyhessian", "hessian-eigenthings",
    "curvlinops-for-pytorch",
)  # fmt: skip


def missing() -> list[str]:
    """What is not installed, or too old, of that without which nothing can be measured; empty if all is there."""
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if line and not line.startswith("#")]
    try:
        needs = map(Requirement, metadata.requires("pnanalysis") or ())
    except metadata.PackageNotFoundError:
        return ["pnanalysis", *(each for each in lines if not _is_there(each))]
    needed = {each.name for each in needs if each.marker is None or each.marker.evaluate({"extra": ""})}
    return [each for each in lines if Requirement(each).name in needed and not _is_there(each)]


def _is_there(requirement: str) -> bool:
    wanted = Requirement(requirement)
    try:
        return wanted.specifier.contains(metadata.version(wanted.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def environment(setup: Any) -> dict[str, Any]:
    """What the numbers depend on."""
    import torch

    from pnanalysis.io.hardware import cpu_name

    on_gpu = setup.device.type == "cuda"
    name = torch.cuda.get_device_name(setup.device) if on_gpu else cpu_name()
    found = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "driver": _driver()}
    packages = {name: metadata.version(name) for name in _PACKAGES if _is_there(name)}
    return found | {"python": platform.python_version(), "packages": packages, "small": setup.small}


def _driver() -> str | None:
    """Version of the driver of the GPU, where there is one."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write what is there after every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument(
        "--longest", type=float, default=90.0, metavar="S", help="seconds that a product may take in all"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small networks, to try the script")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="all if left out")
    parser.add_argument("--networks", nargs="+", metavar="NAME", default=[], help="of products; all if left out")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu.md for a GPU")
    options = parser.parse_args(arguments)
    if absent := missing():
        parser.error(
            f"missing, or too old: {', '.join(absent)}; `make gpu-wheels` where there is a network, and here "
            f"`python -m pip install --no-index --no-deps --find-links wheels -r {REQUIREMENTS.relative_to(ROOT)} "
            "pnanalysis`"
        )
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))  # this tree is measured, not what a wheel holds
    import gpu_report as report
    import gpu_stages
    import torch

    from pnanalysis.errors import PnError

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("there is no CUDA device; --device cpu --small tries the script")
        return
    setup = gpu_stages.Setup(
        torch.device(options.device), options.small, longest=options.longest, networks=options.networks
    )
    networks = list(gpu_stages.networks(setup))
    for given, known in (
        (options.only or [], list(gpu_stages.STAGES)),
        (options.networks, list(map(gpu_stages.short, networks))),
    ):
        if unknown := [each for each in given if each not in known]:
            parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    tried = setup.small or setup.device.type == "cpu"
    default = Path(tempfile.gettempdir(), "tried_gpu.md") if tried else ROOT / "benchmarks" / "results" / "gpu.md"
    output = options.output or default
    warnings.simplefilter("ignore")
    try:
        found = report.stored(output, environment(setup))
    except PnError as error:
        parser.error(str(error))
    gpu_stages.import_compiler()
    chosen = [stage for stage in gpu_stages.STAGES if stage in (options.only or gpu_stages.STAGES)]
    end = time.perf_counter() + 60 * options.minutes
    for i, stage in enumerate(chosen):
        measure, share = gpu_stages.STAGES[stage]
        # what earlier stages have left of their shares is for the later ones
        following = sum(gpu_stages.STAGES[name][1] for name in chosen[i:])
        start = time.perf_counter()
        setup.deadline = start + max(end - start, 0.0) * share / following
        report.begin(found["stages"], stage)
        rows = found["stages"][stage]
        try:
            for row in measure(setup):
                report.put(rows, row)
                print(stage, json.dumps(row), flush=True)
                report.write(found, output, networks)
        except Exception as error:  # the other stages go on
            failed = {"what": report.unfinished(stage), "failed": f"{type(error).__name__}: {error}"[:300]}
            report.put(rows, failed)
            print(stage, json.dumps(failed), flush=True)
        report.write(found, output, networks)
        gpu_stages.release(setup)
    report.draw(found, output)
    for judged in report.verdicts(found["stages"], networks):
        print(f"{judged['verdict']}: {judged['target']} ({judged['found'] or 'no rows'})")
    print(output)


if __name__ == "__main__":
    main()

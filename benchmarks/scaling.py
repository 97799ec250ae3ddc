"""Strong scaling: Hessian products of LeNet-5 and ResNet-18, whose examples 1 to 4 processes divide among them.

    python benchmarks/scaling.py [--small | --memory] [--output benchmarks/results/scaling.md]

Processes have one thread each and exchange vectors through gloo. For every number of processes: the time of a product
over the same examples, the part of it in which a process computes, and the rest, in which it exchanges vectors and
waits for the others. Images are random, since the time of a product does not depend on them. Exchanges of vectors
alone, Gram-Schmidt steps and products over a part of the examples are measured, too, by which
``benchmarks/cost_model.py`` predicts the times.

The memory of a spectrum is the most that any process takes beyond what it took before the operator was made, of a wide
perceptron, with whole bases and with bases divided among the processes (``--shard-basis``). ``--memory`` measures that
alone, which other work on the machine does not change, and keeps the times that the output holds.

Processes in excess of the machine's cores share them: n processes on c cores are at most c times as fast as one, and
``of the cores`` is the speed-up over that bound. The time that processes spent on a core (``CPU``), summed over all of
them, tells what dividing the work costs, whatever else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pnanalysis.curvature.distributed import DistributedOperator, OwnExamples, ShardedOperator
from pnanalysis.curvature.operators import HessianOperator
from pnanalysis.inputs.models import build_model
from pnanalysis.io.hardware import cpu_name
from pnanalysis.spectra.density import spectral_density
from pnanalysis.spectra.inner_products import orthogonalised
from pnanalysis.spectra.used_memory import PeakMemory

RESULTS = Path(__file__).resolve().parent / "results" / "scaling.md"
#: name: (model, examples, products)
NETWORKS = {"LeNet-5": ("lenet5", 2040, 12), "ResNet-18": ("resnet18", 24, 4)}
SMALL = {"LeNet-5": ("lenet5", 48, 2)}
#: Part of the examples over which one process computes products, too: what does not shrink with them is not divided.
PART = 4
PROCESSES = (1, 2, 3, 4)
#: Numbers in vectors that are exchanged alone; the larger are about those of the networks.
SIZES = (62_006, 1_000_000, 11_173_962)
EXCHANGES = 7
#: Parameters and vectors of bases that do not fit in the cache.
BASES = ((1_000_000, 16), (1_000_000, 48), (11_173_962, 8))
#: Width of the perceptron whose peaks are measured, examples, and Lanczos steps.
WIDTH, WIDE_EXAMPLES, STEPS = 800, 64, 40
SMALL_WIDTH = 300
#: Bound on the memory of a process, which is not to depend on what else the machine does.
MOST_BYTES = 4 * 10**9


class Clocks:
    """Wall and CPU time that an operator's products take in this process."""

    def __init__(self, matmat: Callable[[Tensor], Tensor]) -> None:
        self.matmat, self.wall, self.cpu = matmat, 0.0, 0.0

    def __call__(self, V: Tensor) -> Tensor:
        wall, cpu = time.perf_counter(), time.process_time()
        result = self.matmat(V)
        self.wall, self.cpu = time.perf_counter() - wall, time.process_time() - cpu
        return result


def measure_products(name: str, model: str, n_examples: int, n_products: int, group: Any) -> dict[str, Any]:
    """A row for one network and one number of processes; called in all of the group's."""
    torch.manual_seed(0)
    network = build_model(model).eval()
    batches = [(torch.randn(n_examples, 3, 32, 32), torch.randint(10, (n_examples,)))]
    local = HessianOperator(network, cross_entropy, OwnExamples(batches, group=group))
    operator = DistributedOperator(local, group)
    own = Clocks(local.matmat)
    local.matmat = own  # type: ignore[method-assign]
    V = torch.randn(operator.shape[0], 1)
    operator.matmat(V)  # the first one prepares what products have in common
    rows = []
    for _ in range(n_products):
        dist.barrier(group)
        wall, cpu = time.perf_counter(), time.process_time()
        operator.matmat(V)
        rows.append([time.perf_counter() - wall, own.wall, time.process_time() - cpu])
    n = dist.get_world_size(group)
    found = [torch.zeros(n_products, 3, dtype=torch.float64) for _ in range(n)]
    dist.all_gather(found, torch.tensor(rows, dtype=torch.float64), group)
    times = torch.stack(found)  # (processes, products, 3)
    walls = times[:, :, 0].amax(0)
    typical = int(walls.argsort()[len(walls) // 2])  # its parts belong together
    return {
        "network": name, "parameters": operator.shape[0], "examples": n_examples, "processes": n,
        "seconds": float(walls[typical]), "fastest": float(walls.min()), "slowest": float(walls.max()),
        "computing": float(times[:, typical, 1].mean()), "cpu_seconds": float(times[:, :, 2].sum(0).median()),
    }  # fmt: skip


def measure_exchange(size: int, group: Any) -> dict[str, Any]:
    """The messages of a product, a broadcast and a sum, alone."""
    vector, times = torch.randn(size), []
    for _ in range(EXCHANGES + 1):
        dist.barrier(group)
        begin = time.perf_counter()
        dist.broadcast(vector, 0, group)
        dist.all_reduce(vector, group=group)
        times.append(time.perf_counter() - begin)
        vector /= dist.get_world_size(group)
    n = dist.get_world_size(group)
    return {"processes": n, "bytes": 4 * size, "seconds": statistics.median(times[1:]), "fastest": min(times[1:])}


def measure_gram_schmidt(n_parameters: int, n_columns: int) -> dict[str, Any]:
    """Orthogonalising one vector against a basis, in one process."""
    # what the columns are makes no difference to the time
    basis, v, times = torch.randn(n_columns, n_parameters).T, torch.randn(n_parameters, 1), []
    for _ in range(EXCHANGES + 1):
        begin = time.perf_counter()
        orthogonalised(v, [basis])
        times.append(time.perf_counter() - begin)
    return {
        "processes": 1,
        "bytes": 4 * n_parameters * n_columns,
        "seconds": statistics.median(times[1:]),
        "fastest": min(times[1:]),
    }


def measure_spectrum(width: int, divided: bool, group: Any) -> dict[str, Any]:
    """Time and memory of a spectrum, with a whole or a divided basis; called in all processes of the group."""
    torch.manual_seed(0)
    layers = [nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)]
    network = nn.Sequential(*layers)
    batches = [(torch.randn(WIDE_EXAMPLES, width), torch.randint(10, (WIDE_EXAMPLES,)))]
    dist.barrier(group)
    begin = time.perf_counter()
    with PeakMemory(torch.device("cpu")) as memory:
        local = HessianOperator(network, cross_entropy, OwnExamples(batches, group=group), expected_products=STEPS)
        operator = (ShardedOperator if divided else DistributedOperator)(local, group)
        spectral_density(
            operator, STEPS, 1, deflate=False, basis="memory", data_error="none", progress=False,
            max_memory_bytes=MOST_BYTES,
        )  # fmt: skip
    seconds, n = time.perf_counter() - begin, dist.get_world_size(group)
    rise = torch.tensor([float((memory.peak or 0) - (memory.before or 0))], dtype=torch.float64)
    dist.all_reduce(rise, dist.ReduceOp.MAX, group=group)
    return {
        "network": f"perceptron of width {width:,}", "parameters": operator.shape[0], "examples": WIDE_EXAMPLES,
        "processes": n, "divided": divided, "products": STEPS, "seconds": seconds, "bytes": float(rise),
    }  # fmt: skip


def work(
    rank: int, n: int, folder: str, networks: dict[str, tuple[str, int, int]], sizes: tuple[int, ...], width: int
) -> None:
    """All measurements of one process, which is idle where a group is smaller."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=n)
    found: dict[str, list[Any]] = {name: [] for name in ("products", "parts", "exchanges", "gram_schmidt", "spectra")}
    if rank == 0:
        found["gram_schmidt"] = [measure_gram_schmidt(*each) for each in BASES if each[0] in sizes]
    dist.barrier()
    for size in (each for each in PROCESSES if each <= n):
        group = dist.new_group(list(range(size)))
        if rank < size:
            if size > 1:
                found["exchanges"] += [measure_exchange(length, group) for length in sizes]
            for name, settings in networks.items():
                found["products"].append(measure_products(name, *settings, group))
                if size == 1:
                    model, n_examples, n_products = settings
                    found["parts"].append(measure_products(name, model, n_examples // PART, n_products, group))
                if rank == 0:
                    row = found["products"][-1]
                    print(f"{name}, {size} processes: {row['seconds']:.3g} s a product", flush=True)
            for divided in (False, True)[: 1 if size == 1 else 2]:
                found["spectra"].append(measure_spectrum(width, divided, group))
        dist.barrier()
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure(networks: dict[str, tuple[str, int, int]], n: int, sizes: tuple[int, ...], width: int) -> dict[str, Any]:
    """Start ``n`` processes, and derive speed-ups from what they found."""
    load = os.getloadavg()[0]
    # arrays of a megabyte and more are given back at once, so that the peak is that of what is in use
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (n, folder, networks, sizes, width), nprocs=n)
        found = json.loads((Path(folder) / "found.json").read_text())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    alone = {row["network"]: row for row in found["products"] if row["processes"] == 1}
    for row in found["products"]:
        first = alone[row["network"]]
        row["speed_up"] = first["seconds"] / row["seconds"]
        row["efficiency"] = row["speed_up"] / row["processes"]
        row["of_the_cores"] = row["speed_up"] / min(row["processes"], cores)
        row["communication"] = 1 - row["computing"] / row["seconds"]
        row["cpu_ratio"] = row["cpu_seconds"] / first["cpu_seconds"]
    return {
        "machine": cpu_name(), "torch": torch.__version__, "cores": cores, "load_before": load, **found,
    }  # fmt: skip


def report(found: dict[str, Any]) -> str:
    """The Markdown of a measurement."""
    cores = found["cores"]
    lines = [
        "# Strong scaling of Hessian products", "",
        f"`python benchmarks/scaling.py`: {found['machine']} CPU, {cores} cores, one thread a process, gloo, torch "
        f"{found['torch']}; load of the machine before the start {found['load_before']:.1f}. Medians.", "",
        f"More than {cores} processes share the {cores} cores: speed-ups beyond {cores} cannot be seen here, but what "
        "dividing the work costs can. Communication includes waiting for the slowest process, CPU the time of all "
        "processes together, relative to one. Where other work shares the machine, the fastest times say more than the "
        "medians.", "",
        "| network | processes | s a product (fastest to slowest) | speed-up | efficiency | of the cores "
        "| communication | CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in found["products"]:
        lines.append(
            f"| {row['network']}, {row['examples']:,} images | {row['processes']} | {row['seconds']:.3g} "
            f"({row['fastest']:.3g} to {row['slowest']:.3g}) | {row['speed_up']:.2f} | {row['efficiency']:.0%} | "
            f"{row['of_the_cores']:.0%} | {row['communication']:.1%} | {row['cpu_ratio']:.2f} |"
        )
    lines += ["", "A broadcast and a sum of one vector:", "", "| processes | MB | ms |", "|---|---|---|"]
    lines += [
        f"| {row['processes']} | {row['bytes'] / 1e6:.3g} | {1e3 * row['seconds']:.3g} |" for row in found["exchanges"]
    ]
    lines += [
        "", "Memory of a spectrum: the most that any process takes beyond what it took before.", "",
        "| network | products | processes | basis | MB |", "|---|---|---|---|---|",
        *(
            f"| {row['network']}, {row['parameters']:,} parameters | {row['products']} | {row['processes']} | "
            f"{'divided' if row['divided'] else 'whole'} | {row['bytes'] / 1e6:,.0f} |"
            for row in found["spectra"]
        ),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any], output: Path) -> None:
    """Speed-up over the number of processes, and shares of the time."""
    from pnanalysis.plots import save_figure
    from pnanalysis.plots.style import COLOURS, GREY, MARKERS, new_figure, style

    names = list(dict.fromkeys(row["network"] for row in found["products"]))
    with style():
        figure = new_figure(7.0, 2.6)
        left, right = figure.subplots(1, 2)
        counts = sorted({row["processes"] for row in found["products"]})
        bound = [min(n, found["cores"]) for n in counts]
        left.plot(counts, bound, "--", color=GREY, label=f"{found['cores']} cores")
        for name, colour, marker in zip(names, COLOURS, MARKERS, strict=False):
            rows = [row for row in found["products"] if row["network"] == name]
            x = [row["processes"] for row in rows]
            left.plot(x, [row["speed_up"] for row in rows], color=colour, marker=marker, label=name)
            right.plot(x, [100 * row["communication"] for row in rows], color=colour, marker=marker, label=name)
        for axes, label in ((left, "speed-up of a product"), (right, "communication and waiting, %")):
            axes.set_xlabel("processes")
            axes.set_ylabel(label)
            axes.set_xticks(counts)
            axes.set_ylim(bottom=0)
        left.legend()
        save_figure(figure, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="two processes and few images, to try the script")
    parser.add_argument("--memory", action="store_true", help="measure the memory of spectra alone")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    stored = options.output.with_suffix(".json")
    whole = (NETWORKS, max(PROCESSES), SIZES, WIDTH)
    if options.memory:
        spectra = measure({}, max(PROCESSES), (), WIDTH)["spectra"]
        found = json.loads(stored.read_text()) | {"spectra": spectra}
    else:
        found = measure(*(SMALL, 2, SIZES[:2], SMALL_WIDTH) if options.small else whole)
    text = report(found)
    print(text, end="")
    options.output.write_text(text)
    stored.write_text(json.dumps(found, indent=2) + "\n")
    draw(found, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()

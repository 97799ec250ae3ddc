"""Ways to compute a product with the Hessian, each beside the way that it replaces, on one CPU thread.

    python benchmarks/product_modes.py [--only shared compiled vocabulary recomputed] [--small]

shared
    Ten vectors that share each call by ``torch.vmap``, and one after the other: the table by which the size was chosen
    up to which calls are shared.
compiled
    Traced products compiled by ``torch.compile``, and not.
vocabulary
    Cross-entropy over 50,257 words in closed form, and by its graph: what a product allocates, and its time.
recomputed
    Products that run the blocks of a transformer again (``checkpoint_activations``), and those that keep them.

Times are CPU times, medians of rounds in which the two ways take turns; each row has a process of its own. Peaks are
those of the process above what it took before the product. Data are random, since they make no difference. Writes
``results/product_modes.md`` and ``.json``; sections that are not asked for keep their rows.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from gpt import GPT, SIZES, random_text
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import pnanalysis as pn
from pnanalysis.curvature import programs
from pnanalysis.inputs.models import build_model
from pnanalysis.io.hardware import cpu_name
from pnanalysis.spectra.used_memory import PeakMemory

RESULTS = Path(__file__).resolve().parent / "results" / "product_modes.md"
CPU = torch.device("cpu")
SIZES |= {
    "small": (64, 2, 2, 128, 32),
    "two wide layers": (96, 2, 4, 50_257, 64),
    "twelve layers": (192, 12, 6, 256, 256),
}
Setting = tuple[nn.Module, tuple[Tensor, Tensor]]
Row = dict[str, Any]


def images(name: str, n: int) -> Setting:
    """A network of the zoo, and images."""
    return build_model(name).eval(), (torch.randn(n, 3, 32, 32), torch.randint(10, (n,)))


def perceptron(widths: tuple[int, ...], n: int) -> Setting:
    """With tanh between its layers."""
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(widths[:-1])]
    network = nn.Sequential(*layers, nn.Linear(*widths[-2:]))
    return network, (torch.randn(n, widths[0]), torch.randint(widths[-1], (n,)))


def text(size: str, n: int) -> Setting:
    """A transformer, and sequences of its full length."""
    network = GPT(size)
    network.plain = True  # fused attention has no second derivative
    return network, random_text(network, n, CPU)


SETTINGS: dict[str, Callable[[], Setting]] = {
    "perceptron 64-32-10, 512 examples": partial(perceptron, (64, 32, 10), 512),
    "transformer, 2 layers of width 64, 32 tokens": partial(text, "small", 1),
    "the same, 16 x 32 tokens": partial(text, "small", 16),
    "LeNet-5, 32 images": partial(images, "lenet5", 32),
    "perceptron 784-256-10, 1,024 examples": partial(perceptron, (784, 256, 10), 1024),
    "LeNet-5, 512 images": partial(images, "lenet5", 512),
    "ResNet-18, 32 images": partial(images, "resnet18", 32),
}
SMALL = {"perceptron 8-6-3, 16 examples": partial(perceptron, (8, 6, 3), 16)}


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU time of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(cpu_seconds(call))
    return {name: statistics.median(found) for name, found in times.items()}


def shared(make: Callable[[], Setting], rounds: int) -> Row:
    """Time of ten vectors that share calls over that of one after the other, and the size that decides."""
    network, batch = make()
    chosen = programs._SMALL
    calls: dict[str, Callable[[], object]] = {}
    for way, largest in {"shared": 2**60, "alone": 0}.items():
        programs._SMALL = largest  # read when a product is traced, which the first call does
        op = pn.HessianOperator(network, cross_entropy, [batch], expected_products=100)
        V = torch.randn(op.shape[0], 10)
        op.matmat(V)
        calls[way] = partial(op.matmat, V)
    found = in_turns(calls, rounds)
    sizes = mean_result(op)
    return {"bytes": sizes, "ratio": found["shared"] / found["alone"], "used": sizes <= chosen}


def mean_result(op: pn.HessianOperator) -> float:
    """Mean size of the results in the part of a traced product that depends on the vector."""
    ((_, second),) = op.linearisation._programs.values()
    calls = [node for node in second.program.graph.nodes if node.op == "call_function"]
    return sum(programs._bytes_of(node) for node in calls) / len(calls)


def compiled(make: Callable[[], Setting], rounds: int) -> Row:
    """Time of a compiled product over that of the traced one, and what the first product of each takes."""
    network, batch = make()
    calls, first = {}, {}
    for way in ("traced", "compiled"):
        op = pn.HessianOperator(network, cross_entropy, [batch], expected_products=100, compile=way == "compiled")
        v = torch.randn(op.shape[0])
        start = time.perf_counter()
        op.matvec(v)
        first[way] = time.perf_counter() - start
        calls[way] = partial(op.matvec, v)
    found = in_turns(calls, rounds)
    return {"ratio": found["compiled"] / found["traced"], "traced": found["traced"], "first": first}


def graph_of_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy that is not recognised as such."""
    return -torch.log_softmax(outputs, 1).gather(1, targets[:, None]).mean()


def vocabulary(way: str, rounds: int, small: bool) -> Row:
    """Peak and time of products of a transformer with many words, with a loss in closed form and by its graph."""
    network, batch = text("small" if small else "two wide layers", 8)
    recomputed = way == "recomputed activations"
    options = {"expected_products": 10, "checkpoint_activations": recomputed, "weight": "batches"}
    row: Row = {}
    for name, loss in {"graph": graph_of_loss, "closed": cross_entropy}.items():
        op = pn.HessianOperator(network, loss, [batch], **options)
        row[name] = one_product(op, rounds)
    return row


def recomputed(way: str, rounds: int, small: bool) -> Row:
    """Peak and time of products of a transformer of twelve layers, by one way."""
    network, batch = text("small" if small else "twelve layers", 8)
    op = pn.HessianOperator(
        network, cross_entropy, [batch], weight="batches",
        expected_products=10, checkpoint_activations=way == "run again",
    )  # fmt: skip
    return one_product(op, rounds)


def give_back_free_memory() -> None:
    """Let glibc return what it has kept of freed memory, which would hide what the next product takes."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def one_product(op: pn.HessianOperator, rounds: int) -> Row:
    """Peak above what was taken before, and median CPU time."""
    v = torch.randn(op.shape[0])
    op.matvec(v)  # checked before it is used
    peaks = []
    for _ in range(rounds):
        give_back_free_memory()
        with PeakMemory(CPU) as memory:
            op.matvec(v)
        assert memory.peak is not None
        assert memory.before is not None
        peaks.append((memory.peak - memory.before) / 1e6)
    return {
        "method": op.method,
        "MB": statistics.median(peaks),
        "seconds": in_turns({"": partial(op.matvec, v)}, rounds)[""],
    }


def measure(section: str, name: str, rounds: int, small: bool) -> Row:
    """One row."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if section in ("vocabulary", "recomputed"):
        return {"vocabulary": vocabulary, "recomputed": recomputed}[section](name, rounds, small)
    return {"shared": shared, "compiled": compiled}[section]((SETTINGS | SMALL)[name], rounds)


def table(found: dict[str, dict[str, Row]]) -> str:
    """Everything as Markdown."""
    lines = [
        "# Ways to compute a product with the Hessian",
        "",
        f"`python benchmarks/product_modes.py`, {cpu_name()}, one thread, torch {metadata.version('torch')}, float32. "
        "CPU times, medians of rounds in which ways take turns.",
    ]
    for section, title in TITLES.items():
        if section in found:
            lines += ["", f"## {title[0]}", "", *title[1:]]
            lines += [f"| {name} | {CELLS[section](row)} |" for name, row in found[section].items()]
    return "\n".join(lines) + "\n"


TITLES = {
    "shared": (
        "Ten vectors that share calls",
        "Over the time of one vector after the other.",
        "",
        "| network | mean result | shared calls | used |",
        "|---|---|---|---|",
    ),
    "compiled": (
        "Compiled products",
        "Over the time of the same traced product, not compiled. First products have checks and tracing with them.",
        "",
        "| network | compiled | a product, s | first product, s | first compiled, s |",
        "|---|---|---|---|---|",
    ),
    "vocabulary": (
        "Cross-entropy over 50,257 words",
        "A transformer of 2 layers of width 96, 512 tokens: peak above what was there before, and time.",
        "",
        "| products | with the graph of the loss | in closed form |",
        "|---|---|---|",
    ),
    "recomputed": (
        "Activations that are computed again",
        "A transformer of 12 layers of width 192, 8 x 256 tokens: peak above what was there before, and time.",
        "",
        "| activations | peak | time |",
        "|---|---|---|",
    ),
}
CELLS: dict[str, Callable[[Row], str]] = {
    "shared": lambda row: f"{row['bytes'] / 1e3:.0f} KB | {row['ratio']:.2f} | {'yes' if row['used'] else 'no'}",
    "compiled": lambda row: (
        f"{row['ratio']:.2f} | {row['traced']:.3f} | {row['first']['traced']:.1f} | {row['first']['compiled']:.1f}"
    ),
    "vocabulary": lambda row: " | ".join(
        f"{row[way]['MB']:,.0f} MB, {row[way]['seconds']:.1f} s" for way in ("graph", "closed")
    ),
    "recomputed": lambda row: f"{row['MB']:,.0f} MB | {row['seconds']:.1f} s",
}


def main() -> None:
    """Measure what is asked for, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="small networks, to try the script")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    networks = list(SMALL if options.small else SETTINGS)
    names = {
        "shared": networks,
        "compiled": networks,
        "vocabulary": ["reverse mode", "recomputed activations"],
        "recomputed": ["kept", "run again"],
    }
    stored = options.output.with_suffix(".json")
    found: dict[str, dict[str, Row]] = json.loads(stored.read_text()) if stored.is_file() else {}
    own = partial(ProcessPoolExecutor, max_workers=1, mp_context=multiprocessing.get_context("spawn"))
    for section in options.only:
        found[section] = {}
        for name in names[section]:
            with own() as process:
                row = process.submit(measure, section, name, options.rounds, options.small).result()
            found[section][name] = row
            print(section, name, row, flush=True)
    stored.write_text(json.dumps(found, indent=1) + "\n")
    options.output.write_text(table(found))


if __name__ == "__main__":
    main()

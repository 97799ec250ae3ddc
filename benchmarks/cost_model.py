"""What a spectrum costs on many devices: a model of arithmetic, messages, orthogonalisation and memory.

    python benchmarks/cost_model.py [--measured benchmarks/results/scaling.json]

A step of Lanczos with ``n`` devices is

    products         c F N / (n R) + r b P / W        F operations of a forward pass per example, N examples, c = 6;
                                                       r times, numbers of all parameters are read or written
    messages         broadcast and sum of P numbers    within nodes and between them, each with its own rate
    orthogonalise    3 j b P / W                       j vectors so far, each read three times by two passes of
                                                       Gram-Schmidt; 1/n of it where the basis is divided among devices

with R operations and W bytes per second that a device sustains, and b bytes a number. An exact product costs c = 6
forward passes of arithmetic: forward and backward are 1 + 2, and their derivative along the vector is as much again.
What is proportional to the parameters (weights, tangents, gradients and products are read and written in each product,
whatever the number of examples) is not divided among devices. Divided bases need no broadcast, but two more small
messages (the coordinates of the two passes).

With a measurement by ``benchmarks/scaling.py`` the rates are calibrated: arithmetic by one process over all examples
and a part of them, messages by exchanges of vectors between two, memory by the smallest basis. What the model then
predicts for more processes and larger bases is compared with what was measured. Times are the fastest of several, which
other work on the machine disturbs least. The memory of a process is its vectors, parameters and messages included, and
activations: those are calibrated by one process, and divided as the examples are.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
#: Forward passes of arithmetic in an exact product, and in the two gradients of a finite difference.
EXACT_PASSES = 6
#: Times that two passes of Gram-Schmidt read the basis (``pnanalysis.spectra.inner_products.orthogonalised``).
BASIS_READS = 3
#: Times that a product reads or writes numbers of all parameters: weights by each of the six passes, tangents by two of
#: them, both gradients as they are written, added up and joined to one vector.
PARAMETER_READS = 14
#: Vectors of P numbers beside the basis: parameters, gradient, vector, product, and three of Lanczos.
OTHER_VECTORS = 7
#: Predictions agree with the measurement if they are within this part of it.
TOLERANCE = 0.3


@dataclass(frozen=True)
class Link:
    """Messages between devices: bytes per second that each sends and receives, and seconds that any message takes."""

    rate: float
    latency: float


@dataclass(frozen=True)
class Machine:
    """Devices, alike, in nodes.

    Attributes
    ----------
    name : str
    operations : float
        Per second that a device sustains in forward and backward passes.
    memory_rate, memory : float
        Bytes per second, and bytes.
    inside, between : Link
        Within a node, and between nodes for each device.
    per_node : int
        Devices that share a node.
    cores : int, optional
        Where devices are processes that share cores: how many of them compute at a time.
    """

    name: str
    operations: float
    memory_rate: float
    memory: float
    inside: Link
    between: Link
    per_node: int = 8
    cores: int | None = None

    def slowdown(self, n: int) -> float:
        """By sharing cores."""
        return 1.0 if self.cores is None else max(n / self.cores, 1.0)

    def sum_seconds(self, size: float, n: int) -> float:
        """Of a sum over ``n`` devices of ``size`` bytes, in every one of them.

        Within a node as a ring, ``2 (n - 1) / n`` of the bytes for each device; between nodes each device takes part in
        the sum of its share of them.
        """
        if n == 1:
            return 0.0
        local, nodes = min(n, self.per_node), math.ceil(n / self.per_node)
        seconds = 2 * (local - 1) / local * size / self.inside.rate + 2 * _rounds(local) * self.inside.latency
        if nodes > 1:
            seconds += 2 * (nodes - 1) / nodes * size / local / self.between.rate
            seconds += 2 * _rounds(nodes) * self.between.latency
        return seconds * self.slowdown(n)

    def broadcast_seconds(self, size: float, n: int) -> float:
        """Of a copy of ``size`` bytes from one device to all others, as a pipeline."""
        if n == 1:
            return 0.0
        local, nodes = min(n, self.per_node), math.ceil(n / self.per_node)
        seconds = size / self.inside.rate + _rounds(local) * self.inside.latency
        if nodes > 1:
            seconds += size / local / self.between.rate + _rounds(nodes) * self.between.latency
        return seconds * self.slowdown(n)


def _rounds(n: int) -> int:
    return math.ceil(math.log2(n)) if n > 1 else 0


@dataclass(frozen=True)
class Workload:
    """A spectrum: ``products`` Lanczos steps over ``examples`` of a network.

    Attributes
    ----------
    name : str
    parameters : float
    forward : float
        Operations of a forward pass per example.
    kept : float
        Bytes of activations per example that a product keeps, values and tangents.
    examples, products : int
    batch : int
        Examples that a device computes at a time.
    number : int
        Bytes of a number.
    fixed : float, optional
        Seconds of a product that do not depend on the examples, where they were measured.
    """

    name: str
    parameters: float
    forward: float
    kept: float
    examples: int
    products: int
    batch: int
    number: int = 4
    fixed: float | None = None

    @property
    def vector(self) -> float:
        """Bytes of a vector."""
        return self.number * self.parameters


@dataclass(frozen=True)
class Cost:
    """Seconds of a whole spectrum by what they are spent on, and the bytes that a device needs."""

    arithmetic: float
    messages: float
    orthogonalisation: float
    memory: float

    @property
    def seconds(self) -> float:
        """All of it: nothing overlaps."""
        return self.arithmetic + self.messages + self.orthogonalisation


def cost(work: Workload, machine: Machine, n: int, divided: bool = False) -> Cost:
    """Of a spectrum on ``n`` devices; ``divided`` says whether each holds 1/n of every basis vector."""
    steps, vector = work.products, work.vector
    share = n if divided else 1
    fixed = PARAMETER_READS * vector / machine.memory_rate if work.fixed is None else work.fixed
    arithmetic = EXACT_PASSES * work.forward * work.examples / (n * machine.operations) + fixed
    arithmetic *= machine.slowdown(n)
    messages = machine.sum_seconds(vector, n)
    if divided:
        messages += 2 * machine.sum_seconds(8 * steps / 2, n)
    else:
        messages += machine.broadcast_seconds(vector, n)
    reads = BASIS_READS * steps / 2 * vector / share / machine.memory_rate * machine.slowdown(n)
    held = (steps / share + OTHER_VECTORS) * vector + min(work.batch, math.ceil(work.examples / n)) * work.kept
    return Cost(steps * arithmetic, steps * messages, steps * reads, held)


#: Rates are 40 % of the peak of float32 without TensorFloat-32 (67e12), and 80 % of those of memory (3.35e12), NVLink
#: (450e9 each way) and a network of 400 Gb/s per GPU. They are assumed: no such machine has been measured.
H100 = Machine("H100", 0.4 * 67e12, 0.8 * 3.35e12, 80e9, Link(0.8 * 450e9, 10e-6), Link(0.8 * 50e9, 20e-6))
#: 4.1e9 multiplications and additions per image (He et al. 2016); 0.2 GB of values and tangents an image.
RESNET50 = Workload("ResNet-50, all 1,281,167 images of ImageNet", 25_557_032, 8.2e9, 0.2e9, 1_281_167, 100, 128)
RESNET50_PART = replace(RESNET50, name="ResNet-50, 8,192 images of ImageNet", examples=8192)
#: 24 layers of width 1,792 and 50,257 tokens; 2 P per token, and 4 s^2 d a layer of attention; 24 x 34 s d numbers of
#: values, as many of tangents (Korthikanti et al. 2022, without checkpointing; logits on top).
_LAYERS, _WIDTH, _LENGTH, _TOKENS = 24, 1792, 1024, 50_257
_PARAMETERS = 12 * _LAYERS * _WIDTH**2 + _TOKENS * _WIDTH
TRANSFORMER = Workload(
    "transformer of 1.0e9 parameters, 1,024 sequences of 1,024 tokens",
    _PARAMETERS,
    2 * _PARAMETERS * _LENGTH + 4 * _LENGTH**2 * _WIDTH * _LAYERS,
    2 * 4 * (_LAYERS * 34 / 2 * _LENGTH * _WIDTH + 2 * _LENGTH * _TOKENS),
    1024, 100, 1,
)  # fmt: skip


def table() -> Iterator[str]:
    """Lines of a Markdown table: the workloads on 1 to 512 GPUs, with whole and with divided bases."""
    yield "| GPUs | basis | products | messages | orthogonalisation | spectrum | efficiency | memory of each |"
    yield "|---|---|---|---|---|---|---|---|"
    for work in (RESNET50, RESNET50_PART, TRANSFORMER):
        yield f"| **{work.name}**, {work.products} products ||||||||"
        alone = cost(work, H100, 1).seconds
        for n in (1, 8, 64, 512):
            for divided in (False, True)[: 1 if n == 1 else 2]:
                found = cost(work, H100, n, divided)
                fits = "" if found.memory <= H100.memory else " (too much)"
                parts = [found.arithmetic, found.messages, found.orthogonalisation, found.seconds]
                yield (
                    f"| {n} | {'divided' if divided else 'whole'} | " + " | ".join(map(duration, parts))
                    + f" | {alone / (n * found.seconds):.0%} | {found.memory / 1e9:,.0f} GB{fits} |"
                )  # fmt: skip


def duration(seconds: float) -> str:
    """Seconds to two digits, in a unit that suits them."""
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 95 * size else f"{seconds / size:,.0f} {unit}"
    return f"{1e3 * seconds:,.{0 if seconds >= 0.01 else 1}f} ms"


def calibrated(found: dict[str, Any]) -> Machine:
    """The machine of a measurement.

    The rate of messages is that of exchanges between two processes, by least squares over their sizes; the rate of the
    memory that of the smallest basis. Arithmetic is counted in seconds of one process.
    """
    pairs = [(row["bytes"], row["fastest"]) for row in found["exchanges"] if row["processes"] == 2]
    # an exchange is a sum and a broadcast: 2 (n - 1) / n + 1 = 2 of the bytes, and 3 rounds of messages at n = 2
    (slope, offset), cores = _line(pairs), found["cores"]
    link = Link(2 / slope, offset / 3)
    smallest = min(found["gram_schmidt"], key=lambda row: row["bytes"])
    memory_rate = BASIS_READS * smallest["bytes"] / smallest["fastest"]
    return Machine("measured", 1.0, memory_rate, math.nan, link, link, per_node=64, cores=cores)


def fixed_seconds(whole: dict[str, Any], part: dict[str, Any]) -> tuple[float, float]:
    """Seconds of a product that do not depend on the number of examples, and those that all examples take."""
    share = part["examples"] / whole["examples"]
    fixed = min(max((part["fastest"] - share * whole["fastest"]) / (1 - share), 0.0), whole["fastest"])
    return fixed, whole["fastest"] - fixed


def _line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Slope and offset, neither negative, that fit in relative terms."""
    weights = [1 / y**2 for _, y in points]
    total = sum(weights)
    x0, y0 = (sum(w * p[i] for w, p in zip(weights, points, strict=True)) / total for i in (0, 1))
    slope = sum(w * (x - x0) * (y - y0) for w, (x, y) in zip(weights, points, strict=True))
    slope /= sum(w * (x - x0) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    slope = max(slope, 1e-15)
    return slope, max(y0 - slope * x0, 0.0)


def predictions(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What the calibrated model says of each measured row that it was not calibrated by, in seconds."""
    machine, rows = calibrated(found), []
    alone = {row["network"]: row for row in found["products"] if row["processes"] == 1}
    parts = {row["network"]: row for row in found["parts"]}
    for row in found["products"]:
        if row["processes"] > 1:
            fixed, rest = fixed_seconds(alone[row["network"]], parts[row["network"]])
            one = Workload(row["network"], row["parameters"], rest / EXACT_PASSES, 0, 1, 1, 1, fixed=fixed)
            expected = cost(one, replace(machine, memory_rate=math.inf), row["processes"])
            rows.append((f"product, {row['network']}", row, expected.seconds))
    for row in found["exchanges"]:
        if row["processes"] > 2:
            seconds = machine.sum_seconds(row["bytes"], row["processes"])
            seconds += machine.broadcast_seconds(row["bytes"], row["processes"])
            rows.append((f"exchange of {row['bytes'] / 1e6:,.3g} MB", row, seconds))
    smallest = min(row["bytes"] for row in found["gram_schmidt"])
    for row in found["gram_schmidt"]:
        if row["bytes"] > smallest:
            seconds = BASIS_READS * row["bytes"] / machine.memory_rate
            rows.append((f"Gram-Schmidt, basis of {row['bytes'] / 1e6:,.0f} MB", row, seconds))
    return [
        {
            "what": what, "processes": row["processes"], "predicted": seconds, "measured": row["fastest"],
            "off": seconds / row["fastest"] - 1,
        }
        for what, row, seconds in rows
    ]  # fmt: skip


def peaks(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The memory that the model says a process takes for a spectrum, calibrated by one process, in bytes."""
    machine, rows = calibrated(found), []
    spectra = found.get("spectra", [])
    alone = {row["network"]: row for row in spectra if row["processes"] == 1}
    for row in spectra:
        if row["processes"] > 1:
            first, name, examples = alone[row["network"]], row["network"], row["examples"]
            bare = Workload(name, row["parameters"], 0.0, 0.0, examples, row["products"], examples)
            kept = max(first["bytes"] - cost(bare, machine, 1).memory, 0.0) / examples
            expected = cost(replace(bare, kept=kept), machine, row["processes"], row["divided"]).memory
            basis = "divided" if row["divided"] else "whole"
            rows.append(
                {
                    "what": f"{name}, {row['products']} products, {basis} basis", "processes": row["processes"],
                    "predicted": expected, "measured": row["bytes"], "off": expected / row["bytes"] - 1,
                }
            )  # fmt: skip
    return rows


def report(found: dict[str, Any] | None) -> str:
    """The Markdown of both tables."""
    lines = ["# Cost of a spectrum on many devices", "", "`python benchmarks/cost_model.py`", ""]
    lines += ["H100, float32; its rates are assumed (see the script).", "", *table()]
    if found is None:
        return "\n".join(lines) + "\n"
    rows, machine = predictions(found), calibrated(found)
    of_products = [row for row in rows if row["what"].startswith("product")]
    within, within_all = (sum(abs(row["off"]) <= TOLERANCE for row in part) for part in (of_products, rows))
    lines += [
        "", "## Against a measurement", "",
        f"`results/scaling.json`: {found['cores']} cores, load before the start {found['load_before']:.1f}. Calibrated "
        "by one process over all examples and a part of them (arithmetic), by exchanges between two "
        f"({machine.inside.rate / 1e9:.2g} GB/s, {1e3 * machine.inside.latency:.2g} ms a message) and by the smallest "
        f"basis ({machine.memory_rate / 1e9:.2g} GB/s). Within {TOLERANCE:.0%}: {within} of {len(of_products)} "
        f"products, {within_all} of all {len(rows)} predictions.", "",
        "| what | processes | predicted | measured | off by |", "|---|---|---|---|---|",
        *(
            f"| {row['what']} | {row['processes']} | {duration(row['predicted'])} | {duration(row['measured'])} | "
            f"{row['off']:+.0%} |"
            for row in rows
        ),
    ]  # fmt: skip
    if of_memory := peaks(found):
        lines += [
            "", "Memory of each process:", "",
            "| what | processes | predicted | measured | off by |", "|---|---|---|---|---|",
            *(
                f"| {row['what']} | {row['processes']} | {row['predicted'] / 1e6:,.0f} MB | "
                f"{row['measured'] / 1e6:,.0f} MB | {row['off']:+.0%} |"
                for row in of_memory
            ),
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=RESULTS / "scaling.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "cost_model.md")
    options = parser.parse_args()
    found = json.loads(options.measured.read_text()) if options.measured.is_file() else None
    text = report(found)
    print(text, end="")
    options.output.write_text(text)


if __name__ == "__main__":
    main()

"""Traces of all 12 blocks of a transformer from one set of products, beside one trace of all, and one sweep each.

``python benchmarks/block_traces.py [--width 48 --sequences 128 --products 60 --minutes 15]``. Takes about five
minutes of one core by default: of the sweeps, only as many are measured as there is time for. All other ways take turns
in several rounds, of which the shortest time of each counts. Writes ``results/block_traces.md``, ``.json`` and
``.png``.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpt import GPT, SIZES, random_text
from torch.nn.functional import cross_entropy

import pnanalysis as pn
from pnanalysis.analyses.network_blocks import BlockOptions, matrix_blocks
from pnanalysis.curvature.example_groups import N_GROUPS
from pnanalysis.curvature.named_blocks import blocks_of
from pnanalysis.spectra.trace import trace_estimate

RESULTS = Path(__file__).parent / "results" / "block_traces.md"
N_BLOCKS = 12
#: Sweeps of single blocks that are measured at least.
FEWEST_SWEEPS = 3


def trained(width: int, steps: int) -> tuple[GPT, tuple[torch.Tensor, torch.Tensor]]:
    """A transformer of 12 blocks after a few steps, and sequences that it can learn from."""
    SIZES["12 blocks"] = (width, N_BLOCKS, 4, 64, 32)
    torch.manual_seed(0)
    model = GPT("12 blocks")
    tokens = random_text(model, 128, torch.device("cpu"))[0]
    tokens = torch.cat([tokens[:, :16], tokens[:, :16], tokens[:, :1]], dim=1)  # the second half repeats the first
    data = tokens[:, :-1], tokens[:, 1:].flatten()
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        cross_entropy(model(data[0]), data[1]).backward()
        optimiser.step()
    return model, data


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of the next token; targets of a batch are rows of tokens, so that it can be cut into examples."""
    return cross_entropy(outputs, targets.flatten())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """CPU time, products and errors of each way, in the order of the table."""
    begun = time.process_time()
    model, (tokens, targets) = trained(options.width, options.steps)
    tokens, targets = tokens[: options.sequences], targets.view(tokens.shape)[: options.sequences]
    batches = list(zip(tokens.split(64), targets.split(64), strict=True))
    n = options.products
    rows: dict[str, dict[str, Any]] = {}
    divided = {f"blocks.{i}": f"blocks.{i}" for i in range(N_BLOCKS)} | {"rest": ["tokens", "places", "norm"]}
    names = blocks_of(model, divided)

    def operator(**more: Any) -> pn.HessianOperator:
        return pn.HessianOperator(model, loss, batches, expected_products=n, weight="examples", **more)

    def add(way: str, products: float, seconds: float, network: float | None, block: float | None) -> None:
        rows.setdefault(way, {"seconds": seconds})
        seconds = min(seconds, rows[way]["seconds"])
        rows[way] = {"way": way, "products": products, "seconds": seconds, "network": network, "block": block}
        print(rows[way], flush=True)

    start = time.process_time()
    op = operator()
    op.matvec(torch.ones(op.shape[0]))
    set_up = time.process_time() - start
    for _ in range(options.rounds):
        for method in ("hutchinson", "xtrace"):
            start = time.process_time()
            found = trace_estimate(operator(), method, n_hvp=n)
            spent = time.process_time() - start
            add(f"trace of the network, {method}", n, spent, found.se / abs(found.value), None)
        for data_error, way in (
            ("none", "all blocks, without the error of examples"),
            ("examples", "all blocks, with the error of examples (the default)"),
        ):
            start = time.process_time()
            whole = pn.HessianOperator(
                model, loss, batches, params=[name for own in names.values() for name in own], expected_products=1,
                weight="examples",
            )  # fmt: skip
            ds = matrix_blocks(whole, names, BlockOptions(n_hvp=n, data_error=data_error))
            spent = time.process_time() - start
            own = float((ds.trace_probe_se / abs(ds.trace)).median())
            add(way, int(ds.n_hvp), spent, float(ds.network_trace_probe_se / abs(ds.network_trace)), own)
    start, products, errors = time.process_time(), 0, []
    for own_names in names.values():
        found = trace_estimate(operator(params=own_names), "xtrace", n_hvp=n)
        products += found.n_hvp
        errors.append(found.se / abs(found.value))
        if time.process_time() - begun > 60 * options.minutes and len(errors) >= FEWEST_SWEEPS:
            break
    scale = len(names) / len(errors)
    way = "one sweep per block, xtrace"
    way += f" ({len(errors)} of {len(names)} measured)" if scale > 1 else ""
    add(way, products * scale, (time.process_time() - start) * scale, None, float(np.median(errors)))
    return {
        "rows": list(rows.values()), "rounds": options.rounds, "processor": processor(),
        "set_up": set_up, "width": options.width, "blocks": N_BLOCKS, "parameters": op.shape[0],
        "sequences": len(tokens), "length": tokens.shape[1], "torch": torch.__version__,
    }  # fmt: skip


def processor() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(found: dict[str, Any]) -> list[str]:
    """What was measured, in Markdown."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.2%}"

    first = found["rows"][0]["seconds"]
    return [
        "# Traces of blocks",
        "",
        f"A transformer of {found['blocks']} blocks, width {found['width']}, {found['parameters']:,} parameters, "
        f"{found['sequences']} sequences of {found['length']} tokens, one thread of {found['processor']}, torch "
        f"{found['torch']}. Times are the shortest of {found['rounds']} rounds in which the ways take turns. CPU time "
        f"includes that for tracing the network ({found['set_up']:.0f} s for that of all parameters). Errors are "
        "standard errors for the random vectors, relative to the trace; of blocks, the median. The error of examples "
        f"takes passes over {N_GROUPS} groups, here of {found['sequences'] // N_GROUPS} sequences each.",
        "",
        "| | products | CPU seconds | of one trace of the network | error, network | error, block |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['way']} | {row['products']:.0f} | {row['seconds']:.1f} | {row['seconds'] / first:.2f} | "
            f"{percent(row['network'])} | {percent(row['block'])} |"
            for row in found["rows"]
        ),
        "",
        "![CPU time of each way, in units of one trace of the network](block_traces.png)",
        "",
    ]


def draw(found: dict[str, Any], path: Path) -> None:
    """CPU time of each way, in units of one trace of the network."""
    from pnanalysis.plots import save_figure
    from pnanalysis.plots.style import COLOURS, GREY, new_figure, style

    rows = found["rows"]
    ratio = [row["seconds"] / rows[0]["seconds"] for row in rows]
    with style():
        figure = new_figure(6.4, 2.2)
        axes = figure.subplots()
        bars = axes.barh([row["way"].replace(" (", "\n(") for row in rows], ratio, color=COLOURS[0])
        axes.bar_label(bars, [f"{value:.2g}" for value in ratio], padding=3)
        axes.invert_yaxis()
        axes.set(xlim=(0, 1.1 * max(ratio)), xlabel="CPU time, in units of one trace of the network")
        axes.axvline(2, color=GREY, linestyle="--")
        save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--products", type=int, default=40)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=5, help="of CPU time, after which no further sweep begins")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options)
    RESULTS.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    lines = table(found)
    print("\n".join(lines))
    RESULTS.write_text("\n".join(lines))
    draw(found, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()

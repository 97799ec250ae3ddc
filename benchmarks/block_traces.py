"""Traces of all 12 blocks of a transformer from one set of products, beside one trace of all, and one sweep each.

``python benchmarks/block_traces.py [--width 48 --products 60]``. Writes ``results/block_traces.md``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from gpt import GPT, SIZES, random_text
from torch.nn.functional import cross_entropy

import pnanalysis as pn
from pnanalysis.analyses.network_blocks import BlockOptions, matrix_blocks
from pnanalysis.curvature.named_blocks import blocks_of
from pnanalysis.spectra.trace import trace_estimate

RESULTS = Path(__file__).parent / "results" / "block_traces.md"
N_BLOCKS = 12


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--products", type=int, default=60)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, (tokens, targets) = trained(options.width, options.steps)
    batches = [(part, rows) for part, rows in zip(tokens.split(64), targets.view(tokens.shape).split(64), strict=True)]
    n, rows = options.products, []
    divided = {f"blocks.{i}": f"blocks.{i}" for i in range(N_BLOCKS)} | {"rest": ["tokens", "places", "norm"]}
    names = blocks_of(model, divided)

    def operator(**more: object) -> pn.HessianOperator:
        return pn.HessianOperator(model, loss, batches, expected_products=n, weight="examples", **more)

    for method in ("hutchinson", "xtrace"):
        start = time.process_time()
        found = trace_estimate(operator(), method, n_hvp=n)
        rows.append(
            (f"trace of the network, {method}", n, time.process_time() - start, found.se / abs(found.value), "")
        )
    results = {}
    for data_error in ("none", "examples"):
        start = time.process_time()
        chosen = [name for own in names.values() for name in own]
        op = pn.HessianOperator(model, loss, batches, params=chosen, expected_products=1, weight="examples")
        ds = matrix_blocks(op, names, BlockOptions(n_hvp=n, data_error=data_error))
        own = float((ds.trace_probe_se / abs(ds.trace)).median())
        whole = float(ds.network_trace_probe_se / abs(ds.network_trace))
        text = {"none": "all blocks, pn.blocks", "examples": "all blocks, with the error of examples"}[data_error]
        rows.append((text, int(ds.n_hvp), time.process_time() - start, whole, f"{own:.2%}"))
        results[data_error] = ds
    start, spent, errors = time.process_time(), 0, []
    for own in names.values():
        found = trace_estimate(operator(params=own), "xtrace", n_hvp=n)
        spent += found.n_hvp
        errors.append(found.se / abs(found.value))
    rows.append(("one sweep per block, xtrace", spent, time.process_time() - start, np.nan, f"{np.median(errors):.2%}"))
    first = rows[0][2]
    lines = [
        f"A transformer of {N_BLOCKS} blocks, width {options.width}, {op.shape[0]:,} parameters, "
        f"{len(tokens)} sequences of {tokens.shape[1]} tokens, one CPU thread, torch {torch.__version__}. "
        "Errors are standard errors for the random vectors, relative to the trace; of blocks, the median.",
        "",
        "| | products | CPU seconds | of one trace of the network | error, network | error, block |",
        "|---|---|---|---|---|---|",
        *(
            f"| {text} | {products} | {seconds:.1f} | {seconds / first:.2f} | "
            f"{'' if np.isnan(whole) else f'{whole:.2%}'} | {own} |"
            for text, products, seconds, whole, own in rows
        ),
    ]
    print("\n".join(lines))
    RESULTS.write_text("\n".join(["# Traces of blocks", "", *lines, ""]))


if __name__ == "__main__":
    main()

"""GPT-2 of 124 million parameters on a CPU: time of a product, memory of a spectrum, and its picture.

    python benchmarks/language_model.py [--tokens 64] [--rounds 3] [--n-hvp 100] [--basis-n-hvp 12] [--small]

The network is transformers' GPT-2 with random weights, saved to a temporary folder and read from there as
``hf:FOLDER`` is; nothing is fetched. Its text is the documentation of Python's module ``statistics``, a token a byte.

Each row is measured in a process of its own with one thread. Products take turns with a plain forward and backward
pass; times are CPU times, which do not count what else the machine does. Peaks are those of the whole process, network
and libraries included. ``of it anonymous`` leaves out pages of mapped files, which the system takes back when memory
is short; ``said`` is what the forecast of the command says of it after the first two products.

Writes ``results/language_model.md`` and ``.json``, and the picture ``docs/images/gpt2.png`` of the spectra
in ``results/language_model-MATRIX.nc``. Rows that the JSON holds, and whose spectra are there, are not measured again.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.nn.functional import cross_entropy

import pnanalysis as pn
from pnanalysis.inputs.data import TextFile
from pnanalysis.inputs.hugging_face import pretrained
from pnanalysis.io.collection import padded
from pnanalysis.io.hardware import cpu_name
from pnanalysis.spectra.density import smooth
from pnanalysis.spectra.forecast import forecasts
from pnanalysis.spectra.used_memory import PeakMemory

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "language_model.md"
PICTURE = ROOT / "docs" / "images" / "gpt2.png"
MATRICES = {"Hessian": pn.HessianOperator, "Gauss-Newton": pn.GGNOperator}
OPERATORS = {"Hessian": "hessian", "Gauss-Newton": "ggn"}
#: Products to come: from 30 on they are traced.
WAYS = {"traced": 100, "reverse mode": 10}
#: Matrices, and ways to keep the basis: those of the spectra that are drawn, which have many products, and those that
#: are compared.
DRAWN = (("Hessian", "none"), ("Gauss-Newton", "none"))
COMPARED = (("Hessian", "half"), *(("Gauss-Newton", basis) for basis in ("memory", "half", "disk", "none")))
SMALL = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 256, "n_positions": 64}
GIB = 2**30


def save(folder: Path, small: bool) -> None:
    """Write the network and the text."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **(SMALL if small else {}))
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    (folder / "text.txt").write_text(str(statistics.__doc__))


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


@contextmanager
def peaks() -> Iterator[dict[str, float]]:
    """Peak memory of this process in GiB at the end of the body: all that is resident, and the anonymous part."""
    found: dict[str, float] = {}
    with PeakMemory(torch.device("cpu")) as memory:
        yield found
    found["anonymous"] = (memory.peak or 0) / GIB
    found["resident"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def product(folder: Path, matrix: str, way: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Time of a product in forward and backward passes over the same tokens, and its memory."""
    network = pretrained(folder / "gpt2")
    inputs, targets = pn.load_text(folder / "text.txt", tokens).train.take(torch.tensor([0]))
    parameters = list(network.parameters())

    def gradient() -> tuple[Tensor, ...]:
        return torch.autograd.grad(cross_entropy(network(inputs), targets), parameters)

    with peaks() as peak:
        op = MATRICES[matrix](network, cross_entropy, [(inputs, targets)], expected_products=WAYS[way])
        v = torch.randn(op.shape[0], generator=torch.Generator().manual_seed(0))
        first = cpu_seconds(lambda: op.matvec(v))
        gradient()
        times = [(cpu_seconds(gradient), cpu_seconds(lambda: op.matvec(v))) for _ in range(rounds)]
    passes, products = (statistics.median(column) for column in zip(*times, strict=True))
    assert op.method == way, op.method
    return {"first": first, "pass": passes, "product": products, "ratio": products / passes} | peak


def spectrum(folder: Path, matrix: str, basis: str, tokens: int, n_hvp: int, to: Path | None) -> dict[str, Any]:
    """A spectrum with one way of keeping the basis, saved where it is to be drawn: its ends, time and memory."""
    start, begun = time.perf_counter(), time.process_time()
    with peaks() as peak, forecasts() as said:
        ds = pn.hessian(
            f"hf:{folder / 'gpt2'}", data=TextFile(folder / "text.txt", tokens), n=1, operator=OPERATORS[matrix],
            n_hvp=n_hvp, basis=basis, max_memory_bytes=14 * GIB, data_error="none",
        )  # fmt: skip
    used = {"minutes": (time.perf_counter() - start) / 60, "cpu": (time.process_time() - begun) / 60}
    if to is not None:
        pn.save(ds, to)
    one = ds.squeeze("checkpoint")
    names = ("lambda_max", "lambda_min", "trace", "trace_se")
    return {name: float(one[name]) for name in names} | used | peak | {"said": (said[0].peak or 0) / GIB}


def draw(results: Path, to: Path) -> None:
    """The spectra of both matrices over each other, or of the one that has been measured."""
    names = [name for name in MATRICES if _spectrum_of(results, name).is_file()]
    loaded = [pn.load(_spectrum_of(results, name)).squeeze("checkpoint") for name in names]
    grid = np.unique(np.concatenate([ds.eigenvalue.values for ds in loaded]))  # as fine as each of them needs
    found = [
        smooth(ds, grid, float(ds.kernel_width)).assign_coords(checkpoint=name).expand_dims("checkpoint")
        for name, ds in zip(names, loaded, strict=True)
    ]
    pn.plots.save_figure(pn.plots.plot(xr.concat(padded(found), "checkpoint", join="outer")), to)


def _said(row: dict[str, Any]) -> str:
    """What was said of the peak of a row, unless it was measured before that was noted."""
    return f"{row['said']:.1f}" if row.get("said") else ""


def _spectrum_of(results: Path, matrix: str) -> Path:
    return results.with_name(f"{results.stem}-{matrix.lower()}.nc")


def apart(options: argparse.Namespace, part: tuple[str, ...]) -> dict[str, Any]:
    """What a row's own process finds."""
    own = [f"--{name}={getattr(options, name)}" for name in ("tokens", "rounds", "output", "folder")]
    done = subprocess.run(
        [sys.executable, __file__, *own, "--part", *part], check=True, stdout=subprocess.PIPE, text=True
    )
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def table(options: argparse.Namespace, found: dict[str, Any]) -> str:
    """Everything as Markdown."""
    products = [row for row in found["rows"] if row["part"][0] == "product"]
    spectra = [row for row in found["rows"] if row["part"][0] != "product"]
    lines = [
        f"# GPT-2 with {found['parameters']:,} parameters and random weights, {options.tokens} tokens",
        "",
        f"`python benchmarks/language_model.py`, {cpu_name()}, one thread, "
        f"torch {metadata.version('torch')}, transformers {metadata.version('transformers')}, float32. CPU times; "
        "peaks of the whole process in GiB.",
        "",
        f"Products in forward and backward passes, medians of {options.rounds} rounds in which they take turns:",
        "",
        "| matrix | products | passes | one pass, s | first product, s | peak |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['part'][1]} | {row['part'][2]} | {row['ratio']:.2f} | {row['pass']:.2f} | {row['first']:.0f} | "
            f"{row['resident']:.1f} |"
            for row in products
        ),
        "",
        "Spectra (`--data-error none`):",
        "",
        "| matrix | products | basis | peak | of it anonymous | said | CPU minutes | largest | smallest | trace |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {row['part'][1]} | {row['part'][3]} | {row['part'][2]} | {row['resident']:.1f} | "
            f"{row['anonymous']:.1f} | {_said(row)} | {row['cpu']:.1f} | {row['lambda_max']:.4g} | "
            f"{row['lambda_min']:.3g} | {row['trace']:.4g} ± {row['trace_se']:.2g} |"
            for row in spectra
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the rows that are missing, and write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--n-hvp", type=int, default=100, help="products of the spectra that are drawn")
    parser.add_argument("--basis-n-hvp", type=int, default=12, help="of those that compare ways to keep a basis")
    parser.add_argument("--small", action="store_true", help="a network of two layers, to try the script")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part:
        kind, matrix, how, *n_hvp = options.part
        if kind == "product":
            row = product(options.folder, matrix, how, options.tokens, options.rounds)
        else:
            to = _spectrum_of(options.output, matrix) if kind == "drawn" else None
            row = spectrum(options.folder, matrix, how, options.tokens, int(n_hvp[0]), to)
        print(json.dumps(row))
        return
    parts = [("product", matrix, way) for matrix in MATRICES for way in WAYS]
    parts += [("drawn", *case, str(options.n_hvp)) for case in DRAWN]
    parts += [("compared", *case, str(options.basis_n_hvp)) for case in COMPARED]
    stored = options.output.with_suffix(".json")
    found: dict[str, Any] = json.loads(stored.read_text()) if stored.is_file() else {"rows": []}
    found["rows"] = [row for part in parts for row in found["rows"] if row["part"] == list(part)]
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        save(options.folder, options.small)
        found["parameters"] = sum(p.numel() for p in pretrained(options.folder / "gpt2").parameters())
        for part in parts:
            undrawn = part[0] == "drawn" and not _spectrum_of(options.output, part[1]).is_file()
            if undrawn or list(part) not in [row["part"] for row in found["rows"]]:
                found["rows"] = [row for row in found["rows"] if row["part"] != list(part)]
                found["rows"].append({"part": list(part)} | apart(options, part))
                print(found["rows"][-1], flush=True)
                stored.write_text(json.dumps(found, indent=1) + "\n")
                options.output.write_text(table(options, found))
    draw(options.output, options.picture)


if __name__ == "__main__":
    main()

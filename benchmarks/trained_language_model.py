"""A small GPT-2 that learns the texts of Python's ``help``: spectra before and after, and curvature by block.

    python benchmarks/trained_language_model.py [--steps 1500] [--tokens 256] [--n 64] [--n-hvp 80] [--small]

The network is transformers' GPT-2 with 4 layers of width 128, a byte a token. It is trained by AdamW on the first nine
tenths of ``pydoc_data.topics`` and saved by ``save_pretrained`` before and after; all else is done by the command line,
as a user would do it, one command after the other, each with one thread:

    pnanalysis hessian --model hf:trained --weights start/model.safetensors trained/model.safetensors --data text:...
    pnanalysis blocks --model hf:trained --data text:... --by heads

Writes ``results/trained_language_model.md`` and ``.json``, and the pictures
``docs/images/gpt2-trained.png`` and ``docs/images/gpt2-blocks.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from importlib import metadata
from math import cos, pi
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import pnanalysis as pn
from pnanalysis.inputs.hugging_face import pretrained
from pnanalysis.io.hardware import cpu_name

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "trained_language_model.md"
IMAGES = ROOT / "docs" / "images"
SIZE = {"n_layer": 4, "n_embd": 128, "n_head": 4, "vocab_size": 256, "n_positions": 256}
SMALL = SIZE | {"n_layer": 2, "n_embd": 32, "n_head": 2}
BATCH, RATE, WARM_UP, LARGEST_GRADIENT = 8, 1e-3, 50, 1.0
LOSSES = {"topics": "loss on the text, nats a byte", "unseen": "loss on the unseen tenth"}
VALUES = {"lambda_max": "largest eigenvalue", "lambda_min": "smallest eigenvalue", "trace": "trace"}
GIB = 2**30


def texts(folder: Path) -> None:
    """All texts of ``help``, the first nine tenths and the last, as two files."""
    whole = "\n".join(topics[name] for name in sorted(topics)).encode()
    cut = len(whole) * 9 // 10
    (folder / "topics.txt").write_bytes(whole[:cut])
    (folder / "unseen.txt").write_bytes(whole[cut:])


def train(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write the network before and after training, and the text; losses are nats a byte."""
    import transformers

    texts(folder)
    torch.manual_seed(0)
    sizes = SMALL if options.small else SIZE
    config = transformers.GPT2Config(bos_token_id=0, eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **sizes)
    network = transformers.GPT2LMHeadModel(config)
    network.save_pretrained(folder / "start")
    data = pn.load_text(folder / "topics.txt", options.tokens).train
    optimiser = torch.optim.AdamW(network.parameters(), RATE, betas=(0.9, 0.99), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / WARM_UP, (1 + cos(pi * step / options.steps)) / 2)
    )
    draws = torch.Generator().manual_seed(0)
    begun = time.process_time()
    for step in range(options.steps):
        inputs, targets = data.take(torch.randint(len(data), (BATCH,), generator=draws))
        optimiser.zero_grad()
        loss = cross_entropy(network(inputs).logits.transpose(1, 2), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), LARGEST_GRADIENT)
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: {loss.item():.3f} nats a byte", flush=True)
    network.save_pretrained(folder / "trained")
    found = {
        "parameters": sum(p.numel() for p in network.parameters()),
        "steps": options.steps,
        "cpu": (time.process_time() - begun) / 60,
    }
    for name in ("topics", "unseen"):
        found[name] = [mean_loss(folder, network, name, options.tokens) for network in ("start", "trained")]
    return found


@torch.no_grad()
def mean_loss(folder: Path, network: str, text: str, tokens: int) -> float:
    """Of up to 64 examples of a text."""
    model = pretrained(folder / network)
    data = pn.load_text(folder / f"{text}.txt", tokens).train
    inputs, targets = data.take(torch.randperm(len(data), generator=torch.Generator().manual_seed(1))[:64])
    return float(cross_entropy(model(inputs), targets))


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """Analyses of the two networks, with paths relative to their folder."""
    given = [
        "--model",
        "hf:trained",
        "--data",
        "text:topics.txt",
        "--tokens",
        f"{options.tokens}",
        "--n",
        f"{options.n}",
    ]
    given += ["--batch-size", "16", "--n-hvp", f"{options.n_hvp}"]
    weights = ["--weights", "start/model.safetensors", "trained/model.safetensors"]
    return {"trained": ["hessian", *given, *weights], "blocks": ["blocks", *given, "--by", "heads"]}


def analyse(folder: Path, command: list[str], picture: Path) -> dict[str, Any]:
    """Run one command; what it says beforehand, its CPU minutes, and the peak memory of its process in GiB."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.Popen(
        [sys.executable, "-m", "pnanalysis", *command, "--output", f"{picture.stem}.nc", "--plot", str(picture)],
        cwd=folder, env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    anonymous = [0]
    watcher = threading.Thread(target=watch, args=(ran.pid, anonymous), daemon=True)
    watcher.start()
    assert ran.stderr is not None
    said = ran.stderr.read()
    _, status, used = os.wait4(ran.pid, 0)
    ran.returncode = os.waitstatus_to_exitcode(status)
    watcher.join()
    if ran.returncode:
        raise RuntimeError(f"{command[0]} failed: {said}")
    return {
        "command": " ".join(["pnanalysis", *command]),
        "said": [" ".join(line.split()) for line in said.splitlines() if " products of " in line],
        "cpu": (used.ru_utime + used.ru_stime) / 60,
        "peak": max(anonymous) / GIB,
        "resident": used.ru_maxrss * 1024 / GIB,
    }


def watch(pid: int, seen: list[int]) -> None:
    """Note the memory of a process without its mapped files, as long as there is such a process."""
    with suppress(OSError):
        while True:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            seen.extend(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            time.sleep(0.05)


def values(folder: Path) -> dict[str, list[float]]:
    """Of the spectra of the two networks."""
    ds = pn.load(folder / "gpt2-trained.nc")
    names = ("lambda_max", "lambda_max_se", "lambda_min", "trace", "trace_se", "trace_data_se")
    return {name: ds[name].values.tolist() for name in names if name in ds}


def table(found: dict[str, Any]) -> str:
    """Everything as Markdown."""
    trained, values = found["training"], found["values"]
    lines = [
        f"# A GPT-2 with {trained['parameters']:,} parameters, before and after training",
        "",
        f"`python benchmarks/trained_language_model.py`, {cpu_name()}, one thread, torch {metadata.version('torch')}, "
        f"transformers {metadata.version('transformers')}, float32. {trained['steps']} steps of training: "
        f"{trained['cpu']:.1f} minutes of CPU time.",
        "",
        "| | start | trained |",
        "|---|---|---|",
        *(f"| {what} | {trained[key][0]:.3f} | {trained[key][1]:.3f} |" for key, what in LOSSES.items()),
        *(
            f"| {what} | {values[key][0]:.4g}{_error(values, key, 0)} | {values[key][1]:.4g}{_error(values, key, 1)} |"
            for key, what in VALUES.items()
        ),
        "",
        "Peaks in GiB, without mapped files such as libraries, as said beforehand, and with them:",
        "",
        "| command | CPU minutes | peak | with files |",
        "|---|---|---|---|",
        *(
            f"| `{row['command']}` | {row['cpu']:.1f} | {row['peak']:.2f} | {row['resident']:.2f} |"
            for row in found["analyses"].values()
        ),
        "",
        "Said beforehand:",
        "",
        *(f"- {line}" for row in found["analyses"].values() for line in row["said"]),
    ]
    return "\n".join(lines) + "\n"


def _error(values: dict[str, list[float]], key: str, network: int) -> str:
    return f" ± {values[f'{key}_se'][network]:.2g}" if f"{key}_se" in values else ""


def main() -> None:
    """Train, analyse, and write table and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--n", type=int, default=64, help="examples of the analyses")
    parser.add_argument("--n-hvp", type=int, default=80, help="products of each spectrum, and of all blocks")
    parser.add_argument("--small", action="store_true", help="a network of two narrow layers, to try the script")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--images", type=Path, default=IMAGES)
    parser.add_argument("--folder", type=Path, help="keeps networks and datasets, for a run that goes on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        stored = folder / "found.json"
        found: dict[str, Any] = json.loads(stored.read_text()) if stored.is_file() else {"analyses": {}}
        if "training" not in found:
            found["training"] = train(folder, options)
            stored.write_text(json.dumps(found))
        for name, command in commands(options).items():
            if name not in found["analyses"]:
                found["analyses"][name] = analyse(folder, command, (options.images / f"gpt2-{name}.png").resolve())
                stored.write_text(json.dumps(found))
        found["values"] = values(folder)
    options.output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    options.output.write_text(table(found))


if __name__ == "__main__":
    main()

"""Local learning coefficients beside those of devinterp, on the same networks, posteriors and steps.

``pip install devinterp==2.0.1``, then ``python benchmarks/learning_coefficient.py [--rounds 3 --draws 400]``. Takes
about ten minutes of one core. Writes ``results/learning_coefficient.md``, ``.json`` and ``.png``.

devinterp reads rows of integers, so the inputs of networks are looked up by their number. Both take the steps of Lau et
al. with gradients of single batches; the last row of each network is what the defaults here give, with gradients of all
examples.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from devinterp.slt.sampling import sample
from gpt import GPT, SIZES
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import pnanalysis as pn

RESULTS = Path(__file__).parent / "results" / "learning_coefficient.md"
N_CHAINS = 4
PEER, SAME, DEFAULT = "devinterp", "pnanalysis, the same steps", "pnanalysis, its defaults"


@dataclass
class Case:
    """A trained network and its data, with the options of both tools.

    ``losses`` gives the loss of each example from outputs and targets.
    """

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    losses: Callable[[Tensor, Tensor], Tensor]
    batch_size: int
    step_size: float
    localization: float

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss."""
        return self.losses(outputs, targets).mean()


def digits(width: int) -> Case:
    """A tanh network for handwritten digits."""
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32)[:1024] / 16, torch.tensor(data.target)[:1024]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-4)
    for _ in range(300):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets, reduction="none")

    return Case(f"digits, {width} tanh units", model, x, y, losses, 64, 1e-4, 300.0)


def transformer() -> Case:
    """A small transformer that has learnt the beginning of this file."""
    rows = torch.tensor(list(Path(__file__).read_bytes()[: 33 * 64])).view(64, 33)
    SIZES["small"] = (32, 2, 2, 128, 32)
    torch.manual_seed(0)
    model = GPT("small")
    x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs.unflatten(0, targets.shape).mT, targets, reduction="none").mean(1)

    for _ in range(300):
        optimizer.zero_grad()
        losses(model(x), y).mean().backward()
        optimizer.step()
    return Case("GPT, 2 blocks", model, x, y, losses, 32, 1e-4, 3000.0)


def with_error(chains: np.ndarray) -> tuple[float, float]:
    """Mean over chains, and its standard error from their spread."""
    return float(chains.mean()), float(chains.std(ddof=1) / math.sqrt(len(chains)))


def ours(case: Case, seed: int, **options: Any) -> tuple[float, float, float]:
    """Coefficient, its standard error for the length of chains, and seconds."""
    start = time.perf_counter()
    ds = pn.learning_coefficient(
        case.model, data=(case.inputs, case.targets), loss=case.loss, n=None, batch_size=case.batch_size, seed=seed,
        n_chains=N_CHAINS, localization=case.localization, data_error="none", progress=False, **options,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    if "burn_in" not in options:
        return ds.learning_coefficient.item(), ds.learning_coefficient_chain_se.item(), seconds
    excess = ds.excess.squeeze("checkpoint").isel(draw=slice(options["burn_in"], None)).mean("draw")
    return *with_error(ds.attrs["n"] * ds.attrs["beta"] * excess.values), seconds


def theirs(case: Case, draws: int, burn_in: int, seed: int) -> tuple[float, float, float]:
    """The same by devinterp."""
    n = len(case.inputs)
    rows = Dataset.from_dict({"input_ids": [[i, 0] for i in range(n)]}).with_format("torch")

    def losses(model: nn.Module, rows: Tensor) -> Tensor:
        return case.losses(model(case.inputs[rows[:, 0]]), case.targets[rows[:, 0]])[:, None]

    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = sample(
            case.model, rows, {}, lr=case.step_size, n_beta=n / math.log(n), num_chains=N_CHAINS, num_draws=draws,
            num_burnin_steps=burn_in, batch_size=case.batch_size, localization=case.localization, init_seed=seed,
            num_init_loss_batches=n // case.batch_size, device="cpu", loss_fn=losses,
            match_sampling_input_ids_across_chains=False,
        )  # fmt: skip
        ds = tree.dataset.load()
    trace = ds.sampling_loss_micro.mean(["batch_sampling", "token_pos"]).isel(step=slice(burn_in, None))
    chains = n / math.log(n) * (trace.mean("step") - float(ds.init_loss.mean())).values
    return *with_error(chains), time.perf_counter() - start


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both tools in turn, ``rounds`` times with other seeds; the defaults once."""
    rows = []
    draws, burn_in = options.draws, options.burn_in
    for case in (digits(8), digits(64), transformer()):
        same = {"sampler": "sgld", "step_size": case.step_size, "n_draws": draws, "burn_in": burn_in}
        found: dict[str, list[tuple[float, float, float]]] = {PEER: [], SAME: [], DEFAULT: []}
        for seed in range(options.rounds):
            found[PEER].append(theirs(case, draws, burn_in, seed))
            found[SAME].append(ours(case, seed, **same))
        found[DEFAULT].append(ours(case, 0))
        for kind, results in found.items():
            value, se, seconds = np.array(results).T
            rows.append({
                "case": case.name, "kind": kind, "parameters": sum(p.numel() for p in case.model.parameters()),
                "n": len(case.inputs), "batch_size": case.batch_size, "step_size": case.step_size,
                "localization": case.localization, "value": value.tolist(), "se": se.tolist(),
                "seconds": seconds.tolist(),
            })  # fmt: skip
            print(rows[-1], flush=True)
    return {
        "rows": rows, "chains": N_CHAINS, "draws": draws, "burn_in": burn_in, "rounds": options.rounds,
        "torch": torch.__version__, "devinterp": metadata.version("devinterp"),
    }  # fmt: skip


def pooled(row: dict[str, Any]) -> tuple[float, float]:
    """Mean over the rounds, and its standard error."""
    return float(np.mean(row["value"])), float(np.sqrt(np.sum(np.square(row["se"])))) / len(row["se"])


def table(found: dict[str, Any]) -> list[str]:
    """What was measured, in Markdown."""
    lines = [
        "# Local learning coefficients beside devinterp",
        "",
        f"{found['chains']} chains of {found['burn_in']} + {found['draws']} steps, one CPU thread, "
        f"torch {found['torch']}, devinterp {found['devinterp']}. Both take the same steps with the same localisation, "
        f"batch size and temperature (1 / log n). Values are means over {found['rounds']} seeds after burn-in, with "
        "standard errors from the spread of chains, and times are medians. The defaults choose their own steps, with "
        "gradients of all examples, and ran once.",
        "",
        "| network | parameters | examples | | coefficient | seconds | times as fast |",
        "|---|---|---|---|---|---|---|",
    ]
    peer: list[float] = []
    for row in found["rows"]:
        if row["kind"] == PEER:
            peer = row["seconds"]
        value, se = pooled(row)
        faster = f"{np.median(np.divide(peer, row['seconds'])):.1f}" if row["kind"] == SAME else ""
        lines.append(
            f"| {row['case']} | {row['parameters']:,} | {row['n']:,} | {row['kind']} | {value:.2f} ± {se:.2f} | "
            f"{np.median(row['seconds']):.1f} | {faster} |"
        )
    return [*lines, "", "![Coefficients and times of both tools](learning_coefficient.png)", ""]


def draw(found: dict[str, Any], path: Path) -> None:
    """Coefficients with errors, relative to those of devinterp, and times, on each network."""
    from pnanalysis.plots import save_figure
    from pnanalysis.plots.style import COLOURS, GREY, new_figure, style

    cases = list(dict.fromkeys(row["case"] for row in found["rows"]))
    peer = np.array([pooled(row)[0] for row in found["rows"] if row["kind"] == PEER])
    with style():
        figure = new_figure(6.8, 2.6)
        values, times = figure.subplots(1, 2)
        for k, kind in enumerate((PEER, SAME, DEFAULT)):
            rows = [row for row in found["rows"] if row["kind"] == kind]
            places = np.arange(len(cases)) + 0.22 * (k - 1)
            value, se = np.array([pooled(row) for row in rows]).T / peer
            values.errorbar(places, value, 2 * se, fmt="os^"[k], color=COLOURS[k], label=kind, capsize=2)
            times.plot(places, [np.median(row["seconds"]) for row in rows], "os^"[k], color=COLOURS[k], label=kind)
        values.axhline(1, color=GREY, linestyle="--")
        values.set(ylabel="coefficient / that of devinterp\n(± 2 standard errors)")
        times.set(ylabel="time (s)", yscale="log")
        for axes in (values, times):
            axes.set_xticks(range(len(cases)), [name.replace(", ", "\n") for name in cases])
        times.legend(loc="upper left")
        save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--burn-in", type=int, default=200)
    torch.set_num_threads(1)
    found = measure(parser.parse_args())
    RESULTS.write_text("\n".join(table(found)))
    RESULTS.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, RESULTS.with_suffix(".png"))
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()

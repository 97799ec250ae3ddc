"""How often the stated errors hold: of probes, of examples, of comparisons, of outliers.

    PNANALYSIS_CIFAR10=PATH python benchmarks/coverage.py [--jobs 2] [--only intervals] [--subjects Wigner]

Seven sections, each measured in cells (a spectrum or network at a budget) that are saved as they are done; a second
call goes on where the first one stopped.

intervals
    Spectra of diagonal matrices with known eigenvalues: those of nine trained networks (``networks.py``) and ten
    analytic ones (``known_spectra.py``). Random probes do not see a rotation, so that the diagonal matrix does for
    the dense one. For each number with a 95 % interval: how often it holds the true value, and how wide it is; how
    often the density lies in its band; the W1 distance of two estimates of one matrix beside its stated noise.
spikes
    How often as many outliers are found as there are spikes.
blocks
    Traces, Frobenius norms and energies of all layers of three trained networks from few products, beside those of the
    dense Hessian: how often their 95 % intervals hold the true value, and how wide they are.
block examples
    The same numbers of two disjoint random sets of examples, drawn anew each time: how often the 95 % interval of their
    difference holds 0, and how wide it is.
examples, groups
    Two networks' worth of numbers from one network: disjoint random sets of examples, drawn anew each time. How often
    they differ by more than the error stated for the difference. ``groups`` uses half samples for the error of W1.
null
    Whole comparisons where nothing differs: a network and itself with its hidden units permuted, and two functions that
    answer each example, by a coin, with the one or the other of two networks.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from coverage_table import table
from known_spectra import ANALYTIC, GAPLESS, analytic_spectrum, spiked_wigner
from networks import NETWORKS, exact_spectrum, population, trained, training_examples
from null_networks import pairs_by_coin, permuted_units
from torch.nn.functional import cross_entropy
from true_values import Tally, exact_density, exact_edges, exact_statistics, mass_points, rounded

import pnanalysis as pn
from pnanalysis.analyses.significant_differences import with_p_values
from pnanalysis.io.hardware import cpu_name
from pnanalysis.spectra.differences import beyond_noise, compare_spectra
from pnanalysis.spectra.linear_operator import DiagonalOperator

RESULTS = Path(__file__).resolve().parent / "results" / "coverage.md"
N_CLASSES = 10
#: Options of a spectral density, by what the budget is called.
BUDGETS: dict[str, dict[str, int]] = {"60": {"n_hvp": 60}, "120": {"n_hvp": 120}, "200": {"n_hvp": 200}, "default": {}}
#: Spikes: their number, their strength in units of the threshold, and how many zeros are added to the spectrum.
SPIKES = {f"{n} spikes at {s}x": (n, s, 0) for n in (5, 10) for s in (3, 10)} | {
    "5 spikes at 3x, zeros": (5, 3, 20_000)
}
#: Examples in a set, products of its spectrum.
N_EXAMPLES, N_PRODUCTS = 512, 100
#: Networks whose spectra are estimated from half samples too, which costs eight times as much.
HALF_SAMPLED = ("digits tanh MLP", "digits conv BN", "CIFAR tanh MLP", "CIFAR ReLU conv")
#: Networks whose layers are looked at one by one, and the numbers of each.
DIGITS = ("digits tanh MLP", "digits ReLU MLP", "digits GELU MLP")
BLOCK_NUMBERS = ("trace", "frobenius_norm", "off_diagonal_energy", "off_diagonal_share", "energy", "network_trace")


@dataclass(frozen=True)
class Cell:
    """One thing to measure: a section, a spectrum or network, and what is spent on it."""

    section: str
    subject: str
    budget: str
    repetitions: int

    @property
    def key(self) -> str:
        return f"{self.section}: {self.subject}: {self.budget}"


def eigenvalues_of(subject: str) -> np.ndarray:
    """The spectrum of a network, or an analytic one."""
    name = subject.removesuffix(", float32")
    return exact_spectrum(name) if name in NETWORKS else analytic_spectrum(name)


def measure_intervals(cell: Cell) -> dict[str, Any]:
    """Intervals, band, outliers and W1 noise on one spectrum at one budget."""
    eigenvalues = eigenvalues_of(cell.subject)
    dtype = torch.float32 if cell.subject.endswith("float32") else torch.float64
    eigenvalues = torch.from_numpy(eigenvalues).to(dtype).double().numpy()
    operator = DiagonalOperator(torch.from_numpy(eigenvalues).to(dtype))
    truth, tally = exact_statistics(eigenvalues, n_classes=N_CLASSES), Tally(np.abs(eigenvalues).max())
    grid = mass_points(eigenvalues)
    in_band, claimed, ratios, beyond = [], [], [], []
    previous = None
    for seed in range(cell.repetitions):
        ds = pn.spectral_density(
            operator, seed=seed, grid=grid, n_classes=N_CLASSES, progress=False, **BUDGETS[cell.budget]
        )
        tally.add(ds, truth | exact_edges(eigenvalues, ds))
        density = exact_density(eigenvalues, grid, float(ds.kernel_width))
        in_band.append(np.mean(np.abs(ds.density.values - density) <= 1.96 * ds.density_se.values + 1e-12 * density))
        claimed.append(int(ds.n_outliers) > 0 or int(ds.n_outliers_negative) > 0)
        if seed % 2:
            difference = compare_spectra(previous, ds)
            distance, noise, se = (float(difference[f"wasserstein1{end}"]) for end in ("", "_noise", "_se"))
            if noise > 1e-12 * tally.scale:
                ratios.append(distance / noise)
                beyond.append(beyond_noise(distance, noise, se))
        previous = ds
    return {
        "n": cell.repetitions,
        "statistics": tally.summary(cell.repetitions),
        "density": _mean(in_band),
        "outliers": _mean(claimed),
        "w1": _mean(ratios),
        "w1 beyond": _mean(beyond),
    }


def measure_spikes(cell: Cell) -> dict[str, Any]:
    """How often as many outliers are found as there are."""
    n_spikes, strength, n_zeros = SPIKES[cell.subject]
    found = []
    for seed in range(cell.repetitions):
        eigenvalues = np.append(spiked_wigner(1200, n_spikes, strength, seed % 10), np.zeros(n_zeros))
        operator = DiagonalOperator(torch.from_numpy(eigenvalues))
        ds = pn.spectral_density(operator, seed=seed, progress=False, **BUDGETS[cell.budget])
        found.append(int(ds.n_outliers) == n_spikes and int(ds.n_outliers_negative) == 0)
    return {"n": cell.repetitions, "found": _mean(found)}


def measure_blocks(cell: Cell) -> dict[str, Any]:
    """Intervals of blocks of one dense Hessian."""
    op = pn.HessianOperator(trained(cell.subject), cross_entropy, [training_examples(cell.subject)])
    sizes: dict[str, int] = {}
    for _, layer, length in op.tensors:
        sizes[layer] = sizes.get(layer, 0) + length
    H = op.to_dense()
    exact = pn.blocks(H, blocks=sizes, n_hvp=len(H), progress=False)
    found = [
        pn.blocks(H, blocks=sizes, n_hvp=int(cell.budget), seed=seed, progress=False)
        for seed in range(cell.repetitions)
    ]
    statistics: dict[str, Any] = {}
    for name in BLOCK_NUMBERS:
        truth = exact[name].values.ravel()
        value, low, high = (
            np.stack([ds[f"{name}{end}"].values.ravel() for ds in found]) for end in ("", "_low", "_high")
        )
        statistics[name] = _held(value - truth, low - truth, high - truth)
    return {"n": cell.repetitions, "statistics": statistics}


def measure_block_examples(cell: Cell) -> dict[str, Any]:
    """Blocks of one network from disjoint sets of examples."""
    network, (x, y, _) = trained(cell.subject), population(cell.subject)
    rng = np.random.default_rng(0)
    pairs = []
    for repetition in range(cell.repetitions):
        order = torch.from_numpy(rng.permutation(len(x))[: 2 * N_EXAMPLES])
        pairs.append(
            [
                pn.blocks(
                    network, data=(x[half], y[half]), loss=cross_entropy, n=None, n_hvp=int(cell.budget),
                    seed=2 * repetition + index, progress=False,
                ).isel(checkpoint=0)
                for index, half in enumerate(order.split(N_EXAMPLES))
            ]
        )  # fmt: skip
    statistics = {}
    for name in BLOCK_NUMBERS:
        one, other = (
            [np.stack([ds[f"{name}{end}"].values.ravel() for ds in found]) for end in ("", "_low", "_high")]
            for found in zip(*pairs, strict=True)
        )
        difference = one[0] - other[0]
        # the distances of the ends from the values add up in squares
        below, above = (np.hypot(one[end] - one[0], other[3 - end] - other[0]) for end in (1, 2))
        statistics[name] = _held(difference, difference - below, difference + above)
    return {"n": cell.repetitions, "statistics": statistics}


def _held(error: np.ndarray, low: np.ndarray, high: np.ndarray) -> list[list[float]]:
    """How often intervals ``(repetition, block)`` of errors hold zero, how wide they are, how often there are any."""
    given = np.isfinite(low)
    held = ((low <= 0) & (high >= 0)).sum(0) / np.maximum(given.sum(0), 1)
    width = np.nanmean(high - low, 0) / 2 / (1.96 * np.sqrt(np.nanmean(error**2, 0)))
    return [[rounded(one) for one in row] for row in (held, width, given.mean(0))]


def measure_examples(cell: Cell, data_error: str) -> dict[str, Any]:
    """Numbers of one network from disjoint sets of examples."""
    network, (x, y, _) = trained(cell.subject), population(cell.subject)
    rng = np.random.default_rng(0)
    differences = []
    for repetition in range(cell.repetitions):
        order = torch.from_numpy(rng.permutation(len(x))[: 2 * N_EXAMPLES])
        first, second = (
            pn.hessian(
                network,
                data=(x[half], y[half]),
                loss=cross_entropy,
                n=None,
                n_hvp=N_PRODUCTS,
                data_error=data_error,
                seed=2 * repetition + index,
                progress=False,
            ).isel(checkpoint=0)
            for index, half in enumerate(order.split(N_EXAMPLES))
        )
        differences.append(compare_spectra(first, second))
    names = [name for name in exact_statistics(np.arange(20.0)) if f"{name}_low" in differences[0]]
    statistics = {}
    for name in names:
        value, low, high = np.array(
            [[float(ds[f"{name}{end}"]) for end in ("", "_low", "_high")] for ds in differences]
        ).T
        if not np.isfinite(low).all():
            continue
        rms = np.sqrt(np.mean(value**2))
        width = np.mean(high - low) / 2 / (1.96 * rms) if rms > 0 else np.nan
        statistics[name] = [_mean((low > 0) | (high < 0)), rounded(width)]
    w1 = np.array([[float(ds[f"wasserstein1{end}"]) for end in ("", "_noise", "_se")] for ds in differences])
    return {
        "n": cell.repetitions,
        "statistics": statistics,
        "w1": _mean(w1[:, 0] / w1[:, 1]),
        "w1 beyond": _mean([beyond_noise(*row) for row in w1]),
    }


def measure_null(cell: Cell) -> dict[str, Any]:
    """Claims of whole comparisons where nothing differs."""
    kind, name = cell.subject.split(": ")
    x, y, trained_on = population(name)
    rng = np.random.default_rng(0)
    networks = trained(name), trained(name, seed=1)
    counts: dict[str, int] = {}
    n_false = 0
    for repetition in range(cell.repetitions):
        inputs = x.flatten(1)
        if kind == "permuted":
            pair = {"a": networks[0], "b": permuted_units(networks[0], rng)}
        else:
            pair = pairs_by_coin(*networks)
            coin = torch.from_numpy(rng.integers(0, 2, (len(x), 1))).to(x)
            inputs = torch.cat([coin, inputs], 1)
        splits = {"train": (inputs[trained_on], y[trained_on]), "test": (inputs[~trained_on], y[~trained_on])}
        ds = pn.compare(
            pair,
            data=splits,
            loss=cross_entropy,
            hessian={"n": N_EXAMPLES, "n_hvp": N_PRODUCTS},
            seed=repetition,
            progress=False,
        )
        rows = claims(ds)
        n_false += bool(rows)
        for row in rows:
            counts[row] = counts.get(row, 0) + 1
    return {"n": cell.repetitions, "any": n_false / cell.repetitions, "rows": counts}


def claims(ds: xr.Dataset) -> list[str]:
    """What a comparison of two networks calls a significant difference."""
    pair = with_p_values(ds).isel(checkpoint=1, other=0)
    names = [str(name) for name in pair.data_vars if str(name).endswith("_p") and name != "outlier_p"]
    return [name.removesuffix("_p") for name in names if bool((pair[name] <= 0.05).any())]


def _mean(values: Any) -> float | None:
    return rounded(np.mean(values)) if len(values) else None


MEASURE: dict[str, Callable[[Cell], dict[str, Any]]] = {
    "intervals": measure_intervals,
    "spikes": measure_spikes,
    "blocks": measure_blocks,
    "block examples": measure_block_examples,
    "examples": partial(measure_examples, data_error="examples"),
    "groups": partial(measure_examples, data_error="groups"),
    "null": measure_null,
}


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Everything there is to measure, in the order of the table."""
    few = max(options.seeds // 5, 2)
    n_seeds = {"60": options.seeds, "120": options.seeds, "200": options.seeds, "default": few}
    for budget in options.budgets:
        for subject in (*NETWORKS, *ANALYTIC, "Wigner and 10 spikes, float32"):
            yield Cell("intervals", subject, budget, n_seeds[budget])
        for subject in SPIKES:
            yield Cell("spikes", subject, budget, min(n_seeds[budget], 100))
    for budget in ("40", "100"):
        for subject in DIGITS:
            yield Cell("blocks", subject, budget, max(options.seeds // 2, 2))
            yield Cell("block examples", subject, budget, max(options.seeds // 4, 2))
    for subject in NETWORKS:
        yield Cell("examples", subject, "100", few)
    for subject in HALF_SAMPLED:
        yield Cell("groups", subject, "100", max(few // 2, 2))
    for kind in ("permuted", "coin"):
        for subject in ("digits tanh MLP", "digits ReLU MLP"):
            yield Cell("null", f"{kind}: {subject}", "100", options.seeds // 2)


def _measure(cell: Cell) -> dict[str, Any]:
    torch.set_num_threads(1)
    return MEASURE[cell.section](cell)


def _results(wanted: list[Cell], n_jobs: int) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Results as they come, from this process or from several."""
    if n_jobs == 1:
        yield from ((cell, _measure(cell)) for cell in wanted)
        return
    with ProcessPoolExecutor(n_jobs, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(_measure, cell): cell for cell in wanted}
        for finished in as_completed(running):
            yield running[finished], finished.result()


def write(results: dict[str, Any], output: Path, baseline: dict[str, Any]) -> None:
    """Save the cells, one a line, and the table made of them."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(result)}" for key, result in results.items())
    part = output.with_suffix(".part")
    part.write_text(f"{{\n{lines}\n}}\n")
    part.replace(output.with_suffix(".json"))
    command = "`python benchmarks/coverage.py`; " + f"{cpu_name()}, torch {torch.__version__}"
    output.write_text("\n".join(table(results, baseline, set(GAPLESS), command)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=200, help="a fifth of them for the default budget")
    parser.add_argument("--budgets", nargs="+", choices=list(BUDGETS), default=list(BUDGETS))
    parser.add_argument("--only", nargs="+", choices=list(MEASURE), default=list(MEASURE), help="sections")
    parser.add_argument("--subjects", nargs="+", help="spectra and networks, as in the table")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--again", action="store_true", help="measure what was measured already")
    parser.add_argument("--baseline", type=Path, help="results (.json) of an earlier version, shown beside")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    store = options.output.with_suffix(".json")
    results: dict[str, Any] = json.loads(store.read_text()) if store.is_file() else {}
    baseline = json.loads(options.baseline.read_text()) if options.baseline else {}
    order = [cell.key for cell in cells(options)]
    wanted = [
        cell
        for cell in cells(options)
        if cell.section in options.only
        and (options.subjects is None or cell.subject in options.subjects)
        and (options.again or results.get(cell.key, {"n": 0})["n"] < cell.repetitions)
    ]
    for cell, result in _results(wanted, options.jobs):
        results[cell.key] = result
        print(cell.key, json.dumps(result), flush=True)
        results = {key: results[key] for key in [*order, *results] if key in results}
        write(results, options.output, baseline)
    write(results, options.output, baseline)


if __name__ == "__main__":
    main()

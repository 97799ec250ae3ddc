"""Accuracy per Hessian-vector product: deflated compared with plain stochastic Lanczos quadrature.

    python benchmarks/spectrum_accuracy.py [--seeds 20] [--coverage-seeds 100]

The spectra are those of nine trained networks (``networks.py``) and ten analytic ones of 20,000 eigenvalues
(``known_spectra.py``), the latter at 100 and 200 products and a fifth of the seeds. For each budget of
products the table has the median over seeds of the Wasserstein-1 distance to the exact spectrum and the RMS error of
the trace, relative to plain quadrature, and how often the 95 % intervals contain the true value. Both methods run on
the diagonal matrix of the exact eigenvalues: the distribution of probes uniform on the sphere is invariant under the
rotation to the dense Hessian, and so is that of the errors (``--dense`` applies a random rotation as a check).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from known_spectra import ANALYTIC, large_spectrum
from networks import NETWORKS, exact_spectrum
from scipy.stats import wasserstein_distance

from pnanalysis.io.hardware import cpu_name
from pnanalysis.spectra.density import spectral_density
from pnanalysis.spectra.linear_operator import DiagonalOperator, LinearOperator, as_operator

RESULTS = Path(__file__).resolve().parent / "results" / "spectrum_accuracy.md"
#: budget: (probes, steps) of plain quadrature
PLAIN = {100: (1, 100), 200: (4, 50), 400: (4, 100), 1000: (10, 100)}

#: Spectra with more eigenvalues are measured at fewer budgets and with fewer seeds.
LARGEST = 10_000


@dataclass
class Errors:
    """Errors of one estimator over several seeds."""

    distance: list[float]
    trace: list[float]
    trace_covered: list[bool]
    lambda_max_covered: list[bool]
    lambda_max_width: list[float]

    @classmethod
    def over(cls, seeds: range, estimate: Callable[[int], object], exact: np.ndarray) -> Errors:
        errors = cls([], [], [], [], [])
        uniform = np.full(len(exact), 1 / len(exact))
        slack = 1e-12 * np.abs(exact).max()
        for seed in seeds:
            ds = estimate(seed)
            errors.distance.append(wasserstein_distance(ds.node.values, exact, ds.weight.values, uniform))
            errors.trace.append(float(ds.trace) - exact.sum())
            errors.trace_covered.append(bool(ds.trace_low <= exact.sum() <= ds.trace_high))
            low, high = ds.lambda_max_low - slack, ds.lambda_max_high + slack
            errors.lambda_max_covered.append(bool(low <= exact.max() <= high))
            errors.lambda_max_width.append(float(ds.lambda_max_high - ds.lambda_max_low) / exact.max())
        return errors

    @property
    def median_distance(self) -> float:
        return float(np.median(self.distance))

    @property
    def rms_trace(self) -> float:
        return float(np.sqrt(np.mean(np.square(self.trace))))


def make_operator(exact: np.ndarray, dense: bool) -> LinearOperator:
    """The diagonal of the eigenvalues, or a randomly rotated dense matrix."""
    if not dense:
        return DiagonalOperator(torch.from_numpy(exact))
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((len(exact), len(exact))))[0]
    return as_operator((rotation * exact) @ rotation.T)


def compare(exact: np.ndarray, n_hvp: int, seeds: range, dense: bool) -> tuple[Errors, Errors]:
    """Plain and deflated at the same number of products."""
    operator = make_operator(exact, dense)
    n_probes, n_lanczos = PLAIN[n_hvp]
    quiet = {"progress": False, "grid": np.linspace(exact.min(), exact.max(), 16)}
    plain = Errors.over(
        seeds, lambda seed: spectral_density(operator, n_lanczos, n_probes, deflate=False, seed=seed, **quiet), exact
    )
    deflated = Errors.over(seeds, lambda seed: spectral_density(operator, n_hvp=n_hvp, seed=seed, **quiet), exact)
    return plain, deflated


def measure(exact: np.ndarray, options: argparse.Namespace) -> dict[str, float]:
    """One row of the table, by column."""
    row: dict[str, float] = {"P": len(exact)}
    is_large = len(exact) > LARGEST
    n_seeds, n_coverage = (max(n // 5, 2) if is_large else n for n in (options.seeds, options.coverage_seeds))
    for n_hvp in [n for n in PLAIN if n <= 200 or not is_large]:
        plain, deflated = compare(exact, n_hvp, range(n_seeds), options.dense)
        row[f"W1 {n_hvp}"] = deflated.median_distance / plain.median_distance
        row[f"trace {n_hvp}"] = deflated.rms_trace / plain.rms_trace
    operator = make_operator(exact, False)
    seeds = range(1000, 1000 + n_coverage)
    cover = Errors.over(seeds, lambda seed: spectral_density(operator, n_hvp=200, seed=seed, progress=False), exact)
    row["trace held"] = float(np.mean(cover.trace_covered))
    row["lambda_max held"] = float(np.mean(cover.lambda_max_covered))
    row["lambda_max width"] = float(np.median(cover.lambda_max_width))
    return row


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    """The rows as Markdown."""
    names = [f"{what} {n_hvp}" for what in ("W1", "trace") for n_hvp in PLAIN]
    lines = [
        "| spectrum | P | " + " | ".join(names) + " | trace held | lambda_max held | its width |",
        "|---" * 13 + "|",
    ]
    for spectrum, row in rows.items():
        ratios = " | ".join(f"{row[name]:.3f}" if name in row else "" for name in names)
        held = f"{row['trace held']:.0%} | {row['lambda_max held']:.0%} | {row['lambda_max width']:.0e}"
        lines.append(f"| {spectrum} | {row['P']:,} | {ratios} | {held} |")
    return lines


def write(rows: dict[str, dict[str, float]], order: list[str], options: argparse.Namespace) -> None:
    """Write the rows so far, as JSON and as a table."""
    text = [
        "# Spectrum accuracy per product: deflated over plain",
        "",
        f"`python benchmarks/spectrum_accuracy.py --seeds {options.seeds} --coverage-seeds {options.coverage_seeds}`; "
        f"{cpu_name()}, one thread, torch {torch.__version__}, float64.",
        "",
        "Deflated quadrature with a budget of 100, 200, 400 and 1,000 products compared with plain quadrature with",
        "1x100, 4x50, 4x100 and 10x100 (probes x steps). W1: ratio of the medians, over seeds, of the Wasserstein-1",
        "distance to the exact spectrum. trace: ratio of RMS errors. held: fraction of seeds whose 95 % interval (200",
        "products) contains the true value; width: median width of that of lambda_max, relative to lambda_max. This",
        "interval is a bound, not statistical. Spectra of 20,000 eigenvalues: a fifth of the seeds.",
        "",
        *table({name: rows[name] for name in order if name in rows}),
    ]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    options.output.write_text("\n".join(text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--coverage-seeds", type=int, default=100)
    parser.add_argument("--dense", action="store_true", help="dense matrices instead of their diagonal form")
    parser.add_argument("--only", help="measure this spectrum only, and keep the other rows")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    store = options.output.with_suffix(".json")
    rows = json.loads(store.read_text()) if options.only and store.is_file() else {}
    sources = {name: partial(exact_spectrum, name) for name in NETWORKS}
    sources |= {name: partial(large_spectrum, name) for name in ANALYTIC}
    for name, source in sources.items():
        if options.only not in (None, name):
            continue
        try:
            rows[name] = measure(source(), options)
        except FileNotFoundError as error:
            print(f"{name} skipped: {error}")
            continue
        print(table({name: rows[name]})[-1], flush=True)
        write(rows, list(sources), options)


if __name__ == "__main__":
    main()

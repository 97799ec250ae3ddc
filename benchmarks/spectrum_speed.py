"""Time of a spectral density compared with PyHessian and hessian-eigenthings: LeNet-5, 2,048 images in four batches.

    PNANALYSIS_CIFAR10=PATH python benchmarks/spectrum_speed.py [--n-lanczos 30] [--n-probes 3] [--repeats 3]

There are two comparisons, in which all packages take turns in one process. *Same settings*: the same numbers of
probes and steps, tracing included. *Same accuracy*: the time of the smallest budget of products whose Wasserstein-1
distance to a reference spectrum (this project's, from many more products and another seed) is at most the median
distance of the other package. The fraction of the time that is not spent in products is printed too. Without
``PNANALYSIS_CIFAR10`` the images are noise.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from hessian_eigenthings.algorithms.spectral_density import spectral_density as eigenthings_density
from hessian_eigenthings.operators.hessian import HessianOperator as Eigenthings
from pyhessian import hessian as PyHessian
from scipy.stats import wasserstein_distance
from torch import nn
from torch.nn.functional import cross_entropy

from pnanalysis.curvature.operators import HessianOperator
from pnanalysis.inputs.data import load_data
from pnanalysis.inputs.models import build_model
from pnanalysis.io.hardware import cpu_name
from pnanalysis.spectra.density import spectral_density

RESULTS = Path(__file__).resolve().parent / "results" / "spectrum_speed.md"
BUDGETS = (12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
TRAINING_IMAGES = 10_000

Measure = tuple[np.ndarray, np.ndarray]
Batches = list[tuple[torch.Tensor, torch.Tensor]]


def trained_lenet5() -> tuple[nn.Module, Batches, str]:
    """The network after five epochs on 10,000 images, and the batches."""
    torch.manual_seed(0)
    model = build_model("lenet5")
    folder = os.environ.get("PNANALYSIS_CIFAR10")
    if folder:
        images, labels = load_data(f"imagefolder:{folder}").train.subset(TRAINING_IMAGES, 0).take(slice(None))
    else:
        images, labels = torch.randn(TRAINING_IMAGES, 3, 32, 32), torch.randint(10, (TRAINING_IMAGES,))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(5):
        for index in torch.randperm(len(images)).split(100):
            optimiser.zero_grad()
            cross_entropy(model(images[index]), labels[index]).backward()
            optimiser.step()
    batches = list(zip(images[:2048].split(512), labels[:2048].split(512), strict=True))
    return model.eval(), batches, "CIFAR-10" if folder else "noise"


def distance(a: Measure, b: Measure) -> float:
    """Wasserstein-1 distance of two measures."""
    return float(wasserstein_distance(a[0], b[0], a[1], b[1]))


def _eig(matrix: torch.Tensor, eigenvectors: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """A substitute for ``torch.eig``, which PyHessian calls and torch no longer has."""
    value, vector = torch.linalg.eigh(matrix)
    return torch.stack([value, torch.zeros_like(value)], dim=1), vector


def by_pyhessian(model: nn.Module, batches: Batches, n_lanczos: int, n_probes: int, seed: int) -> Measure:
    """PyHessian through its data-loader interface."""
    torch.eig = _eig
    torch.manual_seed(seed)
    peer = PyHessian(copy.deepcopy(model), cross_entropy, dataloader=batches, cuda=False)
    values, weights = peer.density(iter=n_lanczos, n_v=n_probes)
    return np.concatenate(values), np.concatenate(weights)


def by_eigenthings(model: nn.Module, batches: Batches, n_lanczos: int, n_probes: int, seed: int) -> Measure:
    """hessian-eigenthings 1."""
    peer = Eigenthings(copy.deepcopy(model), batches, lambda network, batch: cross_entropy(network(batch[0]), batch[1]))
    result = eigenthings_density(peer, num_runs=n_probes, lanczos_steps=n_lanczos, seed=1000 * seed)
    value, weight = result.raw_eigenvalues.numpy().ravel(), result.raw_weights.numpy().ravel()
    return value[weight > 0], weight[weight > 0]


class TimedOperator:
    """An operator that adds up the time of its products."""

    def __init__(self, operator: HessianOperator) -> None:
        self.operator, self.seconds = operator, 0.0
        self.shape, self.device, self.dtype = operator.shape, operator.device, operator.dtype

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return self.matmat(v[:, None])[:, 0]

    def matmat(self, V: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        result = self.operator.matmat(V)
        self.seconds += time.perf_counter() - start
        return result


def by_pnanalysis(model: nn.Module, batches: Batches, seed: int, **settings: int) -> tuple[Measure, float]:
    """The spectral measure, and the fraction of the time spent outside products."""
    start = time.perf_counter()
    n_products = settings.get("n_hvp") or settings["n_lanczos"] * settings["n_probes"]
    operator = TimedOperator(HessianOperator(model, cross_entropy, batches, expected_products=n_products))
    prepared = time.perf_counter() - start
    ds = spectral_density(operator, seed=seed, progress=False, **settings)
    total = time.perf_counter() - start
    return (ds.node.values, ds.weight.values), 1 - (prepared + operator.seconds) / total


def seconds(call: Callable[[], object]) -> tuple[object, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def compare(options: argparse.Namespace) -> list[str]:
    """Run everything; returns the lines of the table."""
    model, batches, data = trained_lenet5()
    reference, _ = by_pnanalysis(model, batches, 10_000, n_hvp=options.reference)
    settings = {"n_lanczos": options.n_lanczos, "n_probes": options.n_probes}
    peers = {"PyHessian": by_pyhessian, "hessian-eigenthings": by_eigenthings}
    times: dict[str, list[float]] = {name: [] for name in ("pnanalysis", *peers)}
    errors: dict[str, list[float]] = {name: [] for name in times}
    fractions_outside = []
    for seed in range(options.repeats):
        (measure, outside), elapsed = seconds(partial(by_pnanalysis, model, batches, seed, **settings))
        fractions_outside.append(outside)
        times["pnanalysis"].append(elapsed)
        errors["pnanalysis"].append(distance(measure, reference))
        for name, call in peers.items():
            found, elapsed = seconds(partial(call, model, batches, seed=seed, **settings))
            times[name].append(elapsed)
            errors[name].append(distance(found, reference))
    lines = [
        f"Data: {data}. {options.n_probes} probes of {options.n_lanczos} steps; reference spectrum from "
        f"{options.reference:,} products. {cpu_name()}, {torch.get_num_threads()} thread(s), torch "
        f"{metadata.version('torch')}, PyHessian {metadata.version('pyhessian')}, hessian-eigenthings "
        f"{metadata.version('hessian-eigenthings')}; medians of {options.repeats} interleaved runs.",
        "",
        "| package | s, same settings | relative to ours | W1 | to that W1: our products | seconds | times faster |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in times:
        elapsed, error = statistics.median(times[name]), statistics.median(errors[name])
        line = f"| {name} | {elapsed:.1f} | {elapsed / statistics.median(times['pnanalysis']):.2f} | {error:.2e} |"
        lines.append(line + (" | | |" if name == "pnanalysis" else cheapest(model, batches, reference, error, elapsed)))
        print(lines[-1], flush=True)
    lines += ["", f"Time outside products, same settings: {statistics.median(fractions_outside):.1%} of the total."]
    print(lines[-1])
    return lines


def cheapest(model: nn.Module, batches: Batches, reference: Measure, error: float, elapsed: float) -> str:
    """Table cells: the first budget that is as accurate in the median of three seeds, and its time."""
    for budget in BUDGETS:
        found = [seconds(partial(by_pnanalysis, model, batches, seed, n_hvp=budget)) for seed in range(3)]  # type: ignore[misc]
        distances = [distance(measure, reference) for (measure, _), _ in found]
        if statistics.median(distances) <= error:
            own = statistics.median(time for _, time in found)
            return f" {budget} | {own:.1f} | {elapsed / own:.1f} |"
    return f" more than {BUDGETS[-1]} | | |"


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-lanczos", type=int, default=30)
    parser.add_argument("--n-probes", type=int, default=3)
    parser.add_argument("--reference", type=int, default=600, help="products of the reference spectrum")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    lines = compare(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(
        "# Time of a spectral density, LeNet-5, 2,048 images in four batches\n\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()

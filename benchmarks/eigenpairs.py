"""Ten leading eigenpairs of Hessians that are known exactly, beside PyHessian, hessian-eigenthings and skerch.

    python benchmarks/eigenpairs.py [--output benchmarks/results/eigenpairs.md]

Three perceptrons trained on digits, whose Hessians (float64) are computed entry by entry. Each package is asked for
the ten largest eigenvalues and their vectors, with its defaults and, where it has a number of products to choose, with
as many as this project took. Errors of eigenvalues are relative to the largest; the angle is the largest between a
vector that was found and the space of the ten true ones. Products are counted; CPU times have tracing and checks with
them. Packages that are not installed are left out (``pip install hessian-eigenthings==1.0.0a5``, and
``skerch``).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import networks
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import pnanalysis as pn
from pnanalysis.io.hardware import cpu_name

RESULTS = Path(__file__).resolve().parent / "results" / "eigenpairs.md"
NETWORKS = ("digits tanh MLP", "digits ReLU MLP", "digits GELU MLP")
PEERS = ("PyHessian", "hessian-eigenthings", "skerch")
K = 10
Batch = tuple[Tensor, Tensor]
#: Eigenvalues ``(K,)``, vectors ``(P, K)`` and products.
Found = tuple[Tensor, Tensor, int]


class Counted:
    """An operator whose products are counted."""

    def __init__(self, product: Callable[[Tensor], Tensor], size: int) -> None:
        self.product, self.shape, self.n = product, (size, size), 0

    def __call__(self, v: Tensor) -> Tensor:
        self.n += 1
        return self.product(v)

    def __matmul__(self, v: Tensor) -> Tensor:
        """What skerch calls, with one vector or several."""
        return self(v) if v.ndim == 1 else torch.stack([self(column) for column in v.T], dim=1)


def ours(model: nn.Module, batch: Batch, seed: int) -> Found:
    """``pn.eigenpairs`` to its default tolerance, without errors for the choice of examples."""
    ds = pn.eigenpairs(
        model, data=batch, loss=cross_entropy, n=None, batch_size=len(batch[0]), dtype="float64",
        k=K, data_error="none", classes=False, seed=seed, progress=False,
    ).squeeze("checkpoint")  # fmt: skip
    values, vectors = (torch.from_numpy(ds[name].values) for name in ("value", "vector"))
    return values, vectors.reshape(K, -1).T, int(ds.n_hvp)


def pyhessian(model: nn.Module, batch: Batch, seed: int) -> Found:
    """Power iteration, one pair after the other."""
    import pyhessian
    from pyhessian.utils import hessian_vector_product

    torch.manual_seed(seed)
    peer = pyhessian.hessian(model, cross_entropy, data=batch, cuda=False)
    with mock.patch.object(
        sys.modules["pyhessian.hessian"], "hessian_vector_product", side_effect=hessian_vector_product
    ) as product:
        values, vectors = peer.eigenvalues(top_n=K)
    flat = torch.stack([torch.cat([part.flatten() for part in vector]) for vector in vectors], dim=1)
    return torch.tensor(values, dtype=flat.dtype), flat, product.call_count


def eigenthings(model: nn.Module, batch: Batch, seed: int, steps: int | None = None) -> Found:
    """Lanczos, of 20 steps by default."""
    from hessian_eigenthings import HessianOperator, LambdaOperator, lanczos

    peer = HessianOperator(model, [batch], lambda network, given: cross_entropy(network(given[0]), given[1]))
    counted = Counted(peer.matvec, peer.size)
    found = lanczos(
        LambdaOperator(counted, peer.size, dtype=torch.float64, device=torch.device("cpu")),
        k=K, which="LA", max_iter=steps, seed=seed, reorthogonalize=True,
    )  # fmt: skip
    return found.eigenvalues, found.eigenvectors.T, counted.n


def skerch(model: nn.Module, batch: Batch, seed: int, steps: int) -> Found:
    """A sketched decomposition of this project's operator: skerch has no Hessians of its own."""
    from skerch.algorithms import seigh

    op = pn.HessianOperator(model, cross_entropy, [batch], dtype=torch.float64)
    counted = Counted(op.matvec, op.shape[0])
    values, vectors = seigh(counted, torch.device("cpu"), torch.float64, steps // 2, seed=seed, by_mag=False)
    return values[:K], vectors[:, :K], counted.n


def contenders(n_hvp: int) -> dict[str, Callable[[nn.Module, Batch, int], Found]]:
    """What is installed, by what it is called in the table; with as many products as this project took, too."""
    found: dict[str, Callable[[nn.Module, Batch, int], Found]] = {"PyHessian": pyhessian}
    if find_spec("hessian_eigenthings"):
        found["hessian-eigenthings, defaults"] = eigenthings
        found["hessian-eigenthings, as many products"] = partial(eigenthings, steps=n_hvp)
    if find_spec("skerch"):
        found["skerch, as many products"] = partial(skerch, steps=n_hvp)
    return found


def rows(name: str, seeds: int) -> Iterator[dict[str, Any]]:
    """Worst errors over the seeds, and median time, of each package on one network."""
    model = networks.trained(name)
    x, y = networks.training_examples(name)
    true, vectors = torch.linalg.eigh(networks.dense_hessian(model, x, y))
    top, space = true[-K:].flip(0), vectors[:, -K:]

    def measured(way: Callable[[nn.Module, Batch, int], Found]) -> dict[str, Any]:
        values, sines, products, seconds = [], [], [], []
        for seed in range(seeds):
            start = time.process_time()
            found, v, n = way(copy.deepcopy(model), (x, y), seed)
            seconds.append(time.process_time() - start)
            products.append(n)
            values.append(float((found.sort(descending=True).values - top).abs().max() / top[0]))
            off = v - space @ (space.T @ v)
            sines.append(float((off.norm(dim=0) / v.norm(dim=0)).max()))
        return {
            "value": max(values), "sine": max(sines), "products": statistics.median(products),
            "seconds": statistics.median(seconds),
        }  # fmt: skip

    own = measured(ours)
    yield {"network": name, "package": "pnanalysis"} | own
    for package, way in contenders(round(own["products"])).items():
        yield {"network": name, "package": package} | measured(way)


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    versions = [f"{name} {metadata.version(name)}" for name in PEERS if find_spec(name.replace("-", "_").lower())]
    lines = [
        "# Ten leading eigenpairs of Hessians that are known exactly",
        "",
        f"`python benchmarks/eigenpairs.py`, {cpu_name()}, one thread, torch {metadata.version('torch')}, "
        f"{', '.join(versions)}, float64. Worst errors over {options.seeds} seeds, median CPU times: of eigenvalues "
        "relative to the largest one, and the sine of the angle between a vector and the true space of ten.",
        "",
        "| network | package | products | error of values | sine | CPU time, s |",
        "|---|---|---|---|---|---|",
    ]
    for name in NETWORKS:
        for row in rows(name, options.seeds):
            lines.append(
                f"| {row['network']} | {row['package']} | {row['products']:.0f} | {row['value']:.1g} | "
                f"{row['sine']:.1g} | {row['seconds']:.1f} |"
            )
            print(lines[-1], flush=True)
    options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

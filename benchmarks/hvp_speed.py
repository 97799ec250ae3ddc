"""Time of a Hessian-vector product in forward passes, compared with PyHessian, hessian-eigenthings and curvlinops.

All packages take turns in one process, several times, and the medians are compared. The data are random, since the time
of a product does not depend on them.

    python benchmarks/hvp_speed.py [--threads 1] [--repeats 3] [--output benchmarks/results/hvp_speed.md]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from pnanalysis.curvature.operators import HessianOperator
from pnanalysis.inputs.models import build_model
from pnanalysis.io.hardware import cpu_name

Batches = list[tuple[torch.Tensor, torch.Tensor]]

#: name: (model, batch size, batches, products at once)
SETTINGS = {
    "ResNet-18, 64 images, one batch, one vector": ("resnet18", 64, 1, 1),
    "ResNet-18, 64 images, two batches, eight vectors": ("resnet18", 64, 2, 8),
    "LeNet-5, 2,048 images in four batches, ten vectors": ("lenet5", 512, 4, 10),
}


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def contenders(model: nn.Module, batches: Batches, k: int) -> dict[str, Callable[[], object]]:
    """A call over all batches for each package.

    This project's computes ``k`` products at once, the others' one: they have nothing in common between vectors.
    """
    loss = nn.functional.cross_entropy
    native = HessianOperator(model, loss, batches)
    V = torch.randn(native.shape[0], k)
    calls: dict[str, Callable[[], object]] = {"pnanalysis": lambda: native.matmat(V)}
    add_pyhessian(calls, model, batches, V[:, :1])
    add_eigenthings(calls, model, batches, V[:, :1])
    add_curvlinops(calls, model, batches, V[:, :1])
    return calls


def add_pyhessian(calls: dict[str, Callable[[], object]], model: nn.Module, batches: Batches, V: torch.Tensor) -> None:
    """PyHessian: with its retained graph for one batch, through its data-loader interface for several."""
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    peer_model = copy.deepcopy(model).eval()
    shapes = [parameter.shape for parameter in peer_model.parameters()]
    columns = [
        [p.view(s) for p, s in zip(v.split([s.numel() for s in shapes]), shapes, strict=True)] for v in V.T.contiguous()
    ]
    loss = nn.functional.cross_entropy
    if len(batches) == 1:
        peer = hessian(peer_model, loss, data=batches[0], cuda=False)
        calls["PyHessian"] = lambda: [hessian_vector_product(peer.gradsH, peer.params, v) for v in columns]
    else:
        peer = hessian(peer_model, loss, dataloader=batches, cuda=False)
        calls["PyHessian"] = lambda: [peer.dataloader_hv_product(v) for v in columns]


def add_eigenthings(
    calls: dict[str, Callable[[], object]], model: nn.Module, batches: Batches, V: torch.Tensor
) -> None:
    """hessian-eigenthings 1.0 (extra ``bench``)."""
    try:
        from hessian_eigenthings.operators import HessianOperator as Peer
    except ImportError:
        return
    peer_model = copy.deepcopy(model).eval()

    def loss(network: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(network(batch[0]), batch[1])

    peer = Peer(peer_model, batches, loss)
    calls["hessian-eigenthings"] = lambda: [peer.matvec(v) for v in V.T.contiguous()]


def add_curvlinops(calls: dict[str, Callable[[], object]], model: nn.Module, batches: Batches, V: torch.Tensor) -> None:
    """curvlinops 3 (extra ``bench``)."""
    try:
        import curvlinops
    except ImportError:
        return
    peer_model = copy.deepcopy(model).eval()
    peer = curvlinops.HessianLinearOperator(
        peer_model, nn.CrossEntropyLoss(), list(peer_model.parameters()), batches, check_deterministic=False
    )
    calls["curvlinops"] = lambda: peer @ V


def measure(name: str, repeats: int) -> list[tuple[str, str, float, float]]:
    """Rows (setting, contender, forward passes per product, seconds of the first call)."""
    model_name, batch_size, n_batches, k = SETTINGS[name]
    torch.manual_seed(0)
    model = build_model(model_name).eval()
    batches = [(torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))) for _ in range(n_batches)]

    def forward() -> None:
        with torch.no_grad():
            for inputs, _ in batches:
                model(inputs)

    calls = contenders(model, batches, k)
    forward()
    first = {contender: seconds(call) for contender, call in calls.items()}
    times: dict[str, list[float]] = {contender: [] for contender in calls}
    for _ in range(repeats):
        for contender, call in calls.items():
            # The unit is measured next to each call, so that other work on the machine slows both.
            forward_seconds = statistics.median(seconds(forward) for _ in range(3))
            n_products = k if contender == "pnanalysis" else 1
            times[contender].append(seconds(call) / n_products / forward_seconds)
    return [(name, contender, statistics.median(values), first[contender]) for contender, values in times.items()]


def main() -> None:
    """Print the table, and write it to ``--output``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help="part of a setting's name")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    lines = [
        "# Time of a Hessian-vector product, in forward passes over the same data",
        "",
        f"{cpu_name()}, {arguments.threads} thread(s), torch {metadata.version('torch')}, float32, batch "
        f"normalisation in eval mode; medians of {arguments.repeats} interleaved runs. First call: tracing included.",
        "",
        "| setting | package | forward passes per product | first call, s |",
        "|---|---|---|---|",
    ]
    for name in SETTINGS:
        if arguments.only and arguments.only not in name:
            continue
        for setting, contender, passes, first in measure(name, arguments.repeats):
            lines.append(f"| {setting} | {contender} | {passes:.2f} | {first:.1f} |")
            print(lines[-1], flush=True)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

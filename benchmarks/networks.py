"""Nine small trained networks and the exact spectra of their Hessians, for benchmarks of accuracy.

The dense Hessians (float64) are cached under ``data/spectra``; the CIFAR networks need the environment variable
``PNANALYSIS_CIFAR10`` (a folder with ``train/CLASS/IMAGE``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, cross_entropy

CACHE = Path(__file__).resolve().parent.parent / "data" / "spectra"
#: CIFAR images per class that networks are trained on, and that further examples are drawn from.
IMAGES_PER_CLASS, POPULATION_PER_CLASS = 100, 1000


def _mlp(activation: type[nn.Module], *widths: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out), activation()]
    return nn.Sequential(*layers[:-1])


def _conv(activation: type[nn.Module], channels: list[int], strides: list[int], norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out, stride in zip(channels, channels[1:], strides, strict=False):
        layers += [nn.Conv2d(n_in, n_out, 3, stride, 1), *([nn.BatchNorm2d(n_out)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels[-1], 10))


#: name: (data, model)
NETWORKS: dict[str, tuple[str, Callable[[], nn.Sequential]]] = {
    "digits tanh MLP": ("digits", lambda: _mlp(nn.Tanh, 64, 16, 16, 10)),
    "digits ReLU MLP": ("digits", lambda: _mlp(nn.ReLU, 64, 24, 16, 10)),
    "digits conv BN": ("digits", lambda: _conv(nn.ReLU, [1, 8, 16], [1, 2], norm=True)),
    "CIFAR tanh MLP": ("cifar 8x8", lambda: _mlp(nn.Tanh, 192, 16, 16, 10)),
    "CIFAR ReLU MLP": ("cifar 8x8", lambda: _mlp(nn.ReLU, 192, 20, 16, 10)),
    "CIFAR conv BN": ("cifar 16x16", lambda: _conv(nn.ReLU, [3, 8, 16, 16], [2, 2, 2], norm=True)),
    "digits GELU MLP": ("digits", lambda: _mlp(nn.GELU, 64, 20, 20, 10)),
    "digits tanh conv": ("digits", lambda: _conv(nn.Tanh, [1, 8, 16], [1, 2], norm=False)),
    "CIFAR ReLU conv": ("cifar 16x16", lambda: _conv(nn.ReLU, [3, 8, 16, 16], [2, 2, 2], norm=False)),
}


def _digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.images / 16.0)[:, None], torch.from_numpy(data.target), torch.arange(1797) < 1000


@cache
def _cifar() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from PIL import Image

    folder = os.environ.get("PNANALYSIS_CIFAR10")
    if not folder:
        raise FileNotFoundError("set PNANALYSIS_CIFAR10 to the CIFAR-10 image folder")
    images, labels, rank = [], [], []
    for label, class_folder in enumerate(sorted(path for path in (Path(folder) / "train").iterdir() if path.is_dir())):
        for index, file in enumerate(sorted(class_folder.iterdir())[:POPULATION_PER_CLASS]):
            images.append(np.asarray(Image.open(file)).transpose(2, 0, 1) / 255.0)
            labels.append(label)
            rank.append(index)
    x, trained_on = torch.from_numpy(np.stack(images)), torch.tensor(rank) < IMAGES_PER_CLASS
    reference = x[trained_on]
    x = (x - reference.mean((0, 2, 3), keepdim=True)) / reference.std((0, 2, 3), keepdim=True)
    return x, torch.tensor(labels), trained_on


def population(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All inputs and labels there are for a network, float64, and which of them ``(N,)`` of bool it is trained on."""
    data = NETWORKS[name][0]
    if data == "digits":
        return _digits()
    x, y, trained_on = _cifar()
    return avg_pool2d(x, {"cifar 8x8": 4, "cifar 16x16": 2}[data]), y, trained_on


def training_examples(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs and labels that a network is trained on."""
    x, y, trained_on = population(name)
    return x[trained_on], y[trained_on]


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int = 60, seed: int = 0) -> float:
    """Train with Adam in batches of 100; returns the loss over all of ``x`` in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(100):
            optimiser.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimiser.step()
    model.eval()
    with torch.no_grad():
        return cross_entropy(model(x), y).item()


def dense_hessian(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The Hessian ``(P, P)`` of the mean cross-entropy over ``x``, one row at a time on one retained graph."""
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(cross_entropy(model(x), y), parameters, create_graph=True)
    flat = torch.cat([part.flatten() for part in gradient])
    hessian = torch.empty(len(flat), len(flat), dtype=flat.dtype)
    for row, entry in zip(hessian, torch.eye(len(flat), dtype=flat.dtype), strict=True):
        parts = torch.autograd.grad(flat, parameters, entry, retain_graph=True)
        row.copy_(torch.cat([part.flatten() for part in parts]))
    return (hessian + hessian.T) / 2


def trained(name: str, seed: int = 0) -> nn.Sequential:
    """The named network, float64, trained on its examples, in eval mode."""
    torch.manual_seed(seed)
    model = NETWORKS[name][1]().double()
    loss = train(model, *training_examples(name), seed=seed)
    print(f"{name}: training loss {loss:.3g}", flush=True)
    return model


def exact_spectrum(name: str) -> np.ndarray:
    """The sorted eigenvalues ``(P,)`` of the named network's Hessian, computed once and cached."""
    file = CACHE / f"{name.replace(' ', '_')}.npy"
    if not file.is_file():
        eigenvalues = torch.linalg.eigvalsh(dense_hessian(trained(name), *training_examples(name))).numpy()
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, eigenvalues)
    return np.load(file)


if __name__ == "__main__":
    for network in NETWORKS:
        values = exact_spectrum(network)
        print(f"{network}: {values[:3].round(4)} ... {values[-12:].round(3)}, trace {values.sum():.4g}")

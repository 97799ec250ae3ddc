"""Perceptrons, convolutional and residual networks, normalisation, and what people do to their weights and forwards."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from tests.zoo.entry import DIFFERENCES, Entry, images, numbers, vectors


def perceptron(inputs: int = 4, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs))


def pooled(*layers: nn.Module, channels: int = 4) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))


class Residual(nn.Module):
    """A block around a batch-normalised convolution, in place where people save memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        out += x
        return self.act(out)


def hooked_norm() -> nn.Sequential:
    """A hook on the norm layer changes its output, as in feature scaling and activation steering."""
    network = pooled(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    network[1].register_forward_hook(lambda module, arguments, output: output * 0.5 + 0.2)
    return network


class Branch(nn.Module):
    """Takes the path that the data choose."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        if x.mean() > -10:
            out = self.norm(out)
        return self.head(torch.tanh(out).mean((2, 3)))


class OverInput(nn.Module):
    """Works in place on its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron()

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.3
        return self.body(x.mul_(2.0))


class Checkpointed(nn.Module):
    """Activations recomputed in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first, self.act, self.last = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.first(x))
        return checkpoint(self.last, hidden, use_reentrant=self.reentrant)


class Outputs(nn.Module):
    """Mean and log-variance, as a tuple or by name."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.named = named
        self.body, self.act, self.mean, self.logvar = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        hidden = self.act(self.body(x))
        mean, logvar = self.mean(hidden), self.logvar(hidden)
        return {"mean": mean, "logvar": logvar} if self.named else (mean, logvar)


def gaussian(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    mean, logvar = outputs
    return (0.5 * logvar + 0.5 * (mean - targets) ** 2 * torch.exp(-logvar)).mean()


def gaussian_by_name(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    return gaussian((outputs["mean"], outputs["logvar"]), targets)


class Keeps(nn.Module):
    """Keeps its last features on itself, with their graph, for a regulariser or a plot."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)
        self.features: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.features = [self.act(self.first(x))]
        return self.last(self.features[0])


def hard_activations() -> nn.Sequential:
    return pooled(nn.Conv2d(1, 4, 3), nn.Hardswish(), nn.Conv2d(4, 4, 1), nn.Hardsigmoid())


def lightning_module() -> nn.Module:
    from lightning import LightningModule

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = perceptron()
            self.save_hyperparameters()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

    return Classifier()


def used(network: nn.Module, inputs: Tensor) -> nn.Module:
    """After a forward pass: lazy layers have their shapes, kept tensors have graphs."""
    network(inputs)
    return network


def lazy() -> nn.Sequential:
    return used(nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(3)), torch.randn(2, 4))  # type: ignore[return-value]


def pruned() -> nn.Sequential:
    network = perceptron()
    prune.random_unstructured(network[0], "weight", amount=0.4)
    return network


def hook_weight_norm() -> nn.Sequential:
    network = perceptron()
    nn.utils.weight_norm(network[0])
    return network


def hook_spectral_norm() -> nn.Sequential:
    network = perceptron()
    nn.utils.spectral_norm(network[0])
    return network


def partly_frozen() -> nn.Sequential:
    network = perceptron()
    network[0].weight.requires_grad_(False)
    return network


def quantised() -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(perceptron(), {nn.Linear}, dtype=torch.qint8)


def with_(first: nn.Module) -> nn.Sequential:
    return nn.Sequential(first, nn.Tanh(), nn.Linear(5, 3))


def compiled() -> nn.Module:
    return torch.compile(perceptron(), backend="eager")  # type: ignore[return-value]


NORM = "normalisation layers"
IMAGES = images(5, 3)
PLAIN, CONV, WEIGHTS, WRAPPED, OUT = (
    "multilayer perceptrons", "convolutional networks", "reparametrised weights", "wrapped networks", "several outputs",
)  # fmt: skip

NO_PREDICTION = dict.fromkeys(("compare", "functional distance"), "no prediction")

ENTRIES = [
    Entry(PLAIN, "perceptron", perceptron, vectors(5, 3)),
    Entry(PLAIN, "regression", lambda: perceptron(4, 2), numbers(5, 3), F.mse_loss),
    Entry(PLAIN, "partly frozen", partly_frozen, vectors(5, 3)),
    Entry(PLAIN, "in place on its input", OverInput, vectors(5, 3)),
    Entry(PLAIN, "keeps features", lambda: used(Keeps(), torch.randn(2, 4)), vectors(5, 3)),
    Entry(PLAIN, "lazy layers", lazy, vectors(5, 3)),
    Entry(CONV, "convolution", lambda: pooled(nn.Conv2d(1, 4, 3), nn.ReLU()), IMAGES),
    Entry(
        CONV, "batch norm after convolution", lambda: pooled(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.SiLU()), IMAGES
    ),
    Entry(CONV, "hook on the norm layer", hooked_norm, IMAGES),
    Entry(CONV, "branch on data", Branch, IMAGES, not_for=("saturation",)),
    Entry(CONV, "residual, in place", lambda: pooled(nn.Conv2d(1, 4, 3), Residual()), IMAGES),
    Entry(CONV, "Hardswish and Hardsigmoid", hard_activations, IMAGES, differences=True, tolerance=DIFFERENCES),
    Entry(NORM, "LayerNorm", lambda: with_(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5))), vectors(5, 3)),
    Entry(NORM, "RMSNorm", lambda: with_(nn.Sequential(nn.Linear(4, 5), nn.RMSNorm(5))), vectors(5, 3)),
    Entry(NORM, "BatchNorm1d", lambda: with_(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))), vectors(5, 3)),
    Entry(NORM, "GroupNorm", lambda: pooled(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.SiLU()), IMAGES),
    Entry(
        NORM, "InstanceNorm", lambda: pooled(nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ELU()), IMAGES
    ),
    Entry(
        WEIGHTS,
        "weight_norm",
        lambda: with_(parametrizations.weight_norm(nn.Linear(4, 5))),
        vectors(5, 3),
        differences=True,
        tolerance=DIFFERENCES,
    ),
    Entry(WEIGHTS, "weight_norm, hook form", hook_weight_norm, vectors(5, 3), differences=True, tolerance=DIFFERENCES),
    Entry(WEIGHTS, "spectral_norm", lambda: with_(parametrizations.spectral_norm(nn.Linear(4, 5))), vectors(5, 3)),
    Entry(WEIGHTS, "spectral_norm, hook form", hook_spectral_norm, vectors(5, 3)),
    Entry(
        WEIGHTS, "orthogonal", lambda: with_(parametrizations.orthogonal(nn.Linear(5, 5))), vectors(5, 3, features=5)
    ),
    Entry(WEIGHTS, "pruned", pruned, vectors(5, 3)),
    Entry(WRAPPED, "compiled", compiled, vectors(5, 3), slow=True),
    Entry(WRAPPED, "DataParallel", lambda: nn.DataParallel(perceptron()), vectors(5, 3)),
    Entry(WRAPPED, "LightningModule", lightning_module, vectors(5, 3), packages=("lightning",)),
    Entry(WRAPPED, "checkpointed", lambda: Checkpointed(reentrant=False), vectors(5, 3)),
    Entry(
        WRAPPED,
        "checkpointed, reentrant",
        lambda: Checkpointed(reentrant=True),
        vectors(5, 3),
        twin=lambda: Checkpointed(False),
    ),
    Entry(
        WRAPPED,
        "quantised",
        quantised,
        vectors(5, 3),
        refused={"*": "quantised|parameters"},
        not_for=("saturation", "functional distance"),
    ),
    Entry(OUT, "tuple of outputs", lambda: Outputs(named=False), numbers(5, 3), gaussian),
    Entry(OUT, "outputs by name", lambda: Outputs(named=True), numbers(5, 3), gaussian_by_name, refused=NO_PREDICTION),
]

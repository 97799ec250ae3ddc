"""Networks and data for operators, with every kind of layer and small enough for a dense matrix; dense references."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.functional import cross_entropy

Batches = list[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


def images(sizes: tuple[int, ...] = (5, 3), n_classes: int = 3) -> Batches:
    """Batches of unequal size of 1x6x6 images with class targets."""
    torch.manual_seed(1)
    return [(torch.randn(n, 1, 6, 6).double(), torch.randint(n_classes, (n,))) for n in sizes]


def _net(*layers: nn.Module) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = copy.deepcopy(nn.Sequential(*layers)).double()
        for layer in model:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        for module in model.modules():  # statistics that differ from the batches' own
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2.0)
                nn.init.normal_(module.weight, mean=1.0, std=0.2)
        return model.eval()

    return make


#: name -> factory of a network on 1x6x6 images with three outputs
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": _net(nn.Flatten(), nn.Linear(36, 3)),
    "tanh": _net(nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 3)),
    "relu": _net(nn.Flatten(), nn.Linear(36, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)),
    "conv": _net(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 2, 3, stride=2), nn.Flatten(), nn.Linear(2, 3)),
    "maxpool": _net(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)),
    "batchnorm": _net(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)),
    "avgpool-gelu": _net(
        nn.Conv2d(1, 3, 3, bias=False), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)
    ),
    "layernorm": _net(nn.Flatten(), nn.Linear(36, 4), nn.LayerNorm(4), nn.Sigmoid(), nn.Linear(4, 3)),
}


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared distance from the one-hot targets."""
    return nn.functional.mse_loss(outputs, torch.eye(3, dtype=outputs.dtype)[targets])


def flat(model: nn.Module) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def unflat(model: nn.Module, vector: Tensor) -> dict[str, Tensor]:
    """The tensors by name that make up a vector like :func:`flat`."""
    parts = vector.split([p.numel() for p in model.parameters()])
    return {name: part.view_as(p) for (name, p), part in zip(model.named_parameters(), parts, strict=True)}


def dense_hessian(model: nn.Module, batches: Batches, loss: Loss = cross_entropy, bn_train: bool = False) -> Tensor:
    """The Hessian of the mean over all examples; with ``bn_train`` each batch has its own statistics."""
    model = copy.deepcopy(model).train(bn_train)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and bn_train:
            module.track_running_stats = False
    total = sum(len(y) for _, y in batches)

    def mean_loss(vector: Tensor) -> Tensor:
        theta = unflat(model, vector)
        return sum(loss(functional_call(model, theta, (x,)), y) * len(y) for x, y in batches) / total

    # torch.func.hessian would be faster, but vmap's rules for second derivatives of normalisations are wrong
    return torch.autograd.functional.hessian(mean_loss, flat(model))


def relative(a: Tensor, b: Tensor) -> float:
    """Norm of the difference, relative to the norm of ``b``."""
    return float((a - b).norm() / b.norm())


class TanhOnce(torch.autograd.Function):
    """Differentiable once: of its second derivative torch gives zero, without a word, beside that of other parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return slope * (1 - y**2)


class Hungry(nn.Sequential):
    """A network that runs out of memory with more examples than ``most``."""

    most = 1000

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(x)

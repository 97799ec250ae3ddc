"""Activations are seen in whatever way a network calls them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pnanalysis.activations.hooks import watch_activations


class Functional(nn.Module):
    """Calls its activations as functions, as methods, and one module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.gate = nn.Sigmoid()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.fc(x))
        x = self.block(torch.tanh(x)).tanh()
        return self.gate(self.gate(F.gelu(x)))


def test_functional_method_and_repeated_calls_are_all_seen() -> None:
    seen: list[tuple[str, str]] = []
    model = Functional()
    with watch_activations(model, lambda layer, activation, *_: seen.append((layer, activation.name))):
        model(torch.randn(3, 4))
    expected = [
        ("relu", "relu"), ("tanh", "tanh"), ("block.1", "relu"), ("tanh#2", "tanh"), ("gelu", "gelu"),
        ("gate", "sigmoid"), ("gate#2", "sigmoid"),
    ]  # fmt: skip
    assert seen == expected
    seen.clear()
    model(torch.randn(3, 4))
    assert not seen  # hooks are gone


#: Minima of the functions that dip below their asymptote, rounded down.
MINIMA = {"silu": -0.2785, "mish": -0.3089, "gelu": -0.17, "hardswish": -0.375}


@pytest.mark.parametrize(
    "module",
    [nn.Tanh(), nn.Sigmoid(), nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(), nn.PReLU(), nn.ELU(),
     nn.SELU(), nn.CELU(), nn.GELU(), nn.SiLU(), nn.Mish(), nn.Hardtanh(), nn.Hardsigmoid(), nn.Hardswish(),
     nn.Softplus(), nn.Softsign(), nn.LogSigmoid()],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_every_activation_module_is_seen_once_within_its_asymptotes(module: nn.Module) -> None:
    seen = []
    model = nn.Sequential(nn.Linear(3, 50), module)
    with watch_activations(model, lambda *call: seen.append(call)), torch.no_grad():
        output = model(10 * torch.randn(40, 3))
    ((layer, activation, values, _),) = seen
    assert layer == "1"
    assert torch.equal(values, output)
    assert values.min() >= MINIMA.get(activation.name, activation.low)
    assert values.max() <= activation.high

"""Activations are seen in whatever way a network calls them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pnanalysis.activations.axis_tracker import Known
from pnanalysis.activations.functions import BOUNDED_BY_ONE, Activation
from pnanalysis.activations.hooks import composite, watch_activations
from pnanalysis.errors import ModelError

Call = tuple[str, Activation, Tensor, Known]


def watched(model: nn.Module, *inputs: Tensor) -> list[Call]:
    """What the observer is told of one forward pass."""
    seen: list[Call] = []
    with torch.no_grad(), watch_activations(model, lambda *call: seen.append(call)):
        model(*inputs)
    return seen


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


def test_limits_other_than_one_are_in_the_name() -> None:
    """Whatever goes by the name alone, as figures of distances from one do, must not take them for one."""
    model = nn.Sequential(nn.Hardtanh(), nn.Hardtanh(-5, 5), nn.Hardtanh(0, 6))
    seen = [
        (activation.name, activation.low, activation.high) for _, activation, *_ in watched(model, torch.randn(3, 4))
    ]
    assert seen == [("hardtanh", -1, 1), ("hardtanh(-5, 5)", -5, 5), ("relu6", 0, 6)]
    assert "hardtanh" in BOUNDED_BY_ONE
    assert not {"hardtanh(-5, 5)", "relu6", "relu", "elu"} & BOUNDED_BY_ONE


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


class Applied(nn.Module):
    """A linear layer and a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.fc(x))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda h: torch.special.expit(h), "sigmoid"),
        (lambda h: torch.tanh(h, out=torch.empty_like(h)), "tanh"),
        (lambda h: h.relu_(), "relu"),
        (lambda h: F.leaky_relu_(h), "leaky_relu"),
        (lambda h: torch.selu_(h), "selu"),
        (lambda h: torch.ops.aten.sigmoid(h), "sigmoid"),
        (lambda h: torch.ops.aten.relu.default(h), "relu"),
    ],
)  # fmt: skip
def test_every_form_of_a_function_is_seen(function: Callable[[Tensor], Tensor], expected: str) -> None:
    model, x = Applied(function), torch.randn(4, 3)
    ((_, activation, values, known),) = watched(model, x)
    assert (activation.name, known) == (expected, (True, True))
    with torch.no_grad():
        assert torch.equal(values, model(x))


def test_asymptotes_are_those_that_functions_are_called_with() -> None:
    for module, low, high in (
        (nn.ELU(2.0), -2.0, float("inf")), (nn.CELU(0.5), -0.5, float("inf")), (nn.Hardtanh(-3, 2), -3.0, 2.0)
    ):  # fmt: skip
        ((_, activation, _, _),) = watched(nn.Sequential(nn.Linear(3, 5), module), torch.randn(4, 3))
        assert (activation.low, activation.high) == (low, high)


class NewGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))


class Swish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta, self.gate = nn.Parameter(torch.ones(1)), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.beta * x)


class GELU(nn.Module):
    """A layer that is called like the function at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


def test_functions_inside_a_composite_activation_are_part_of_it() -> None:
    model = nn.Sequential(nn.Linear(3, 5), NewGELU(), Swish(), GELU(), nn.Tanh())
    x = torch.randn(4, 3)
    seen = watched(model, x)
    assert [(name, activation.name) for name, activation, _, _ in seen] == [
        ("1", "gelu"), ("2", "silu"), ("3.gelu", "gelu"), ("4", "tanh"),
    ]  # fmt: skip
    assert all(known == (True, True) for *_, known in seen)
    assert torch.equal(seen[1][2], model[:3](x))


def test_activations_of_transformers_are_composite() -> None:
    activations = pytest.importorskip("transformers.activations")
    new_gelu = composite(activations.NewGELUActivation())
    assert new_gelu is not None
    assert new_gelu.name == "gelu"
    assert composite(activations.LinearActivation()) is None
    clipped = composite(activations.ClippedGELUActivation(-1, 1))
    assert clipped == Activation("clippedgelu")


def test_padded_encoders_are_watched_without_their_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(4, 6, 8), torch.arange(6) >= torch.tensor([[2], [6], [3], [4]])
    hidden: list[Tensor] = []
    handles = [own.linear1.register_forward_hook(lambda *call: hidden.append(call[2].relu())) for own in model.layers]
    model(x, src_key_padding_mask=padding)  # with gradients: the slow path
    for handle in handles:
        handle.remove()
    seen: list[Call] = []
    with torch.no_grad(), watch_activations(model, lambda *call: seen.append(call)):
        model(x, src_key_padding_mask=padding)
    assert torch.backends.mha.get_fastpath_enabled()
    for (_, _, values, known), expected in zip(seen, hidden, strict=True):
        assert known == (True, True)
        torch.testing.assert_close(values, expected.transpose(1, 2))


def test_compiled_parts_are_watched_and_keep_their_names() -> None:
    torch._dynamo.reset()
    part = torch.compile(nn.Sequential(nn.Linear(3, 5), nn.Tanh()), backend="eager")
    model = nn.Sequential(part, nn.Linear(5, 2), nn.ReLU())
    model(torch.randn(4, 3))  # compiled by now
    assert [name for name, *_ in watched(model, torch.randn(4, 3))] == ["0.1", "2"]


def test_exported_networks_are_watched() -> None:
    model, x = (
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2), nn.Tanh()),
        torch.randn(4, 1, 4, 4),
    )
    seen = watched(torch.export.export(model, (x,)).module(), x)
    assert [(activation.name, values.shape[:2]) for _, activation, values, _ in seen] == [
        ("relu", (4, 3)),
        ("tanh", (4, 2)),
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_activations_that_cannot_be_seen_or_measured_are_refused() -> None:
    x = torch.randn(4, 3)
    scripted = nn.Sequential(nn.Linear(3, 3), torch.jit.trace(nn.ReLU(), x))
    with pytest.raises(ModelError, match="1 is scripted or traced"):
        watched(scripted, x)
    with pytest.raises(ModelError, match="within torch.vmap"):
        watched(Applied(torch.vmap(torch.tanh)), x)
    with pytest.raises(ModelError, match="complex numbers"):
        watched(Applied(lambda h: torch.tanh(torch.complex(h, h)).abs()), x)
    with pytest.raises(ModelError, match="nested tensor"):
        watched(Applied(lambda h: torch.relu(torch.nested.nested_tensor(list(h)))), x)


def test_watching_leaves_everything_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 5), Swish(), nn.Dropout(), nn.BatchNorm1d(5), nn.ReLU(inplace=True))
    model.eval()
    hooks = [module.register_forward_hook(lambda *_: None) for module in model.modules()]
    x = torch.randn(4, 3)
    before, state, rng = x.clone(), {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    watched(model, x)
    assert torch.equal(torch.get_rng_state(), rng)
    with pytest.raises(RuntimeError):
        watched(model, torch.randn(4, 2))
    assert torch.equal(x, before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(len(module._forward_hooks) == 1 and not module._forward_pre_hooks for module in model.modules())
    assert torch.overrides._get_current_function_mode_stack() == []
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())
    for hook in hooks:
        hook.remove()

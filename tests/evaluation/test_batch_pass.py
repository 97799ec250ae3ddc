"""Networks and losses of many kinds, in every analysis that evaluates them: against the network called by hand."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pnanalysis as pn
from pnanalysis.errors import PnError
from pnanalysis.inputs.models import takes_model

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (24,), generator=torch.Generator().manual_seed(1))
BATCHES = [(X[:14], Y[:14]), (X[14:], Y[14:])]

ANALYSES: dict[str, Callable[..., Any]] = {
    "compare": lambda nets, **k: pn.compare(nets, hessian=False, saturation=False, **k).loss.sel(split="train"),
    "line": lambda nets, **k: pn.landscape(nets, n_points=3, **k).loss.sel(path="line", split="train")[[0, -1]],
    "sharpness": lambda nets, **k: (
        pn.sharpness(
            nets, n_steps=2, measures=("worst", "average"), second_order=False, n_starts=1, n_directions=2, **k
        ).loss
    ),
}


class Body(nn.Module):
    """Three classes from four numbers; subclasses do something unusual with them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


class InPlace(Body):
    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        x /= 2
        return self.body(x)


class Slopes(Body):
    """A network that needs gradients within its pass, as physics-informed ones do."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        u = self.body(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return u + slope[:, :3]


class Cache:
    """Holds tensors in a way that torch does not know."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


class Answer(OrderedDict[str, Any]):
    """The like of what Hugging Face's models return."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


class Model(Body):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Answer:
        logits = self.body(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return Answer(loss=loss, logits=logits, cache=Cache(logits))


class Padded(nn.Module):
    """An encoder whose fast path takes nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        encoded = self.encoder(self.embed(tokens), src_key_padding_mask=padding)
        return self.head((encoded * ~padding[..., None]).sum(1) / (~padding).sum(1, keepdim=True))


class Rotating(Body):
    """Complex parameters, which are two real ones each."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.randn(2, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.reshape(-1, 2, 2).contiguous()) * self.turn
        return self.body(torch.view_as_real(turned).flatten(1))


TOKENS = torch.randint(1, 20, (24, 7), generator=torch.Generator().manual_seed(2))
TOKENS[torch.arange(7)[None] >= 2 + torch.arange(24)[:, None] % 6] = 0


def residual(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    inputs = inputs.requires_grad_()
    u = model(inputs)
    (slope,) = torch.autograd.grad(u.sum(), inputs, create_graph=True)
    return (slope.sum(1) - targets).square().mean()


def of_body(model: Any, batch: tuple[tuple[Tensor, Tensor], Tensor]) -> Tensor:
    """Calls a part of the network, with inputs that the whole would refuse."""
    (a, b), targets = batch
    return F.cross_entropy(model.body(a) - model.body(b), targets)


def works_in_place(outputs: Tensor, targets: Tensor) -> Tensor:
    targets += 1
    return F.cross_entropy(outputs.mul_(2), targets % 3)


def of_tensor(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def of_logits(outputs: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits, targets)


#: Network, batches, loss, and the loss by hand where that is not ``loss(network(inputs), targets)``.
KINDS: dict[str, tuple[Callable[[], nn.Module], list[Any], Any, Any]] = {
    "in place on its inputs": (InPlace, BATCHES, F.cross_entropy, None),
    "in place from the first layer": (lambda: nn.Sequential(nn.ELU(inplace=True), Body()), BATCHES, of_tensor, None),
    "loss in place on outputs and targets": (Body, BATCHES, works_in_place, None),
    "gradients within the pass": (Slopes, BATCHES, F.cross_entropy, None),
    "loss of the model": (Body, BATCHES, residual, residual),
    "loss of parts of the model": (Body, [((x, x.flip(0)), y) for x, y in BATCHES], of_body, of_body),
    "padding": (Padded, [(TOKENS, Y)], F.cross_entropy, None),
    "cache beside the logits": (Model, BATCHES, of_logits, None),
    "labels in a mapping": (Model, [(UserDict(x=x, labels=y), y) for x, y in BATCHES], "model",
                            lambda net, batch: net(**batch[0]).loss),
    "complex parameters": (Rotating, BATCHES, F.cross_entropy, None),
    "float64 data": (Body, [(x.double(), y) for x, y in BATCHES], F.cross_entropy,
                     lambda net, batch: F.cross_entropy(net(batch[0].float()), batch[1])),
}  # fmt: skip


def networks(make: Callable[[], nn.Module]) -> dict[str, nn.Module]:
    found = {}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        found[name] = make().eval()
    return found


@pytest.mark.parametrize("analysis", ANALYSES)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_network_called_by_hand(kind: str, analysis: str) -> None:
    make, batches, loss, by_hand = KINDS[kind]
    nets = networks(make)
    by_hand = by_hand or (lambda net, batch: loss(net(batch[0]), batch[1]))
    expected = [
        sum(len(batch[1]) * float(by_hand(net, deepcopy(batch)).detach()) for batch in batches) / 24
        for net in nets.values()
    ]
    given = deepcopy(batches)
    found = ANALYSES[analysis](nets, data=given, loss=loss, progress=False)
    np.testing.assert_allclose(found.values.ravel(), expected, rtol=2e-5)
    flat, before = ([t for b in both for t in _tensors(b)] for both in (given, batches))
    assert all(torch.equal(a, b) for a, b in zip(flat, before, strict=True))


def _tensors(nest: Any) -> list[Tensor]:
    if isinstance(nest, Tensor):
        return [nest]
    return [t for part in (nest.values() if hasattr(nest, "values") else nest) for t in _tensors(part)]


def test_sharpness_of_complex_parameters_is_that_of_their_two_real_parts() -> None:
    class Split(Body):
        """The same network with real parameters."""

        def __init__(self) -> None:
            super().__init__()
            self.turn = nn.Parameter(torch.view_as_real(Rotating().turn.detach()))

        def forward(self, x: Tensor) -> Tensor:
            turned = torch.view_as_complex(x.reshape(-1, 2, 2).contiguous()) * torch.view_as_complex(self.turn)
            return self.body(torch.view_as_real(turned).flatten(1))

    whole, split = Rotating(), Split()
    split.load_state_dict(whole.state_dict() | {"turn": torch.view_as_real(whole.turn.detach())})
    a, b = (
        pn.sharpness(
            net,
            data=BATCHES,
            loss=F.cross_entropy,
            n_steps=4,
            measures=("worst", "average"),
            second_order=False,
            n_starts=1,
            progress=False,
        )
        for net in (whole, split)
    )
    np.testing.assert_allclose(a.rise, b.rise, rtol=1e-4)


def test_cka_does_not_count_the_passes_of_a_loss() -> None:
    nets = networks(Body)
    options = {"data": [(X, X[:, 0].clone())], "progress": False}
    of_model = pn.functional_distance(nets, loss=residual, **options)
    plain = pn.functional_distance(nets, loss=lambda o, t: (o.mean(1) - t).square().mean(), **options)
    np.testing.assert_allclose(of_model.cka, plain.cka, rtol=1e-5)


def test_a_model_that_only_its_loss_can_call_has_a_loss_and_no_predictions() -> None:
    ds = pn.compare(
        networks(Body), data=KINDS["loss of parts of the model"][1], loss=of_body, hessian=False, saturation=False,
        progress=False,
    )  # fmt: skip
    assert bool(ds.loss.notnull().all())
    assert bool(ds.error.isnull().all())


def test_a_loss_takes_the_model_if_its_first_parameter_says_so() -> None:
    assert takes_model(residual)
    assert not any(map(takes_model, (F.cross_entropy, nn.MSELoss(), of_logits, torch.add)))


@pytest.mark.parametrize("analysis", ANALYSES)
def test_the_loss_that_a_network_returns_is_pointed_out(analysis: str) -> None:
    batches = [({"x": x, "labels": y}, y) for x, y in BATCHES]
    with pytest.raises(PnError, match='give loss="model"'):
        ANALYSES[analysis](networks(Model), data=batches, progress=False)
    with pytest.raises(PnError, match="returns a Tensor without a loss"):
        ANALYSES[analysis](networks(Body), data=BATCHES, loss="model", progress=False)


@pytest.mark.parametrize("analysis", ANALYSES)
def test_a_mean_over_unequal_numbers_of_tokens_is_refused(analysis: str) -> None:
    def unmasked(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.square().sum(1) * (1 + targets / 500)).sum() / (1 + targets / 500).sum()

    with pytest.raises(PnError, match="average within each example first"):
        ANALYSES[analysis](networks(Body), data=[(X, Y)], loss=unmasked, progress=False)

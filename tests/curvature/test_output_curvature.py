"""The Hessian of cross-entropy in the outputs in closed form against the derivative of its gradient."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp
from torch.nn import functional as F

from pnanalysis import GGNOperator
from pnanalysis.curvature import output_curvature
from pnanalysis.curvature.output_curvature import closed_form
from pnanalysis.evaluation.losses import loss_on

N_CLASSES = 5
OPTIONS = {
    "plain": {},
    "weights": {"weight": torch.linspace(0.5, 2.0, N_CLASSES, dtype=torch.float64)},
    "ignored": {"ignore_index": 3},
    "smoothed": {"label_smoothing": 0.3},
    "all": {
        "weight": torch.linspace(0.5, 2.0, N_CLASSES, dtype=torch.float64),
        "ignore_index": 3,
        "label_smoothing": 0.3,
    },
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("places", [(), (7,), (2, 3)], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("at_once", [1, 12, 10**6])
def test_it_is_the_derivative_of_the_gradient(
    options: dict[str, Any], places: tuple[int, ...], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_curvature, "_AT_ONCE", at_once)
    outputs, u = 3 * drawn(4, N_CLASSES, *places), drawn(4, N_CLASSES, *places, seed=1)
    targets = torch.arange(outputs[:, 0].numel()).reshape(4, *places) % N_CLASSES
    loss = partial(F.cross_entropy, **options)
    product = closed_form(loss_on(loss, outputs.device, outputs.dtype), outputs, targets)
    assert product is not None
    expected = jvp(grad(lambda z: loss(z, targets)), (outputs,), (u,))[1]
    assert torch.allclose(product(u), expected, rtol=1e-12, atol=1e-14)


def test_outputs_of_any_size_give_no_overflow() -> None:
    outputs, targets = torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([1])
    product = closed_form(loss_on(F.cross_entropy, outputs.device, outputs.dtype), outputs, targets)
    assert product is not None
    assert torch.equal(product(torch.ones(1, 3)), torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (F.mse_loss, torch.zeros(4, N_CLASSES)),
        (F.nll_loss, torch.zeros(4, dtype=torch.long)),
        (F.cross_entropy, torch.full((4, N_CLASSES), 1 / N_CLASSES)),
        (lambda outputs, targets: F.cross_entropy(outputs, targets), torch.zeros(4, dtype=torch.long)),
    ],
    ids=["numbers", "log-probabilities", "probabilities as targets", "own"],
)
def test_other_losses_have_none(loss: Any, targets: Tensor) -> None:
    outputs = torch.zeros(4, N_CLASSES)
    assert closed_form(loss_on(loss, outputs.device, outputs.dtype), outputs, targets) is None


@pytest.mark.parametrize("expected_products", [1, 1000], ids=["untraced", "traced"])
@pytest.mark.parametrize("method", ["_product", "_direct"])
def test_products_are_those_of_the_same_loss_that_is_not_recognised(method: str, expected_products: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(6, 4), nn.Tanh(), nn.Linear(4, N_CLASSES)).double()
    by_class = nn.Sequential(network, Classes())
    tokens, targets = torch.randint(6, (3, 7)), torch.randint(N_CLASSES, (3, 7))
    targets[1, 3:] = -100
    products = []
    for loss in (F.cross_entropy, lambda outputs, targets: F.cross_entropy(outputs, targets)):
        operator = GGNOperator(by_class, loss, [(tokens, targets)], expected_products=expected_products)
        v = drawn(operator.shape[0], seed=2)
        if method == "_product":
            products += [
                operator.matvec(v),
                operator.forms(v[:, None], v[:, None]) @ torch.from_numpy(operator.group_weights),
            ]
        else:
            parts = [p.clone() for p in torch.split(v, [s.numel() for s in operator.parameter_shapes])]
            parts = [p.view(s) for p, s in zip(parts, operator.parameter_shapes, strict=True)]
            products += [torch.cat([p.flatten() for p in operator._direct(operator._few)(parts)])]
    half = len(products) // 2
    for a, b in zip(products[:half], products[half:], strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


class Classes(nn.Module):
    def forward(self, outputs: Tensor) -> Tensor:
        return outputs.transpose(1, 2)

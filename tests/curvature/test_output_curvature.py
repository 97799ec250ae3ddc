"""The Hessian of cross-entropy in the outputs in closed form against the derivative of its gradient."""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from pnanalysis import GGNOperator, HessianOperator
from pnanalysis.curvature import output_curvature
from pnanalysis.curvature.output_curvature import closed_form, closed_form_slope
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


@pytest.mark.parametrize("places", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("at_once", [1, 12, 10**6])
def test_the_slope_and_its_derivatives_are_those_of_torch(
    options: dict[str, Any], places: tuple[int, ...], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_curvature, "_AT_ONCE", at_once)
    outputs, u = 3 * drawn(4, N_CLASSES, *places), drawn(4, N_CLASSES, *places, seed=1)
    targets = torch.arange(outputs[:, 0].numel()).reshape(4, *places) % N_CLASSES
    loss = partial(F.cross_entropy, **options)
    known = loss_on(loss, outputs.device, outputs.dtype)
    expected, curved = jvp(grad(lambda z: loss(z, targets)), (outputs,), (u,))

    leaf = outputs.clone().requires_grad_()
    slope = closed_form_slope(known, leaf, targets)
    assert slope is not None
    assert torch.allclose(slope, expected, rtol=1e-12, atol=1e-14)
    (by_reverse,) = torch.autograd.grad(slope, leaf, u)
    assert torch.allclose(by_reverse, curved, rtol=1e-12, atol=1e-14)
    with forward_ad.dual_level():
        pushed = closed_form_slope(known, forward_ad.make_dual(outputs, u), targets)
        assert torch.allclose(forward_ad.unpack_dual(pushed).tangent, curved, rtol=1e-12, atol=1e-14)


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


@pytest.mark.parametrize("at_once", [12, 10**6], ids=["in pieces", "whole"])
@pytest.mark.parametrize("operator", [GGNOperator, HessianOperator])
@pytest.mark.parametrize("way", ["traced", "reverse mode", "recomputed activations"])
def test_products_are_those_of_the_same_loss_that_is_not_recognised(
    way: str, operator: Any, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_curvature, "_AT_ONCE", at_once)
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    network = nn.Sequential(nn.Embedding(6, 4), block, nn.Linear(4, N_CLASSES), Classes()).double()
    tokens, targets = torch.randint(6, (3, 7)), torch.randint(N_CLASSES, (3, 7))
    targets[1, 3:] = -100
    options = {"expected_products": 1000 if way == "traced" else 1}
    if way == "recomputed activations":
        options["checkpoint_activations"] = True
    products = []
    for loss in (F.cross_entropy, unknown):
        op = operator(network, loss, [(tokens, targets)], **options)
        V = drawn(op.shape[0], 3, seed=2)
        products += [op.matmat(V), op.forms(V, V) @ torch.from_numpy(op.group_weights)]
        assert op.method == way
    for a, b in zip(products[:2], products[2:], strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("expected_products", [1, 1000], ids=["reverse mode", "traced"])
def test_hessian_of_masked_tokens_equals_the_dense_one(expected_products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_curvature, "_AT_ONCE", 12)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(6, 3), nn.Tanh(), nn.Linear(3, N_CLASSES), Classes()).double()
    tokens, targets = torch.randint(6, (5, 4)), torch.randint(N_CLASSES, (5, 4))
    targets[2, 1:] = -100
    loss = nn.CrossEntropyLoss(torch.linspace(0.5, 2.0, N_CLASSES), label_smoothing=0.1)
    batches = [(tokens[:2], targets[:2]), (tokens[2:], targets[2:])]
    found = HessianOperator(network, loss, batches, expected_products=expected_products).to_dense()

    loss, parameters = loss.double(), dict(network.named_parameters())
    shapes = [p.shape for p in parameters.values()]

    def mean(theta: Tensor) -> Tensor:
        parts = [p.view(s) for p, s in zip(theta.split([s.numel() for s in shapes]), shapes, strict=True)]
        return loss(functional_call(network, dict(zip(parameters, parts, strict=True)), (tokens,)), targets)

    expected = hessian(mean)(torch.cat([p.detach().flatten() for p in parameters.values()]))
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("checkpoint", [False, True], ids=["reverse mode", "recomputed activations"])
def test_products_of_a_large_vocabulary_hold_no_graph_of_the_loss(
    checkpoint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_curvature, "_AT_ONCE", 2**14)
    torch.manual_seed(0)
    n_classes = 2**13
    network = nn.Sequential(nn.Embedding(8, 2), nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, n_classes), Classes())
    batch = torch.randint(8, (2, 16)), torch.randint(n_classes, (2, 16))
    held = []
    for loss in (F.cross_entropy, unknown):
        op = HessianOperator(network, loss, [batch], expected_products=1, checkpoint_activations=checkpoint)
        v = torch.ones(op.shape[0])
        op.matvec(v)
        held.append(peak(partial(op.matvec, v)) / (4 * batch[1].numel() * n_classes))
    assert held[0] < held[1] - 2  # arrays of the size of the outputs


def unknown(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def peak(call: Any) -> int:
    """Most bytes of tensors that a call holds at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events)
    return max(accumulate(n for _, n in changes))


class Classes(nn.Module):
    def forward(self, outputs: Tensor) -> Tensor:
        return outputs.transpose(1, 2)

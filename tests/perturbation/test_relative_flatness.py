"""Relative flatness: dense Hessians, the closed form of a softmax layer, and what leaves it as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn import functional as F

import pnanalysis as pn
from pnanalysis.curvature.operators import HessianOperator
from pnanalysis.errors import ModelError
from pnanalysis.perturbation.relative_flatness import last_weight, output_dim, relative_flatness, weight_of
from pnanalysis.perturbation.weight_uses import weight_uses

X, Y = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).double(), torch.arange(40) % 3


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).double()


def operator(net: nn.Module, name: str) -> HessianOperator:
    return HessianOperator(net, F.cross_entropy, [(X[:25], Y[:25]), (X[25:], Y[25:])], params=name)


def dense(net: nn.Module, name: str) -> float:
    w = net.get_parameter(name).detach()
    d, m = w.shape
    blocks = operator(net, name).to_dense().reshape(d, m, d, m)
    return float(torch.einsum("ac,bc,aibi->", w, w, blocks))


@pytest.mark.parametrize("name", ["2.weight", pytest.param("4.weight", marks=pytest.mark.slow)])
def test_few_numbers_are_summed_up_exactly_and_more_are_estimated(name: str) -> None:
    net = network()
    exact = dense(net, name)
    whole = relative_flatness(operator(net, name), net.get_parameter(name), n_probes=64)
    assert whole.value == pytest.approx(exact, rel=1e-9)
    assert whole.probe_se == 0
    some = relative_flatness(operator(net, name), net.get_parameter(name), n_probes=8)
    assert abs(some.value - exact) < 4 * some.probe_se
    assert 0 < some.probe_se < abs(exact)


def test_that_of_a_softmax_layer_has_a_closed_form_with_its_error_of_examples() -> None:
    net = network()
    features = net[:4](X).detach()
    p, w = torch.softmax(net(X).detach(), 1), net[4].weight.detach()
    gram = w @ w.T
    each = features.square().sum(1) * ((p * gram.diagonal()).sum(1) - ((p @ gram) * p).sum(1))
    found = relative_flatness(operator(net, "4.weight"), w, n_probes=64)
    assert found.value == pytest.approx(float(each.mean()), rel=1e-9)
    assert found.data_se == pytest.approx(float(each.std() / 40**0.5), rel=1e-9)
    assert found.interval()[0] < found.value < found.interval()[1]


@pytest.mark.slow
def test_estimates_of_many_seeds_scatter_as_their_errors_say() -> None:
    net = network()
    exact = dense(net, "2.weight")
    op = operator(net, "2.weight")
    found = [relative_flatness(op, net[2].weight, seed, n_probes=8) for seed in range(30)]
    inside = sum(abs(one.value - exact) < 2.36 * one.probe_se for one in found)  # of Student with 7 degrees
    assert inside >= 25  # of 28.5 expected


def test_rescaling_relu_layers_leaves_it_as_it_was() -> None:
    net, scaled = network(), network()
    with torch.no_grad():
        scaled[2].weight *= 7
        scaled[2].bias *= 7
        scaled[4].weight /= 7
    for name in ("2.weight", "4.weight"):
        one, two = (relative_flatness(operator(n, name), n.get_parameter(name), n_probes=64).value
                    for n in (net, scaled))  # fmt: skip
        assert one == pytest.approx(two, rel=1e-9)


def test_the_layer_is_one_with_a_single_matrix() -> None:
    net = network()
    assert last_weight(net) == "4.weight"
    assert weight_of(net, "2") == "2.weight"
    assert last_weight(nn.BatchNorm1d(3)) is None
    with pytest.raises(ModelError, match="one weight matrix"):
        weight_of(net, "*")
    with pytest.raises(ModelError, match="has none"):
        weight_of(net, "2.bias")


class Transposed(nn.Module):
    """As Conv1D of transformers: its weight has inputs first."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def flatness(net: nn.Module, inputs: Tensor = X, **options: Any) -> xr.Dataset:
    data = (inputs, Y[: len(inputs)])
    return pn.sharpness(
        net, data=data, loss=F.cross_entropy, measures=["flatness"], dtype="float64", progress=False, **options
    ).squeeze()


def test_rows_are_outputs_however_a_layer_stores_its_weight() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), Transposed(6, 3)).double()
    same = nn.Sequential(net[0], nn.Tanh(), nn.Linear(6, 3, bias=False)).double()
    same[2].weight.data = net[2].weight.detach().T.clone()
    found, expected = flatness(net), flatness(same)
    assert float(expected.relative_flatness) == pytest.approx(dense(same, "2.weight"), rel=1e-9)
    assert float(found.relative_flatness) == pytest.approx(float(expected.relative_flatness), rel=1e-9)


def test_transposed_convolutions_have_their_outputs_second() -> None:
    torch.manual_seed(0)
    images = torch.randn(12, 3, 1, 1, dtype=torch.float64)
    net = nn.Sequential(nn.ConvTranspose2d(3, 4, 1), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)).double()
    same = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Flatten(), net[3]).double()
    same[0].weight.data = net[0].weight.detach().movedim(1, 0).clone()
    same[0].bias.data = net[0].bias.detach().clone()
    values = [float(flatness(one, images, layer="0").relative_flatness) for one in (net, same)]
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    grouped = nn.Sequential(nn.ConvTranspose2d(3, 6, 1, groups=3), nn.Flatten(), nn.Linear(6, 3)).double()
    with pytest.warns(UserWarning, match="transposed convolution in groups"):
        assert flatness(grouped, images, layer="0").relative_flatness.isnull()


class HeadFirst(nn.Module):
    """Its last layer is the first to be registered."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.body = nn.Linear(6, 3), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.body(x)))
        return out


def test_the_last_layer_is_the_one_that_is_used_last() -> None:
    net = HeadFirst().double()
    assert str(flatness(net).flatness_layer.values) == "head.weight"
    assert float(flatness(net).relative_flatness) == pytest.approx(dense(net, "head.weight"), rel=1e-9)


PRODUCTS: dict[str, tuple[Any, int]] = {
    "x @ w": (lambda x, w: x @ w, 1),
    "w.T x": (lambda x, w: (w.T @ x.T).T, 1),
    "x @ w.T": (lambda x, w: x @ w.transpose(0, 1), 0),
    "addmm": (lambda x, w: torch.addmm(torch.zeros(4), x, w), 1),
    "linear": (lambda x, w: F.linear(x, weight=w), 0),
    "w x": (lambda x, w: torch.mm(w, x.T).T, 0),
}


@pytest.mark.parametrize(("product", "dim"), PRODUCTS.values(), ids=PRODUCTS)
def test_uses_of_a_weight_tell_its_outputs(product: Any, dim: int) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = product(x, self.weight)
            return out

    net = Own()
    uses = weight_uses(net, torch.randn(7, 4))
    assert output_dim(net, "weight", uses) == dim
    assert len(uses) == 1
    x, other = torch.randn(5, 4), torch.eye(4)  # an output is a sum over the other dim: by brute force
    other[(2, 1) if dim == 0 else (1, 2)] = 5.0
    changed = (product(x, other) != product(x, torch.eye(4))).any(0)
    assert changed.nonzero().flatten().tolist() == [2]


def test_where_outputs_are_is_not_guessed() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ni,io->no", x, self.weight)

    with pytest.warns(UserWarning, match="it is not seen which dim of 'weight' counts outputs"):
        assert flatness(Own().double()).relative_flatness.isnull()

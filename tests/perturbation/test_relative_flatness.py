"""Relative flatness: dense Hessians, the closed form of a softmax layer, and what leaves it as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pnanalysis.curvature.operators import HessianOperator
from pnanalysis.errors import ModelError
from pnanalysis.perturbation.relative_flatness import last_weight, relative_flatness, weight_of

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

"""The persistent penalty compared with its formula and finite differences."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from pnanalysis.errors import TrainingError
from trainers import PersistentPenalty
from trainers.loop.persistence import choose_layers


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)).double()


def vector(model: nn.Module, layer: int) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model[layer].parameters()])


def by_the_formula(model: nn.Module, ends: list[nn.Module], lam: float, layers: list[int]) -> float:
    total = 0.0
    for end in ends:
        for layer in layers:
            theta, Theta = vector(model, layer), vector(end, layer)
            total += abs(float(Theta @ theta)) / float(Theta @ Theta)
    return lam * total


@pytest.mark.parametrize(
    ("layers", "positions"), [("all", [0, 1, 3]), ("3", [3]), (0, [0]), (["0", "3"], [0, 3]), ([-1, -3], [0, 3])]
)
@pytest.mark.parametrize("n_ends", [1, 5])
def test_value_follows_the_formula(layers: object, positions: list[int], n_ends: int) -> None:
    model, ends = network(), [network(seed) for seed in range(1, n_ends + 1)]
    penalty = PersistentPenalty(model, lam=0.3, layers=layers)
    for end in ends:
        penalty.add(end)
    expected = by_the_formula(model, ends, 0.3, positions)
    assert float(penalty().detach()) == pytest.approx(expected, rel=1e-14)  # float64: a few roundings of 2^-53


def test_gradient_agrees_with_finite_differences() -> None:
    model = network()
    penalty = PersistentPenalty(model, lam=0.3)
    for seed in range(1, 4):
        penalty.add(network(seed))
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(penalty(), parameters)
    for parameter, slope in zip(parameters, gradient, strict=True):
        direction = torch.randn_like(parameter)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                values.append(float(penalty()))
                parameter.sub_(direction, alpha=step)
        # piecewise linear: differences are exact but for cancellation, 2^-53 / 1e-5 relative to the value
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(float((slope * direction).sum()), rel=1e-8, abs=1e-9)


def test_gradient_is_the_signed_sum_of_scaled_end_points() -> None:
    model, end = network(), network(1)
    penalty = PersistentPenalty(model, lam=0.5, layers="3")
    penalty.add(end)
    (gradient,) = torch.autograd.grad(penalty(), [model[3].weight])
    theta, Theta = vector(model, 3), vector(end, 3)
    expected = 0.5 * torch.sign(Theta @ theta) * end[3].weight.detach() / (Theta @ Theta)
    torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=0)


def test_end_points_are_copies() -> None:
    model = network()
    penalty = PersistentPenalty(model)
    end = copy.deepcopy(model)
    penalty.add(end)
    before = float(penalty())
    with torch.no_grad():
        for parameter in end.parameters():
            parameter.zero_()
    assert float(penalty()) == before
    assert len(penalty) == 1


def test_without_end_points_it_is_zero_and_differentiable() -> None:
    model = network()
    value = PersistentPenalty(model)()
    assert float(value) == 0
    value.backward()


def test_random_layers_depend_on_the_seed_alone() -> None:
    model = network()
    drawn = {seed: tuple(PersistentPenalty(model, layers="random", seed=seed).layers) for seed in range(30)}
    assert {name for names in drawn.values() for name in names} == {"0", "1", "3"}
    assert drawn[4] == tuple(PersistentPenalty(network(9), layers="random", seed=4).layers)


def test_a_zero_layer_is_left_out_with_one_warning() -> None:
    model, end = network(), network(1)
    with torch.no_grad():
        end[3].weight.zero_()
        end[3].bias.zero_()
    penalty = PersistentPenalty(model, lam=1.0)
    with pytest.warns(UserWarning, match="'3'.*left out") as caught:
        for _ in range(2):
            penalty.add(end)
    assert len(caught) == 1
    assert float(penalty().detach()) == pytest.approx(2 * by_the_formula(model, [end], 1.0, [0, 1]), rel=1e-14)


@pytest.mark.parametrize("lam", [-1.0, math.nan, math.inf])
def test_a_bad_strength_is_refused(lam: float) -> None:
    with pytest.raises(TrainingError, match="lam"):
        PersistentPenalty(network(), lam=lam)


@pytest.mark.parametrize("layers", ["fc9", 17, ["0", "conv"]])
def test_an_unknown_layer_lists_the_known_ones(layers: object) -> None:
    with pytest.raises(TrainingError, match="there are 0, 1, 3"):
        PersistentPenalty(network(), layers=layers)


def test_an_end_point_of_another_architecture_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"3\.weight"):
        PersistentPenalty(network()).add(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).double())


@pytest.mark.parametrize("size", [1.0, *(pytest.param(size, marks=pytest.mark.slow) for size in (0.01, 100.0))])
def test_signs_are_right_all_along_a_path_that_crosses_many_kinks(size: float) -> None:
    torch.manual_seed(0)
    model, ends = network(), [network(seed) for seed in range(1, 8)]
    with torch.no_grad():  # small end points repel with large vectors, and large ones with small
        for parameter in (p for end in ends for p in end.parameters()):
            parameter.mul_(size)
    penalty = PersistentPenalty(model, lam=0.3)
    for end in ends:
        penalty.add(end)
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    flips, before = 0, penalty.inner_products()
    for step in range(600):
        value = penalty()
        assert float(value.detach()) == pytest.approx(by_the_formula(model, ends, 0.3, [0, 1, 3]), rel=1e-12)
        gradient = torch.autograd.grad(value, list(model.parameters()))
        products = penalty.inner_products()
        expected = sum(p.abs().sum() for p in products.values()) * 0.3
        direct = torch.autograd.grad(expected, list(model.parameters()))
        torch.testing.assert_close(gradient, direct, rtol=1e-10, atol=1e-13 / size)
        flips += sum(int((products[name].sign() != before[name].sign()).sum()) for name in products)
        before = products
        with torch.no_grad():
            for p, v in zip(model.parameters(), velocity, strict=True):
                p.add_(v.mul_(0.95).add_(torch.randn_like(p), alpha=0.02), alpha=0.2 if step < 500 else 0.0)
    assert flips > 10  # the path was worth the test


@pytest.mark.parametrize("form", ["absolute", "squared", "cosine"])
@pytest.mark.parametrize("from_start", [False, True])
def test_other_forms_and_origins_follow_their_formulas(form: str, from_start: bool) -> None:
    model, end, start = network(), network(1), network(2)
    penalty = PersistentPenalty(model, lam=0.5, layers="3", form=form, origin=start if from_start else None)
    penalty.add(end)
    away = vector(start, 3) if from_start else 0.0
    theta, Theta = vector(model, 3) - away, vector(end, 3) - away
    product = abs(Theta @ theta)
    expected = {
        "absolute": product / (Theta @ Theta),
        "squared": (product / (Theta @ Theta)) ** 2,
        "cosine": product / (Theta.norm() * theta.norm()),
    }[form]
    assert float(penalty().detach()) == pytest.approx(0.5 * float(expected), rel=1e-12)


@pytest.mark.filterwarnings("ignore:layer '1' of an end point is all zeros")  # batch norm, alike in all networks
@pytest.mark.parametrize("form", ["absolute", "squared", "cosine"])
def test_at_the_origin_itself_nothing_is_infinite(form: str) -> None:
    model = network()
    penalty = PersistentPenalty(model, form=form, origin=copy.deepcopy(model))
    penalty.add(network(1))
    value = penalty()
    value.backward()
    assert float(value) == 0
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_an_unknown_form_lists_the_known_ones() -> None:
    with pytest.raises(TrainingError, match="absolute, squared, cosine"):
        PersistentPenalty(network(), form="quartic")


@pytest.mark.parametrize("form", ["absolute", "squared", "cosine"])
def test_long_layers_keep_their_digits(form: str) -> None:
    """In float32 torch's own sums over this many terms are off by 1e-4."""
    torch.manual_seed(0)
    model = nn.Linear(2000, 1500, bias=False)
    end = {"weight": model.weight.detach() * (1 + torch.randn_like(model.weight))}
    double = copy.deepcopy(model).double()
    products, values, gradients = [], [], []
    for network in (model, double):
        penalty = PersistentPenalty(network, lam=1.0, form=form)
        penalty.add(end)
        products.extend(penalty.inner_products().values())
        values.append(penalty())
        gradients.append(torch.autograd.grad(values[-1], network.weight)[0])
    for one, exact in (products, values):
        assert float(one.detach()) == pytest.approx(float(exact.detach()), rel=5e-6)
    torch.testing.assert_close(
        gradients[0].double(), gradients[1], rtol=1e-5, atol=1e-6 * float(gradients[1].abs().max())
    )


def test_scripts_that_name_no_strength_go_on_with_the_same_one() -> None:
    assert PersistentPenalty(network()).lam == 0.01


@pytest.mark.parametrize(("layers", "chosen"), [(0, ["a"]), (-1, ["c"]), ([2, -3], ["a", "c"])])
def test_layers_are_chosen_by_position(layers: int | list[int], chosen: list[str]) -> None:
    assert choose_layers(["a", "b", "c"], layers) == chosen


@pytest.mark.parametrize("position", [3, -4])
def test_positions_beyond_the_layers_are_refused(position: int) -> None:
    with pytest.raises(TrainingError, match="no layer"):
        choose_layers(["a", "b", "c"], position)


@pytest.mark.parametrize("form", ["absolute", "squared", "cosine"])
def test_a_complex_parameter_counts_as_two_real_ones(form: str) -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.cdouble))
            self.bias = nn.Parameter(torch.randn(3, dtype=torch.double))

    torch.manual_seed(0)
    model, end = Spectral(), Spectral()
    penalty = PersistentPenalty(model, 1.0, form=form)
    penalty.add(end)
    theta, anchor = (torch.cat([torch.view_as_real(one.weight).reshape(-1), one.bias]).detach() for one in (model, end))
    product = (theta @ anchor).abs()
    expected = {
        "absolute": product / anchor.norm() ** 2,
        "squared": (product / anchor.norm() ** 2) ** 2,
        "cosine": product / anchor.norm() / theta.norm(),
    }[form]
    torch.testing.assert_close(penalty().detach(), expected)
    penalty().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.is_complex()


def test_a_network_without_trainable_parameters_is_refused() -> None:
    for layers in ("all", "random"):
        with pytest.raises(TrainingError, match="no trainable parameters"):
            PersistentPenalty(nn.Linear(2, 2).requires_grad_(False), layers=layers)

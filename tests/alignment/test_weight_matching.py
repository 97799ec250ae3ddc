"""Alignment: relabelled networks compute the same and are recovered; networks that cannot be traced are refused."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pnanalysis.alignment.permutation_symmetries import find_groups
from pnanalysis.alignment.relabelling import Change, Relabelling
from pnanalysis.alignment.similarities import Similarities
from pnanalysis.alignment.weight_matching import _improved, align, check_preserved
from pnanalysis.errors import ModelError
from pnanalysis.geometry.distances import state_distance
from trainers.zoo.models import lenet5, tanh7


class Block(nn.Module):
    """A residual block whose shortcut is a convolution."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.norm2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.shortcut = nn.Conv2d(before, after, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        y += self.shortcut(x)
        return F.relu(y)


class ResNet(nn.Module):
    """Two residual blocks, the mean over the image, a linear output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.out = nn.Conv2d(3, 8, 3), Block(8, 10), Block(10, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(self.one(torch.relu(self.stem(x)))).mean((2, 3)))


class Separable(nn.Module):
    """Depthwise convolutions, a gate of channels, group normalisation, sums with scalars."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.deep, self.norm = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.GroupNorm(1, 8)
        self.gate, self.down = nn.Linear(8, 8), nn.Linear(8 * 16, 6)
        self.last = nn.LayerNorm(6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.deep(self.up(x)) + 0.1)
        gate = torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1).flatten(1)))
        x = x * gate.view(x.size(0), -1, 1, 1)
        return self.out(F.gelu(self.last(self.down(x.reshape(x.shape[0], -1)))))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, bias=False),
        nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 9, 20), nn.BatchNorm1d(20), nn.ReLU(),
        nn.Linear(20, 5),
    )  # fmt: skip


NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 15), nn.ReLU(), nn.Linear(15, 3)), (6,)),
    "tanh": (lambda: tanh7((1, 8, 8), width=12), (1, 8, 8)),
    "tanh with norms": (
        lambda: nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.Tanh(), nn.Linear(20, 9), nn.Tanh(),
                              nn.Linear(9, 3)),
        (6,),
    ),
    "lenet5": (lenet5, (3, 32, 32)),
    "convolutions with norms": (conv_net, (3, 12, 12)),
    "residual": (ResNet, (3, 16, 16)),
    "separable": (Separable, (2, 6, 6)),
}  # fmt: skip


def trained_looking(make) -> nn.Module:
    """A network without special values, such as zero biases or unit variances, among parameters and statistics."""
    torch.manual_seed(3)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.bias, std=0.3)
    return model


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_relabelled_network_computes_the_same_and_is_recovered(name: str) -> None:
    make, shape = NETWORKS[name]
    model, inputs = trained_looking(make), torch.randn(4, *shape)
    state, names = state_of(model), [n for n, _ in model.named_parameters()]
    groups = find_groups(model, inputs)
    shuffled = Relabelling.random(groups, seed=1).apply(state)
    # float64 forward passes that add in another order: about depth * width * 2^-53
    assert check_preserved(model, state, shuffled, inputs) < 1e-12
    assert state_distance(state, shuffled, names) > 0.5 * state_distance(state, {n: 0 * state[n] for n in names}, names)
    found = align(model, state, shuffled, inputs, n_restarts=4)
    back = found.apply(shuffled)
    assert all(torch.equal(back[n], state[n]) for n in state)


def test_tanh_networks_need_signs_too() -> None:
    model, inputs = trained_looking(NETWORKS["tanh"][0]), torch.randn(4, 1, 8, 8)
    state = state_of(model)
    groups = find_groups(model, inputs)
    assert [(group.size, group.odd) for group in groups] == [(12, True)] * 6
    flipped = Relabelling.random(groups, seed=2).apply(state)
    names = list(state)
    with_signs = align(model, state, flipped, inputs)
    without = align(model, state, flipped, inputs, signs=False)
    assert state_distance(state, with_signs.apply(flipped), names) == 0
    assert state_distance(state, without.apply(flipped), names) > 1
    assert all((change.signs == 1).all() for change in without.changes)


def test_one_hidden_layer_is_matched_as_by_trying_all_permutations() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    a = state_of(trained_looking(lambda: model))
    b = {name: torch.randn(tensor.shape) for name, tensor in a.items()}
    groups = find_groups(model, torch.randn(2, 3))
    trials = [Relabelling(groups, [Change(np.array(order), np.ones(5))]) for order in permutations(range(5))]
    best = min(state_distance(a, trial.apply(b), list(a)) for trial in trials)
    assert state_distance(a, align(model, a, b, torch.randn(2, 3)).apply(b), list(a)) == pytest.approx(best, rel=1e-6)


class Stream(nn.Module):
    """A residual stream that a layer maps onto itself: one permutation on both axes of its weight."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.read, self.mix, self.write = nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.read(x)
        return self.write(hidden + torch.relu(self.mix(hidden)))


def stream_state(seed: int) -> dict[str, Tensor]:
    """Random weights, of which those with one group on both axes dominate."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        for name, tensor in Stream().state_dict().items()
    }
    return {**state, "mix.weight": 3 * state["mix.weight"]}


def test_a_group_on_both_axes_of_a_weight_never_loses_and_the_search_ends() -> None:
    model, inputs = Stream().eval(), torch.randn(4, 3)
    (group,) = groups = find_groups(model, inputs)
    assert sorted(axis.dims for axis in group.axes if axis.tensor == "mix.weight") == [(0,), (1,)]
    for seed in range(20):
        a, b = stream_state(2 * seed), stream_state(2 * seed + 1)
        matching = Similarities(groups, set(a), a, b, ["none"])
        current, before = Relabelling.identity(groups), state_distance(a, b, list(a))
        steps = 0
        while (better := _improved(matching, current, 0)) is not None:
            current = better
            after = state_distance(a, current.apply(b), list(a))
            assert after < before
            before, steps = after, steps + 1
            assert steps < 20
        trials = [Relabelling(groups, [Change(np.array(order), np.ones(5))]) for order in permutations(range(5))]
        every = [state_distance(a, trial.apply(b), list(a)) for trial in trials]
        assert min(every) <= before + 1e-12  # a quadratic assignment: not always the best, never worse than it was


def test_a_relabelled_residual_stream_is_recovered() -> None:
    model, inputs = Stream().eval(), torch.randn(4, 3)
    groups = find_groups(model, inputs)
    for seed in range(20):
        state = stream_state(seed)
        shuffled = Relabelling.random(groups, seed).apply(state)
        back = align(model, state, shuffled, inputs).apply(shuffled)
        assert all(torch.equal(back[name], state[name]) for name in state)


def test_a_layer_that_is_called_twice_shares_its_groups() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.again, self.out = nn.Linear(4, 7), nn.Linear(7, 7), nn.Linear(7, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.into(x))
            for _ in range(2):
                x = x + torch.tanh(self.again(x))
            return self.out(x)

    model, inputs = Twice().eval(), torch.randn(3, 4)
    (group,) = find_groups(model, inputs)
    assert (group.size, group.odd, len(group.axes)) == (7, True, 6)
    state = state_of(model)
    check_preserved(model, state, Relabelling.random([group], 5).apply(state), inputs)


def test_a_relabelling_that_changes_the_function_is_caught() -> None:
    model, inputs = trained_looking(NETWORKS["mlp"][0]), torch.randn(4, 6)
    groups = find_groups(model, inputs)
    flips = [Change(np.arange(group.size), -np.ones(group.size)) for group in groups]  # ReLU is not odd
    wrong = Relabelling(groups, flips)
    with pytest.raises(ModelError, match="changed what the network computes"):
        check_preserved(model, state_of(model), wrong.apply(state_of(model)), inputs)

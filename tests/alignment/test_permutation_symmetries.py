"""Which channels of a network can be relabelled."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pnanalysis.alignment.permutation_symmetries import find_groups
from pnanalysis.alignment.relabelling import Relabelling
from pnanalysis.alignment.weight_matching import check_preserved
from pnanalysis.errors import ModelError
from trainers.zoo.models import alexnet, resnet18


def test_resnet18_and_alexnet_have_the_groups_they_should() -> None:
    groups = find_groups(resnet18().eval(), torch.randn(2, 3, 32, 32))
    streams = [(g.size, len({axis.tensor.rsplit(".", 1)[0] for axis in g.axes})) for g in groups if len(g.axes) > 6]
    # channels of a residual stream: written by stem or shortcut and each block, read by the next ones
    assert [size for size, _ in streams] == [64, 128, 256, 512]
    assert sorted(g.size for g in groups) == sorted([64] * 3 + [128] * 3 + [256] * 3 + [512] * 3)
    assert not any(g.odd for g in groups)
    sizes = [g.size for g in find_groups(alexnet().eval(), torch.randn(1, 3, 32, 32))]
    assert sizes == [64, 192, 384, 256, 256, 4096, 4096]


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Joining(nn.Module):
    """Two layers beside each other: their outputs keep their places, hidden channels in each need not."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)
        self.out = nn.Linear(6, 2) if hidden else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.a(x), self.b(x)], 1))


class Mixing(nn.Module):
    """Channels in two blocks that share what is done to them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).view(-1, 2, 3))


class Wrapped(nn.Module):
    """Outputs in a mapping, of which one is a hidden layer: its channels have a meaning to whoever reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> dict[str, object]:
        hidden = torch.relu(self.a(x))
        return {"logits": self.c(torch.relu(self.b(hidden))), "hidden": hidden, "cache": object(), "n": 1}


class Recurrent(nn.Module):
    """A GRU, whose gates are split from packed weights, and a linear output."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(2, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Branching(), "branches on data"),
        (Joining(hidden=False), "no hidden channels that may be permuted"),
        (nn.Linear(4, 2), "no hidden channels that may be permuted"),
    ],
    ids=["branching", "joined outputs", "linear"],
)
def test_networks_that_cannot_be_aligned_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message) as raised:
        find_groups(model.eval(), torch.randn(2, 4))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Joining(hidden=True), [(3, 3), (3, 3)]),
        (Mixing(), [(3, 3)]),
        (Wrapped(), [(5, 3)]),
        (nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(6, 2)), [(6, 3)]),
        (nn.Sequential(nn.Linear(4, 10), nn.GLU(), nn.Linear(5, 2)), [(5, 3)]),
        (nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 6, 1, groups=2), nn.ReLU(), nn.Conv1d(6, 2, 1)),
         [(3, 3), (3, 3)]),
        (nn.Sequential(weight_norm(nn.Linear(4, 6)), nn.Tanh(), weight_norm(nn.Linear(6, 2))), [(6, 4)]),
        (nn.Sequential(nn.Unflatten(1, (2, 2)), Recurrent()), [(5, 5)]),
    ],
    ids=["joined", "in blocks", "mapping", "viewed", "gated", "grouped convolution", "weight norm", "GRU"],
)  # fmt: skip
def test_channels_are_followed_through_views_and_joins(model: nn.Module, expected: list[tuple[int, int]]) -> None:
    """Sizes of the groups, and the number of tensors that each indexes."""
    torch.manual_seed(0)
    inputs, model = torch.randn(3, 4), model.eval()
    groups = find_groups(model, inputs)
    assert sorted((group.size, len({axis.tensor for axis in group.axes})) for group in groups) == sorted(expected)
    state = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    moved = Relabelling.random(groups, 1).apply(state)
    assert any(not torch.equal(moved[name], state[name]) for name in state)
    assert check_preserved(model, state, moved, inputs) < 1e-13


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_channels_are_followed_through_the_hook_form_of_weight_norm() -> None:
    """Its weight is computed before every pass, and stays in the module: none of a trace may be left there."""
    torch.manual_seed(0)
    layers = [nn.utils.weight_norm(layer) for layer in (nn.Linear(4, 6), nn.Linear(6, 2))]
    model, inputs = nn.Sequential(layers[0], nn.Tanh(), layers[1]).eval(), torch.randn(3, 4)
    before = [layer.weight.detach().clone() for layer in layers]
    groups = find_groups(model, inputs)
    assert [(group.size, len({axis.tensor for axis in group.axes})) for group in groups] == [(6, 4)]
    for layer, weight in zip(layers, before, strict=True):
        torch.testing.assert_close(layer.weight, weight, rtol=0, atol=0)
    state = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    assert check_preserved(model, state, Relabelling.random(groups, 1).apply(state), inputs) < 1e-13


@pytest.mark.parametrize("through", ["group norm", "grouped convolution, group norm"])
def test_channels_stay_in_the_block_that_is_normalised_together(through: str) -> None:
    torch.manual_seed(0)
    grouped = [nn.Conv2d(8, 8, 3, groups=4, padding=1), nn.ReLU()] if through != "group norm" else []
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *grouped, nn.GroupNorm(2, 8), nn.Tanh(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(8 * 16, 3)).double().eval()
    inputs = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    groups = find_groups(model, inputs)
    assert {(group.kind, group.size) for group in groups} >= {("blocks", 2), ("units", 2 if grouped else 4)}
    other = copy.deepcopy(model)
    for seed in range(5):
        other.load_state_dict(Relabelling.random(groups, seed).apply(model.state_dict()))
        assert not torch.equal(other[0].weight, model[0].weight)
        torch.testing.assert_close(other(inputs), model(inputs), rtol=0, atol=1e-12)

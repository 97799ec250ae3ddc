"""Which channels of a network can be relabelled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pnanalysis.alignment.permutation_symmetries import find_groups
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
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], 1)


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).view(-1, 2, 3))


@pytest.mark.parametrize(
    ("model", "message"),
    [(Branching(), "branches on data"), (Joining(), "cat"), (Mixing(), "reshape")],
    ids=["branching", "joining", "mixing"],
)
def test_networks_that_cannot_be_followed_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message) as raised:
        find_groups(model, torch.randn(2, 4))
    assert "\n" not in str(raised.value)

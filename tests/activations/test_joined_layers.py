"""Units of several layers side by side are not counted as those of one."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pnanalysis as pn

DATA = (torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3)


class Joined(nn.Module):
    """A rectifier of two layers of five units, of which the first is dead, put together in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.a, self.b, self.out = how, nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(10, 3)
        self.cell = nn.RNNCell(4, 5)
        nn.init.constant_(self.a.bias, -100.0)

    def forward(self, inputs: Tensor) -> Tensor:
        a, b = self.a(inputs), self.b(inputs)
        if self.how == "assigned":
            both = torch.zeros(len(inputs), 2, 5)
            both[:, 0], both[:, 1] = a, b
        elif self.how == "recurrent":
            first = self.cell(inputs)
            both = torch.stack([first, self.cell(inputs, first)], dim=1) - 100
        else:
            both = {
                "stacked": lambda: torch.stack([a, b], dim=1),
                "joined elsewhere": lambda: torch.cat([a[:, None], b[:, None]], dim=1),
                "signs": lambda: torch.stack([a, -a], dim=2),
                "joined units": lambda: torch.cat([a, b], dim=1),
                "twice": lambda: torch.stack([self.a(inputs), self.a(2 * inputs)], dim=1),
            }[self.how]()
        out: Tensor = self.out(torch.relu(both).flatten(1))
        return out


def saturation(how: str) -> Any:
    return pn.saturation(Joined(how), data=DATA, n=None, progress=False).sel(layer="relu").squeeze()


@pytest.mark.parametrize("how", ["stacked", "joined elsewhere", "assigned", "signs"])
def test_units_of_different_layers_are_not_known(how: str) -> None:
    with pytest.warns(UserWarning, match="units cannot be told from other axes in relu"):
        ds = saturation(how)
    assert ds.n_units.isnull()
    assert ds.dead_units.isnull()


@pytest.mark.parametrize(("how", "units", "dead"), [("joined units", 10, 5), ("twice", 5, 5), ("recurrent", 5, 5)])
def test_units_of_one_layer_or_joined_along_their_axis_are(how: str, units: int, dead: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ds = saturation(how)
    assert (float(ds.n_units), float(ds.dead_units)) == (units, dead)

"""Networks that draw in eval mode are found and refused; the generators of random numbers stay where they are."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pnanalysis as pn
from pnanalysis.errors import PnError
from pnanalysis.evaluation.randomness import differs_between_passes

X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (20,), generator=torch.Generator().manual_seed(1))


class Drawing(nn.Module):
    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.then = nn.Linear(4, 3), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.layer(x))


def rarely_dropped(h: Tensor) -> Tensor:
    return h * 0 if random.random() < 0.2 else h


RANDOM = {
    "sample": lambda h: h + 0.01 * torch.randn_like(h),
    "dropout": lambda h: F.dropout(h, 0.1, training=True),
    "numpy": lambda h: h * float(np.random.default_rng().normal()),
    "numpy's global generator": lambda h: h * np.random.rand(),  # noqa: NPY002
    "python": rarely_dropped,
}
FIXED = {
    "plain": lambda h: h,
    "not a number": lambda h: h / 0 * 0,
    "infinite": lambda h: h / 0,
    "draws that do not count": lambda h: h + 0 * torch.randn_like(h),
}


@pytest.mark.parametrize("then", RANDOM.values(), ids=RANDOM.keys())
def test_networks_that_draw_are_found(then: Callable[[Tensor], Tensor]) -> None:
    assert differs_between_passes(Drawing(then).eval(), X)


@pytest.mark.parametrize("then", FIXED.values(), ids=FIXED.keys())
def test_others_are_not(then: Callable[[Tensor], Tensor]) -> None:
    network = Drawing(then).eval()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert not differs_between_passes(network, X)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


ANALYSES = {
    "compare": lambda nets, loss: pn.compare(nets, data=(X, Y), loss=loss, hessian=False, progress=False),
    "functional_distance": lambda nets, loss: pn.functional_distance(nets, data=(X, Y), loss=loss, progress=False),
    "landscape": lambda nets, loss: pn.landscape(nets, data=(X, Y), loss=loss, n_points=3, progress=False),
    "random plane": lambda nets, loss: pn.landscape(
        nets[0], data=(X, Y), loss=loss, view="random", n_points=3, progress=False
    ),
    "sharpness": lambda nets, loss: pn.sharpness(
        nets, data=(X, Y), loss=loss, n_steps=2, measures=("worst", "average"), second_order=False, progress=False
    ),
}


def noisy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs + torch.randn_like(outputs), targets)


@pytest.mark.parametrize("analyse", ANALYSES.values(), ids=ANALYSES.keys())
@pytest.mark.parametrize(("then", "loss"), [(RANDOM["dropout"], F.cross_entropy), (FIXED["plain"], noisy)])
def test_analyses_refuse_them(analyse: Callable, then: Callable, loss: Callable) -> None:
    who = "the network" if loss is F.cross_entropy else "its loss"
    with pytest.raises(PnError, match=f"{who} draws at random in eval mode .* make it deterministic"):
        analyse([Drawing(then), Drawing(then)], loss)

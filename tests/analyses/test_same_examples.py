"""Every checkpoint and every pass of an analysis see the same examples, in the precision of the analysis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import pnanalysis as pn
from pnanalysis.errors import DataError
from pnanalysis.inputs.selection import select
from tests.cases import cases

X, Y = torch.randn(120, 4, generator=torch.Generator().manual_seed(0)), torch.arange(120) % 3


class Reshuffled:
    """Batches in another order on every pass, by a generator of its own."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for index in torch.from_numpy(self.generator.permutation(120)).split(20):
            yield X[index], Y[index]


QUIET = {"n": 60, "progress": False}
ANALYSES: dict[str, Callable[..., xr.DataArray]] = {
    "hessian": lambda nets, data: pn.hessian(nets, data=data, n_hvp=20, **QUIET).trace,
    "eigenpairs": lambda nets, data: pn.eigenpairs(nets, data=data, k=1, **QUIET).value.squeeze(),
    "sharpness": lambda nets, data: (
        pn.sharpness(
            nets,
            data=data,
            n_steps=2,
            measures=("worst", "average"),
            second_order=False,
            n_starts=1,
            n_directions=2,
            **QUIET,
        ).loss
    ),
    "blocks": lambda nets, data: pn.blocks(nets, data=data, n_hvp=16, **QUIET).network_trace,
    "saturation": lambda nets, data: pn.saturation(nets, data=data, **QUIET)["mean"].squeeze(),
    "landscape": lambda nets, data: pn.landscape(nets, data=data, n_points=3, **QUIET).loss.squeeze(),
    "compare": lambda nets, data: pn.compare(nets, data=data, hessian=False, **QUIET).loss.squeeze(),
    "functional_distance": lambda nets, data: pn.functional_distance(nets, data=data, **QUIET).disagreement[0],
}


@pytest.fixture
def twins() -> dict[str, nn.Module]:
    """The same network twice; a landscape between them needs a length, so one bias differs where it cannot matter."""
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    other = deepcopy(one)
    with torch.no_grad():
        other[2].bias += 1.0  # softmax does not see it
    return {"one": one, "other": other}


@pytest.mark.parametrize("name", ANALYSES)
def test_a_loader_without_an_order_is_the_same_for_all_networks(twins: dict[str, nn.Module], name: str) -> None:
    found = ANALYSES[name](twins, Reshuffled()).values
    np.testing.assert_allclose(found, found.ravel()[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", cases({name: name for name in ANALYSES}, ("eigenpairs",)))
def test_arrays_in_double_precision_are_those_in_single(twins: dict[str, nn.Module], name: str) -> None:
    single, double = (ANALYSES[name](twins, data).values for data in ((X, Y), (X.double().numpy(), Y.numpy())))
    np.testing.assert_allclose(single, double, rtol=1e-6)


@pytest.mark.parametrize("name", ANALYSES)
def test_numbers_that_are_not_finite_are_refused(twins: dict[str, nn.Module], name: str) -> None:
    with pytest.raises(DataError, match=r"train, batch 1: some numbers are not finite"):
        ANALYSES[name](twins, [(X[:40], Y[:40]), (X[40:] / 0, Y[40:])])


def test_sources_of_one_loader_share_what_is_read_of_it(twins: dict[str, nn.Module]) -> None:
    loader = Reshuffled()
    selection = select([twins], data=loader)
    first = selection.split(selection.sources[0], "train", 60, 0, "cpu")
    other = select([{"one": twins["one"]}], data=loader).sources[0]
    assert other.data is not selection.sources[0].data
    assert selection.split(other, "train", 60, 0, "cpu") is first

"""What is found in a folder of unfinished work belongs to the same network and the same data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import pnanalysis as pn
from pnanalysis.analyses.work_folder import WorkFolder, loss_tolerance

QUIET: dict[str, Any] = {"progress": False}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def loader(scale: float, noise: float) -> DataLoader[Any]:
    """Data that the network fits nearly exactly: losses of different sets differ by a millionth."""
    inputs = scale * torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    targets = network()(inputs) + noise * torch.randn(64, 1, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(inputs, targets.detach()), batch_size=32)


ANALYSES: dict[str, Callable[..., xr.Dataset]] = {
    "sharpness": lambda data, state: pn.sharpness(
        network(), data=data, loss=F.mse_loss, state=state, n_steps=2, n_directions=4, **QUIET
    ),
    "learning coefficient": lambda data, state: pn.learning_coefficient(
        network(), data=data, loss=F.mse_loss, state=state, n=64, n_draws=60, burn_in=20, n_chains=2, **QUIET
    ),
    "eigenpairs": lambda data, state: pn.eigenpairs(
        network(), data=data, loss=F.mse_loss, state=state, k=2, data_error="none", **QUIET
    ),
    "hessian": lambda data, state: pn.hessian(
        network(), data=data, loss=F.mse_loss, state=state, n_hvp=20, data_error="none", **QUIET
    ),
    "blocks": lambda data, state: pn.blocks(network(), data=data, loss=F.mse_loss, state=state, **QUIET),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of short chains
@pytest.mark.parametrize("analysis", ANALYSES)
def test_parts_of_other_data_are_not_taken_however_small_the_loss(analysis: str, tmp_path: Path) -> None:
    analyse = ANALYSES[analysis]
    analyse(loader(1.0, 1e-3), tmp_path / "state")
    other = loader(3.0, 2e-3)
    xr.testing.assert_identical(analyse(other, tmp_path / "state").drop_attrs(), analyse(other, None).drop_attrs())


def test_a_part_is_that_of_the_network_the_data_and_the_loss(tmp_path: Path) -> None:
    one, other = network(), network()
    other[0].weight.data += 1
    data, changed = [(torch.ones(2, 4), torch.zeros(2, 1))], [(torch.ones(2, 4), torch.ones(2, 1))]
    spectrum, made = pn.spectral_density(np.diag([1.0, 2.0]), progress=False), list[float]()

    def part(model: nn.Module, batches: Any, loss: float) -> float:
        def compute() -> xr.Dataset:
            made.append(float(len(made)))
            return spectrum.assign(trace=spectrum.trace.copy(data=made[-1]))

        with WorkFolder.held(tmp_path, {"seed": 0}) as folder:
            assert folder is not None
            return float(folder.of(model, batches).part("a", loss, compute).trace)

    assert [part(one, data, 1e-6), part(one, data, 1e-6), part(other, data, 1e-6)] == [0.0, 0.0, 1.0]
    assert [part(one, changed, 1e-6), part(one, data, 1e-6)] == [2.0, 0.0]
    assert [part(one, data, 1e-6 + 0.5e-7), part(one, data, 2e-6)] == [0.0, 3.0]
    assert 3.0 + loss_tolerance(3.0) == pytest.approx(3.0 * (1 + 1e-5), abs=2e-7)

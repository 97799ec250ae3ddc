"""The live monitor: the same numbers as the analysis of the same batches, without any effect on training."""

from __future__ import annotations

import copy
import doctest
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pnanalysis as pn
from pnanalysis.errors import ModelError, PnError


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(108, 12), nn.Tanh(), nn.Linear(12, 2)
    )


def batches(n: int, seed: int = 0) -> list[torch.Tensor]:
    return list(torch.randn(n, 40, 1, 8, 8, generator=torch.Generator().manual_seed(seed)))


def train(model: nn.Module, inputs: list[torch.Tensor], lr: float = 0.1) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=lr)
    for batch in inputs:
        optimiser.zero_grad()
        (model(batch) - 1).square().mean().backward()
        optimiser.step()


@pytest.mark.parametrize("n_examples", [None, 25])
def test_a_record_equals_the_analysis_of_the_same_batch(tmp_path: Path, n_examples: int | None) -> None:
    model, inputs = small_network(), batches(3)
    options = {"bin_range": (-1.0, 4.0), "bins": 20, "per_unit": True, "saturation_bins": 7}
    files = []
    with pn.SaturationMonitor(model, every=1, n_examples=n_examples, **options) as monitor:
        for i, batch in enumerate(inputs):
            files.append(tmp_path / f"{i}.pt")
            torch.save(model.state_dict(), files[-1])
            train(model, [batch])
    live = monitor.dataset()
    assert live.step.values.tolist() == [0, 1, 2]
    for i, file in enumerate(files):
        seen = inputs[i][:n_examples]
        source = pn.open_files(small_network(), [file], (seen, torch.zeros(len(seen))))
        offline = pn.saturation(source, split="train", n=None, progress=False, **options).isel(checkpoint=0)
        assert set(offline.data_vars) == set(live.data_vars)
        for name in offline.data_vars:
            # batches of one size: the same kernels give the same activations
            np.testing.assert_array_equal(live[name].isel(step=i), offline[name], err_msg=str(name))


def test_monitoring_does_not_change_training() -> None:
    watched, alone = small_network(), small_network()
    with pn.SaturationMonitor(watched, every=2):
        train(watched, batches(5))
    train(alone, batches(5))
    for mine, other in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in watched.modules())


def test_only_training_passes_count() -> None:
    model = small_network()
    with pn.SaturationMonitor(model, every=2) as monitor:
        train(model, batches(1))
        model.eval()
        for batch in batches(7):
            model(batch)
        model.train()
        train(model, batches(4))
    assert monitor.step == 5
    assert monitor.dataset().step.values.tolist() == [0, 2, 4]


def test_a_failed_pass_leaves_no_record_and_no_hooks() -> None:
    model = small_network()
    with pn.SaturationMonitor(model, every=1) as monitor:
        with pytest.raises(RuntimeError):
            model(torch.randn(4, 2, 8, 8))
        train(model, batches(1))
    assert monitor.dataset().step.values.tolist() == [1]
    assert torch.overrides._get_current_function_mode_stack() == []


def test_a_compiled_network_is_watched_and_stays_compiled() -> None:
    compilations = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> object:
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = small_network()
    compiled = torch.compile(copy.deepcopy(model), backend=backend)
    with pn.SaturationMonitor(compiled, every=3) as monitor:
        train(compiled, batches(7))
    with pn.SaturationMonitor(model, every=3) as plain:
        train(model, batches(7))
    assert len(compilations) == 1
    live, expected = monitor.dataset(), plain.dataset()
    assert live.layer.values.tolist() == expected.layer.values.tolist() == ["1", "4"]
    for name in live.data_vars:
        np.testing.assert_allclose(live[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=str(name))


class Tokens(nn.Module):
    """A linear layer and GELU at each of several places, as in a transformer; then one channel a feature."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.conv = nn.Conv1d(6, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.fc(x))
        return torch.sigmoid(self.conv(x.transpose(1, 2)))


def test_units_are_features_after_a_linear_layer_and_channels_after_a_convolution() -> None:
    model = Tokens()
    with pn.SaturationMonitor(model, every=1, per_unit=True) as monitor:
        model(torch.randn(5, 9, 4))
    ds = monitor.dataset().isel(step=0)
    assert ds.n_units.values.tolist() == [6, 3]
    assert ds.unit_dead.sel(layer="sigmoid").isnull().values.tolist() == [False] * 3 + [True] * 3


def test_networks_that_cannot_be_monitored_raise_an_error() -> None:
    linear = nn.Linear(3, 3)
    with pn.SaturationMonitor(linear) as monitor, pytest.raises(ModelError, match="no activation functions"):
        linear(torch.randn(2, 3))
    with pytest.raises(ModelError, match="no training pass"):
        monitor.dataset()
    with pytest.raises(PnError, match="every is 0"):
        pn.SaturationMonitor(linear, every=0)


def test_the_example_of_the_docstring_runs() -> None:
    result = doctest.testmod(importlib.import_module("pnanalysis.activations.monitor"))
    assert result.attempted > 3
    assert result.failed == 0


def test_a_live_dataset_survives_saving(tmp_path: Path) -> None:
    model = small_network()
    with pn.SaturationMonitor(model, every=1) as monitor:
        train(model, batches(2))
    ds = monitor.dataset()
    assert pn.load(pn.save(ds, tmp_path / "saturation.nc")).identical(ds)

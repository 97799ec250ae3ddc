"""Statistics of a layer: the saturation measure against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pnanalysis as pn
from pnanalysis.activations.functions import ACTIVATIONS, Activation
from pnanalysis.activations.statistics import LayerActivity, Measures


def saturation_measure(values: torch.Tensor, activation: Activation, bins: int) -> float:
    layer = LayerActivity(activation, Measures(saturation_bins=bins), (activation.low, activation.high))
    layer.add(values)
    return float(layer.variables()["saturation_measure"][1])


def test_the_saturation_measure_by_hand() -> None:
    tanh, sigmoid = ACTIVATIONS["tanh"], ACTIVATIONS["sigmoid"]
    values = torch.tensor([[-0.9], [0.25], [0.05], [0.75]])
    # bins of width 0.2: each number is alone in its own
    assert saturation_measure(values, tanh, 10) == pytest.approx((0.9 + 0.25 + 0.05 + 0.75) / 4, rel=1e-6)
    # three bins: -0.9 | 0.25 and 0.05, of mean 0.15 | 0.75
    assert saturation_measure(values, tanh, 3) == pytest.approx((0.9 + 2 * 0.15 + 0.75) / 4, rel=1e-6)
    # one bin: the mean 0.0375
    assert saturation_measure(values, tanh, 1) == pytest.approx(0.0375, rel=1e-6)
    assert saturation_measure(-values, tanh, 1) == pytest.approx(0.0375, rel=1e-6)
    assert saturation_measure((values + 1) / 2, sigmoid, 3) == pytest.approx(
        saturation_measure(values, tanh, 3), rel=1e-6
    )
    assert saturation_measure(torch.full((5, 3), -1.0), tanh, 10) == 1.0
    assert saturation_measure(torch.full((5, 3), 0.5), sigmoid, 7) == 0.0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), bins=st.integers(1, 13), shift=st.floats(-2, 2))
def test_the_saturation_measure_is_the_sum_over_bins(seed: int, bins: int, shift: float) -> None:
    values = (torch.randn(40, 5, generator=torch.Generator().manual_seed(seed)) + shift).tanh()
    flat = values.double().numpy().ravel()
    place = np.clip(((flat + 1) / 2 * bins).astype(int), 0, bins - 1)
    expected = sum(abs(flat[place == b].mean()) * (place == b).sum() for b in range(bins) if (place == b).any())
    assert saturation_measure(values, ACTIVATIONS["tanh"], bins) == pytest.approx(
        expected / flat.size, rel=1e-5, abs=1e-7
    )


class Logarithm(nn.Module):
    """Some of its activations are NaN, and its outputs are not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.out = nn.Linear(4, 50), nn.Linear(50, 8), nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.nan_to_num(torch.tanh(torch.log(self.a(inputs) + 1.2)))
        out: Tensor = self.out(torch.relu(self.b(hidden)))
        return out


def test_nothing_is_said_of_activations_that_are_no_numbers() -> None:
    data = (torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3)
    with pytest.warns(UserWarning, match="some activations of tanh are NaN, so that nothing is known of these layers"):
        ds = pn.saturation(Logarithm(), data=data, n=None, progress=False)
    for name, values in ds.data_vars.items():
        if "layer" in values.dims:
            assert values.sel(layer="tanh").isnull().all(), name
    assert ds.percentile.sel(layer="relu").notnull().all()

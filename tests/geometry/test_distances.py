"""Distances between networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pnanalysis.geometry.distances import distance_between, parameter_distances, state_distance


def test_distances_between_architectures_are_unknown() -> None:
    found = parameter_distances([nn.Linear(3, 2), nn.Linear(2, 3), nn.Linear(3, 2)])
    distance = found["distance"][1]
    assert np.isnan(distance[0, 1])
    assert np.isfinite(distance[0, 2])
    np.testing.assert_array_equal(np.diagonal(distance), 0)


def test_distances_between_states_are_those_by_hand() -> None:
    network = nn.Linear(2, 2)
    with torch.no_grad():
        network.weight.fill_(1.0)
        network.bias.fill_(2.0)
    state = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
    assert distance_between(network, state) == pytest.approx(np.sqrt(4 * 1 + 2 * 4), rel=1e-15)
    assert state_distance(network.state_dict(), state, ["bias"]) == pytest.approx(np.sqrt(8), rel=1e-15)
    network.bias.requires_grad_(False)  # frozen parameters do not count
    assert distance_between(network, state) == 2


class _Spectral(nn.Module):
    """The same numbers as complex ones, or as pairs of real ones."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def test_complex_parameters_count_as_pairs_of_real_ones() -> None:
    weights = torch.randn(2, 3, 4, dtype=torch.complex64)
    complex_ones, pairs = (
        [_Spectral(part(weight)) for weight in weights] for part in (lambda w: w, torch.view_as_real)
    )
    ours, real = parameter_distances(complex_ones), parameter_distances(pairs)
    for name in ("norm", "distance", "cosine", "layer_distance"):
        np.testing.assert_array_equal(ours[name][1], real[name][1])
    assert distance_between(complex_ones[0], complex_ones[1].state_dict()) == ours["distance"][1][0, 1]
    assert np.isnan(parameter_distances([complex_ones[0], _Spectral(torch.ones(3, 4))])["distance"][1][0, 1])

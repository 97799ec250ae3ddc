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

"""Distances between networks."""

from __future__ import annotations

import numpy as np
from torch import nn

from pnanalysis.geometry.distances import parameter_distances


def test_distances_between_architectures_are_unknown() -> None:
    found = parameter_distances([nn.Linear(3, 2), nn.Linear(2, 3), nn.Linear(3, 2)])
    distance = found["distance"][1]
    assert np.isnan(distance[0, 1])
    assert np.isfinite(distance[0, 2])
    np.testing.assert_array_equal(np.diagonal(distance), 0)

"""Coordinates on planes, against dense vectors."""

from __future__ import annotations

import numpy as np
import pytest

from pnanalysis.errors import RunError
from pnanalysis.geometry.planes import plane_coordinates, plane_weights


def test_coordinates_on_a_plane_are_those_of_an_orthonormal_basis() -> None:
    vectors = np.random.default_rng(0).normal(size=(6, 20))
    a, b = vectors[2], vectors[4]
    e1 = a / np.linalg.norm(a)
    e2 = b - (b @ e1) * e1
    e2 /= np.linalg.norm(e2)
    gram, pair = vectors @ vectors.T, [2, 4]
    found = plane_coordinates(gram, gram[:, pair], gram[np.ix_(pair, pair)])
    np.testing.assert_allclose(found, np.stack([vectors @ e1, vectors @ e2], axis=1), atol=1e-13)
    parallel = [2, 2]
    assert np.isnan(plane_coordinates(gram, gram[:, parallel], gram[np.ix_(parallel, parallel)])).all()


def test_weights_of_a_plane_place_its_points_at_their_coordinates() -> None:
    states = np.random.default_rng(1).normal(size=(3, 20))
    moved = states - states[0]
    x, y = np.array([0.0, 1.5, -2.0]), np.array([0.0, 0.5, 3.0])
    weights, points = plane_weights(moved @ moved.T, x, y)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-14)
    at = weights @ states - states[0]
    np.testing.assert_allclose(np.linalg.norm(at, axis=1), np.hypot(x, y), atol=1e-13)
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), np.linalg.norm(points, axis=1), atol=1e-13)
    np.testing.assert_array_equal(points[0], 0)
    assert points[1, 1] == 0
    with pytest.raises(RunError, match="one line"):
        plane_weights(np.outer([0, 1, 2], [0, 1, 2]).astype(float), x, y)

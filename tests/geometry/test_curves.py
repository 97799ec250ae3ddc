"""Weights of points on curves."""

from __future__ import annotations

import numpy as np
import pytest

from pnanalysis.geometry.curves import curve_weights


@pytest.mark.parametrize("n_bends", [1, 2, 3])
def test_weights_of_curves(n_bends: int) -> None:
    t = np.linspace(0, 1, 13)
    for kind in ("bezier", "chain"):
        weights = curve_weights(kind, t, n_bends)
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-14)
        assert (weights >= 0).all()
        np.testing.assert_array_equal(weights[[0, -1]], np.eye(n_bends + 2)[[0, -1]])
        # on equally spaced points of a line both kinds run along it at constant speed
        np.testing.assert_allclose(weights @ np.linspace(0, 1, n_bends + 2), t, atol=1e-15)
    np.testing.assert_allclose(
        curve_weights("chain", np.linspace(0, 1, n_bends + 2), n_bends), np.eye(n_bends + 2), atol=1e-12
    )

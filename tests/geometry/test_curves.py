"""Curves between minima: their weights, ends and seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pnanalysis.geometry.curves import curve_weights, train_curve
from pnanalysis.geometry.loss_surface import LossSurface
from pnanalysis.inputs.sources import as_source
from pnanalysis.io.runs import Run


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


def test_a_trained_curve_keeps_its_ends_and_follows_its_seed(tiny_run: Run) -> None:
    source = as_source(tiny_run)
    surface = LossSurface(source.make_model(), source.loss)
    ends = tuple(surface.anchor(end.load()) for end in tiny_run.ends[:2])
    first, again = (
        train_curve(surface, ends, source.data.train, n_bends=2, n_steps=5, seed=7, progress=False) for _ in range(2)
    )
    assert len(first) == 4
    for end, anchor in ((ends[0], first[0]), (ends[1], first[-1])):
        assert all(torch.equal(end[name], anchor[name]) for name in end)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, again, strict=True) for name in a)
    third = {name: (2 * ends[0][name] + ends[1][name]) / 3 for name in ends[0]}
    assert not torch.allclose(first[1]["fc1.weight"], third["fc1.weight"], atol=1e-4)

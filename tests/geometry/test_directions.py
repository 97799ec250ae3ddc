"""Random directions of parameter space."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from pnanalysis.geometry.directions import random_directions

EPS32 = 2.0**-23


def test_random_directions_have_the_norms_of_filters() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    state, names = dict(model.state_dict()), [name for name, _ in model.named_parameters()]
    first, second = random_directions(state, names, seed=1)
    for direction in (first, second):
        for name in ("0.weight", "3.weight"):
            norms = [tensor[name].flatten(1).norm(dim=1) for tensor in (direction, state)]
            np.testing.assert_allclose(norms[0], norms[1].detach(), rtol=10 * EPS32)
        assert all(direction[name].abs().sum() == 0 for name in state if name not in ("0.weight", "3.weight"))
    assert not torch.allclose(first["0.weight"], second["0.weight"])
    assert torch.equal(random_directions(state, names, seed=1)[1]["3.weight"], second["3.weight"])


def test_complex_filters_are_scaled_as_pairs_of_real_numbers() -> None:
    weight = torch.randn(3, 5, dtype=torch.complex64)
    pairs = torch.view_as_real(weight)
    ours, real = (random_directions({"w": w}, ["w"], seed=1)[0]["w"] for w in (weight, pairs))
    torch.testing.assert_close(torch.view_as_real(ours), real)
    bias = {"b": weight[0]}
    assert not random_directions(bias, ["b"])[0]["b"].abs().any()

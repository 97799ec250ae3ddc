"""The loss at points of parameter space, against passes one by one and autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pnanalysis.geometry.loss_surface import LossSurface
from pnanalysis.inputs.sources import as_source
from pnanalysis.io.runs import Run

EPS32 = 2.0**-23


def test_many_points_per_pass_equal_one_at_a_time(tiny_run: Run) -> None:
    source = as_source(tiny_run)
    results = []
    for at_once in (1, 32, 5):
        surface = LossSurface(source.make_model(), source.loss, dtype=torch.float64, at_once=at_once)
        anchors = [surface.anchor(end.load()) for end in tiny_run.ends]
        weights = np.random.default_rng(0).dirichlet(np.ones(3), 12)
        found = list(surface.values(anchors, weights, source.data.test.batches(100)))
        assert len(found) == 12
        results.append(np.stack([values.loss for values in found]))
    assert LossSurface(source.make_model(), source.loss).at_once == 32
    # float64 round-off of seven layers
    np.testing.assert_allclose(results[1], results[0], rtol=1e-12)
    np.testing.assert_allclose(results[2], results[0], rtol=1e-12)


class InPlace(nn.Module):
    """Adds a parameter to a tensor that no parameter has touched yet, in place: vmap cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.layer = nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = 1.0 * x
        x += self.shift
        return self.layer(x)


def test_networks_that_cannot_be_vectorised_are_evaluated_one_point_at_a_time() -> None:
    model, inputs, targets = InPlace(), torch.randn(30, 4), torch.randint(3, (30,))
    surface = LossSurface(model, nn.functional.cross_entropy)
    assert surface.at_once == 32
    (found,) = surface.values([surface.anchor(model.state_dict())], np.ones((1, 1)), [(inputs, targets)])
    assert surface.at_once == 1
    expected = nn.functional.cross_entropy(model(inputs), targets, reduction="none").detach()
    np.testing.assert_allclose(found.loss, expected, rtol=20 * EPS32)


def test_gradients_are_those_of_the_mean_loss(tiny_run: Run) -> None:
    source = as_source(tiny_run)
    surface = LossSurface(source.make_model(), source.loss, dtype=torch.float64)
    state = surface.anchor(tiny_run.plain.load())
    value, gradient = surface.value_and_gradient(state, source.data.test.batches(70))
    model = source.model(tiny_run.plain).double()
    inputs, targets = source.data.test.take(slice(None))
    loss = nn.functional.cross_entropy(model(inputs.double()), targets)
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-12)
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(gradient[name], parameter.grad, atol=1e-14)

"""Gradients at several points: of networks whose parameters are complex by a view, or have sparse gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pnanalysis.geometry.loss_surface import LossSurface
from pnanalysis.sampling.stacked_gradients import StackedGradients


class Turned(nn.Module):
    """Real parameters of which one, behind an odd number of others, is seen as complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.turn = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return (x * torch.view_as_complex(self.turn)).abs() + self.shift


def words(sparse: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 3, sparse=sparse), nn.Flatten(), nn.Linear(6, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_nothing_but_round_off_do_not_forbid_vectorised_passes(dtype: torch.dtype) -> None:
    """At a least-squares solution the gradient is round-off, which differs between passes."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(200, k, generator=generator, dtype=dtype) for k in (12, 1))
    network = nn.Linear(12, 1, bias=False).to(dtype)
    with torch.no_grad():
        network.weight.copy_(torch.linalg.lstsq(x.double(), y.double()).solution.T)
    surface = LossSurface(network, F.mse_loss, dtype=dtype, at_once=8)
    gradients = StackedGradients(surface, surface.anchor(network.state_dict()), ["weight"])
    gradients(gradients.centre.repeat(5, 1), x, y)
    assert gradients._vectorised


def test_a_vectorised_pass_that_differs_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    network, (x, y) = nn.Linear(4, 3), (torch.randn(10, 4), torch.arange(10) % 3)
    surface = LossSurface(network, F.cross_entropy, at_once=8)
    gradients = StackedGradients(surface, surface.anchor(network.state_dict()), surface.parameter_names)
    right = gradients._at_once
    monkeypatch.setattr(gradients, "_at_once", lambda *given: (right(*given)[0], 1.01 * right(*given)[1]))
    gradients(gradients.centre.repeat(2, 1), x, y)
    assert not gradients._vectorised


@pytest.mark.parametrize("at_once", [1, 8])
@pytest.mark.parametrize("make", [Turned, lambda: words(True), lambda: words(False)], ids=["turned", "sparse", "dense"])
def test_they_are_those_of_each_point(make, at_once: int) -> None:
    torch.manual_seed(0)
    network = make()
    x, y = (
        (torch.randint(7, (10, 2)) if isinstance(network, nn.Sequential) else torch.randn(10, 3)),
        torch.arange(10) % 3,
    )
    surface = LossSurface(network, F.cross_entropy, at_once=at_once)
    gradients = StackedGradients(surface, surface.anchor(network.state_dict()), surface.parameter_names)
    points = gradients.centre + 0.1 * torch.randn(3, len(gradients.centre))
    losses, slopes = gradients(points, x, y)
    for point, loss, slope in zip(points, losses, slopes, strict=True):
        own = list(network.parameters())
        with torch.no_grad():
            for parameter, part in zip(own, point.split([one.numel() for one in own]), strict=True):
                parameter.copy_(part.view_as(parameter))
        value = F.cross_entropy(network(x), y)
        parts = torch.autograd.grad(value, own)
        expected = torch.cat([(part.to_dense() if part.is_sparse else part).flatten() for part in parts])
        torch.testing.assert_close(loss, value.detach())
        torch.testing.assert_close(slope, expected)

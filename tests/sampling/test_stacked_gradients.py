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

"""Calls with other tensors leave a network as it was, whatever it shares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pnanalysis as pn
from pnanalysis.evaluation.forward import forward
from pnanalysis.inputs.functional_calls import functional_call


class Shared(nn.Module):
    """One layer under two names, a weight that is tied to another layer's, and a normalisation under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, 5), nn.BatchNorm1d(5)
        self.again, self.norm_again, self.tied = self.first, self.norm, nn.Linear(5, 5)
        self.tied.weight = self.first.weight
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_again(torch.tanh(self.again(self.norm(torch.tanh(self.first(x))))))
        return self.last(torch.tanh(self.tied(x)))


@pytest.mark.parametrize("name", ["first.weight", "again.weight", "tied.weight"])
def test_a_network_with_shared_modules_is_what_it_was(name: str) -> None:
    torch.manual_seed(0)
    network, x = Shared().eval(), torch.randn(4, 5)
    before = {key: (value, value.detach().clone()) for key, value in network.named_parameters(remove_duplicate=False)}
    outputs = network(x)
    with torch.no_grad():
        changed = functional_call(network, {name: 2 * network.first.weight, "norm.running_mean": torch.ones(5)}, (x,))
        assert torch.equal(network(x), outputs)
        for key, value in network.named_parameters(remove_duplicate=False):
            assert value is before[key][0]
            assert torch.equal(value, before[key][1])
        network.first.weight.mul_(2)  # of all three layers
        network.norm.running_mean.fill_(1)
        torch.testing.assert_close(changed, forward(network, x))


def test_analyses_of_a_network_with_shared_modules() -> None:
    """A second pass over the weights, in float64, sees all of them, and the network stays as it is."""
    torch.manual_seed(1)
    network, x, y = Shared().eval(), torch.randn(40, 5), torch.arange(40) % 3
    weights = {name: value.detach().clone() for name, value in network.state_dict().items()}
    ds = pn.sharpness(
        network, data=(x.double(), y), radii={"ball": 1e-3}, average_radii={"ball": 1e-3}, dtype="float64", n_steps=4,
        n_directions=4, progress=False,
    )  # fmt: skip
    assert ds.loss.item() == pytest.approx(float(F.cross_entropy(network(x), y).detach()), rel=1e-6)
    assert ds.average.item() == pytest.approx(ds.average_quadratic.item(), rel=1e-3)
    assert ds.rise.item() == pytest.approx(ds.rise_quadratic.item(), rel=1e-3)
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())

"""The copy of the model that the products see."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pnanalysis.curvature.operators import HessianOperator
from pnanalysis.curvature.prepared_copy import fold_norms, prepared_copy, unfold_norms
from tests.curvature.conftest import NETWORKS, dense_hessian, images, relative


def test_the_users_model_is_left_as_it_was() -> None:
    model, batches = NETWORKS["batchnorm"]().train(), images()
    before = copy.deepcopy(model.state_dict())
    HessianOperator(model, cross_entropy, batches, bn_mode="train").to_dense()
    assert model.training
    assert all(module.training for module in model.modules())
    assert model[1].track_running_stats
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


class Skipped(nn.Module):
    """Of which the connection around the layers starts before the activation, or, in place, behind it."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(36, 4), nn.Linear(4, 3)
        self.around = nn.Sequential(activation, nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.flatten(1))
        return self.last(self.around(x) + x)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("expected_products", [3, 1000])
def test_activations_in_place_that_others_see_stay_in_place(activation: Any, expected_products: int) -> None:
    torch.manual_seed(0)
    batches = images((5, 3))
    model = Skipped(activation(inplace=True)).double()
    op = HessianOperator(model, cross_entropy, batches, expected_products=expected_products)
    assert relative(op.to_dense(), dense_hessian(model, batches)) < 1e-10


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_folded_batch_normalisation_leaves_the_outputs_as_they_are(padding_mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode=padding_mode), nn.BatchNorm2d(3), nn.ReLU())
    model(torch.randn(8, 2, 5, 5))  # running statistics that are not trivial
    model = model.double().eval()
    prepared = prepared_copy(model, "eval")
    folded = fold_norms(prepared)
    assert folded == [prepared[0], prepared[1]]
    inputs = torch.randn(4, 2, 5, 5).double()
    torch.testing.assert_close(prepared(inputs), model(inputs), rtol=1e-12, atol=1e-12)
    norm_inputs = torch.randn(1, 3, 2, 2).double()
    assert torch.equal(prepared[1](norm_inputs), norm_inputs)  # nothing is left to do for the norm
    unfold_norms(folded)
    assert torch.equal(prepared(inputs), model(inputs))


def test_batch_normalisation_behind_a_shared_convolution_is_not_folded() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z = self.conv(x)
            return self.norm(z) + z

    model = Branches().eval()
    nn.init.constant_(model.norm.running_mean, 0.5)
    inputs = torch.randn(2, 1, 3, 3)
    prepared = prepared_copy(model, "eval")
    assert not fold_norms(prepared)
    assert torch.equal(prepared(inputs), model(inputs))


@pytest.mark.parametrize("shared", ["convolution", "normalisation"])
def test_layers_that_are_called_twice_are_not_folded(shared: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(1, 1, 1) for _ in range(2))
            self.norms = nn.ModuleList(nn.BatchNorm2d(1) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            convs, norms = self.convs, self.norms
            last = (convs[0], norms[1]) if shared == "convolution" else (convs[1], norms[0])
            return last[1](last[0](norms[0](convs[0](x)).relu()))

    model = Twice().eval()
    nn.init.constant_(model.norms[1].running_mean, 0.5)
    inputs = torch.randn(2, 1, 3, 3)
    prepared = prepared_copy(model, "eval")
    assert not fold_norms(prepared)
    assert torch.equal(prepared(inputs), model(inputs))

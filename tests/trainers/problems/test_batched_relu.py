"""Batched networks compared with single ones, step by step and layer by layer."""

from __future__ import annotations

import pytest
import torch

from trainers import PersistentPenalty
from trainers.problems.batched_relu import ReluBatch, Repulsion, layer_sizes, pack, predict, unpack
from trainers.zoo.kink import kink_data
from trainers.zoo.models import relu32

X, Y = kink_data("kink6")


def test_steps_agree_one_by_one() -> None:
    torch.manual_seed(3)
    model = relu32().double()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    batch = ReluBatch(x, y, pack(model.state_dict())[None], 32, 1e-3, 0.9)
    for step in range(1, 31):
        optimiser.zero_grad()
        loss = (model(x[:, None])[:, 0] - y).square().mean()
        loss.backward()
        torch.testing.assert_close(batch.losses()[0], loss.detach(), rtol=step * 1e-14, atol=0)
        optimiser.step()
        batch.step()
        torch.testing.assert_close(batch.parameters[0], pack(model.state_dict()), rtol=0, atol=step * 2**-52)


def test_repulsion_is_the_gradient_of_the_penalty_for_each_member() -> None:
    width, lams, n = 5, [0.3, 0.0, 0.02], 4
    torch.manual_seed(0)
    ends = torch.randn(n, 3, sum(layer_sizes(width)), dtype=torch.float64)
    repulsion = Repulsion(ends, torch.tensor(lams, dtype=torch.float64), width)
    for _ in range(3):  # signs change between the points
        theta = torch.randn(3, sum(layer_sizes(width)), dtype=torch.float64)
        gradient = repulsion.update([block[:, None] for block in theta.split(layer_sizes(width), dim=1)])
        found = torch.cat([f.view(3, -1) for f in gradient.split([3 * s for s in layer_sizes(width)])], dim=1)
        for member, lam in enumerate(lams):
            model = relu32(width).double()
            model.load_state_dict(unpack(theta[member], width))
            penalty = PersistentPenalty(model, lam)
            for end in ends:
                penalty.add(unpack(end[member], width))
            penalty().backward()
            expected = pack({name: p.grad for name, p in model.named_parameters()})  # type: ignore[misc]
            torch.testing.assert_close(found[member], expected, rtol=1e-13, atol=1e-15)


def test_a_layer_of_zeros_repels_nothing_and_is_reported() -> None:
    ends = torch.ones(1, 2, sum(layer_sizes(4)))
    ends[0, 1, : layer_sizes(4)[0]] = 0
    with pytest.warns(UserWarning, match="1 layers of end points are zero"):
        repulsion = Repulsion(ends, torch.ones(2), 4)
    gradient = repulsion.update([torch.ones(2, 1, size) for size in layer_sizes(4)])
    first = gradient[: 2 * layer_sizes(4)[0]].view(2, -1)
    assert (first[0] == 1 / layer_sizes(4)[0]).all()
    assert (first[1] == 0).all()


def test_packing_predicting_and_unpacking_agree_with_the_network() -> None:
    torch.manual_seed(0)
    model = relu32(7).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    parameters = pack(model.state_dict())
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    expected = model(x[:, None])[:, 0].detach()
    torch.testing.assert_close(predict(parameters[None], x, 7)[0], expected, rtol=1e-13, atol=1e-13)
    other = relu32(7).double()
    other.load_state_dict(unpack(parameters, 7))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))

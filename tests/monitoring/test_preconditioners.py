"""Preconditioners are those of the steps that torch's optimizers make, and thresholds those at which steps diverge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pnanalysis.errors import ModelError
from pnanalysis.monitoring.preconditioners import PreconditionedOperator, read_preconditioner
from pnanalysis.spectra.linear_operator import DenseOperator

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def trained(make: Make, n_steps: int = 5) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    """A parameter after some steps with gradients of all sizes."""
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(6, dtype=torch.float64, generator=generator))
    optimizer = make([parameter])
    for _ in range(n_steps):
        parameter.grad = torch.randn(6, dtype=torch.float64, generator=generator) * 10.0 ** torch.arange(-3.0, 3.0)
        optimizer.step()
    return parameter, optimizer


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.0, 0.9), eps=1e-3),
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.0, 0.9), amsgrad=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.0, 0.99), weight_decay=0.0),
        lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.9),
        lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.9, centered=True),
        lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.3),
    ],
    ids=["sgd", "adam", "amsgrad", "adamw", "rmsprop", "centered", "adagrad"],
)
def test_without_momentum_a_step_is_the_gradient_times_the_inverse(make: Make) -> None:
    parameter, optimizer = trained(make)
    before = parameter.detach().clone()
    optimizer.step()  # with the gradient of the last step
    moved = before - parameter.detach()
    found = read_preconditioner(optimizer, {"w": parameter})
    assert found.inverse is not None
    torch.testing.assert_close(found.learning_rate * found.inverse["w"] * parameter.grad, moved, rtol=1e-10, atol=0)


@pytest.mark.parametrize("n_steps", [1, 3, 50])
def test_adams_momentum_is_corrected_for_its_start_in_the_preconditioner(n_steps: int) -> None:
    parameter, optimizer = trained(lambda p: torch.optim.Adam(p, lr=0.1), n_steps)
    before = parameter.detach().clone()
    optimizer.step()
    found = read_preconditioner(optimizer, {"w": parameter})
    assert found.inverse is not None
    momentum = optimizer.state[parameter]["exp_avg"]
    moved = before - parameter.detach()
    torch.testing.assert_close(0.1 * found.inverse["w"] * momentum, moved, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, weight_decay=2.0),
        lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=1.0, momentum=0.8),
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, 1.0 - 1e-12)),
    ],
    ids=["gd", "momentum", "dampening", "nesterov", "decay", "rmsprop", "adam"],
)
@pytest.mark.parametrize("ratio", [0.97, 1.03])
def test_steps_on_a_parabola_are_unstable_beyond_the_threshold(make: Make, ratio: float) -> None:
    parameter = nn.Parameter(torch.full((1,), 1e-9, dtype=torch.float64))  # second moments hardly see such gradients
    optimizer = make([parameter])
    if not isinstance(optimizer, torch.optim.SGD):  # second moments that stay as they are
        parameter.grad = torch.zeros(1, dtype=torch.float64)
        optimizer.step()
        state = optimizer.state[parameter]
        state["step"] += 1e14  # no correction for the start
        state["square_avg" if "square_avg" in state else "exp_avg_sq"].fill_(4.0)
    found = read_preconditioner(optimizer, {"w": parameter})
    assert found.inverse is not None
    curvature = ratio * found.threshold / float(found.inverse["w"]) - found.decay["w"]
    largest = []
    for _ in range(3):
        largest.append(0.0)
        for _ in range(25):
            parameter.grad = curvature * parameter.detach()
            optimizer.step()
            largest[-1] = max(largest[-1], abs(float(parameter.detach())))
    assert (largest[-1] > 2 * largest[0]) == (ratio > 1)


def test_the_operator_has_the_eigenvalues_of_the_preconditioned_matrix() -> None:
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(8, 8, dtype=torch.float64, generator=generator)
    matrix, inverse = root + root.T, torch.rand(8, dtype=torch.float64, generator=generator)
    decay = torch.rand(8, dtype=torch.float64, generator=generator)
    operator = PreconditionedOperator(DenseOperator(matrix), inverse, decay)
    dense = operator.matmat(torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(dense, dense.T)
    expected = torch.linalg.eigvals(torch.diag(inverse) @ (matrix + torch.diag(decay))).real.sort().values
    torch.testing.assert_close(torch.linalg.eigvalsh(dense), expected)


def test_groups_with_rates_of_their_own_are_part_of_the_preconditioner() -> None:
    a, b, unmoved = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.4, "weight_decay": 0.5}], lr=1.0)
    found = read_preconditioner(optimizer, {"a": a, "b": b, "c": unmoved})
    assert found.inverse is not None
    assert [float(found.inverse[name][0]) for name in "abc"] == pytest.approx([0.25, 1.0, 0.0])
    assert (found.learning_rate, found.threshold, found.decay["b"]) == pytest.approx((0.4, 5.0, 0.5))
    assert not found.constant
    optimizer.param_groups[0]["momentum"] = 0.9
    assert read_preconditioner(optimizer, {"a": a, "b": b}).threshold != found.threshold  # NaN: the groups differ


def test_gradients_that_are_dampened_to_nothing_have_no_threshold() -> None:
    """With a dampening of one, the buffer never takes a gradient again, so that no curvature makes steps unstable."""
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.SGD([a], lr=0.1, momentum=0.9, dampening=1.0)
    assert read_preconditioner(optimizer, {"a": a}).threshold == np.inf
    for _ in range(50):
        a.grad = 1e3 * a.detach()
        optimizer.step()
    assert float(a.detach().abs().max()) < 1e4  # only the first gradient counts, however large the curvature
    optimizer.add_param_group({"params": [b], "dampening": 0.0})
    assert np.isnan(read_preconditioner(optimizer, {"a": a, "b": b}).threshold)
    del optimizer.param_groups[1]
    optimizer.param_groups[0]["dampening"] = 1.5  # up the gradient
    assert np.isnan(read_preconditioner(optimizer, {"a": a}).threshold)


def test_before_the_first_step_an_adaptive_preconditioner_is_not_known() -> None:
    parameter = nn.Parameter(torch.ones(2))
    found = read_preconditioner(torch.optim.AdamW([parameter], lr=0.01), {"w": parameter})
    assert found.inverse is None
    assert found.threshold == pytest.approx(3800)
    assert found.decay == {"w": 0.0}  # decoupled


class _Slower(torch.optim.Adam):
    """Its steps may be anything."""


def refused() -> list[Any]:
    own, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    return [
        (torch.optim.LBFGS([own]), own, "not known"),
        (_Slower([own]), own, "not known"),
        (torch.optim.SGD([own], lr=0.1, maximize=True), own, "maximises"),
        (torch.optim.SGD([other], lr=0.1), own, "none of the parameters"),
    ]


@pytest.mark.parametrize(("optimizer", "parameter", "message"), refused(), ids=["lbfgs", "subclass", "ascent", "other"])
def test_what_has_no_known_preconditioner_is_refused(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        read_preconditioner(optimizer, {"w": parameter})

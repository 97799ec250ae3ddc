"""Kink regression: this project's batched program compared with the same trainings through autograd, on one core.

Prints milliseconds per step and how many times faster the hand-written program is, for plain networks and for
persistent chains with 11 earlier end points. It is compared with one batch of networks through autograd, and with
single networks one after another, with ``torch.optim.SGD``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from trainers import PersistentPenalty
from trainers.problems.batched_relu import ReluBatch, Repulsion, layer_sizes, unpack
from trainers.problems.kink_ensemble import initial_parameters
from trainers.zoo.kink import kink_data
from trainers.zoo.models import relu32

WIDTH, LR, MOMENTUM, LAM = 32, 1e-3, 0.9, 0.01


def stepper_ours(x: Tensor, y: Tensor, initial: Tensor, ends: Tensor | None) -> Callable[[], None]:
    """The hand-written batch."""
    repulsion = None if ends is None else Repulsion(ends, torch.full((len(initial),), LAM), WIDTH)
    return ReluBatch(x, y, initial, WIDTH, LR, MOMENTUM, repulsion).step


def stepper_batched_autograd(x: Tensor, y: Tensor, initial: Tensor, ends: Tensor | None) -> Callable[[], None]:
    """Batched matrix products, autograd and ``torch.optim.SGD``."""
    b, sizes = len(initial), layer_sizes(WIDTH)
    layers = [block.clone().requires_grad_() for block in initial.split(sizes, dim=1)]
    optimiser = torch.optim.SGD(layers, lr=LR, momentum=MOMENTUM)
    anchors = None
    if ends is not None:
        blocks = ends.transpose(0, 1).split(sizes, dim=2)
        anchors = [(block / block.square().sum(2, keepdim=True)).contiguous().mT for block in blocks]

    def step() -> None:
        first, second, third = layers
        hidden = (first[:, None, :WIDTH] * x[:, None] + first[:, None, WIDTH:]).relu()
        middle = second.view(b, WIDTH + 1, WIDTH)
        hidden = torch.baddbmm(middle[:, -1:], hidden, middle[:, :-1]).relu()
        output = torch.baddbmm(third[:, None, -1:], hidden, third[:, :-1, None])[..., 0]
        loss = (output - y).square().mean(1).sum()
        if anchors is not None:
            for anchor, layer in zip(anchors, layers, strict=True):
                loss = loss + LAM * torch.bmm(layer[:, None], anchor).abs().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def stepper_single(x: Tensor, y: Tensor, initial: Tensor, ends: Tensor | None) -> Callable[[], None]:
    """One network of the batch through autograd and ``torch.optim.SGD``."""
    model = relu32(WIDTH)
    model.load_state_dict(unpack(initial[0], WIDTH))
    penalty = PersistentPenalty(model, LAM)
    for end in () if ends is None else ends[:, 0]:
        penalty.add(unpack(end, WIDTH))
    optimiser = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    inputs, targets = x[:, None], y[:, None]

    def step() -> None:
        optimiser.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        (loss + penalty() if len(penalty) else loss).backward()
        optimiser.step()

    return step


def milliseconds(steppers: dict[str, Callable[[], None]], steps: int, rounds: int) -> dict[str, float]:
    """Shortest time per step over several rounds; the programs take turns, so that other work slows all of them."""
    best = dict.fromkeys(steppers, float("inf"))
    for _ in range(rounds):
        for name, step in steppers.items():
            start = time.perf_counter()
            for _ in range(steps):
                step()
            best[name] = min(best[name], 1000 * (time.perf_counter() - start) / steps)
    return best


def compare(title: str, n_networks: int, n_ends: int, steps: int, rounds: int) -> None:
    """Time one case and print it."""
    x, y = (torch.from_numpy(values).float() for values in kink_data())
    initial = torch.stack([initial_parameters(seed) for seed in range(n_networks)])
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(n_ends, *initial.shape, generator=generator)
    ends = initial + noise if n_ends else None
    steppers = {
        "this project": stepper_ours(x, y, initial, ends),
        "batched autograd": stepper_batched_autograd(x, y, initial, ends),
        "single, times the number": stepper_single(x, y, initial, ends),
    }
    for step in steppers.values():
        step()
    best = milliseconds(steppers, steps, rounds)
    best["single, times the number"] *= n_networks
    print(title)
    for name, value in best.items():
        print(
            f"  {name:26s}{value:9.3f} ms per step {value * 50:9.1f} s per 50,000 {value / best['this project']:9.1f} x"
        )


def main() -> None:
    """Parse the options and print both cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="steps per round")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    compare("100 plain networks", 100, 0, options.steps, options.rounds)
    compare("18 persistent chains, 11 earlier end points", 18, 11, options.steps, options.rounds)


if __name__ == "__main__":
    main()

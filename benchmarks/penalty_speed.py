"""Time of a training step with a penalty of 20 earlier end points on all layers, relative to the step without.

    python benchmarks/penalty_speed.py [--threads 1] [--steps 200]

The two trainings take single steps in turn in one process; medians over the steps. The end points are random, at a
distance from the network of about its own norm.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from torch.nn.functional import cross_entropy

from pnanalysis.inputs.models import build_model
from trainers import PersistentPenalty

SETTINGS = {"lenet5": (256, 1.0), "resnet18": (32, 0.1)}  # batch size, fraction of the steps
N_ENDS = 20


def step_times(name: str, steps: int, device: torch.device | str = "cpu") -> tuple[float, float]:
    """Medians in seconds of a step without the penalty and one with it."""
    batch_size = SETTINGS[name][0]
    torch.manual_seed(0)
    models = [build_model(name).to(device)]
    models.append(copy.deepcopy(models[0]))
    penalty = PersistentPenalty(models[1], lam=1e-3)
    for _ in range(N_ENDS):
        end = copy.deepcopy(models[0])
        with torch.no_grad():
            for parameter in end.parameters():
                parameter.add_(torch.randn_like(parameter) * parameter.square().mean().sqrt().clamp_min(0.01))
        penalty.add(end)
    optimisers = [torch.optim.Adam(model.parameters(), lr=1e-3) for model in models]
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    labels = torch.randint(10, (batch_size,), device=device)

    def seconds(side: int) -> float:
        wait(device)
        start = time.perf_counter()
        optimisers[side].zero_grad()
        loss = cross_entropy(models[side](images), labels)
        (loss + penalty() if side else loss).backward()
        optimisers[side].step()
        wait(device)
        return time.perf_counter() - start

    for side in (0, 1, 0, 1):  # warm up
        seconds(side)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(steps):
        for side in (0, 1):
            times[side].append(seconds(side))
    return statistics.median(times[0]), statistics.median(times[1])


def wait(device: torch.device | str) -> None:
    """Wait for what the device is computing."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def measure(name: str, steps: int) -> str:
    """One line of the table."""
    batch_size, fraction = SETTINGS[name]
    plain, penalised = step_times(name, max(round(fraction * steps), 5))
    return f"{name}, batch {batch_size}: {1e3 * plain:.1f} ms per step, with the penalty {penalised / plain:.3f} times"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in SETTINGS:
        print(measure(name, options.steps), flush=True)


if __name__ == "__main__":
    main()

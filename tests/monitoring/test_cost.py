"""The cost cap on a clock of its own."""

from __future__ import annotations

import pytest
import torch

from pnanalysis.monitoring.cost import CostCap


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_measurements_stay_within_their_part_of_the_training() -> None:
    clock = Clock()
    cap = CostCap(0.05, torch.device("cpu"), clock)
    lengths = iter([2.0, *[1.0, 3.0] * 50])
    with cap.measured():
        clock.now += next(lengths)
    clock.now += 50  # before training begins
    cap.start()
    measured = []
    for step in range(2000):
        clock.now += 1.0
        if cap.affordable():
            expected = cap.measuring + cap.last
            assert expected <= 0.05 * cap.training
            with cap.measured():
                clock.now += next(lengths)
            measured.append(step)
    cap.stop()
    clock.now += 50  # after it
    assert cap.training == pytest.approx(2000)
    assert measured[0] == 79  # 2 + 2 seconds are 5 % of 80
    assert cap.measuring == pytest.approx(sum([2.0, *([1.0, 3.0] * 50)][: len(measured) + 1]))
    assert 0.04 < cap.cost <= 0.05 + 3 / 2000
    assert len(measured) > 40


def test_what_continues_a_measurement_belongs_to_it() -> None:
    clock = Clock()
    cap = CostCap(None, torch.device("cpu"), clock)
    cap.start()
    with cap.measured():
        clock.now += 2
    with cap.measured(continued=True):
        clock.now += 1
    clock.now += 12
    assert (cap.last, cap.measuring, cap.training, cap.cost) == (3, 3, 12, 0.25)
    assert cap.affordable()

"""Means over examples and directions: their errors cover, and quadratics have the mean that their trace says."""

from __future__ import annotations

import numpy as np
import pytest

from pnanalysis.perturbation.average_case import Crossed


def crossed(numbers: np.ndarray) -> Crossed:
    return Crossed(numbers.mean(-1), numbers.mean(-2), (numbers**2).sum((-1, -2)))


@pytest.mark.parametrize(("a", "b", "c"), [(1.0, 1.0, 1.0), (3.0, 0.1, 1.0), (0.1, 2.0, 1.0), (0.0, 0.0, 1.0)])
def test_intervals_cover_the_mean_of_the_population(a: float, b: float, c: float) -> None:
    rng = np.random.default_rng(0)
    n, j, trials = 60, 10, 400
    numbers = (
        a * rng.normal(size=(trials, n, 1)) + b * rng.normal(size=(trials, 1, j)) + c * rng.normal(size=(trials, n, j))
    )
    found = crossed(numbers)
    low, high = found.interval()
    covered = float(((low <= 0) & (high >= 0)).mean())
    assert 0.92 < covered <= 1.0  # the binomial error is 0.011; conservative where one part is nil
    se, of_directions, of_examples, _ = found.errors()
    assert np.mean(se**2) == pytest.approx(a**2 / n + b**2 / j + c**2 / (n * j), rel=0.15 if a or b else 1.5)
    assert (se >= np.maximum(of_directions, of_examples)).all()


def test_differences_of_the_same_examples_and_directions_lose_what_is_common() -> None:
    rng = np.random.default_rng(1)
    common = 5 * rng.normal(size=(50, 1)) + 5 * rng.normal(size=(1, 8))
    one, other = (crossed(common + 0.01 * rng.normal(size=(50, 8)) + shift) for shift in (0.2, 0.0))
    change = one.minus(other)
    assert float(change.mean) == pytest.approx(0.2, abs=0.01)
    assert float(change.errors()[0]) < 0.01
    assert float(one.errors()[0]) > 1

"""Axes that other figures share: their ticks, and what is written at them."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.axes import Axes

from pnanalysis.plots.style import log_axis, new_figure, symlog_axis


def axes_of(x: list[float], y: list[float]) -> Axes:
    ax = new_figure().add_subplot()
    ax.plot(x, y)
    return ax


def texts(ax: Axes, which: str) -> list[str]:
    """What is written at the ticks within the limits of an axis."""
    axis = getattr(ax, f"{which}axis")
    low, high = sorted(axis.get_view_interval())
    ax.figure.draw_without_rendering()
    ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    return [label.get_text() for place, label in ticks if low <= place <= high]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.5, 3.2, ["0.6", "0.8", "1", "2", "3"]),
        (0.015, 0.3, ["0.02", "0.05", "0.1", "0.2"]),
        (0.012, 0.7, ["0.03", "0.1", "0.3"]),  # two decades, whose default ticks read 6 x 10^-1, 4 x 10^-1, ...
        (1.1, 90.0, ["3", "10", "30"]),
    ],
)
def test_ticks_of_a_few_decades_are_short_numbers(low: float, high: float, expected: list[str]) -> None:
    ax = axes_of([0, 1], [low, high])
    log_axis(ax, low, high)
    ax.set_ylim(low, high)
    assert texts(ax, "y") == expected


@pytest.mark.parametrize(
    ("low", "high", "linear", "expected"),
    [
        (-1.0, 17.0, 9.0, ["0", "2", "4", "6", "8", "10"]),
        (-3.0, 16.0, 3.5, ["−3", "−1.5", "0", "1.5", "3", "5", "10"]),
        (0.0, 2e4, 1.0, ["0", "0.5", "1", "10", "100", "1000", "10000"]),
    ],
)
def test_both_parts_of_a_symmetric_logarithmic_axis_have_ticks(
    low: float, high: float, linear: float, expected: list[str]
) -> None:
    ax = axes_of([low, high], [0, 1])
    ax.set_xlim(low, high)
    symlog_axis(ax, linear)
    ax.set_xlim(low, high)
    assert texts(ax, "x") == expected
    assert (np.diff(ax.xaxis.get_ticklocs()) > 0).all()

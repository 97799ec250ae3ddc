"""Figures drawn by tests of small problems do not stay open."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def closed_figures() -> Iterator[None]:
    yield
    import matplotlib.pyplot as plt

    plt.close("all")

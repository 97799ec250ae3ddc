"""Parameters of tests by name, some of which take long."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pytest


def cases(values: Mapping[str, Any], slow: Collection[str]) -> list[Any]:
    """What ``pytest.mark.parametrize`` takes, with names as ids; those in ``slow`` are marked so."""
    marks = {True: [pytest.mark.slow], False: []}
    return [pytest.param(value, id=name, marks=marks[name in slow]) for name, value in values.items()]

"""Counts of this session's faults, kept if many were tried."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults import counts as table


@pytest.fixture(scope="session")
def counts(request: pytest.FixtureRequest) -> Iterator[table.Counts]:
    """What has happened, by what was done; saved at the end of ``make test-faults``."""
    found: table.Counts = {}
    yield found
    if request.config.option.markexpr == "faults" and not request.session.testsfailed:
        table.save(found)

"""Counts of inputs and of what readers made of them, and the bounds of memory."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "benchmarks/results/fuzz.json"
#: Memory that reading small files may take beyond what the process has.
_MEMORY = 2 * 2**30

Counts = dict[str, Counter[str]]


@pytest.fixture(scope="session")
def counts(request: pytest.FixtureRequest) -> Iterator[Counts]:
    """How many inputs each reader has read or refused; printed, and saved where ``make fuzz`` asks for many."""
    found: Counts = defaultdict(Counter)
    yield found
    if "FUZZ" in os.environ:
        known = json.loads(FILE.read_text()) if FILE.is_file() else {}
        known |= {reader: dict(sorted(row.items())) for reader, row in found.items()}
        FILE.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
        capture = request.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            for reader, row in sorted(found.items()):
                print(f"\n{reader}: " + ", ".join(f"{n:,} {what}" for what, n in sorted(row.items())), end="")


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """Let an attempt to take gigabytes end in an error."""
    resource = pytest.importorskip("resource")
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    before = resource.getrlimit(resource.RLIMIT_AS)
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)

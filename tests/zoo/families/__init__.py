"""The networks of the zoo, family by family."""

from __future__ import annotations

from tests.zoo.entry import Entry
from tests.zoo.families import plain

ENTRIES: list[Entry] = [*plain.ENTRIES]

"""The networks of the zoo, family by family."""

from __future__ import annotations

from tests.zoo.entry import Entry
from tests.zoo.families import geometric, language, losses, plain, sequences, structures, vision

PARTS = (plain, sequences, losses, structures, vision, language, geometric)
ENTRIES: list[Entry] = [entry for part in PARTS for entry in part.ENTRIES]

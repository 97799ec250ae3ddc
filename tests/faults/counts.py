"""Counts of faults and of what followed, as JSON, and the table that docs/reliability.md is made from."""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = ROOT / "benchmarks/results/faults.json"
FUZZ = ROOT / "benchmarks/results/fuzz.json"
PAGE = ROOT / "docs/reliability.md"

Counts = dict[str, dict[str, int]]

_HEAD = """# Reliability

What was tried, how often, and what happened. `make test` runs a few cases of each kind.

## Faults

`make test-faults` runs all of it and writes this page. After every fault the same command was run again. It had to end
well, with the same numbers bit for bit as without the fault, nothing that had been saved lost, and no temporary files
left.

"struck" counts the faults that came while the job was at work; the others came after its end. Where a folder is gone or
read-only, or a disk is full, a job that cannot go on has to say so in one sentence and end with exit status 2. So does
a second writer of a run or spectrum, while the first is not disturbed; two sweeps share their runs. Readers (`info`,
with and without `--verify`, `history`, `saturation`, `report`) are started one after the other while a run is written.
Clocks jump by up to a year each time they are read, and so do the times of files before a killed job is continued.

"""
_FUZZ_HEAD = """
## Damaged and made-up input

`make fuzz` gives it to every reader. Whatever it holds, it is read, or refused by one sentence: no other error, no code
from it that runs, no gigabytes of memory, no hanging. Inputs are sound files with bytes or entries replaced at random;
*guided*: those that reach new lines of a reader are kept and changed further. The made-up command lines name no run, so
that all have to be refused. Files whose digest would tell every change are tried without it.

| input | tried | read | refused |
|---|---|---|---|
"""
_COLUMNS = ("tried", "struck", "resumed", "identical", "clean")


def add(counts: Counts, what: str, **found: bool) -> None:
    """Count one try."""
    row = Counter(counts.get(what, {}))
    row["tried"] += 1
    row.update({name: int(value) for name, value in found.items()})
    counts[what] = dict(row)


def save(counts: Counts) -> None:
    """Merge the counts of this session into the file and write the page."""
    with open(FILE, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # tests may run in several processes
        file.seek(0)
        known: Counts = {**json.loads(file.read() or "{}"), **counts}
        file.truncate(0)
        file.write(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
        write_page(known)


def write_page(counts: Counts) -> None:
    """The page, from counts."""
    lines = ["| fault | " + " | ".join(_COLUMNS) + " |", "|---" * (len(_COLUMNS) + 1) + "|"]
    lines += [
        f"| {what} | " + " | ".join(str(row.get(column, 0)) for column in _COLUMNS) + " |"
        for what, row in sorted(counts.items())
    ]
    fuzz: Counts = json.loads(FUZZ.read_text())
    tried = [
        f"| {what} | {sum(row.values())} | {row.get('read', 0)} | {row.get('refused', 0)} |"
        for what, row in sorted(fuzz.items())
    ]
    PAGE.write_text(_HEAD + "\n".join(lines) + "\n" + _FUZZ_HEAD + "\n".join(tried) + "\n")


if __name__ == "__main__":
    write_page(json.loads(FILE.read_text()))

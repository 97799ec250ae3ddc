"""Run every network of the zoo, and write the page of the documentation that lists the results.

``python -m tests.zoo.page [options of pytest]``
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.zoo.checks import CHECKS
from tests.zoo.families import ENTRIES

PAGE = Path(__file__).parents[2] / "docs/reference/networks.md"
PACKAGES = ("torch", "torchvision", "transformers", "timm", "torch_geometric", "peft", "lightning")
INTRODUCTION = """\
# Networks

For which networks each analysis is right. This page is written by `make test-zoo` from the tests in `tests/zoo`,
which compare every analysis of every network with an independent computation in float64: Hessians by reverse mode
over reverse mode or by differences of gradients, Gauss-Newton matrices likewise, Fisher matrices from the gradients
of single examples; losses, distances and activations directly. *Right* means equal up to round-off, random estimates
within five standard errors, by traced and by untraced products, and that nothing of yours has changed: weights,
modes, hooks, data, the states of random number generators. *Refused* means one sentence that says why and what to do;
the sentences are below the table. *–* means that there is nothing to compute, such as the saturation of a network
without activation modules.
"""


class Cell(NamedTuple):
    """What became of a network in an analysis; ``refusal`` is empty if the analysis is right."""

    family: str
    network: str
    check: str
    refusal: str


class Cells:
    """Plugin of pytest that collects the cells of the table."""

    def __init__(self) -> None:
        self.found: list[Cell] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.found += [Cell(*value) for name, value in report.user_properties if name == "cell"]


def lines(cells: Sequence[Cell]) -> Iterator[str]:
    """The page, line by line."""
    yield INTRODUCTION
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    yield f"Versions: {versions}.\n"
    families = list(dict.fromkeys(entry.family for entry in ENTRIES))
    yield from _row(["family", *CHECKS])
    yield from _row(["---"] * (len(CHECKS) + 1))
    for family in families:
        yield from _row([family, *(_summary(cells, family, check) for check in CHECKS)])
    yield "\n## The networks\n"
    for family in families:
        yield f"- **{family}**: {'; '.join(entry.name for entry in ENTRIES if entry.family == family)}"
    yield "\n## What is refused, and why\n"
    reasons: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        if cell.refusal:
            reasons.setdefault((cell.network, cell.refusal), []).append(cell.check)
    for (network, refusal), checks in reasons.items():
        yield f"- **{network}** ({', '.join(checks)}): {refusal}"


def _summary(cells: Sequence[Cell], family: str, check: str) -> str:
    """``right``, ``refused`` or both, for the networks of a family."""
    refused = {bool(cell.refusal) for cell in cells if (cell.family, cell.check) == (family, check)}
    return ", ".join(["right", "refused"][kind] for kind in sorted(refused)) or "–"


def _version(package: str) -> str:
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:  # the page itself is only written where all are installed
        return "not installed"


def _row(cells: Sequence[str]) -> Iterator[str]:
    yield f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str]) -> int:
    """Run the tests, and write the page if all of them pass and none is left out."""
    cells = Cells()
    code = pytest.main([str(Path(__file__).parent), *arguments], plugins=[cells])
    if code:
        return int(code)
    expected = [(entry.name, check) for entry in ENTRIES for check in CHECKS if check not in entry.not_for]
    if len(cells.found) < len(expected):
        print(f"{PAGE.name} stays as it is, since tests were left out; are all packages of the extra zoo installed?")
        return 1
    cells.found.sort(key=lambda cell: expected.index((cell.network, cell.check)))  # workers report in any order
    PAGE.write_text("\n".join(lines(cells.found)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Parts of the page of results: tables, numbers with intervals, links to cells."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pnanalysis.estimates import Estimate
from pnanalysis.reproduce.cells import RECORD, Cell, Result, Store

UNKNOWN = "–"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    head, *body = ["| " + " | ".join(map(_plain, row)) + " |" for row in (columns, *rows)]
    return "\n".join([head, "|" + "---|" * len(columns), *body])


def _plain(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def number(value: float, digits: int = 2, signed: bool = False) -> str:
    """A number with so many decimals; a dash where it is unknown."""
    return UNKNOWN if math.isnan(value) else f"{value:{'+' if signed else ''}z.{digits}f}"


def with_interval(estimate: Estimate, digits: int = 2, signed: bool = False) -> str:
    """A mean with the ends of its interval, where it has one."""
    text = number(estimate.value, digits, signed)
    if math.isnan(estimate.low):
        return text
    return f"{text} ({number(estimate.low, digits, signed)} to {number(estimate.high, digits, signed)})"


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits."""
    return UNKNOWN if math.isnan(value) else f"{value:.{digits}g}"


def p_text(p: float) -> str:
    """A p-value; a dash where there is none."""
    return UNKNOWN if math.isnan(p) else f"{p:.2g}" if p >= 1e-4 else "< 0.0001"


@dataclass(frozen=True)
class Links:
    """Links from a page to cells and figures.

    Attributes
    ----------
    store : Store
    page : Path
    """

    store: Store
    page: Path

    def to(self, path: Path) -> str:
        """A path as the page refers to it."""
        return Path(os.path.relpath(path, self.page.parent)).as_posix()

    def cell(self, cell: Cell) -> str:
        """A link to a cell, by its id."""
        return f"[{cell.id}]({self.to(self.store.path(cell) / RECORD)})"

    def cells(self, results: Iterable[Result]) -> str:
        """Links to the cells that numbers come from, as a sentence."""
        links = [self.cell(result.cell) for result in results]
        return f"Cells: {', '.join(links)}." if links else ""

    def figure(self, path: Path, text: str) -> str:
        """An image."""
        return f"![{text}]({self.to(path)})"


def failures(results: Iterable[Result], links: Links) -> str:
    """A row for each training that failed; empty if none did."""
    rows = [
        [links.cell(result.cell), str(result.record["status"]), result.failure]
        for result in results
        if not result.is_finished
    ]
    if not rows:
        return ""
    text = (
        "Trainings that failed. None of their iterations, finished or not, is in any mean, and their seeds are in no "
        "difference: means are those of trainings that succeed."
    )
    return f"{text}\n\n" + table(["cell", "ended", "why"], rows)


def blocks(parts: Iterable[str]) -> str:
    """Paragraphs, without the empty ones."""
    return "\n\n".join(part for part in parts if part)

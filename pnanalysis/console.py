"""Command lines: tables or JSON on standard output, every foreseeable failure as one clear line on standard error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import rich.markup
import rich.table
import typer
from rich.console import Console

from pnanalysis.errors import PnError
from pnanalysis.measured import Measured, Shown

_INTERRUPTED = 130

#: What a command has to say, where ``--json`` asked for it; printed at the command's end.
_spoken: dict[str, Any] | None = None


class Percent(float):
    """A share: printed in per cent, a dash where it is unknown."""


Cell = str | float | int | Percent | Measured | Shown | None


@dataclass(frozen=True)
class Table:
    """Rows of named columns, before anybody has decided how to show them."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]


def run_app(app: typer.Typer) -> None:
    """Run a typer application; exit status 2 for what the user can mend, 130 for an interrupt."""
    global _spoken
    _spoken = None
    try:
        app()
    except PnError as error:
        _print_json()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as stopped:
        if stopped.code == _INTERRUPTED:
            print("interrupted; what was saved is intact", file=sys.stderr)
        elif not stopped.code:
            _print_json()
        raise


def _print_json() -> None:
    if _spoken is not None and any(_spoken.values()):
        print(json.dumps(_spoken, indent=2, allow_nan=False))


def version_option(wanted: bool) -> None:
    """Print the version and stop (option ``--version``)."""
    if wanted:
        print(metadata.version("pnanalysis"))
        raise typer.Exit


def speak_json(wanted: bool) -> None:
    """From here on, collect tables and files and print them as one JSON object at the end (option ``--json``)."""
    global _spoken
    _spoken = {"files": [], "tables": [], "notes": []} if wanted else None


def make_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> Table:
    """A table whose first column is text and whose others are mostly numbers."""
    return Table(title, list(columns), [list(row) for row in rows])


def show(what: Table | str | None, quiet: bool = False) -> None:
    """Print a table or a line, unless told to be quiet; where there is no terminal, never wrapped or cut."""
    if what is None:
        return
    if _spoken is not None:
        if isinstance(what, Table):
            rows = [dict(zip(what.columns, map(_plain, row), strict=True)) for row in what.rows]
            _spoken["tables"].append({"title": what.title, "rows": rows})
        else:
            _spoken["notes"].append(what)
        return
    if quiet:
        return
    console = Console() if sys.stdout.isatty() else Console(width=200)
    rendered = _rendered(what) if isinstance(what, Table) else what
    console.print(rendered, highlight=False, soft_wrap=isinstance(what, str), markup=False)


def show_saved(quiet: bool, *files: Any) -> None:
    """Say where files are."""
    names = [str(file) for file in files if file is not None]
    if _spoken is not None:
        _spoken["files"] += names
    else:
        show("saved " + " and ".join(names), quiet)


def text(cell: Cell) -> str:
    """A cell as people read it."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Measured):
        return cell.text()
    if isinstance(cell, Shown):
        return cell.text()
    if cell is None or math.isnan(cell):
        return "–"
    if isinstance(cell, Percent):
        return f"{float(cell):.2%}"
    return f"{cell:.4g}"


def _plain(cell: Cell) -> Any:
    """A cell as machines read it: numbers stay numbers, what is unknown is null."""
    if isinstance(cell, Shown):
        return _plain(cell.measured)
    if isinstance(cell, Measured):
        known = {name: value for name, value in vars(cell).items() if math.isfinite(value)}
        return {"value": None, **known}
    if isinstance(cell, str) or cell is None:
        return cell
    return None if not math.isfinite(cell) else int(cell) if isinstance(cell, int) else float(cell)


def _rendered(table: Table) -> rich.table.Table:
    drawn = rich.table.Table(title=rich.markup.escape(table.title), title_justify="left")
    for i, column in enumerate(table.columns):
        drawn.add_column(rich.markup.escape(column), justify="left" if i == 0 else "right")
    for row in table.rows:
        drawn.add_row(*(rich.markup.escape(text(cell)) for cell in row))
    return drawn

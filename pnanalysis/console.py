"""Command lines: tables on standard output, and every foreseeable failure as one clear line on standard error."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from pnanalysis.errors import PnError

_INTERRUPTED = 130


def run_app(app: typer.Typer) -> None:
    """Run a typer application; exit status 2 for what the user can mend, 130 for an interrupt."""
    try:
        app()
    except PnError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as stopped:
        if stopped.code == _INTERRUPTED:
            print("interrupted; what was saved is intact", file=sys.stderr)
        raise


def make_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, str) else f"{cell:.4g}" for cell in row))
    return table


def percent(share: float) -> str:
    """A share as printed in tables; a dash where it is unknown."""
    return "–" if math.isnan(share) else f"{share:.2%}"


def show(what: Table | str | None, quiet: bool = False) -> None:
    """Print a table or a line, unless told to be quiet; where there is no terminal, never wrapped or cut."""
    if what is None or quiet:
        return
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(what, highlight=False, soft_wrap=isinstance(what, str))

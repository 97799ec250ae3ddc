"""Command lines: tables on standard output, and every foreseeable failure as one clear line on standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

import click
import typer
from rich.console import Console
from rich.table import Table

from pnanalysis.errors import PnError


def run_app(app: typer.Typer) -> None:
    """Run a typer application; exit status 2 for what the user can mend, 130 for an interrupt."""
    try:
        status = app(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        status = 2
    except (click.Abort, KeyboardInterrupt):
        print("interrupted; what was saved is intact", file=sys.stderr)
        status = 130
    except PnError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename}", file=sys.stderr)
        status = 2
    sys.exit(status if isinstance(status, int) else 0)


def show(what: Table | str | None, quiet: bool = False) -> None:
    """Print a table or a line, unless told to be quiet; where there is no terminal, never wrapped or cut."""
    if what is None or quiet:
        return
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(what, highlight=False, soft_wrap=isinstance(what, str))


def make_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, str) else f"{cell:.4g}" for cell in row))
    return table

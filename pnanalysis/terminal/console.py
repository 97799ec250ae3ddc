"""Command lines: tables or JSON on standard output, every foreseeable failure as one clear line on standard error."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from types import FrameType
from typing import Any, NoReturn, SupportsFloat

import rich.markup
import rich.table
import typer
from rich.console import Console

from pnanalysis.errors import PnError
from pnanalysis.estimates import Estimate

#: The base of what typer raises for command lines it does not understand.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
#: What a command has to say, where ``--json`` asked for it; printed at the command's end.
_spoken: dict[str, Any] | None = None
#: How to go on with the command after an interrupt.
_next = ""


class Percent(float):
    """A share: printed in per cent, a dash where it is unknown."""


def error_cell(error: SupportsFloat, kind: str) -> float:
    """An error of a history as a cell: a share in per cent, a squared error as it is."""
    return Percent(error) if kind == "share" else float(error)


Cell = str | float | int | Percent | Estimate | None


@dataclass(frozen=True)
class Table:
    """Rows of named columns, before anybody has decided how to show them."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]


def run_app(app: typer.Typer) -> None:
    """Run a typer application; exit status 2 for what the user can mend, 128 and the signal for an interrupt.

    SIGTERM, which batch systems send before they kill, is an interrupt too.
    """
    global _spoken, _next
    _spoken, _next = None, "what was saved is intact"
    status: Any = 0
    try:
        with _interruptible() as stopped:
            status = app(standalone_mode=False)
    except PnError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except _USAGE_ERROR as error:
        _fail_usage(error)
    if stopped:
        print(f"interrupted; {_next}", file=sys.stderr)
        sys.exit(128 + stopped[0])
    if not status:
        _print_json()
    sys.exit(status or 0)


def when_interrupted(advice: str) -> None:
    """Say how this command is gone on with, should it be interrupted from here on."""
    global _next
    _next = advice


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Within the body SIGINT and SIGTERM raise KeyboardInterrupt; the list tells which has come."""
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:  # what is being saved then is not interrupted again
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    own = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in own:
        signal.signal(number, interrupt)
    try:
        yield received
    except KeyboardInterrupt:
        if not received:
            raise
    finally:
        for number in own:
            signal.signal(number, before[number])


def _print_json() -> None:
    if _spoken is not None and any(_spoken.values()):
        print(json.dumps(_spoken, indent=2, allow_nan=False))


def _fail(message: str) -> NoReturn:
    if _spoken is not None:
        _spoken["error"] = message
    _print_json()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _fail_usage(error: Any) -> NoReturn:
    """A command line that cannot be understood: what is wrong with it, and where to read how it goes."""
    message, context = error.format_message().replace("Value error, ", ""), getattr(error, "ctx", None)
    if not message:  # nothing was asked for, and the help has been shown
        sys.exit(2)
    advice = "" if context is None else f"see {context.command_path} --help"
    _fail(f"{message} {advice.capitalize()}" if message.endswith("?") else f"{message.rstrip('.')}; {advice}")


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
    """A table; columns of nothing but text stand left, others right."""
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


def say(line: str, quiet: bool = False) -> None:
    """A line on standard error, about the work rather than its result."""
    if not quiet:
        print(line, file=sys.stderr)


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
    if isinstance(cell, Estimate):
        return cell.text()
    if cell is None or math.isnan(cell):
        return "–"
    if isinstance(cell, Percent):
        return f"{float(cell):.2%}"
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:.4g}"


def _plain(cell: Cell) -> Any:
    """A cell as machines read it: numbers stay numbers, what is unknown is null."""
    if isinstance(cell, Estimate):
        parts = {name: getattr(cell, name) for name in ("value", "se", "low", "high")}
        return {"value": None} | {name: part for name, part in parts.items() if math.isfinite(part)}
    if isinstance(cell, str) or cell is None:
        return cell
    return None if not math.isfinite(cell) else int(cell) if isinstance(cell, int) else float(cell)


def _rendered(table: Table) -> rich.table.Table:
    drawn = rich.table.Table(title=rich.markup.escape(table.title), title_justify="left")
    for i, column in enumerate(table.columns):
        names = all(isinstance(row[i], str) for row in table.rows)
        drawn.add_column(rich.markup.escape(column), justify="left" if names else "right", overflow="fold")
    for row in table.rows:
        drawn.add_row(*(rich.markup.escape(text(cell)) for cell in row))
    return drawn

"""Command lines: tables or JSON on standard output, every error that a user can mend as one line on standard error."""

from __future__ import annotations

import json
import math
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from types import FrameType
from typing import Any, NoReturn, SupportsFloat

import rich.table
import typer
from rich.console import Console
from rich.text import Text

from pnanalysis.errors import PnError, is_out_of_memory, printable, reason
from pnanalysis.estimates import Estimate, proportion
from pnanalysis.terminal.streams import lasting_streams, write_line

#: The base class of the errors that typer raises for invalid command lines, which has no public name.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
#: Signals that end a command cleanly; Windows has no SIGHUP.
_INTERRUPTS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
#: With ``--json``: the files, tables and notes of this command, printed as one object at its end.
_json_output: dict[str, Any] | None = None
#: How to resume this command, printed after an interrupt.
_interrupt_advice = ""
#: Of a table that is printed as text.
_MOST_ROWS = 1000


class Percent(float):
    """A fraction, printed in per cent; a dash where it is unknown."""


def error_cell(error: SupportsFloat, kind: str, n: int | None = None) -> float | Estimate:
    """An error of a history as a cell: a fraction (kind ``share``) of n examples in per cent, or a squared error."""
    if kind != "share":
        return float(error)
    return Percent(error) if n is None else proportion(float(error), n)


Cell = str | float | int | Percent | Estimate | None


@dataclass(frozen=True)
class Table:
    """Rows of named columns, to be printed as text or as JSON.

    ``columns`` gives the title of each column by its key; JSON output has the keys, which do not change when titles do.
    """

    title: str
    columns: dict[str, str]
    rows: list[list[Cell]]


def run_app(app: typer.Typer) -> None:
    """Run a typer application and exit: status 2 for errors that the user can mend, 128 + signal for an interrupt.

    SIGTERM, which batch systems send before they kill, and SIGHUP, when the terminal is closed, are interrupts too. A
    terminal or reader that has gone stops nothing; output that a full disk refuses is an error at the end.
    """
    try:
        with lasting_streams() as (output, _), _printable_warnings():
            _run(app)
    except SystemExit as ending:
        if output.lost and not ending.code:
            print_status(f"error: standard output cannot be written ({output.error}); everything else is done")
            sys.exit(2)
        raise


@contextmanager
def _printable_warnings() -> Iterator[None]:
    """Within the body, messages of warnings are shown with control characters as escapes."""
    before = warnings.formatwarning

    def shown(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        return before(printable(str(message)), category, printable(filename), lineno, line)

    warnings.formatwarning = shown
    try:
        yield
    finally:
        warnings.formatwarning = before


def _run(app: typer.Typer) -> NoReturn:
    global _json_output, _interrupt_advice
    _json_output, _interrupt_advice = None, "what was saved is intact"
    status: Any = 0
    try:
        with _interruptible() as stopped:
            # Without a name the program's is guessed from __main__, which is wrong under python -m.
            status = app(standalone_mode=False, prog_name=app.info.name)
    except PnError as error:
        _fail(str(error))
    except OSError as error:
        _fail((error.strerror or reason(error)) + (f": {error.filename}" if error.filename else ""))
    except _USAGE_ERROR as error:
        _fail_usage(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _fail("there is not enough memory; take smaller batches or fewer examples, or a machine with more of it")
    except SystemExit as ending:  # typer returns its own
        _fail(f"code of a network, loss or data set ended the program ({reason(ending)}); what was saved is intact")
    if stopped:
        print_status(f"interrupted; {_interrupt_advice}")
        sys.exit(128 + stopped[0])
    if not status:
        _print_json()
    sys.exit(status or 0)


def when_interrupted(advice: str) -> None:
    """Set how this command can be resumed, which is printed if it is interrupted from here on."""
    global _interrupt_advice
    _interrupt_advice = advice


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Make SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt within the body; the list holds the signals received."""
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:  # a second signal must not interrupt what is being saved on the way out
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in _INTERRUPTS}
    # Signals that are ignored (under nohup) or handled outside Python stay as they are.
    replaced = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in replaced:
        signal.signal(number, interrupt)
    try:
        yield received
    except KeyboardInterrupt:
        if not received:  # raised by something other than a signal
            raise
    finally:
        for number in replaced:
            signal.signal(number, before[number])


def _print_json() -> None:
    if _json_output is not None and any(_json_output.values()):
        print(json.dumps(_json_output, indent=2, allow_nan=False))


def _fail(message: str) -> NoReturn:
    message = printable(message)
    if _json_output is not None:
        _json_output["error"] = message
    _print_json()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _fail_usage(error: Any) -> NoReturn:
    """Print what is wrong with an invalid command line, and which help to read."""
    message, context = error.format_message().replace("Value error, ", ""), getattr(error, "ctx", None)
    if not message:  # no command was given, and the help has been printed
        sys.exit(2)
    advice = "" if context is None else f"see {context.command_path} --help"
    _fail(f"{message} {advice.capitalize()}" if message.endswith("?") else f"{message.rstrip('.')}; {advice}")


def version_option(wanted: bool) -> None:
    """Callback of ``--version``: print the version and stop."""
    if wanted:
        print(metadata.version("pnanalysis"))
        raise typer.Exit


def json_option(wanted: bool) -> None:
    """Callback of ``--json``: collect tables, lines and files, and print them as one JSON object at the end."""
    global _json_output
    _json_output = {"files": [], "tables": [], "notes": []} if wanted else None


def make_table(title: str, columns: Mapping[str, str] | Iterable[str], rows: Iterable[Iterable[Any]]) -> Table:
    """A table.

    Parameters
    ----------
    title : str
    columns : mapping of str to str, or iterable of str
        Titles by key, or keys that are the titles too.
    rows : iterable of iterables
        The cells of each row, in the order of the columns.
    """
    titles = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}
    return Table(title, titles, [list(row) for row in rows])


def print_table(table: Table, quiet: bool = False) -> None:
    """Print a table unless ``quiet``, or collect it with ``--json``. It is not narrowed where there is no terminal.

    Of more rows than anyone reads, and than can be laid out in a second, only the first are printed.
    """
    if _json_output is not None:
        rows = [dict(zip(table.columns, map(_json_value, row), strict=True)) for row in table.rows]
        _json_output["tables"].append({"title": table.title, "rows": rows})
    elif not quiet:
        shown = replace(table, rows=table.rows[:_MOST_ROWS])
        _console().print(_rendered(shown), highlight=False, markup=False)
        if len(table.rows) > _MOST_ROWS:
            print_line(f"and {len(table.rows) - _MOST_ROWS:,} more rows; --json gives all of them")


def print_line(line: str, quiet: bool = False) -> None:
    """Print a line of results unless ``quiet``, or collect it with ``--json``. Long lines are not wrapped."""
    if _json_output is not None:
        _json_output["notes"].append(line)
    elif not quiet:
        _console().print(printable(line), highlight=False, soft_wrap=True, markup=False)


def print_status(line: str, quiet: bool = False) -> None:
    """Print a line on standard error, about the work rather than its result, unless ``quiet``."""
    if not quiet:
        write_line(line)


def print_saved(quiet: bool, *files: Any) -> None:
    """Print where files were saved unless ``quiet``, or collect their names with ``--json``; ``None`` is left out."""
    names = [str(file) for file in files if file is not None]
    if _json_output is not None:
        _json_output["files"] += names
    else:
        print_line("saved " + " and ".join(names), quiet)


def _console() -> Console:
    return Console(emoji=False) if sys.stdout.isatty() else Console(width=200, emoji=False)


def text(cell: Cell) -> str:
    """A cell as printed in a table."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Estimate):
        return cell.text() + (" *" if cell.is_significant else "")
    if cell is None or math.isnan(cell):
        return "–"
    if isinstance(cell, Percent):
        return f"{float(cell):.2%}"
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:.4g}"


def _json_value(cell: Cell) -> Any:
    """A cell in JSON: numbers stay numbers, unknown ones are null, estimates are objects of their finite parts."""
    if isinstance(cell, Estimate):
        names = ("value", "se", "low", "high", "data_se", "p", "gap_p")
        parts = {name: getattr(cell, name, math.nan) for name in names}
        return {"value": None} | {name: part for name, part in parts.items() if math.isfinite(part)}
    if isinstance(cell, str) or cell is None:
        return cell
    return None if not math.isfinite(cell) else int(cell) if isinstance(cell, int) else float(cell)


def _rendered(table: Table) -> rich.table.Table:
    rendered = rich.table.Table(title=_shown(table.title), title_justify="left")
    for i, title in enumerate(table.columns.values()):
        is_text = all(isinstance(row[i], str) for row in table.rows)
        rendered.add_column(_shown(title), justify="left" if is_text else "right", overflow="fold")
    for row in table.rows:
        rendered.add_row(*(_shown(text(cell)) for cell in row))
    return rendered


def _shown(cell: str) -> Text:
    """Text as it is: names in it may look like markup or hold control characters."""
    return Text(printable(cell))

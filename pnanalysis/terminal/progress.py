"""Progress bars with rate and remaining time, on a terminal only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Protocol, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from pnanalysis.errors import printable
from pnanalysis.terminal.streams import error_stream


class Advance(Protocol):
    """Call with the number of units done since the last call and, optionally, a short text to show after the bar."""

    def __call__(self, steps: float = 1, text: str = "") -> None: ...


class _Rate(ProgressColumn):
    """Units of work per second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.3g}/s")


class _Words(TextColumn):
    """Text in which names of layers or recipes occur."""

    def render(self, task: Task) -> Text:
        shown = super().render(task)
        shown.plain = printable(shown.plain)
        return shown


@contextmanager
def progress_bar(description: str, total: float | None, enabled: bool = True) -> Iterator[Advance]:
    """Show a bar on standard error while the body runs; silent when disabled or not on a terminal.

    Parameters
    ----------
    description : str
        The work, in a few words.
    total : float or None
        Units of work altogether, where that is known.
    enabled : bool
        ``False`` shows nothing.
    """
    stream = error_stream()
    console = Console(file=cast("IO[str]", stream))
    columns = (
        _Words("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        _Words("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=console, disable=not (enabled and stream.isatty())) as bar:
        task = bar.add_task(description, total=total, text="")

        def advance(steps: float = 1, text: str = "") -> None:
            bar.update(task, advance=steps, text=text)

        yield advance

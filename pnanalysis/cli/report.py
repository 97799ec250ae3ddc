"""``pnanalysis report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pnanalysis.checks import check_writable
from pnanalysis.cli import options
from pnanalysis.terminal.console import print_saved


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("report")(report)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs, and their restart controls.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.html", callback=check_writable)] = Path(
        "report.html"
    ),
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Write one self-contained HTML page with all results of the runs.

    [bold]Example[/bold]

      pnanalysis report runs/lenet5 runs/lenet5-restart -o report.html
    """
    from pnanalysis.io.runs import open_run
    from pnanalysis.report import write_report

    path = write_report([open_run(run) for run in runs], output, title=title)
    print_saved(quiet, path)

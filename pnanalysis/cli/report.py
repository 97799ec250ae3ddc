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
    given: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN|FILE...", help="Runs, and their restart controls; datasets that analyses have saved elsewhere."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.html", callback=check_writable)] = Path(
        "report.html"
    ),
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Write one self-contained HTML page with all results of the runs, or of your own networks.

    [bold]Examples[/bold]

      pnanalysis report runs/lenet5 runs/lenet5-restart -o report.html

      pnanalysis report comparison.nc spectra.nc blocks.nc -o report.html
    """
    from pnanalysis.report import write_report

    path = write_report(given, output, title=title)
    print_saved(quiet, path)

"""The command line: a file per subcommand, each of which parses, calls one analysis, saves and prints."""

from __future__ import annotations

from typing import Annotated

import typer

from pnanalysis.cli import (
    compare,
    demo,
    gradients,
    hessian,
    history,
    info,
    landscape,
    plot,
    report,
    saturation,
    sharpness,
    trajectory,
)
from pnanalysis.terminal.console import run_app, version_option

app = typer.Typer(
    name="pnanalysis",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
COMMANDS = (
    demo, compare, hessian, saturation, trajectory, landscape, sharpness, gradients, history, plot, report, info,
)  # fmt: skip
for command in COMMANDS:
    command.register(app)


@app.callback()
def pnanalysis(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=version_option, is_eager=True)
    ] = False,
) -> None:
    """Are these two minima different, and which is better?

    Exit status: 0 when all is done, 2 for what you can mend (one line says what), 130 when interrupted (143 by
    SIGTERM); what was saved by then is intact, and [bold]pnanalysis hessian[/bold] and [bold]pntrain --resume[/bold]
    go on from it.
    """


def main() -> None:
    """Entry point of ``pnanalysis``."""
    run_app(app)

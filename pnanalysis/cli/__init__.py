"""The command line: one file per subcommand, which parses options, calls one analysis, saves and prints."""

from __future__ import annotations

from typing import Annotated

import typer

from pnanalysis.cli import (
    blocks,
    champion,
    compare,
    correlate,
    demo,
    eigenpairs,
    gradients,
    hessian,
    history,
    info,
    landscape,
    learning_coefficient,
    options,
    plot,
    report,
    reproduce,
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
    demo, champion, compare, hessian, eigenpairs, blocks, saturation, trajectory, landscape, sharpness,
    learning_coefficient, correlate, gradients, history, plot, report, info, reproduce,
)  # fmt: skip
#: Commands that several processes of ``torchrun`` divide among them.
_SHARED = ("hessian",)
for command in COMMANDS:
    command.register(app)


@app.callback()
def pnanalysis(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=version_option, is_eager=True)
    ] = False,
) -> None:
    """Are these two minima different, and which is better?

    Exit status: 0 for success, 2 for an error that you can mend (one line says which), 130 for an interrupt (143 for
    SIGTERM, 129 for SIGHUP); what was saved by then is intact, and [bold]pnanalysis hessian[/bold],
    [bold]eigenpairs[/bold], [bold]blocks[/bold], [bold]sharpness[/bold], [bold]learning-coefficient[/bold],
    [bold]compare[/bold], [bold]champion[/bold], [bold]correlate[/bold] and [bold]pntrain --resume[/bold] continue from
    it.
    """
    if context.invoked_subcommand not in (None, *_SHARED):
        options.refuse_several(str(context.invoked_subcommand))


def main() -> None:
    """Entry point of ``pnanalysis``."""
    run_app(app)

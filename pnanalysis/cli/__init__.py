"""The command line: a file per subcommand, each of which parses, calls one analysis, saves and prints."""

from __future__ import annotations

import typer

from pnanalysis.cli import (
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
from pnanalysis.console import run_app

app = typer.Typer(
    name="pnanalysis",
    help="Are these two minima different, and which is better?",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for command in (demo, hessian, saturation, trajectory, landscape, sharpness, gradients, history, plot, report, info):
    command.register(app)


def main() -> None:
    """Entry point of ``pnanalysis``."""
    run_app(app)

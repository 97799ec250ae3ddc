"""The command line: a file per subcommand, each of which parses, calls one analysis, saves and prints."""

from __future__ import annotations

import typer

from pnanalysis.cli import compare, demo, gradients, hessian, history, info, plot, report, saturation, trajectory
from pnanalysis.console import run_app

app = typer.Typer(
    name="pnanalysis",
    help="Are these two minima different, and which is better?",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for command in (demo, compare, hessian, saturation, trajectory, gradients, history, plot, report, info):
    command.register(app)


def main() -> None:
    """Entry point of ``pnanalysis``."""
    run_app(app)

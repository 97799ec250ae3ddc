"""``pnanalysis plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pnanalysis.checks import check_writable
from pnanalysis.cli import options
from pnanalysis.terminal.console import print_saved


def _kinds() -> list[str]:
    from pnanalysis import plots

    return list(plots.FIGURES)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("plot")(plot)


def plot(
    file: Annotated[Path, typer.Argument(metavar="FILE.nc|zarr", help="A saved dataset.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.png|pdf|svg",
            help="By default FILE.png next to the dataset.",
            callback=options.figure_file,
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="Figure, such as saturation_gap; by default that of the dataset's kind.", autocompletion=_kinds
        ),
    ] = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Draw the figure of a saved dataset.

    [bold]Example[/bold]

      pnanalysis plot runs/lenet5/analysis/hessian.nc -o spectrum.pdf
    """
    from pnanalysis import plots
    from pnanalysis.io.datasets import load

    target = output or check_writable(file.with_suffix(".png"))
    plots.save_figure(plots.plot(load(file), kind), target)
    print_saved(quiet, target)

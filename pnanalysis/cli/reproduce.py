"""``pnanalysis reproduce``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pnanalysis.cli import options
from pnanalysis.terminal.console import print_line, when_interrupted


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("reproduce")(reproduce)


def reproduce(
    experiments: Annotated[
        list[str] | None, typer.Argument(metavar="[S1..S9|all]...", help="Experiments; all by default.")
    ] = None,
    scale: Annotated[
        Literal["smoke", "cpu", "paper"],
        typer.Option(help="smoke: digits, minutes; cpu: CIFAR-10 on two cores; paper: the paper's settings."),
    ] = "smoke",
    seeds: Annotated[int | None, typer.Option(help="Repetitions of each experiment; by default the scale's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; by default results/SCALE.")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="SPEC", help="cifar10, imagefolder:PATH; by default the scale's.")
    ] = None,
    work: Annotated[Path | None, typer.Option(help="Folder of the trainings; by default OUT/work.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Trainings at a time; by default one per core or GPU.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after so long; the same command continues.")] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="CELL", help="Make this cell; repeatable.")] = None,
    tables: Annotated[bool, typer.Option("--tables", help="Only write tables and figures of what is there.")] = False,
    page: Annotated[Path | None, typer.Option(help="The page to write; by default OUT/RESULTS.md.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep trainings whose results are saved.")] = False,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Run the paper's experiments with restarts of equal cost as controls, and write RESULTS.md.

    Every training is a cell, whose small results are kept in OUT/cells. What is there is never trained again.

    [bold]Examples[/bold]

      pnanalysis reproduce all --scale smoke --out smoke

      pnanalysis reproduce S3 S4 --scale cpu --data imagefolder:cifar --minutes 60

      pnanalysis reproduce --scale cpu --tables
    """
    from pnanalysis.reproduce.study import reproduce as run

    when_interrupted("run the same command again to continue")
    written = run(
        experiments or ["all"], scale, out or Path("results") / scale, seeds=seeds, data=data, work=work, jobs=jobs,
        minutes=minutes, only=only or (), train=not tables, page=page, keep=keep, device=device,
        log=lambda line: print_line(line, quiet),
    )  # fmt: skip
    print_line(f"results in {written}", quiet)

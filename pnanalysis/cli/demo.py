"""``pnanalysis demo``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from pnanalysis.cli import options
from pnanalysis.terminal.console import make_table, show, when_interrupted


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for runs and report.")] = Path("demo"),
    device: options.Device = "auto",
    seed: options.Seed = 0,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Train two small networks on digits, plain, persistent and restarted; analyse and report. Takes minutes.

    [bold]Example[/bold]

      pnanalysis demo --out demo
    """
    from pnanalysis.demo import demo as run_demo
    from pnanalysis.report import summary_table

    when_interrupted("the same command goes on from there")
    begun = time.monotonic()
    report, runs = run_demo(out, device, seed, say=lambda line: show(line, quiet), progress=not quiet)
    rows = summary_table(runs)
    show(make_table("plain, champion and best restart", list(rows[0]), ([*row.values()] for row in rows)), quiet)
    show(f"runs in {out}, report in {report} ({time.monotonic() - begun:.0f} s)", quiet)

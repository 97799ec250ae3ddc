"""``pnanalysis demo``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from pnanalysis.cli import options
from pnanalysis.terminal.console import make_table, print_line, print_table, when_interrupted


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path("demo"),
    device: options.Device = "auto",
    seed: options.Seed = 0,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Train two small networks on digits, plain, persistent and restarted, then analyse and report. Takes minutes.

    [bold]Example[/bold]

      pnanalysis demo --out demo
    """
    from pnanalysis.demo import demo as run_demo
    from pnanalysis.report import summary_sentences, summary_table

    when_interrupted("run the same command again to continue")
    started = time.monotonic()
    report, runs = run_demo(out, device, seed, log=lambda line: print_line(line, quiet), progress=not quiet)
    rows = summary_table(runs)
    print_table(make_table("plain, champion and best restart", rows[0].keys(), (row.values() for row in rows)), quiet)
    for sentence in summary_sentences(runs):
        print_line(sentence, quiet)
    print_line(f"runs in {out}, report in {report} ({time.monotonic() - started:.0f} s)", quiet)

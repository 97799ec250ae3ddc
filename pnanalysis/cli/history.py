"""``pnanalysis history``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pnanalysis.cli import options
from pnanalysis.errors import PnError
from pnanalysis.terminal.console import Table, error_cell, make_table

if TYPE_CHECKING:
    import xarray as xr


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("history")(history)


def history(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="[RUN]...", help="Run directories.")] = None,
    output: options.Output = None,
    plot: options.Plot = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Loss, penalty and errors by iteration and epoch.

    [bold]Example[/bold]

      pnanalysis history runs/lenet5 runs/lenet5-restart --plot history.pdf
    """
    from pnanalysis.analyses.history import history as analyse
    from pnanalysis.io.runs import open_run

    if not runs:
        raise PnError("no run given: name a run directory")
    opened = [open_run(path) for path in runs]
    ds = analyse(*opened)
    options.deliver(ds, None, output, plot, quiet, _table)  # runs have their histories already: saved only with -o


def _table(ds: xr.Dataset) -> Table:
    """Every iteration at its run's last epoch."""
    from pnanalysis.analyses.summaries import at_last_epoch
    from pnanalysis.schema import error_kind, error_name

    rows, kinds = [], set()
    has_runs = "run" in ds.dims
    for name, run in [(str(n), ds.sel(run=n)) for n in ds.run.values] if has_runs else [("", ds)]:
        kind = error_kind(run)
        kinds.add(kind)
        last = at_last_epoch(run)
        for iteration in ds.iteration.values:
            at = last.sel(iteration=iteration)
            if not at.train_loss.isnull():
                errors = [
                    error_cell(at[f"{split}_error"], kind, ds.attrs.get(f"n_{split}"))
                    for split in ("validation", "test")
                ]
                rows.append(
                    [*([name] if has_runs else []), int(iteration), float(at.train_loss), float(at.penalty), *errors]
                )
    titles = [error_name(split, *kinds) for split in ("validation", "test")]
    columns = [*(["run"] if has_runs else []), "iteration", "training loss", "penalty", *titles]
    return make_table("at the end of training", columns, rows)

"""``pnanalysis history``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from pnanalysis.cli import options
from pnanalysis.console import Percent, Table, make_table, show
from pnanalysis.errors import PnError

if TYPE_CHECKING:
    import xarray as xr


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("history")(history)


def history(
    runs: options.Paths = None,
    output: options.Output = None,
    plot: options.Plot = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Loss, penalty and errors by iteration and epoch.

    [bold]Example[/bold]

      pnanalysis history runs/lenet5 runs/lenet5-restart --plot history.pdf
    """
    from pnanalysis.history import history as analyse
    from pnanalysis.runs import open_run
    from pnanalysis.sources import as_source

    if not runs:
        raise PnError("name a run directory")
    opened = [open_run(path) for path in runs]
    ds = analyse(*opened)
    if output is None and plot is None:
        show(_table(ds), quiet)
    else:
        options.deliver(ds, as_source(opened[0]), output, plot, quiet, _table)


def _table(ds: xr.Dataset) -> Table:
    """Every iteration at its last epoch."""
    last = ds.dropna("epoch", how="all").isel(epoch=-1)
    rows = []
    several = "run" in ds.dims
    for name, run in [(str(n), last.sel(run=n)) for n in ds.run.values] if several else [("", last)]:
        for iteration in ds.iteration.values:
            at = run.sel(iteration=iteration)
            if not at.train_loss.isnull():
                errors = [Percent(at.validation_error), Percent(at.test_error)]
                rows.append(
                    [*([name] if several else []), int(iteration), float(at.train_loss), float(at.penalty), *errors]
                )
    columns = ["run"] if several else []
    return make_table(
        "at the end of training",
        [*columns, "iteration", "training loss", "penalty", "validation error", "test error"],
        rows,
    )

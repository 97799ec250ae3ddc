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
        first = as_source(opened[0], opened[0].manifest["model"]["name"])  # named, not built: no code of its own runs
        options.deliver(ds, first, output, plot, quiet, _table)


def _table(ds: xr.Dataset) -> Table:
    """Every iteration at its run's last epoch."""
    from pnanalysis.history import error_kind, error_name

    rows, kinds = [], set()
    several = "run" in ds.dims
    for name, run in [(str(n), ds.sel(run=n)) for n in ds.run.values] if several else [("", ds)]:
        kind = error_kind(run)
        kinds.add(kind)
        last = run.dropna("epoch", how="all").isel(epoch=-1)
        for iteration in ds.iteration.values:
            at = last.sel(iteration=iteration)
            if not at.train_loss.isnull():
                errors = [
                    Percent(error) if kind == "share" else float(error)
                    for error in (at.validation_error, at.test_error)
                ]
                rows.append(
                    [*([name] if several else []), int(iteration), float(at.train_loss), float(at.penalty), *errors]
                )
    columns = ["run"] if several else []
    titles = [error_name(split, *kinds) for split in ("validation", "test")]
    return make_table("at the end of training", [*columns, "iteration", "training loss", "penalty", *titles], rows)

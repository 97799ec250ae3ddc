"""``pnanalysis trajectory``."""

from __future__ import annotations

from typing import Annotated

import typer
import xarray as xr

from pnanalysis.cli import options
from pnanalysis.console import Table, make_table
from pnanalysis.trajectory import trajectory as analyse


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("trajectory")(trajectory)


def trajectory(
    runs: options.Paths = None,
    iteration: Annotated[list[int] | None, typer.Option(help="Which iterations; repeat. All by default.")] = None,
    components: Annotated[int, typer.Option(help="Principal components to give.")] = 2,
    model: options.Model = None,
    weights: options.Weights = None,
    output: options.Output = None,
    plot: options.Plot = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Paths through parameter space, on the plane through their ends and on their principal components.

    [bold]Examples[/bold]

      pnanalysis trajectory runs/lenet5 --iteration 0 --iteration 3 --plot paths.pdf

      pnanalysis trajectory runs/lenet5 runs/lenet5-restart
    """
    given = options.sources(runs, model, weights, None, None)
    ds = analyse(*given, iterations=iteration, n_components=components, progress=not quiet)
    options.deliver(ds, given[0], output, plot, quiet, _table)


def _table(ds: xr.Dataset) -> Table:
    """Each path's end: distance from the start, length, distance from the plane."""
    ends = {(run, i): k for k, (run, i) in enumerate(zip(ds.run.values, ds.iteration.values, strict=True))}
    rows = [
        [f"{run} iteration {iteration}", float(at.distance_from_start), float(at.path_length), float(at.plane_residual)]
        for (run, iteration), k in ends.items()
        for at in [ds.isel(checkpoint=k)]
    ]
    shares = ", ".join(f"{share:.1%}" for share in ds.explained_variance.values)
    return make_table(
        f"ends of the paths (principal components explain {shares})",
        ["path", "distance from start", "path length", "distance from plane"],
        rows,
    )

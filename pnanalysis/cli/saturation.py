"""``pnanalysis saturation``."""

from __future__ import annotations

from typing import Annotated

import typer
import xarray as xr

from pnanalysis.cli import options
from pnanalysis.console import Table, make_table
from pnanalysis.saturation import saturation as analyse


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("saturation")(saturation)


def saturation(
    runs: options.Paths = None,
    checkpoint: options.Checkpoints = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "validation",
    n: Annotated[int, typer.Option("--n", help="Images to look at.")] = 1000,
    bins: Annotated[int, typer.Option(help="Of the histograms.")] = 100,
    model: options.Model = None,
    weights: options.Weights = None,
    data: options.Data = None,
    output: options.Output = None,
    plot: options.Plot = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Percentiles and histograms of every activation, by layer, epoch and iteration.

    [bold]Examples[/bold]

      pnanalysis saturation runs/tanh7 --plot saturation.pdf

      pnanalysis saturation --model mymodels:make --weights a.safetensors b.safetensors --data mydata:make
    """
    given = options.sources(runs, model, weights, data, None)
    ds = analyse(
        *given, checkpoints=checkpoint or ["all"], split=split, n=n, bins=bins, device=device, seed=seed,
        progress=not quiet,
    )  # fmt: skip
    options.deliver(ds, given[0], output, plot, quiet, _table)


def _table(ds: xr.Dataset) -> Table:
    """The 98th percentile of the absolute activations at each path's last checkpoint."""
    values = ds.abs_percentile.sel(quantile=98.0)
    if "epoch" in values.dims:
        values = values.dropna("epoch", how="all").isel(epoch=-1)
    rows = values.stack(row=[dim for dim in values.dims if dim != "layer"]).transpose("row", "layer")
    names = [" ".join(f"{part}" for part in row) for row in rows.row.values]
    return make_table(
        "98th percentile of |activation| at the end of training",
        [" ".join(str(dim) for dim in values.dims if dim != "layer"), *map(str, ds.layer.values)],
        ([name, *row] for name, row in zip(names, rows.values, strict=True)),
    )

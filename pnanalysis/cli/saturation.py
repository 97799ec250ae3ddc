"""``pnanalysis saturation``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pnanalysis.cli import options
from pnanalysis.estimates import Estimate, proportion
from pnanalysis.terminal.console import Cell, Table, make_table

if TYPE_CHECKING:
    import xarray as xr


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("saturation")(saturation)


def saturation(
    runs: options.Paths = None,
    checkpoint: options.Checkpoints = None,
    split: Annotated[options.Split, typer.Option()] = "validation",
    n: Annotated[int, typer.Option("--n", help="Examples, drawn at random by --seed.")] = 1000,
    bins: Annotated[int, typer.Option(help="Bins of the histograms.")] = 100,
    saturation_bins: Annotated[int, typer.Option(help="Bins of the saturation measure.")] = 10,
    per_unit: Annotated[
        bool, typer.Option("--per-unit", help="Also give the saturation of every unit (channel).")
    ] = False,
    model: options.Model = None,
    weights: options.Weights = None,
    data: options.Data = None,
    tokens: options.Tokens = None,
    output: options.Output = None,
    plot: options.Plot = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Percentiles, histograms, saturation and dead units of every activation, by layer, epoch and iteration.

    [bold]Examples[/bold]

      pnanalysis saturation runs/tanh7 --plot saturation.pdf

      pnanalysis saturation runs/lenet5 --checkpoint ends --per-unit

      pnanalysis saturation --model mymodels:make --weights a.safetensors b.safetensors --data mydata:make
    """
    from pnanalysis.analyses.saturation import saturation as analyse

    given = options.sources(runs, model, weights, data, None, output, tokens)
    ds = analyse(
        *given, checkpoints=checkpoint or ["all"], split=split, n=n, bins=bins, saturation_bins=saturation_bins,
        per_unit=per_unit, device=device, seed=seed, progress=not quiet,
    )  # fmt: skip
    options.deliver(ds, given[0], output, plot, quiet, _table)


def _table(ds: xr.Dataset) -> Table:
    """Each layer at the end of each iteration: percentile, saturation with standard errors, dead units."""
    from pnanalysis.activations.statistics import MARGIN
    from pnanalysis.analyses.summaries import at_last_epoch

    stacked = [dim for dim in ds.n_units.dims if dim not in ("layer", "epoch")]
    rows, n = [], int(ds.attrs["n"])
    for key, group in ds.drop_dims(["bin", "unit"], errors="ignore").stack(row=stacked).groupby("row", squeeze=False):
        at = group.isel(row=0)
        if "epoch" in at.dims:
            at = at_last_epoch(at, "abs_percentile")
        rows += [[*key, str(layer), *_cells(at.sel(layer=layer), n)] for layer in ds.layer.values]
    percentile = f"{float(ds['quantile'].max()):g}th percentile of |a|"
    names = [*map(str, stacked), "layer", percentile]
    columns = {name: name for name in names} | {
        f"share within {MARGIN}": f"fraction within {MARGIN}",
        "saturation measure": "saturation measure",
        "dead units": "dead units",
        "of": "of",
    }
    return make_table("activations at the end of training, with standard errors over the examples", columns, rows)


def _cells(at: xr.Dataset, n: int) -> list[Cell]:
    percentile = (at.abs_percentile.isel(quantile=-1), at.abs_percentile_se.isel(quantile=-1))
    measure = (at.saturation_measure, at.saturation_measure_se)
    share = proportion(float(at.saturated_share), n, float(at.saturated_share_se))
    counts = [int(count) if count.notnull() else None for count in (at.dead_units, at.n_units)]  # units may be unknown
    first, last = (Estimate(float(value), float(se)) for value, se in (percentile, measure))
    return [first, share, last, *counts]

"""``pnanalysis gradients``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pnanalysis.cli import options
from pnanalysis.estimates import Estimate
from pnanalysis.terminal.console import Table, make_table

if TYPE_CHECKING:
    import xarray as xr


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("gradients")(gradients)


def gradients(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A persistent or partial run.")],
    iteration: Annotated[
        list[int] | None, typer.Option(help="Iteration to analyse; may be repeated. All by default.")
    ] = None,
    window: Annotated[
        int, typer.Option(help="First epoch of the window over which the constant push is computed.")
    ] = 1,
    split: Annotated[options.Split, typer.Option()] = "train",
    n: Annotated[
        int, typer.Option("--n", help="Examples for the gradient of the loss, drawn at random by --seed.")
    ] = 2048,
    model: options.Model = None,
    data: options.Data = None,
    tokens: options.Tokens = None,
    loss: options.LossName = None,
    output: options.Output = None,
    plot: options.Plot = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Split the persistent gradient into a constant push and fluctuations, and compare with the loss gradient.

    [bold]Example[/bold]

      pnanalysis gradients runs/gradient-split --window 10 --plot gradients.pdf
    """
    from pnanalysis.analyses.gradients import gradient_split
    from pnanalysis.inputs.sources import as_source

    source = as_source(run, model, options.data_of(data, tokens), loss)
    ds = gradient_split(
        source, iterations=iteration, window=window, split=split, n=n, device=device, seed=seed, progress=not quiet
    )
    options.deliver(ds, source, output, plot, quiet, _table)


def _table(ds: xr.Dataset) -> Table:
    from pnanalysis.analyses.summaries import at_last_epoch, rms_fluctuation

    rows = []
    for i in ds.iteration.values:
        for layer in ds.layer.values:
            at = ds.sel(iteration=i, layer=layer)
            if bool(at.constant_norm.isnull()):
                continue
            last = at_last_epoch(at, "loss_gradient_norm")
            rows.append(
                [
                    int(i),
                    str(layer),
                    float(at.constant_norm),
                    rms_fluctuation(at, ds.attrs["window"]),
                    float(last.loss_gradient_norm),
                    f"{float(at.last_flip.max()):.0f}",
                    Estimate(float(at.half_difference), float(at.half_difference_se)),
                ]
            )
    columns = {
        "iteration": "iteration",
        "layer": "layer",
        "constant push": "constant push",
        "rms fluctuation": "rms fluctuation",
        "loss gradient, end": "loss gradient at the end",
        "last flip, epoch": "epoch of the last flip",
        "halves differ by": "difference of the halves",
    }
    return make_table(f"norms over the epochs from {ds.attrs['window']} on, lam {ds.attrs['lam']:g}", columns, rows)

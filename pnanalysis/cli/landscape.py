"""``pnanalysis landscape``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pnanalysis.cli import options
from pnanalysis.estimates import Estimate
from pnanalysis.terminal.console import Percent, Table, make_table

if TYPE_CHECKING:
    import xarray as xr

    from pnanalysis.inputs.sources import Source


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("landscape")(landscape)


def landscape(
    runs: options.Paths = None,
    view: Annotated[
        Literal["line", "curve", "plane", "random"], typer.Option(help="curve gives the line and a trained curve.")
    ] = "line",
    align: Annotated[bool, typer.Option("--align", help="Also the line to the relabelled second network.")] = False,
    checkpoint: options.Checkpoints = None,
    points: Annotated[int | None, typer.Option(help="From end to end (25), or along each axis (21).")] = None,
    extrapolate: Annotated[float, typer.Option(help="Go on beyond both ends by this share of the line.")] = 0.0,
    span: Annotated[
        tuple[float, float, float, float] | None, typer.Option(help="Of a plane: x_min x_max y_min y_max.")
    ] = None,
    curve: Annotated[Literal["bezier", "chain"], typer.Option()] = "bezier",
    bends: Annotated[int, typer.Option(help="Trained points of the curve.")] = 1,
    steps: Annotated[int, typer.Option(help="Minibatches to train the curve with.")] = 1000,
    lr: Annotated[float, typer.Option(help="Largest step length of that training (Adam).")] = 3e-3,
    restarts: Annotated[int, typer.Option(help="Of the alignment.")] = 5,
    bn: Annotated[Literal["reestimate", "interpolate"], typer.Option(help="Batch-norm statistics.")] = "reestimate",
    split: Annotated[
        list[str] | None, typer.Option(metavar="train|validation|test", help="Repeat; lines: train and test.")
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Examples of each split.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Examples at a time.")] = 512,
    dtype: Annotated[options.Dtype, typer.Option()] = "float32",
    model: options.Model = None,
    weights: options.Weights = None,
    data: options.Data = None,
    loss: options.LossName = None,
    output: options.Output = None,
    plot: options.Plot = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Loss and error between two minima, on the plane through three, or around one.

    [bold]Examples[/bold]

      pnanalysis landscape runs/lenet5 --align --plot barrier.pdf

      pnanalysis landscape runs/lenet5 runs/lenet5-restart --view curve --align

      pnanalysis landscape runs/lenet5 --view plane --plot plane.pdf

      pnanalysis landscape --model mymodels:make --weights a.safetensors b.safetensors --data mydata:make
    """
    from pnanalysis.analyses.landscape import landscape as analyse

    given = options.sources(runs, model, weights, data, loss, output)
    ds = analyse(
        *given, checkpoints=checkpoint, view=view, align=align, n_points=points, extrapolate=extrapolate, span=span,
        curve=curve, n_bends=bends, n_steps=steps, lr=lr, n_restarts=restarts, bn=bn, splits=split, n=n,
        batch_size=batch_size, dtype=dtype, device=device, seed=seed, progress=not quiet,
    )  # fmt: skip
    drawing = _paths(given, quiet) if view == "plane" and plot is not None and checkpoint is None else {}
    table = _barriers if ds.attrs["kind"] == "barrier" else _extremes
    options.deliver(ds, given[0], output, plot, quiet, table, **drawing)


def _paths(given: list[Source], quiet: bool) -> dict[str, Any]:
    """The trajectories to draw over the plane that they define."""
    from pnanalysis.analyses.trajectory import trajectory

    return {"trajectory": trajectory(*given, progress=not quiet)}


def _barriers(ds: xr.Dataset) -> Table:
    rows = []
    for path in ds.path.values:
        for split in ds.split.values:
            at = ds.sel(path=path, split=split)
            loss = Estimate(float(at.barrier), float(at.barrier_se))
            error = None
            if "error" in ds:
                error = Estimate(float(at.error_barrier), float(at.error_barrier_se), percent=True, signed=True)
            place, distance, length = (float(at[name]) for name in ("barrier_position", "distance", "length"))
            rows.append([str(path), str(split), loss, place, error, distance, length])
    columns = ["path", "split", "barrier of the loss", "at", "barrier of the error", "distance of the ends", "length"]
    return make_table("barriers", columns, rows)


def _extremes(ds: xr.Dataset) -> Table:
    rows = []
    for split in ds.split.values:
        at = ds.sel(split=split)
        lowest = at.isel(at.loss.argmin(("y", "x")))
        error = Percent(lowest.error) if "error" in ds else None
        place = f"({float(lowest.x):.3g}, {float(lowest.y):.3g})"
        rows.append([str(split), float(lowest.loss), error, place, float(at.loss.max())])
    return make_table("on the plane", ["split", "lowest loss", "error there", "at (x, y)", "highest loss"], rows)

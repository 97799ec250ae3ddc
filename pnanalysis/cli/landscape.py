"""``pnanalysis landscape``."""

from __future__ import annotations

import json as json_module
from pathlib import Path
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
        Literal["line", "curve", "plane", "random", "eigenvectors"],
        typer.Option(
            help="line, line and trained curve, plane through three points, or plane around one: random, or along "
            "eigenvectors of the Hessian."
        ),
    ] = "line",
    align: Annotated[
        bool,
        typer.Option(
            "--align", help="Also give the line to the second network with its units permuted to match the first."
        ),
    ] = False,
    checkpoint: options.Checkpoints = None,
    points: Annotated[
        int | None, typer.Option(help="Points from end to end (25 by default), or along each axis of a plane (21).")
    ] = None,
    extrapolate: Annotated[
        float, typer.Option(help="Extend the line beyond both ends by this fraction of its length.")
    ] = 0.0,
    span: Annotated[
        tuple[float, float, float, float] | None, typer.Option(help="Extent of a plane: x_min x_max y_min y_max.")
    ] = None,
    curve: Annotated[Literal["bezier", "chain"], typer.Option()] = "bezier",
    bends: Annotated[int, typer.Option(help="Trained points of the curve.")] = 1,
    steps: Annotated[int, typer.Option(help="Minibatches in the training of the curve.")] = 1000,
    lr: Annotated[float, typer.Option(help="Largest learning rate of that training (Adam).")] = 3e-3,
    restarts: Annotated[int, typer.Option(help="Restarts of the weight matching for --align.")] = 5,
    rotations: Annotated[
        bool,
        typer.Option(
            "--rotations/--permutations",
            help="Whether --align may also rotate channels within heads, and others that only enter linear maps.",
        ),
    ] = True,
    bn: Annotated[
        Literal["reestimate", "interpolate"],
        typer.Option(help="How batch-normalisation statistics are obtained between the ends."),
    ] = "reestimate",
    eigenpairs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.nc|zarr",
            help="Eigenpairs of the same weights, as pnanalysis eigenpairs saves them; computed by default.",
        ),
    ] = None,
    pairs: Annotated[tuple[int, int], typer.Option(help="Which two of them span the plane, from 1 on.")] = (1, 2),
    split: Annotated[
        list[str] | None,
        typer.Option(
            metavar="train|validation|test",
            help="May be repeated; by default train and, for lines, test.",
        ),
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Examples of each split, drawn at random by --seed.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Examples per batch.")] = 512,
    dtype: Annotated[options.Dtype, typer.Option()] = "float32",
    model: options.Model = None,
    weights: options.Weights = None,
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
    """Loss and error between two minima, on the plane through three, or around one.

    [bold]Examples[/bold]

      pnanalysis landscape runs/lenet5 --align --plot barrier.pdf

      pnanalysis landscape runs/lenet5 runs/lenet5-restart --view curve --align

      pnanalysis landscape runs/lenet5 --view plane --plot plane.pdf

      pnanalysis landscape runs/lenet5 --view eigenvectors -c plain

      pnanalysis landscape --model mymodels:make --weights a.safetensors b.safetensors --data mydata:make
    """
    from pnanalysis.analyses.landscape import landscape as analyse
    from pnanalysis.io.datasets import load

    given = options.sources(runs, model, weights, data, loss, output, tokens)
    ds = analyse(
        *given, checkpoints=checkpoint, view=view, align=align, n_points=points, extrapolate=extrapolate, span=span,
        curve=curve, n_bends=bends, n_steps=steps, lr=lr, n_restarts=restarts, rotations=rotations, bn=bn,
        eigenpairs=None if eigenpairs is None else load(eigenpairs), pairs=pairs, splits=split, n=n,
        batch_size=batch_size, dtype=dtype, device=device, seed=seed, progress=not quiet,
    )  # fmt: skip
    drawing = _paths(given, quiet) if view == "plane" and plot is not None and checkpoint is None else {}
    table = _barriers if ds.attrs["kind"] == "barrier" else _extremes
    options.deliver(ds, given[0], output, plot, quiet, table, **drawing)


def _paths(given: list[Source], quiet: bool) -> dict[str, Any]:
    """The trajectories, to be drawn over the plane that they define."""
    from pnanalysis.analyses.trajectory import trajectory

    return {"trajectory": trajectory(*given, progress=not quiet)}


def _barriers(ds: xr.Dataset) -> list[Table | str]:
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
    columns = {
        "path": "path",
        "split": "split",
        "barrier of the loss": "loss barrier",
        "at": "at",
        "barrier of the error": "error barrier",
        "distance of the ends": "distance between ends",
        "length": "length",
    }
    return [make_table("barriers", columns, rows), *_aligned(ds)]


def _aligned(ds: xr.Dataset) -> list[Table | str]:
    """What alignment could move, and what it moved."""
    if "relabelled" not in ds.attrs:
        return []
    kinds = [(kind["kind"], kind["groups"], kind["size"], kind["signs"], kind["moved"])
             for kind in json_module.loads(ds.attrs["relabelled"])]  # fmt: skip
    columns = {
        "kind": "channels",
        "groups": "groups",
        "size": "channels in each",
        "signs": "signs",
        "moved": "moved or flipped",
    }
    found: list[Table | str] = [make_table("aligned", columns, kinds)]
    if "not_followed" in ds.attrs:
        operations = ", ".join(json_module.loads(ds.attrs["not_followed"]))
        found.append(f"channels could not be followed through {operations}, and were left in their places there")
    return found


def _extremes(ds: xr.Dataset) -> Table:
    from pnanalysis.analyses.summaries import lowest_point

    rows = []
    for split in ds.split.values:
        at = ds.sel(split=split)
        lowest = lowest_point(at)
        error = Percent(lowest.error) if "error" in ds else None
        place = f"({float(lowest.x):.3g}, {float(lowest.y):.3g})"
        rows.append([str(split), float(lowest.loss), error, place, float(at.loss.max())])
    return make_table("on the plane", ["split", "lowest loss", "error there", "at (x, y)", "highest loss"], rows)

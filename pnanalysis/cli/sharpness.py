"""``pnanalysis sharpness``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pnanalysis.cli import options
from pnanalysis.errors import PnError
from pnanalysis.estimates import Estimate
from pnanalysis.terminal.console import Table, make_table

if TYPE_CHECKING:
    import xarray as xr


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("sharpness")(sharpness)


def sharpness(
    runs: options.Paths = None,
    checkpoint: options.Checkpoints = None,
    radius: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=RADIUS",
            help="Neighbourhood (ball, adaptive or box) and its radius; may be repeated. All three by default.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Gradient steps per ascent.")] = 20,
    starts: Annotated[
        int,
        typer.Option(help="Ascents: the first from the checkpoint, the others from random points of the border."),
    ] = 2,
    split: Annotated[options.Split, typer.Option()] = "train",
    n: Annotated[int, typer.Option("--n", help="Examples, drawn at random by --seed.")] = 2048,
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
    """How far the loss rises in small neighbourhoods of minima (SAM, ASAM and Keskar's measure).

    [bold]Examples[/bold]

      pnanalysis sharpness runs/lenet5

      pnanalysis sharpness runs/lenet5 -c ends --radius ball=0.1 --radius box=5e-4 --plot sharpness.pdf
    """
    from pnanalysis.analyses.sharpness import sharpness as analyse

    radii = _radii(radius)
    given = options.sources(runs, model, weights, data, loss, output, tokens)
    ds = analyse(
        *given, checkpoints=checkpoint, radii=radii, n_steps=steps, n_starts=starts, split=split, n=n,
        batch_size=batch_size, dtype=dtype, device=device, seed=seed, progress=not quiet,
    )  # fmt: skip
    options.deliver(ds, given[0], output, plot, quiet, _table)


def _radii(texts: list[str] | None) -> dict[str, float] | None:
    from pnanalysis.analyses.sharpness import RADII

    radii: dict[str, float] = {}
    for text in texts or ():
        name, _, number = text.partition("=")
        try:
            radii[name] = float(number) if number else RADII[name]
        except (ValueError, KeyError) as error:
            raise PnError(f"--radius {text}: write {'|'.join(RADII)}=RADIUS, such as ball=0.05") from error
    return radii or None


def _table(ds: xr.Dataset) -> Table:
    rows = []
    for name in ds.checkpoint.values:
        at = ds.sel(checkpoint=name)
        rises = [Estimate(float(rise), float(se)) for rise, se in zip(at.rise, at.rise_se, strict=True)]
        rows.append([str(name), Estimate(float(at.loss), float(at.loss_se)), *rises])
    columns = [f"{kind} {float(r):g}" for kind, r in zip(ds.neighbourhood.values, ds.radius, strict=True)]
    return make_table("largest rise of the loss", ["checkpoint", "loss", *columns], rows)

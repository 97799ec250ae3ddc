"""``pnanalysis sharpness``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pnanalysis.cli import options
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
            metavar=options.RADII,
            help="Neighbourhood (ball, adaptive, filter, box, linf or adaptive-linf) and its radii in the worst case; "
            "may be repeated. Three radii of the first four by default.",
        ),
    ] = None,
    average_radius: Annotated[
        list[str] | None, typer.Option(metavar=options.RADII, help="The same in the average case; may be repeated.")
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(metavar="worst|average|flatness", help="What to measure, all by default; may be repeated."),
    ] = None,
    method: Annotated[
        Literal["frank-wolfe", "gradient", "apgd"], typer.Option(help="How to look for the worst case.")
    ] = "frank-wolfe",
    steps: Annotated[int, typer.Option(help="Gradient steps per ascent.")] = 10,
    starts: Annotated[
        int,
        typer.Option(help="Ascents: the first from the checkpoint, the others from random points of the border."),
    ] = 2,
    group: Annotated[
        int | None, typer.Option(help="Look for a worst case of each so many examples (m-sharpness), not of all.")
    ] = None,
    directions: Annotated[int, typer.Option(help="Random directions of the average case.")] = 16,
    layer: Annotated[
        str | None, typer.Option(help="Layer of the relative flatness; by default the last with a weight matrix.")
    ] = None,
    normalize_logits: Annotated[
        bool, typer.Option("--normalize-logits", help="Divide the logits of each example by their norm.")
    ] = False,
    second_order: Annotated[
        bool,
        typer.Option("--second-order/--no-second-order", help="Compare with the second-order expansion of the loss."),
    ] = True,
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
    """How far the loss rises near minima: worst and average case (SAM, ASAM, Keskar's measure), relative flatness.

    Called again after an interruption, it continues with what is not finished.

    [bold]Examples[/bold]

      pnanalysis sharpness runs/lenet5

      pnanalysis sharpness runs/lenet5 -c ends --radius ball=0.05,0.1 --radius box=5e-4,1e-3 --plot sharpness.pdf

      pnanalysis sharpness runs/lenet5 --measure worst --method apgd --group 128 --normalize-logits
    """
    from pnanalysis.analyses.network_sharpness import MEASURES
    from pnanalysis.analyses.sharpness import sharpness as analyse
    from pnanalysis.analyses.work_folder import remove_unfinished

    radii, average_radii = options.radii(radius, "--radius"), options.radii(average_radius, "--average-radius")
    given = options.sources(runs, model, weights, data, loss, output, tokens)
    unfinished = options.unfinished("sharpness", given[0], output, quiet)
    ds = analyse(
        *given, checkpoints=checkpoint, radii=radii, average_radii=average_radii, measures=measure or MEASURES,
        method=method, n_steps=steps, n_starts=starts, group=group, n_directions=directions, layer=layer,
        normalize_logits=normalize_logits, second_order=second_order, split=split, n=n, batch_size=batch_size,
        dtype=dtype, device=device, seed=seed, progress=not quiet, state=unfinished,
    )  # fmt: skip
    options.deliver(ds, given[0], output, plot, quiet, _tables)
    remove_unfinished(unfinished)


def _tables(ds: xr.Dataset) -> Iterator[Table]:
    if "rise" in ds:
        yield _table(ds, "rise", "radius", "largest rise of the loss found")
    if "average" in ds:
        yield _table(ds, "average", "average_radius", "mean rise of the loss")
    if "relative_flatness" in ds:
        rows = []
        for name in ds.checkpoint.values:
            at = ds.sel(checkpoint=name)
            value = Estimate(
                float(at.relative_flatness), float(at.relative_flatness_se),
                data_se=float(at.relative_flatness_data_se),
            )  # fmt: skip
            rows.append([str(name), str(at.flatness_layer.item()), value])
        yield make_table("relative flatness", ["checkpoint", "layer", "relative flatness"], rows)


def _table(ds: xr.Dataset, name: str, radius: str, title: str) -> Table:
    """A row for each checkpoint and neighbourhood, a column for each radius."""
    rows = []
    if "radius_index" not in ds.dims:
        names = (name, f"{name}_se", radius)
        ds = ds.assign({one: ds[one].expand_dims("radius_index") for one in names})
    sizes = ds[radius].transpose("radius_index", "neighbourhood").values
    for checkpoint in ds.checkpoint.values:
        for k, kind in enumerate(ds.neighbourhood.values):
            at = ds.sel(checkpoint=checkpoint, neighbourhood=kind).transpose("radius_index", ...)
            cells = []
            for value, se, size in zip(at[name].values, at[f"{name}_se"].values, sizes[:, k], strict=True):
                cells.append(f"{Estimate(float(value), float(se)).text()} at {size:.3g}")
            rows.append([str(checkpoint), f"{float(at.loss):.4g}", str(kind), *cells])
    columns = [f"radius {i + 1}" for i in range(ds.sizes["radius_index"])]
    return make_table(title, ["checkpoint", "loss", "neighbourhood", *columns], rows)

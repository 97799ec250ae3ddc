"""``pnanalysis eigenpairs``."""

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
    app.command("eigenpairs")(eigenpairs)


def eigenpairs(
    runs: options.Paths = None,
    checkpoint: options.Checkpoints = None,
    k: Annotated[int, typer.Option("--k", "-k", help="How many eigenpairs.")] = 10,
    which: Annotated[
        Literal["largest", "smallest", "magnitude"],
        typer.Option(help="The largest eigenvalues, the smallest (most negative), or those of largest magnitude."),
    ] = "largest",
    operator: Annotated[Literal["hessian", "ggn", "fisher"], typer.Option()] = "hessian",
    split: Annotated[options.Split, typer.Option()] = "train",
    n: Annotated[int, typer.Option("--n", help="Examples, drawn at random by --seed.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Examples per batch; changes memory use, not the result.")] = 512,
    params: options.Params = None,
    bn: options.BatchNorm = "eval",
    dtype: Annotated[options.Dtype, typer.Option()] = "float32",
    amp: options.Amp = "no",
    draws: options.Draws = None,
    method: options.Method = "exact",
    tolerance: Annotated[float, typer.Option(help="Residuals to reach, relative to the largest eigenvalue.")] = 1e-4,
    max_hvp: Annotated[int, typer.Option("--max-hvp", help="The most products, converged or not.")] = 1000,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory limit of the vectors, such as 500M or 8G; the fewer fit in, the more products it takes. "
            "Passes of the network add to it.",
        ),
    ] = None,
    data_error: Annotated[
        Literal["groups", "halves", "examples", "none"],
        typer.Option(
            help="Error for the choice of examples: of eigenvalues (examples), also of spaces by two halves of the "
            "examples (halves; about twice the products), or of all numbers by fourteen halves (groups; about seven "
            "times the products)."
        ),
    ] = "halves",
    classes: Annotated[
        bool, typer.Option("--classes/--no-classes", help="Class structure of the outliers of classifiers.")
    ] = True,
    vectors: Annotated[bool, typer.Option("--vectors/--no-vectors", help="Save the eigenvectors.")] = True,
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
    """Eigenvalues and eigenvectors of the loss Hessian at one end of its spectrum, with bounds and errors.

    Where they lie in the network, how much of the gradient and of the last update is among them, what they owe to the
    classes, and how far the spaces of several checkpoints coincide: docs/concepts/eigenpairs.md. The vectors are saved
    beside the dataset. Called again after an interruption, it continues where it stopped.

    [bold]Examples[/bold]

      pnanalysis eigenpairs runs/lenet5 --plot eigenpairs.pdf

      pnanalysis eigenpairs runs/lenet5 runs/lenet5-restart -c champion -k 20

      pnanalysis eigenpairs runs/lenet5 --which smallest --data-error examples

      pnanalysis eigenpairs runs/resnet18 --memory 1G

      pnanalysis eigenpairs --model mymodels:make --weights a.safetensors b.safetensors --data mydata:make
    """
    from pnanalysis.analyses.eigenpairs import eigenpairs as analyse
    from pnanalysis.analyses.work_folder import remove_unfinished

    given = options.sources(runs, model, weights, data, loss, output, tokens)
    unfinished = options.unfinished("eigenpairs", given[0], output, quiet)
    ds = analyse(
        *given, checkpoints=checkpoint, k=k, which=which, operator=operator, split=split, n=n, batch_size=batch_size,
        params=params, bn_mode=bn, dtype=dtype, amp=amp, draws=draws, method=method, tolerance=tolerance,
        max_hvp=max_hvp, data_error=data_error, classes=classes, vectors=vectors, device=device, seed=seed,
        progress=not quiet, state=unfinished, max_memory_bytes=options.size(memory),
    )  # fmt: skip
    options.deliver(ds, given[0], output, plot, quiet, _tables)
    remove_unfinished(unfinished)


def _tables(ds: xr.Dataset) -> Iterator[Table | str]:
    for name in ds.checkpoint.values:
        at = ds.sel(checkpoint=name).dropna("pair", subset=["value"])
        yield _pairs(str(name), at)
        missing = int((at.converged == 0).sum())
        if missing:
            yield f"{name}: {missing} of {at.sizes['pair']} eigenpairs have not converged; raise --max-hvp"
    if "gradient_top" in ds:
        yield _directions(ds)
    if "overlap" in ds:
        yield _overlaps(ds)


def _pairs(name: str, ds: xr.Dataset) -> Table:
    """One row per pair: the value, how well it is known, and where its vector lies."""
    import numpy as np

    columns = ["", "eigenvalue", "residual", "sin(angle)", "of cluster"]
    columns += ["largest layer", "part"] if "layer_part" in ds else []
    columns += ["class means", "pairs of classes"] if "class_part" in ds else []
    rows = []
    for i in range(ds.sizes["pair"]):
        at = ds.isel(pair=i)
        value = Estimate(float(at.value), low=float(at.value_low), high=float(at.value_high))
        mark = "" if at.converged == 1 else " (not converged)"
        row = [f"{int(at.pair)}{mark}", value, float(at.residual), float(at.sin_theta), float(at.space_sin_theta)]
        if "layer_part" in ds:
            largest = int(np.nanargmax(at.layer_part.values))
            row += [str(ds.layer.values[largest]), _with_error(at, "layer_part", largest)]
        if "class_part" in ds:
            row += [_with_error(at, part) for part in ("class_part", "cross_part")]
        rows.append(row)
    which = {"largest": "largest", "smallest": "smallest", "magnitude": "largest magnitude of the"}[ds.attrs["which"]]
    title = f"{name}: {which} eigenvalues of the {ds.attrs['operator']} over {ds.attrs['n']} examples"
    return make_table(title, columns, rows)


def _with_error(ds: xr.Dataset, name: str, i: int | None = None, percent: bool = True) -> Estimate:
    """A number, in the layer ``i`` if one is named, with its error for the choice of examples where it is known."""
    at = ds if i is None else ds.isel(layer=i)
    error = f"{name}_data_se"
    return Estimate(float(at[name]), float(at[error]) if error in at else float("nan"), percent=percent)


def _directions(ds: xr.Dataset) -> Table:
    """Parts of the gradient and of the last update in the top space."""
    rows = []
    for name in ds.checkpoint.values:
        at = ds.sel(checkpoint=name)
        gradient = Estimate(float(at.gradient_top), float(at.gradient_top_se), percent=True)
        update = _with_error(at, "update_top") if "update_top" in at else None
        rows.append([str(name), gradient, update, Estimate(float(at.top_chance), percent=True)])
    columns = ["checkpoint", "of the gradient", "of the last update", "of a random vector"]
    return make_table(f"part in the top {ds.attrs.get('n_top', 'k')} eigenvectors", columns, rows)


def _overlaps(ds: xr.Dataset) -> Table:
    """Overlaps with the first checkpoint, beside chance and the same over different halves of the examples."""
    columns, rows = ["pair", "overlap", "by chance"], []
    has_halves = "overlap_halves" in ds
    columns += ["different halves", "ceiling"] if has_halves else []
    first = ds.isel(other=0)
    for i in range(1, ds.sizes["checkpoint"]):
        at = first.isel(checkpoint=i)
        chance = Estimate(float(at.overlap_chance), float(at.overlap_chance_sd))
        names = f"{ds.checkpoint.values[i]}, {ds.checkpoint.values[0]}"
        row = [names, _with_error(at, "overlap", percent=False), chance]
        if has_halves:
            own = [float(ds.overlap_halves[j, j]) for j in (0, i)]
            row += [float(at.overlap_halves), f"{min(own):.3g}" if min(own) == min(own) else None]
        rows.append(row)
    known = "overlap_data_se" in ds
    title = "overlap of the spaces with that of the first" + (" (errors: --data-error groups)" if not known else "")
    return make_table(title, columns, rows)

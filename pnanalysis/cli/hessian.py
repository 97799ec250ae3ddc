"""``pnanalysis hessian``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pnanalysis.cli import options
from pnanalysis.estimates import Estimate, OutlierCount
from pnanalysis.terminal.console import Table, make_table

if TYPE_CHECKING:
    import xarray as xr


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("hessian")(hessian)


def hessian(
    runs: options.Paths = None,
    checkpoint: options.Checkpoints = None,
    operator: Annotated[Literal["hessian", "ggn", "fisher"], typer.Option()] = "hessian",
    n_hvp: options.Budget = None,
    until: options.Until = None,
    n_lanczos: Annotated[
        int | None, typer.Option(help="Lanczos steps per probe, with --n-probes in place of --n-hvp.")
    ] = None,
    n_probes: Annotated[int | None, typer.Option(help="Random probes.")] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory limit of the Lanczos basis, such as 500M or 8G; passes of the network add to it.",
        ),
    ] = None,
    basis: Annotated[
        Literal["auto", "memory", "half", "disk", "none"],
        typer.Option(help="How the basis is kept; by itself the first of these that --memory has room for."),
    ] = "auto",
    shard_basis: Annotated[
        bool,
        typer.Option("--shard-basis", help="Divide the vectors of the basis among the processes of torchrun."),
    ] = False,
    deflate: Annotated[
        bool,
        typer.Option("--deflate/--no-deflate", help="Treat outlying eigenvalues exactly instead of sampling them."),
    ] = True,
    kernel_width: Annotated[
        float | None, typer.Option(help="Standard deviation of the Gaussian kernel, in units of eigenvalues.")
    ] = None,
    split: Annotated[options.Split, typer.Option()] = "train",
    n: Annotated[int, typer.Option("--n", help="Examples, drawn at random by --seed.")] = 2048,
    batch_size: Annotated[
        int, typer.Option(help="Examples per batch; changes memory use, and the result with --bn train only.")
    ] = 512,
    params: options.Params = None,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="Analyse the diagonal block of each layer.")] = False,
    bn: options.BatchNorm = "eval",
    dtype: Annotated[options.Dtype, typer.Option()] = "float32",
    amp: options.Amp = "no",
    weight: Annotated[
        Literal["examples", "batches"] | None,
        typer.Option(help="What batches weigh in the mean, where a loss of your own leaves it open."),
    ] = None,
    draws: options.Draws = None,
    method: options.Method = "exact",
    checkpoint_activations: Annotated[
        bool,
        typer.Option("--checkpoint-activations", help="Compute activations of blocks twice instead of keeping them."),
    ] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the products by torch.compile.")] = False,
    data_error: options.DataError = "examples",
    engine: Annotated[
        Literal["native", "pyhessian", "curvlinops"], typer.Option(help="Implementation of the products.")
    ] = "native",
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
    """Eigenvalue spectral density of the loss Hessian, with error bars.

    They are those of the random probes and of the choice of examples: docs/concepts/error-bars.md.

    [bold]Examples[/bold]

      pnanalysis hessian runs/lenet5 --plot spectrum.pdf

      pnanalysis hessian runs/lenet5 -c champion --per-layer --n-hvp 200

      pnanalysis hessian runs/lenet5 --until trace=0.02

      torchrun --nproc-per-node 4 -m -- pnanalysis hessian runs/resnet18 --shard-basis

      pnanalysis hessian --model mymodels:make --weights a.safetensors b.safetensors --data mydata:make --loss mse
    """
    from pnanalysis.analyses.hessian import hessian as analyse
    from pnanalysis.analyses.work_folder import remove_unfinished

    together = options.join_processes(device)
    quiet = quiet or not together.is_first
    given = options.sources(runs, model, weights, data, loss, output, tokens)
    unfinished = options.unfinished("hessian", given[0], output, quiet)
    ds = analyse(
        *given, checkpoints=checkpoint, operator=operator, engine=engine, n_lanczos=n_lanczos, n_probes=n_probes,
        n_hvp=n_hvp, until=options.targets(until), max_memory_bytes=options.size(memory), state=unfinished, amp=amp,
        basis=basis, deflate=deflate, kernel_width=kernel_width, split=split, n=n, batch_size=batch_size, params=params,
        per_layer=per_layer, bn_mode=bn, dtype=dtype, weight=weight, draws=draws, method=method, data_error=data_error,
        checkpoint_activations=checkpoint_activations, compile=compile,
        device=together.device, seed=seed, progress=not quiet, distributed=together.several,
        shard_basis=shard_basis,
    )  # fmt: skip
    if not together.is_first:
        return
    drawing = {"kind": "layer_spectra"} if per_layer else {}
    options.deliver(ds, given[0], output, plot, quiet, _tables, **drawing)
    remove_unfinished(unfinished)


def _tables(ds: xr.Dataset) -> Iterator[Table | str]:
    from pnanalysis.analyses.diagnostics import is_of_these_examples

    yield _table(ds)
    yield _largest(ds)
    if len(ds.checkpoint) > 1 and "layer" not in ds.coords:
        yield from _differences(ds)
    if is_of_these_examples(ds, "negative_curvature"):
        yield "intervals of the negative curvature are of these examples, without the error of choosing them"


def _table(ds: xr.Dataset) -> Table:
    from pnanalysis.analyses.diagnostics import estimate_of

    rows = [
        [
            str(name),
            _within(at, "lambda_max"),
            _within(at, "lambda_min"),
            estimate_of(at, "trace"),
            _within(at, "negative_curvature", percent=True),
        ]
        for name in ds.checkpoint.values
        for at in [ds.sel(checkpoint=name)]
    ]
    columns = ["checkpoint", "lambda_max", "lambda_min", "trace", "negative curvature"]
    return make_table(f"{ds.attrs['operator']} over {ds.attrs.get('n', 'all')} examples", columns, rows)


def _largest(ds: xr.Dataset) -> Table:
    """How far the largest eigenvalues stand out: from the bulk, and as many as there are classes."""
    columns, names = ["checkpoint", "outliers", "bulk edge", "lambda_max / edge"], ["bulk_edge_high", "gap_ratio"]
    if "n_classes" in ds.attrs:
        classes = int(ds.attrs["n_classes"])
        names += ["class_ratio", "class_gap", "class_trace"]
        columns += [f"lambda_1 / lambda_{classes}", f"lambda_1 / lambda_{classes + 1}", f"top {classes} in the trace"]
    rows = []
    for name in ds.checkpoint.values:
        at = ds.sel(checkpoint=name)
        count = OutlierCount(float(at.n_outliers), whole=True, gap_p=float(at.outlier_p))
        rows.append([str(name), count, *(_within(at, number, percent=number == "class_trace") for number in names)])
    return make_table("largest eigenvalues", columns, rows)


def _within(ds: xr.Dataset, name: str, **style: bool) -> Estimate:
    """A number with its interval: residual bounds of eigenvalues and their ratios, 95 % otherwise."""
    return Estimate(float(ds[name]), low=float(ds[f"{name}_low"]), high=float(ds[f"{name}_high"]), **style)


def _differences(ds: xr.Dataset) -> Iterator[Table | str]:
    """Each checkpoint minus the first. A W1 distance near that of noise alone is no difference."""
    from pnanalysis.spectra.differences import compare_spectra

    first, *others = (ds.sel(checkpoint=name) for name in ds.checkpoint.values)
    rows = []
    for other in others:
        if first.node.variable.equals(other.node.variable):  # the champion may be the plain model
            yield f"{other.checkpoint.item()} is the same checkpoint as {first.checkpoint.item()}"
            continue
        change = compare_spectra(first, other)
        rows.append(
            [
                f"{other.checkpoint.item()} - {first.checkpoint.item()}",
                _within(change, "lambda_max", signed=True),
                Estimate(float(change.trace), float(change.trace_se), signed=True),
                _within(change, "negative_curvature", percent=True, signed=True),
                float(change.wasserstein1),
                float(change.wasserstein1_noise),
            ]
        )
    columns = ["difference", "lambda_max", "trace", "negative curvature", "W1 distance", "W1 of noise alone"]
    if rows:
        yield make_table("differences from the first checkpoint", columns, rows)

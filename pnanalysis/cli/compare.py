"""``pnanalysis compare``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from pnanalysis.cli import options
from pnanalysis.terminal.console import Table, make_table

if TYPE_CHECKING:
    import xarray as xr

_NARROW = 3  # checkpoints whose values and differences fit into one table


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compare")(compare)


def compare(
    runs: options.Paths = None,
    checkpoint: options.Checkpoints = None,
    n: Annotated[
        int | None, typer.Option("--n", help="Examples of each split, drawn at random by --seed; all by default.")
    ] = None,
    split: Annotated[options.Split, typer.Option(help="Split on which outputs are compared.")] = "test",
    hessian: Annotated[bool, typer.Option("--hessian/--no-hessian", help="Compare Hessian spectra.")] = True,
    n_hvp: options.BudgetOfEach = None,
    until: options.Until = None,
    n_hessian: Annotated[int, typer.Option(help="Training examples for the spectra.")] = 1024,
    data_error: options.DataError = "examples",
    everything: options.Further = False,
    eigenpairs: options.Eigenpairs = None,
    sharpness: options.Sharpness = None,
    radius: Annotated[
        list[str] | None,
        typer.Option(
            metavar=options.RADII,
            help="Neighbourhood of --sharpness (ball, adaptive, filter, box, linf or adaptive-linf) and its radii; may "
            "be repeated, with as many radii of each. adaptive=0.5 by default.",
        ),
    ] = None,
    blocks: options.Blocks = None,
    learning_coefficient: options.LearningCoefficient = None,
    cka: Annotated[bool, typer.Option("--cka/--no-cka", help="Compare layers by centred kernel alignment.")] = True,
    batch_size: Annotated[int, typer.Option(help="Examples per batch.")] = 256,
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
    """Are these minima different, and which is better? Compare every diagnostic, with errors of the differences.

    The first checkpoint is the reference. By default: plain and champion of one run, the champion of each of several
    runs (of a restart control, the best restart), or all weight files of --model. Where a champion is the plain model,
    and that is compared already, the best later iteration takes its place. What the errors cover:
    docs/concepts/error-bars.md. Called again after an interruption, it continues where it stopped.

    [bold]Examples[/bold]

      pnanalysis compare runs/lenet5

      pnanalysis compare runs/lenet5 runs/lenet5-restart --plot dashboard.pdf

      pnanalysis compare runs/lenet5 -c plain -c iter01 -c iter02 --no-hessian --n 2000

      pnanalysis compare runs/lenet5 --radius ball=0.05,0.1 --radius adaptive=0.25,0.5

      pnanalysis compare --model mymodels:make --weights a.safetensors b.safetensors --data mydata:make
    """
    from pnanalysis.analyses.comparison import compare as analyse
    from pnanalysis.analyses.work_folder import remove_unfinished

    nearby = options.radii(radius, "--radius")
    given = options.sources(runs, model, weights, data, loss, output, tokens)
    spectra = {"n": n_hessian, "data_error": data_error, "until": options.targets(until)}
    spectra |= {} if n_hvp is None else {"n_hvp": n_hvp}
    further = options.further(
        everything, n_hessian, n_hvp,
        eigenpairs=eigenpairs, sharpness=sharpness if nearby is None else True, blocks=blocks,
        learning_coefficient=learning_coefficient,
    )  # fmt: skip
    if nearby is not None:
        further["sharpness"]["radii"] = nearby
    unfinished = options.unfinished("comparison", given[0], output, quiet)
    ds = analyse(
        *given, checkpoints=checkpoint, n=n, split=split, cka=cka,
        hessian=spectra if hessian else False, **further,
        batch_size=batch_size, device=device, seed=seed, progress=not quiet, state=unfinished,
    )  # fmt: skip
    options.deliver(ds, given[0], output, plot, quiet, _tables)
    remove_unfinished(unfinished)


def _tables(ds: xr.Dataset) -> Iterator[Table | str]:
    from pnanalysis.analyses.verdict import verdict

    yield from _values(ds)
    yield from verdict(ds)


def _values(ds: xr.Dataset) -> Iterator[Table]:
    """Values and differences from the first checkpoint, in one table if that is narrow enough."""
    from pnanalysis.analyses.diagnostics import diagnostics, short_names
    from pnanalysis.analyses.significant_differences import METHOD

    names, rows = short_names(ds), diagnostics(ds)
    k, marked = len(names), f"(* differs significantly: {METHOD})"
    differences = ["difference"] if k == 2 else [f"{name} - first" for name in names[1:]]
    if k <= _NARROW:
        cells = [row.cells() for row in rows]
        yield make_table(f"compared with {names[0]} {marked}", ["diagnostic", *names, *differences], cells)
        return
    yield make_table("values", ["diagnostic", *names], (row.cells()[: k + 1] for row in rows if row.values))
    cells = [[row.title, *row.cells()[k + 1 :]] for row in rows]
    yield make_table(f"differences from {names[0]} {marked}", ["diagnostic", *names[1:]], cells)

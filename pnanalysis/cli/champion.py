"""``pnanalysis champion``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pnanalysis.cli import options
from pnanalysis.terminal.console import Cell, Table, make_table

if TYPE_CHECKING:
    import xarray as xr


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("champion")(champion)


def champion(
    runs: options.Paths = None,
    restarts: Annotated[
        list[Path] | None,
        typer.Option(
            "--restarts",
            metavar="RUN",
            help="Runs that hold restarts, of others the plain model; may be repeated. By default RUN-restart, which "
            "pntrain --control has trained.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer examples, products and points, and no layers: a first look.")
    ] = False,
    n: Annotated[
        int | None, typer.Option("--n", help="Examples of each split, drawn at random by --seed; all by default.")
    ] = None,
    hessian: Annotated[bool, typer.Option("--hessian/--no-hessian", help="Hessian spectra of all networks.")] = True,
    n_hvp: options.BudgetOfEach = None,
    n_hessian: Annotated[
        int | None,
        typer.Option(help="Training examples for spectra and all that is measured like them; 1,024 by default."),
    ] = None,
    data_error: options.DataError = "examples",
    everything: options.Further = False,
    eigenpairs: options.Eigenpairs = None,
    sharpness: options.Sharpness = None,
    blocks: options.Blocks = None,
    learning_coefficient: options.LearningCoefficient = None,
    saturation: Annotated[bool, typer.Option("--saturation/--no-saturation", help="Saturation of activations.")] = True,
    cka: Annotated[
        bool | None,
        typer.Option("--cka/--no-cka", help="Compare layers by centred kernel alignment.", show_default=False),
    ] = None,
    align: Annotated[
        bool, typer.Option("--align/--no-align", help="Also the line to each network with its units permuted.")
    ] = True,
    points: Annotated[int | None, typer.Option(help="Points of each line from end to end; 11 by default.")] = None,
    n_line: Annotated[int | None, typer.Option(help="Training examples on the lines; 2,048 by default.")] = None,
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
    """Is the champion of a persistent run another minimum than the plain model, and a better one than restarts give?

    Restarts are the null distribution: what another start alone does. Spectra saved with the runs are used where they
    are of the same weights, examples and settings. Of weight files of --model the first is the plain model, the second
    the champion, and the others are restarts. The rules: docs/concepts/champion.md. Called again after an interruption,
    it continues where it stopped.

    [bold]Examples[/bold]

      pnanalysis champion runs/lenet5 --plot champion.pdf

      pnanalysis champion runs/lenet5 --quick

      pnanalysis champion runs/lenet5 --restarts runs/lenet5-restart --restarts runs/another-seed --eigenpairs --blocks

      pnanalysis champion runs/lenet5 --all --no-learning-coefficient
    """
    from pnanalysis.analyses.champion import QUICK
    from pnanalysis.analyses.champion import champion as analyse
    from pnanalysis.analyses.work_folder import remove_unfinished
    from pnanalysis.io.runs import open_run

    given = options.sources(runs, model, weights, data, loss, output, tokens)
    own = {"n": n_hessian, "n_hvp": n_hvp}
    spectra: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
    spectra = (QUICK["hessian"] if quick else {}) | {"data_error": data_error} | spectra
    further = options.further(
        everything, spectra.get("n", 1024), n_hvp,
        eigenpairs=eigenpairs, sharpness=sharpness, blocks=blocks, learning_coefficient=learning_coefficient,
    )  # fmt: skip
    unfinished = options.unfinished("champion", given[0], output, quiet)
    ds = analyse(
        *given, restarts=[open_run(path) for path in restarts] if restarts else None, n=n,
        hessian=spectra if hessian else False, **further, cka=cka, saturation=saturation, align=align, n_points=points,
        n_line=n_line, quick=quick, batch_size=batch_size, device=device, seed=seed,
        progress=not quiet, state=unfinished,
    )  # fmt: skip
    options.deliver(ds, given[0], output, plot, quiet, _tables)
    remove_unfinished(unfinished)


def _tables(ds: xr.Dataset) -> Iterator[Table | str]:
    """The answers, then the numbers."""
    from pnanalysis.analyses.verdict import verdict

    yield from verdict(ds)
    yield _numbers(ds)


def _numbers(ds: xr.Dataset) -> Table:
    """Every diagnostic of plain model and champion, and where the restarts lie."""
    from pnanalysis.analyses.champion_verdict import interval, number_of
    from pnanalysis.analyses.diagnostics import estimate_of
    from pnanalysis.estimates import Estimate
    from pnanalysis.significance import LEVEL

    n = ds.sizes["checkpoint"] - 2
    rows: list[list[Cell]] = []
    for i, name in enumerate(map(str, ds.diagnostic.values)):
        at = ds.isel(diagnostic=i)
        style = {"percent": bool(at.percent), "whole": bool(at.whole)}
        difference = estimate_of(at[[key for key in at if str(key).startswith("difference")]], "difference")
        row: list[Cell] = [str(at.title.item()), number_of(ds, name, 0), number_of(ds, name, 1)]
        row.append(Estimate(**vars(difference) | style | {"signed": True}))
        if n:
            is_tested = float(at.null_p) == float(at.null_p)
            p = f"{float(at.null_p):.2g}" if is_tested else "–"
            mean = Estimate(float(at.null_mean), percent=style["percent"]).text()
            rank = float(at.null_rank)
            row += [f"{mean} ({interval(at)})" if is_tested else mean, f"{rank:g} of {int(at.null_n) + 1}", p]
            row.append("–" if not is_tested else "outside" if float(at.null_p) <= LEVEL else "inside")
        rows.append(row)
    plain, best = map(str, ds.checkpoint.values[:2])
    columns = {"diagnostic": "diagnostic", "plain": plain, "champion": best, "difference": "difference"}
    if n:
        columns |= {"restarts": f"{n} restarts (95 % for one more)", "rank": "rank", "p": "p (Holm)", "where": "where"}
    return make_table("all diagnostics (* differs significantly from the plain model)", columns, rows)

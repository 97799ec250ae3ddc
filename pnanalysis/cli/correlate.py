"""``pnanalysis correlate``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pnanalysis.cli import options
from pnanalysis.errors import PnError
from pnanalysis.estimates import Estimate
from pnanalysis.terminal.console import Table, make_table, when_interrupted

if TYPE_CHECKING:
    import xarray as xr


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("correlate")(correlate)


def correlate(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="SWEEP|RUN...", help="A folder of runs, or several runs.", show_default=False),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            "--with",
            metavar="TARGET",
            help="test_error, validation_error, train_error, train_loss, generalization_gap or any diagnostic.",
        ),
    ] = "test_error",
    diagnostic: Annotated[
        list[str] | None,
        typer.Option(
            "--diagnostic",
            "-d",
            metavar="NAME",
            help="A diagnostic, or the kind of dataset that it is in (hessian, sharpness...); may be repeated. "
            "By default all that are stored.",
        ),
    ] = None,
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", "-c", metavar="NAME", help="plain, champion, challenger, start or iterNN.")
    ] = "champion",
    axis: Annotated[
        list[str] | None,
        typer.Option(metavar="SETTING", help="Settings that are looked at one at a time; all but seed by default."),
    ] = None,
    compute: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ANALYSIS",
            help="Run hessian, eigenpairs, blocks, sharpness, saturation or learning_coefficient first on each run "
            "that lacks it at the checkpoint, and save it there; may be repeated.",
        ),
    ] = None,
    bootstrap: Annotated[int, typer.Option(help="Resamples of the runs.")] = 2000,
    data: options.Data = None,
    output: options.Output = None,
    plot: options.Plot = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Which diagnostics go with generalisation over a sweep: rank correlations with errors, from what is stored.

    Nothing is computed unless --compute asks for it. Called again after an interruption, it continues where it stopped.

    [bold]Examples[/bold]

      pnanalysis correlate runs/sweep --with test_error

      pnanalysis correlate runs/sweep --compute sharpness --with generalization_gap -d sharpness --plot tau.pdf
    """
    from pnanalysis.analyses.correlation import correlate as analyse
    from pnanalysis.checks import check_writable

    if not runs:
        raise PnError("nothing to correlate: name a folder of runs, or several runs")
    if output is None:
        output = check_writable((runs[0] if len(runs) == 1 else Path()) / "correlation.nc")
    if compute:
        when_interrupted("run the same command again to continue")
    ds = analyse(
        *runs, target=target, diagnostics=diagnostic, checkpoint=checkpoint, axes=axis, compute=compute or (),
        data=data, n_bootstrap=bootstrap, device=device, seed=seed, progress=not quiet,
    )  # fmt: skip
    options.deliver(ds, None, output, plot, quiet, _tables)


def _tables(ds: xr.Dataset) -> Iterator[Table | str]:
    from pnanalysis.significance import LEVEL

    order = (-abs(ds.tau)).argsort().values
    rows = []
    for i in order:
        at = ds.isel(diagnostic=int(i))
        tau, psi = (
            Estimate(float(at[name]), low=float(at[f"{name}_low"]), high=float(at[f"{name}_high"]))
            for name in ("tau", "psi")
        )
        mark = "*" if float(at.tau_p) <= LEVEL else ""
        numbers = [f"{float(at[name]):.2g}" for name in ("tau_p_single", "tau_p")]
        rows.append([str(at.diagnostic.item()), int(at.n_runs), f"{_short(tau)}{mark}", *numbers, _short(psi),
                     f"{float(at.information):.2f}"])  # fmt: skip
    columns = ["diagnostic", "runs", "tau (95 % interval)", "p", "p, Holm", "one setting at a time", "information"]
    target = str(ds.attrs["target_name"]).replace("_", " ")
    yield make_table(f"rank correlation with the {target}", columns, rows)
    n = ds.sizes["diagnostic"]
    yield (
        f"{n} diagnostics were tried: at {LEVEL:.0%} each, {LEVEL * n:.2g} would pass by chance; * passes after Holm's "
        "step-down for all of them."
    ).replace("%", " %")


def _short(value: Estimate) -> str:
    if value.value != value.value:
        return "–"
    return f"{value.value:+.2f} ({value.low:+.2f} to {value.high:+.2f})"

"""``pnanalysis learning-coefficient``."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pnanalysis.cli import options
from pnanalysis.estimates import Estimate
from pnanalysis.terminal.console import Table, make_table

if TYPE_CHECKING:
    import xarray as xr


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("learning-coefficient")(learning_coefficient)


def learning_coefficient(
    runs: options.Paths = None,
    checkpoint: options.Checkpoints = None,
    chains: Annotated[int, typer.Option(help="Langevin chains of each checkpoint.")] = 4,
    draws: Annotated[
        int | None, typer.Option(help="Steps of each chain that count; by default as many as needed.")
    ] = None,
    burn_in: Annotated[int | None, typer.Option(help="Steps before that, which do not.")] = None,
    step_size: Annotated[
        list[float] | None, typer.Option(help="Variance of a step's noise; several give a calibration.")
    ] = None,
    localization: Annotated[
        list[float] | None,
        typer.Option(help="Strength of the pull towards the checkpoint, 100 by default; several give a calibration."),
    ] = None,
    beta: Annotated[float | None, typer.Option(help="Inverse temperature, 1 / log n by default.")] = None,
    sampler: Annotated[
        Literal["full", "minibatch", "sgld"],
        typer.Option(help="Steps by all examples, or by one batch; sgld is that of Lau et al."),
    ] = "full",
    layers: Annotated[
        list[str] | None,
        typer.Option("--params", metavar="LAYER", help="Layers or patterns that move, others fixed; may be repeated."),
    ] = None,
    split: Annotated[options.Split, typer.Option()] = "train",
    n: Annotated[int, typer.Option("--n", help="Examples, drawn at random by --seed.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Examples per pass, or per step with single batches.")] = 256,
    dtype: Annotated[options.Dtype, typer.Option()] = "float32",
    data_error: Annotated[
        Literal["examples", "none"],
        typer.Option(help="Whether errors include that of the choice of examples."),
    ] = "examples",
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
    """How singular minima are: the local learning coefficient, by Langevin chains around each.

    Called again after an interruption, it continues where it stopped.

    [bold]Examples[/bold]

      pnanalysis learning-coefficient runs/lenet5 --n 512

      pnanalysis learning-coefficient runs/lenet5 -c champion --localization 10 --localization 100 --plot both.pdf
    """
    from pnanalysis.analyses.learning_coefficient import learning_coefficient as analyse
    from pnanalysis.analyses.work_folder import remove_unfinished

    given = options.sources(runs, model, weights, data, loss, output, tokens)
    unfinished = options.unfinished("learning_coefficient", given[0], output, quiet)
    ds = analyse(
        *given, checkpoints=checkpoint, n_chains=chains, n_draws=draws, burn_in=burn_in,
        step_size=None if step_size is None else _one(step_size), localization=_one(localization or [100.0]),
        beta=beta, sampler=sampler, params=layers, split=split, n=n, batch_size=batch_size, data_error=data_error,
        dtype=dtype, device=device, seed=seed, progress=not quiet, state=unfinished,
    )  # fmt: skip
    options.deliver(ds, given[0], output, plot, quiet, _table)
    remove_unfinished(unfinished)


def _one(values: list[float]) -> float | list[float]:
    """A single value by itself: only several make a dim."""
    return values[0] if len(values) == 1 else values


def _table(ds: xr.Dataset) -> Table:
    rows = []
    for name in ds.checkpoint.values:
        dims = [dim for dim in ("localization", "step_size") if dim in ds.dims]
        for place in product(*(range(ds.sizes[dim]) for dim in dims)):
            at = ds.sel(checkpoint=name).isel(dict(zip(dims, place, strict=True)))
            rows.append([str(name), *_row(at)])
    columns = ["gamma", "step size", "coefficient", "Gaussian", "R-hat", "effective draws", "converged"]
    return make_table("local learning coefficient", ["checkpoint", *columns], rows)


def _row(at: xr.Dataset) -> list[object]:
    found = Estimate(
        float(at.learning_coefficient),
        float(at.learning_coefficient_se),
        data_se=float(at.learning_coefficient_data_se),
    )
    gaussian = Estimate(float(at.gaussian), low=float(at.gaussian_low), high=float(at.gaussian_high))
    return [
        f"{float(at.localization):g}", f"{float(at.epsilon):.3g}", found, gaussian, f"{float(at.rhat):.3f}",
        f"{float(at.effective_draws):.0f}", "yes" if float(at.converged) else "no",
    ]  # fmt: skip

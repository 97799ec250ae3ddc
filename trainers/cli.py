"""``pntrain``: run a named experiment, or train your own model, into a run directory."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pnanalysis.checks import shown
from pnanalysis.errors import PnError, TrainingError
from pnanalysis.estimates import Estimate
from pnanalysis.terminal.console import (
    error_cell,
    json_option,
    make_table,
    print_line,
    print_table,
    run_app,
    version_option,
    when_interrupted,
)
from trainers.choices import Amp, Form, Optimizer, Origin, Strategy
from trainers.recipes import RECIPES, Config, configure, find_recipe

if TYPE_CHECKING:
    from pnanalysis.io.runs import Run
    from trainers.runs.curvature import Every
    from trainers.runs.sweep import Outcome

app = typer.Typer(name="pntrain", add_completion=True, rich_markup_mode="rich", pretty_exceptions_enable=False)

_PERSISTENT, _DATA, _OPTIMISATION, _OUTPUT = "Persistent penalty", "Model and data", "Optimisation", "Output"
_UNVALIDATED = "there is no validation split: the champion is the iteration with the lowest training loss"
_RECIPE_HELP = "; ".join(f"{recipe.id} {name}" for name, recipe in RECIPES.items())


@app.command(no_args_is_help=True)
def pntrain(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            autocompletion=lambda: [*RECIPES, "custom"],
            help=f"{_RECIPE_HELP}; or custom, with --model and --data.",
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Run directory; by default runs/RECIPE.")] = None,
    strategy: Annotated[
        Strategy | None, typer.Option(help="persistent repels all layers, partial one; restart starts afresh.")
    ] = None,
    iterations: Annotated[int | None, typer.Option(help="Number of trainings, the plain one included.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs per training (steps for S1 and S2).")] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Also train the restart control of equal cost, into OUT-restart.")
    ] = False,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=A,B|FIRST:LAST", help="Train a grid of runs in OUT over this setting; repeatable."),
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Runs of a sweep at a time; by default one per core or GPU.")] = None,
    together: Annotated[
        bool, typer.Option("--together", help="Train the runs of a sweep, or run and control, as one batched program.")
    ] = False,
    engine: Annotated[
        str,
        typer.Option(
            metavar="local|dask:ADDRESS", help="Where the runs of a sweep are trained: here, or on a cluster."
        ),
    ] = "local",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted or shorter run.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of initial points, batch order and augmentation.")] = None,
    device: Annotated[str, typer.Option(metavar="cpu|cuda|auto", help="auto uses CUDA if it is available.")] = "auto",
    lam: Annotated[
        float | None, typer.Option(rich_help_panel=_PERSISTENT, help="Strength of the persistent penalty.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(rich_help_panel=_PERSISTENT, help="all, random, random-each, or names joined by commas."),
    ] = None,
    penalty: Annotated[Form | None, typer.Option(rich_help_panel=_PERSISTENT, help="Form of the penalty.")] = None,
    origin: Annotated[
        Origin | None, typer.Option(rich_help_panel=_PERSISTENT, help="Where the penalty measures parameters from.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME|MODULE:FACTORY", rich_help_panel=_DATA, help="By default the recipe's."),
    ] = None,
    model_option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=JSON", rich_help_panel=_DATA, help="Argument of the model's factory; repeatable."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC", rich_help_panel=_DATA, help="digits, cifar10, imagefolder:PATH or module:factory."
        ),
    ] = None,
    split_seed: Annotated[
        int | None, typer.Option(rich_help_panel=_DATA, help="Seed of the validation/test split.")
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(metavar="NAME|MODULE:FUNCTION", rich_help_panel=_DATA, help="By default the recipe's."),
    ] = None,
    init_std: Annotated[
        float | None, typer.Option(rich_help_panel=_OPTIMISATION, help="Draw all parameters from N(0, std^2).")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(rich_help_panel=_OPTIMISATION, help="Examples per step.")] = None,
    lr: Annotated[
        float | None, typer.Option(rich_help_panel=_OPTIMISATION, help="Learning rate; 1e-3 by default.")
    ] = None,
    optimizer: Annotated[Optimizer | None, typer.Option(rich_help_panel=_OPTIMISATION)] = None,
    momentum: Annotated[float | None, typer.Option(rich_help_panel=_OPTIMISATION, help="Momentum of sgd.")] = None,
    weight_decay: Annotated[
        float | None, typer.Option(rich_help_panel=_OPTIMISATION, help="Coefficient of the L2 term.")
    ] = None,
    augment: Annotated[
        list[str] | None,
        typer.Option(metavar="crop|flip", rich_help_panel=_OPTIMISATION, help="Random augmentation; repeatable."),
    ] = None,
    amp: Annotated[
        Amp | None, typer.Option(rich_help_panel=_OPTIMISATION, help="Precision of the forward pass.")
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", rich_help_panel=_OPTIMISATION, help="torch.compile the network."),
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(rich_help_panel=_OUTPUT, help="Epochs between saved checkpoints.")
    ] = None,
    curvature: Annotated[
        bool,
        typer.Option(
            "--curvature",
            rich_help_panel=_OUTPUT,
            help="Measure curvature along the trainings, as often as 5 % of their time allow, into the run.",
        ),
    ] = False,
    curvature_every: Annotated[
        int | None,
        typer.Option(metavar="STEPS", rich_help_panel=_OUTPUT, help="The same, every so many steps of the optimizer."),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", rich_help_panel=_OUTPUT, help="No progress, no table.")
    ] = False,
    json_output: Annotated[
        bool,
        typer.Option(
            "--json",
            rich_help_panel=_OUTPUT,
            callback=json_option,
            is_eager=True,
            help="Print one JSON object instead of tables.",
        ),
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=version_option, is_eager=True)
    ] = False,
) -> None:
    """Train a network, then train it again from the same start, repelled from every earlier end point.

    [bold]Examples[/bold]

      pntrain lenet5 --data imagefolder:cifar --iterations 5 --epochs 5 --control

      pntrain custom --model mymodels:make --data mydata:make --epochs 20

      pntrain S1 --out runs/two-well

      pntrain lenet5 --sweep lam=1e-3,1e-2 --sweep seed=0:5 --out runs/sweep

      pntrain lenet5 --sweep strategy=partial,restart --sweep seed=0:10 --together --device cuda --out runs/study

      pntrain resnet18 --sweep seed=0:16 --engine dask:tcp://node1:8786 --out /shared/runs

      torchrun --nproc-per-node 4 -m -- trainers resnet18 --data imagefolder:cifar --device cuda
    """
    chosen = find_recipe("lenet5" if recipe == "custom" else recipe)
    if recipe == "custom" and model is None:
        raise TrainingError("custom needs --model: a registered name or module:factory")
    if recipe == "custom" and data is None:
        raise TrainingError("custom needs --data: digits, cifar10, imagefolder:PATH or module:factory")
    config = configure(
        chosen, recipe="custom" if recipe == "custom" else None, strategy=strategy, iterations=iterations,
        epochs=epochs, lam=lam, layers=layers, penalty=penalty, origin=origin, init_std=init_std,
        batch_size=batch_size, lr=lr, optimizer=optimizer,
        momentum=momentum, weight_decay=weight_decay, augment=tuple(augment) if augment else None, model=model,
        model_options=_model_options(model_option), data=data, loss=loss, seed=seed, split_seed=split_seed,
        checkpoint_every=checkpoint_every, amp=amp, compile=compile,
    )  # fmt: skip
    from pnanalysis.cli.options import join_processes
    from trainers.loop.processes import FailedElsewhere
    from trainers.runs.strategies import train, train_together
    from trainers.runs.sweep import parse_sweep
    from trainers.runs.sweep import sweep as run_sweep

    out = out or Path("runs") / config.recipe
    every: Every | None = curvature_every if curvature_every is not None else "auto" if curvature else None
    processes = join_processes(device)
    when_interrupted(f"resume with: {_resume_command(sys.argv, processes.several)}")
    if processes.several and (sweep or together):
        raise TrainingError("torchrun divides the batches of one training; leave out --sweep and --together")
    quiet = quiet or not processes.is_first
    if engine != "local" and not sweep:
        raise TrainingError("--engine says where the runs of a sweep are trained; give --sweep NAME=A,B, too")
    if sweep:
        if control:
            raise TrainingError("--control applies to a single run; in a sweep use --sweep strategy=partial,restart")
        grid = parse_sweep(sweep, config)
        outcomes = run_sweep(
            config, grid, out, jobs=jobs, device=device, resume=resume, progress=not quiet, together=together,
            engine=engine, curvature=every,
        )  # fmt: skip
        _report_sweep(outcomes, quiet)
        return
    configs, outs = [config], [out]
    if control and config.strategy != "restart":
        configs.append(configure_restart(config))
        outs.append(out.with_name(f"{out.name}-restart"))
    if together and every is not None:
        raise TrainingError("curvature is measured along trainings of their own; leave out --together")
    if together:
        runs = train_together(configs, outs, device=device, resume=resume, progress=not quiet)
    else:
        try:
            runs = [
                train(
                    each, path, device=processes.device, resume=resume, progress=not quiet,
                    distributed=processes.several, curvature=every,
                )
                for each, path in zip(configs, outs, strict=True)
            ]  # fmt: skip
        except FailedElsewhere as error:  # which is said there
            raise typer.Exit(2) from error
    if not processes.is_first:
        return
    for run in runs:
        if isinstance(run, PnError):
            raise run
        _report(run, quiet)


def configure_restart(config: Config) -> Config:
    """The control of equal cost: as many plain trainings, each from a fresh initial point."""
    return replace(config, strategy="restart")


def _resume_command(arguments: list[str], several: bool = False) -> str:
    """The command that continues where this one stops."""
    command = ["pntrain", *arguments[1:]]
    if several:
        command[:1] = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m", "--", "trainers"]
        if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":  # further options say where the machines meet
            command[1:1] = ["--nnodes", os.environ["GROUP_WORLD_SIZE"], "..."]
    return shlex.join(command if "--resume" in command else [*command, "--resume"])


def _model_options(entries: list[str] | None) -> dict[str, object] | None:
    if not entries:
        return None
    options = {}
    for entry in entries:
        name, separator, text = entry.partition("=")
        try:
            if not separator:
                raise ValueError("no = sign")
            options[name] = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TrainingError(f"--model-option {shown(entry)}: write NAME=JSON, such as width=256") from error
    return options


def _report(run: Run, quiet: bool) -> None:
    from pnanalysis.schema import error_kind, error_name

    kind = error_kind(run.history)
    last, counts = run.history.isel(epoch=-1), run.history.attrs
    champion = run.manifest["champion"]
    rows = [
        [
            i,
            ", ".join([*["plain"][i:], *(["champion"] if i == champion else [])]),
            float(last.train_loss[i]),
            *(
                error_cell(last[f"{split}_error"][i], kind, counts.get(f"n_{split}"))
                for split in ("validation", "test")
            ),
        ]
        for i in range(len(run.ends))
    ]
    title = f"{run.path} ({run.manifest['strategy']})"
    errors = [error_name(split, kind) for split in ("validation", "test")]
    print_table(make_table(title, ["iteration", "role", "training loss", *errors], rows), quiet)
    if len(rows) > 1 and last.validation_error.isnull().all():
        print_line(_UNVALIDATED, quiet)


def _report_sweep(outcomes: list[Outcome], quiet: bool) -> None:
    """Show a row per run, then raise an error that names the first failure, if any."""
    from pnanalysis.io.runs import open_run
    from pnanalysis.schema import error_kind, error_name

    rows, kinds, unvalidated = [], set(), False
    for outcome in outcomes:
        ending = outcome.failure or "finished"
        errors: list[float | Estimate] = [math.nan, math.nan]
        if outcome.failure is None:
            run = open_run(outcome.path)
            last = run.history.isel(epoch=-1, iteration=run.manifest["champion"])
            kind = error_kind(run.history)
            errors = [
                error_cell(last[f"{split}_error"], kind, run.history.attrs.get(f"n_{split}"))
                for split in ("validation", "test")
            ]
            kinds.add(kind)
            unvalidated |= len(run.ends) > 1 and bool(last.validation_error.isnull())
        rows.append([outcome.path.name, *errors, ending])
    title = "champions of the sweep"
    names = [error_name(split, *kinds) for split in ("validation", "test")]
    print_table(make_table(title, ["run", *names, "ended"], rows), quiet)
    if unvalidated:
        print_line(_UNVALIDATED, quiet)
    failed = [outcome for outcome in outcomes if outcome.failure is not None]
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(outcomes)} runs failed ({failed[0].path.name}: {failed[0].failure}); "
            "the others are complete; fix the cause and continue with --resume"
        )


def main() -> None:
    """Entry point of ``pntrain``."""
    run_app(app)


if __name__ == "__main__":
    main()

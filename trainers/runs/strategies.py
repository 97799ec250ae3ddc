"""Sequences of fits, plain, persistent, partial or restarted, into a run directory that can be resumed.

Iteration 0 is the plain training. ``persistent`` and ``partial`` train every further iteration from the same
initial point, repelled from all earlier end points; ``restart`` trains it from a fresh one, without repulsion. In
persistent runs batch order and augmentation depend on the run's seed and the epoch alone, so that iterations differ by
the penalty only; restarts each draw their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from pnanalysis.checks import at_least
from pnanalysis.errors import PnError, TrainingError
from pnanalysis.inputs.data import Splits, downloads_allowed, load_data
from pnanalysis.inputs.models import build_model
from pnanalysis.inputs.sources import resolve_device
from pnanalysis.io.runs import Run
from pnanalysis.terminal.console import print_status
from pnanalysis.terminal.progress import progress_bar
from pnanalysis.terminal.streams import error_stream
from trainers.loop.batched_fit import SingleFit, fit_together
from trainers.loop.processes import OneProcess, SeveralProcesses
from trainers.recipes import RECIPES, Config
from trainers.runs.curvature import Every
from trainers.runs.preflight import check_tensors
from trainers.runs.session import PreparedIteration, Session, check_settings
from trainers.runs.small_problems import SMALL_PROBLEMS

_SAVE_INTERVAL = 5.0  # seconds between resume states: small networks would spend most of their time on writing them


def train(
    config: Config,
    out: str | os.PathLike[str],
    *,
    device: str = "auto",
    resume: bool = False,
    progress: bool = True,
    save_interval: float = _SAVE_INTERVAL,
    distributed: bool = False,
    curvature: Every | None = None,
) -> Run:
    """Train a configuration into a run directory.

    Parameters
    ----------
    config : Config
        See :func:`trainers.recipes.configure`.
    out : path
        The run directory; new, unless ``resume``.
    device : str
        ``auto`` uses CUDA if it is available.
    resume : bool
        Continue an interrupted run; on the same CPU the result is bit-identical to that of an uninterrupted one. More
        ``iterations`` than before extend a finished run. If the directory does not exist yet, a new run begins.
    progress : bool
        Show a bar on a terminal, or print a line per iteration elsewhere.
    save_interval : float
        Shortest time between two resume states, in seconds.
    distributed : bool
        Divide the examples of each batch among the processes of the default ``torch.distributed`` group, all of which
        make this call: see :func:`trainers.fit`. All must see the data and the folder ``out``; the first one writes.
    curvature : int or "auto", optional
        Measure curvature on training examples along every iteration, every so many steps of the optimizer or as often
        as 5 % of the training's time allow, into ``analysis/curvature_monitor.nc`` of the run: see
        :class:`pnanalysis.CurvatureMonitor`. Training is the same with and without.

    Returns
    -------
    Run

    Raises
    ------
    PnError
        If something is wrong with the configuration, the data or the disk, or the loss is not finite. What was saved
        until then is kept.
    """
    recipe = RECIPES.get(config.recipe)
    if curvature is not None and curvature != "auto":
        at_least(1, curvature=curvature)
    if curvature is not None and distributed:
        raise TrainingError("curvature is measured along trainings in one process; run pntrain without torchrun")
    if recipe is not None and recipe.problem != "images":
        if curvature is not None:
            raise TrainingError(f"{config.recipe} trains no network on images; leave out --curvature")
        if distributed:
            raise TrainingError(f"{config.recipe} is trained in one process; run pntrain without torchrun")
        return SMALL_PROBLEMS[recipe.problem](config, Path(out), device, resume, progress)
    torch_device = resolve_device(device)
    processes = SeveralProcesses(torch_device) if distributed else OneProcess()
    progress = progress and processes.is_first
    processes.from_first(lambda: check_settings(config, Path(out), resume))
    parents = not Path(out).parent.is_dir()  # a folder that is gone once the data are read is not made again
    data = processes.first_before_others(lambda: _load(config, torch_device))
    session = Session(config, data, torch_device, Path(out), resume, save_interval, parents, processes, curvature)
    _print_resume_message(session, progress)
    try:
        with progress_bar(f"{config.recipe}/{config.strategy}", session.n_to_see(), progress) as advance:
            session.run(advance, progress and not error_stream().isatty())
        return session.finish()
    except BaseException as error:  # a user's network may raise anything, and a signal may arrive at any time
        session.fail(error)
        raise
    finally:
        session.release()


def train_together(
    configs: Sequence[Config],
    outs: Sequence[str | os.PathLike[str]],
    *,
    device: str = "auto",
    resume: bool = False,
    progress: bool = True,
    save_interval: float = _SAVE_INTERVAL,
) -> list[Run | PnError]:
    """Train several runs of one network on one data set, all at once: see :mod:`trainers.loop.batched_fit`.

    Each becomes a run directory like those of :func:`train`, with the same results up to round-off (which training
    amplifies), and can be resumed by either function.

    Parameters
    ----------
    configs : sequence of Config
        They may differ in seed, strategy, strength, layers, origin, initialisation, number of iterations and interval
        of checkpoints.
    outs : sequence of path
        A run directory for each.
    device, resume, progress, save_interval
        As for :func:`train`.

    Returns
    -------
    list of Run or PnError
        Each run, or the error that ended it; the others continue.

    Raises
    ------
    PnError
        If the configurations differ in more than they may, or the data cannot be loaded.
    """
    check_together(configs)
    torch_device = resolve_device(device)
    results: dict[int, Run | PnError] = {}
    for k, (config, out) in enumerate(zip(configs, outs, strict=True)):
        try:
            check_settings(config, Path(out), resume)
        except PnError as error:
            results[k] = error
    if len(results) == len(configs):
        return [results[k] for k in range(len(configs))]
    data = _load(configs[0], torch_device)
    sessions: dict[int, Session] = {}
    for k in sorted(set(range(len(configs))) - set(results)):
        try:
            sessions[k] = Session(configs[k], data, torch_device, Path(outs[k]), resume, save_interval)
            _print_resume_message(sessions[k], progress)
        except PnError as error:
            results[k] = error
    total = sum(session.n_to_see() for session in sessions.values())
    try:
        with progress_bar(f"{len(sessions)} runs together", total, progress) as advance:
            while sessions:
                for k in [k for k, session in sessions.items() if session.iteration == session.config.iterations]:
                    results[k] = sessions.pop(k).finish()
                for k, failure in _iterate_together(sessions, advance).items():
                    sessions.pop(k).fail(failure)
                    results[k] = failure
    except BaseException as error:  # a signal, or raised in a step that is common to all runs
        for session in sessions.values():
            session.fail(error)
        raise
    finally:
        for session in sessions.values():
            session.release()
    return [results[k] for k in range(len(configs))]


def check_together(configs: Sequence[Config]) -> None:
    """Check that configurations can be trained together.

    Raises
    ------
    TrainingError
        The message names a setting in which they differ.
    """
    for config in configs:
        recipe = RECIPES.get(config.recipe)
        if recipe is not None and recipe.problem != "images":
            raise TrainingError(f"{config.recipe} always trains its networks together; leave out --together")
        for name, value in configs[0].to_dict().items():
            if name not in _MAY_DIFFER and getattr(config, name) != getattr(configs[0], name):
                raise TrainingError(
                    f"runs that differ in {name} ({value!r} and {getattr(config, name)!r}) cannot be trained together; "
                    "leave out --together"
                )


#: Settings in which runs that are trained together may differ.
_MAY_DIFFER = ("seed", "strategy", "lam", "layers", "origin", "init_std", "iterations", "checkpoint_every")


def _iterate_together(sessions: Mapping[int, Session], advance: Callable[..., None]) -> dict[int, PnError]:
    """Train one iteration of the runs that are furthest behind; returns the errors of those that failed."""
    behind = min((session.iteration for session in sessions.values()), default=0)
    prepared: dict[int, PreparedIteration] = {}
    failed: dict[int, PnError] = {}
    for k, session in sessions.items():
        if session.iteration == behind:
            try:
                prepared[k] = session.prepare(advance)
            except PnError as error:
                failed[k] = error
    # An interruption may have left some runs an epoch ahead of others: runs at one epoch are trained together.
    for start in sorted({ready.start_epoch for ready in prepared.values()}):
        chosen = {k: ready for k, ready in prepared.items() if ready.start_epoch == start}
        first = next(iter(chosen))
        fits = [
            SingleFit(ready.model, ready.seed, ready.penalty, ready.optimizer_state, ready.recorder.on_epoch)
            for ready in chosen.values()
        ]
        options, on_batch = sessions[first].fit_options(), chosen[first].recorder.on_batch
        results = fit_together(fits, **options, start_epoch=start, on_batch=on_batch)
        for k, records in zip(chosen, results, strict=True):
            if isinstance(records, PnError):
                failed[k] = records
                continue
            try:
                sessions[k].end_iteration()
            except PnError as error:
                failed[k] = error
    return failed


def _print_resume_message(session: Session, progress: bool) -> None:
    if message := session.resume_message():
        print_status(message, quiet=not progress)


def _load(config: Config, device: torch.device) -> Splits:
    input_shape = getattr(build_model(config.model, config.model_options), "input_shape", None)
    with downloads_allowed():
        data = load_data(config.data, input_shape, config.split_seed).in_memory()
    check_tensors(data, config)
    return data.to(device)

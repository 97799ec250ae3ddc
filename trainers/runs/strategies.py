"""Sequences of fits: plain, persistent, partial and restart, into a run directory that can be resumed.

Iteration 0 is the plain training. ``persistent`` and ``partial`` train every further iteration from the same
initial point, repelled from all earlier end points; ``restart`` trains it from a fresh one, unrepelled. Batch order
and augmentation depend on the run's seed and the epoch alone in persistent runs, so that iterations differ by the
penalty and by nothing else; restarts draw their own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from pnanalysis.errors import DataError, PnError, TrainingError
from pnanalysis.inputs.data import Split, Splits, load_data
from pnanalysis.inputs.models import build_model
from pnanalysis.inputs.sources import resolve_device
from pnanalysis.io.runs import Run
from pnanalysis.terminal.progress import progress_bar
from trainers.loop.batched_fit import Member, fit_together
from trainers.recipes import RECIPES, Config
from trainers.runs.session import Session, Start, check_settings
from trainers.runs.small_problems import RUNNERS

_SAVE_INTERVAL = 5.0  # seconds between resume states, so that small networks do not spend their time on syncing files


def train(
    config: Config,
    out: str | os.PathLike[str],
    *,
    device: str = "auto",
    resume: bool = False,
    progress: bool = True,
    save_interval: float = _SAVE_INTERVAL,
) -> Run:
    """Train a configuration into a run directory.

    Parameters
    ----------
    config : Config
        See :func:`trainers.recipes.configure`.
    out : path
        The run directory; new, unless ``resume``.
    device : str
        ``auto`` takes CUDA where there is one.
    resume : bool
        Go on with an interrupted run; on the same CPU it ends bit-identical to one that never stopped. More
        ``iterations`` than before extend a finished run. A directory that is not there yet is started.
    progress : bool
        Show a bar on a terminal, or a line per iteration elsewhere.
    save_interval : float
        Least time between resume states, in seconds.

    Returns
    -------
    Run

    Raises
    ------
    PnError
        If something is wrong with the configuration, the data, the disk, or the loss is not finite. What was saved
        before stays.
    """
    recipe = RECIPES.get(config.recipe)
    if recipe is not None and recipe.runner != "images":
        return RUNNERS[recipe.runner](config, Path(out), device, resume, progress)
    torch_device = resolve_device(device)
    check_settings(config, Path(out), resume)
    session = Session(config, _load(config, torch_device), torch_device, Path(out), resume, save_interval)
    _say_going_on(session, progress)
    try:
        with progress_bar(f"{config.recipe}/{config.strategy}", session.n_to_see(), progress) as advance:
            session.run(advance, progress and not sys.stderr.isatty())
    except Exception as error:  # whatever a user's network may raise
        session.fail(error)
        raise
    return session.finish()


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

    Each is a run directory as :func:`train` makes it, the same to round-off (which training amplifies), and can be
    resumed by either.

    Parameters
    ----------
    configs : sequence of Config
        They may differ in seed, strategy, strength, layers, origin, initialisation and number of iterations.
    outs : sequence of path
        A run directory for each.
    device, resume, progress, save_interval
        As for :func:`train`.

    Returns
    -------
    list of Run or PnError
        What became of each; one that fails stops no other.

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
            _say_going_on(sessions[k], progress)
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
    except Exception as error:  # what ends one ends all
        for session in sessions.values():
            session.fail(error)
        raise
    return [results[k] for k in range(len(configs))]


def check_together(configs: Sequence[Config]) -> None:
    """Refuse configurations that cannot be trained as one.

    Raises
    ------
    TrainingError
        The message names a setting in which they differ.
    """
    for config in configs:
        recipe = RECIPES.get(config.recipe)
        if recipe is not None and recipe.runner != "images":
            raise TrainingError(f"{config.recipe} trains its networks together by itself; leave out --together")
        for name, value in configs[0].to_dict().items():
            if name not in _OWN_SETTINGS and getattr(config, name) != getattr(configs[0], name):
                raise TrainingError(
                    f"runs that differ in {name} ({value!r} and {getattr(config, name)!r}) cannot be trained together; "
                    "leave out --together"
                )


#: In what runs that are trained together may differ.
_OWN_SETTINGS = ("seed", "strategy", "lam", "layers", "origin", "init_std", "iterations", "checkpoint_every")


def _iterate_together(sessions: Mapping[int, Session], advance: Callable[..., None]) -> dict[int, PnError]:
    """One iteration of the runs that are furthest behind; the errors of those that failed."""
    behind = min((session.iteration for session in sessions.values()), default=0)
    fits: dict[int, Start] = {}
    failed: dict[int, PnError] = {}
    for k, session in sessions.items():
        if session.iteration == behind:
            try:
                fits[k] = session.prepare(advance)
            except PnError as error:
                failed[k] = error
    for start in sorted({one.start_epoch for one in fits.values()}):  # the same, but where runs were interrupted
        chosen = {k: one for k, one in fits.items() if one.start_epoch == start}
        first = sessions[next(iter(chosen))]
        members = [
            Member(one.model, one.seed, one.penalty, one.optimizer_state, one.recorder.on_epoch)
            for one in chosen.values()
        ]
        on_batch = next(iter(chosen.values())).recorder.on_batch
        ended = fit_together(members, **first.fit_options(), start_epoch=start, on_batch=on_batch)
        for k, records in zip(chosen, ended, strict=True):
            if isinstance(records, PnError):
                failed[k] = records
                continue
            try:
                sessions[k].end_iteration()
            except PnError as error:
                failed[k] = error
    return failed


def _say_going_on(session: Session, progress: bool) -> None:
    if progress and session.going_on():
        print(session.going_on(), file=sys.stderr)


def _load(config: Config, device: torch.device) -> Splits:
    data = load_data(config.data, _input_shape(config), config.split_seed)
    if not isinstance(data.train, Split):
        raise DataError(f"{config.data}: training needs tensors (inputs, targets), not a loader")
    return data.to(device)


def _input_shape(config: Config) -> tuple[int, ...] | None:
    shape: tuple[int, ...] | None = getattr(build_model(config.model, config.model_options), "input_shape", None)
    return shape

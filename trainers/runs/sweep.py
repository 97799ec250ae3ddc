"""Grids of runs: every combination of some settings, each a resumable run, several at a time.

Runs are independent processes on one machine, started through joblib, or calls on a Dask cluster. A run that fails does
not stop the others; if a whole process is killed, the sweep ends and can be resumed.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import torch
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import TerminatedWorkerError

from pnanalysis.checks import at_least, check_writable, shown
from pnanalysis.errors import PnError, TrainingError
from pnanalysis.inputs.sources import resolve_device
from pnanalysis.io.runs import MANIFEST, open_run
from pnanalysis.io.writer import RunWriter
from pnanalysis.terminal.progress import progress_bar
from trainers.recipes import Config
from trainers.runs.cluster import on_cluster
from trainers.runs.curvature import Every
from trainers.runs.manifest import failure_of, mark_unfinished
from trainers.runs.strategies import train, train_together

_MOST_RUNS = 10_000
_EXISTS = "exists already; continue it with --resume"


@dataclass(frozen=True)
class Outcome:
    """How one run of a sweep ended: ``failure`` is ``None`` if it finished."""

    path: Path
    settings: dict[str, Any]
    failure: str | None


def parse_sweep(entries: Sequence[str], base: Config) -> dict[str, list[Any]]:
    """Values of each setting from ``NAME=A,B,C`` or, for integers, ``NAME=FIRST:LAST`` (LAST not included).

    Raises
    ------
    TrainingError
        If a setting does not exist or a value is not of its type.
    """
    known = {entry.name: getattr(base, entry.name) for entry in fields(Config)}
    grid: dict[str, list[Any]] = {}
    for entry in entries:
        name, separator, text = entry.partition("=")
        name = name.replace("-", "_")
        if not separator or not text:
            raise TrainingError(f"--sweep {shown(entry)}: write NAME=A,B,C or NAME=FIRST:LAST")
        if name not in known or not isinstance(known[name], int | float | str | None):
            simple = [key for key, value in known.items() if isinstance(value, int | float | str | None)]
            raise TrainingError(f"--sweep {shown(entry)}: no setting {name!r}; there are {', '.join(simple)}")
        grid[name] = [_parse_value(part, known[name], entry) for part in _split_values(text, known[name])]
        if not grid[name]:
            raise TrainingError(f"--sweep {shown(entry)}: names no values; FIRST must be below LAST")
        if len(set(grid[name])) < len(grid[name]):
            raise TrainingError(f"--sweep {shown(entry)}: a value is listed twice")
    if math.prod(map(len, grid.values())) > _MOST_RUNS:
        raise TrainingError(f"--sweep names more than {_MOST_RUNS:,} runs; make several sweeps of fewer values")
    return grid


def sweep(
    base: Config,
    grid: Mapping[str, Sequence[Any]],
    out: Path,
    *,
    jobs: int | None = None,
    device: str = "auto",
    resume: bool = False,
    progress: bool = True,
    together: bool = False,
    engine: str = "local",
    curvature: Every | None = None,
) -> list[Outcome]:
    """Train every combination of the grid, in ``OUT/NAME=VALUE,NAME=VALUE``.

    Parameters
    ----------
    base : Config
        The settings that the combinations have in common.
    grid : mapping of str to sequence
        Values of each setting.
    out : Path
    jobs : int, optional
        Number of runs at a time; by default that of the cores, or of the GPUs.
    device : str, optional
        With several GPUs, ``cuda`` distributes the runs over them.
    resume : bool
        Continue existing runs; otherwise they are reported as failed and left as they are.
    progress : bool
    together : bool
        Train all runs as one batched program in this process, instead of one process per run. Intended for small
        networks, which leave a GPU idle when trained alone; on a CPU separate processes take about half the time
        (LeNet-5). Only settings that :func:`trainers.runs.strategies.train_together` lets differ can then be swept.
    engine : str
        ``local``, processes of this machine; or ``dask:ADDRESS``, the workers of a Dask cluster, which must see ``out``
        at the same path. The device is then one of the worker's, and ``jobs`` is up to the cluster.
    curvature : int or "auto", optional
        See :func:`trainers.train`; not for runs that are trained together.

    Returns
    -------
    list of Outcome
        In the order of the grid.

    Raises
    ------
    TrainingError
        If a process of the sweep is killed, the runs cannot be trained together, or there is no such engine.
    """
    at_least(1, jobs=jobs)
    name, _, address = engine.partition(":")
    if name not in ("local", "dask") or (name == "dask") != bool(address):
        raise TrainingError(f"--engine {shown(engine)}: give local, or dask:ADDRESS with the address of a scheduler")
    if address and (together or jobs):
        raise TrainingError(
            "on a cluster, runs are calls of their own, as many at a time as it has workers: leave out "
            f"--{'together' if together else 'jobs'}"
        )
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    plans = [_Plan(replace(base, **one), one, out / _folder(one), curvature) for one in combinations]
    shared = [path for path, n in Counter(plan.path for plan in plans).items() if n > 1]
    if shared:
        raise TrainingError(
            f"several runs of the sweep would be trained in {shared[0]}, for a folder's name cannot have a slash: "
            "give values that differ by more than / and -"
        )
    if together and curvature is not None:
        raise TrainingError("curvature is measured along trainings of their own; leave out --together")
    if together:
        configs, paths = [plan.config for plan in plans], [plan.path for plan in plans]
        results = train_together(configs, paths, device=device, resume=resume, progress=progress)
        return [
            Outcome(plan.path, plan.settings, str(result) if isinstance(result, PnError) else None)
            for plan, result in zip(plans, results, strict=True)
        ]
    trained = _on_cluster(address, plans, device, resume) if address else _on_this_machine(plans, device, resume, jobs)
    outcomes: dict[Path, Outcome] = {}
    check_writable(out / MANIFEST)
    out.mkdir(parents=True, exist_ok=True)
    marked = nullcontext() if address else _interruptions_marked(plans)  # on a cluster, they go on
    with marked, progress_bar(f"{len(plans)} runs", len(plans), progress) as advance:
        try:
            for outcome in trained:
                outcomes[outcome.path] = outcome
                advance(1)
        except TerminatedWorkerError as error:
            raise TrainingError(
                f"a process of the sweep was killed, perhaps for lack of memory; {len(outcomes)} of {len(plans)} runs "
                "are complete: continue with --resume and fewer --jobs"
            ) from error
    with suppress(OSError):  # of runs that could not begin, nothing stays
        out.rmdir()
    return [outcomes[plan.path] for plan in plans]


def _on_this_machine(plans: Sequence[_Plan], device: str, resume: bool, jobs: int | None) -> Iterator[Outcome]:
    devices = _available_devices(device)
    jobs = max(min(jobs or len(devices), len(plans)), 1)
    # No more threads than this process may use: OMP_NUM_THREADS and torch.set_num_threads hold for its runs, too.
    threads = min(max(joblib.cpu_count() // jobs, 1), torch.get_num_threads())
    calls = [
        joblib.delayed(_train_one)(plan, place, resume, threads)
        for plan, place in zip(plans, itertools.cycle(devices), strict=False)
    ]
    yield from joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")(calls)


def _on_cluster(address: str, plans: Sequence[_Plan], device: str, resume: bool) -> Iterator[Outcome]:
    calls, paths = [], {plan.path.resolve(): plan.path for plan in plans}
    for plan in plans:
        if not resume and (plan.path / MANIFEST).exists():
            yield Outcome(plan.path, plan.settings, _EXISTS)
        else:  # a run whose worker dies is resumed by another one
            calls.append((plan._replace(path=plan.path.resolve()), device, True))
    for outcome in on_cluster(address, _train_one, calls):
        yield replace(outcome, path=paths[outcome.path])


@contextmanager
def _interruptions_marked(plans: Sequence[_Plan]) -> Iterator[None]:
    """Mark runs as interrupted that a signal ends: joblib kills their processes, which then cannot do so themselves."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        get_reusable_executor(kill_workers=True).shutdown(wait=True, kill_workers=True)
        for plan in plans:
            with suppress(PnError):
                manifest = open_run(plan.path).manifest
                if manifest["status"] == "running":
                    writer = RunWriter(plan.path, manifest)
                    writer.lock()
                    mark_unfinished(writer, interrupt)
                    writer.release()
        raise


class _Plan(NamedTuple):
    """A run of the grid before it is trained."""

    config: Config
    settings: dict[str, Any]
    path: Path
    curvature: Every | None = None


def _available_devices(device: str) -> list[str]:
    """The devices to distribute runs over, one entry for each run that can be trained at the same time."""
    chosen = resolve_device(device)
    if chosen.type == "cuda":
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())] if chosen.index is None else [str(chosen)]
    return [str(chosen)] * joblib.cpu_count()


def _train_one(plan: _Plan, device: str, resume: bool, threads: int | None = None) -> Outcome:
    before = torch.get_num_threads()
    if threads:  # else every process would start as many threads as there are cores
        torch.set_num_threads(threads)
    try:
        if not plan.path.parent.is_dir():  # not to be made again, without the other runs
            return Outcome(plan.path, plan.settings, f"there is no folder {plan.path.parent}; put it back")
        if resume or not (plan.path / MANIFEST).exists():
            train(plan.config, plan.path, device=device, resume=resume, progress=False, curvature=plan.curvature)
            return Outcome(plan.path, plan.settings, None)
        return Outcome(plan.path, plan.settings, _EXISTS)
    except (Exception, SystemExit) as error:  # a user's model may raise anything; it must not stop the other runs
        return Outcome(plan.path, plan.settings, failure_of(error))
    finally:
        torch.set_num_threads(before)


def _folder(settings: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in settings.items()).replace("/", "-")


def _split_values(text: str, like: Any) -> list[str]:
    first, colon, last = text.partition(":")
    if colon and isinstance(like, int) and first.lstrip("-").isdigit() and last.lstrip("-").isdigit():
        return [str(i) for i in itertools.islice(range(int(first), int(last)), _MOST_RUNS + 1)]
    return text.split(",")


def _parse_value(text: str, like: Any, entry: str) -> Any:
    """The text as a value of the type of ``like``, the setting in the base configuration (``None`` for a number)."""
    if isinstance(like, bool):
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
    elif isinstance(like, str):
        return text
    else:
        try:
            return int(text) if isinstance(like, int) else float(text)
        except ValueError:  # also where there are thousands of digits
            pass
    expected = {bool: "true or false", int: "an integer"}.get(type(like), "a number")
    raise TrainingError(f"--sweep {shown(entry)}: {shown(text)} is not {expected}")

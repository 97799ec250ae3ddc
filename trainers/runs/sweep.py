"""Grids of runs: every combination of some settings, each a resumable run of its own, several at a time.

Runs are independent processes on one machine, so joblib (its loky backend) is all that is needed, and scikit-learn
brings it along. One failed run never stops the others; if a whole process is killed, the sweep ends and is resumed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import joblib
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError

from pnanalysis.errors import PnError, TrainingError
from pnanalysis.inputs.sources import resolve_device
from pnanalysis.io.runs import MANIFEST
from pnanalysis.terminal.progress import progress_bar
from trainers.recipes import Config
from trainers.runs.strategies import train, train_together


@dataclass(frozen=True)
class Outcome:
    """How one run of a sweep ended: ``failure`` is None for those that finished."""

    path: Path
    settings: dict[str, Any]
    failure: str | None


def parse_sweep(entries: Sequence[str], base: Config) -> dict[str, list[Any]]:
    """Values by setting from ``NAME=A,B,C`` or, for whole numbers, ``NAME=FIRST:LAST`` (LAST not included).

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
            raise TrainingError(f"--sweep {entry!r}: write NAME=A,B,C or NAME=FIRST:LAST")
        if name not in known or not isinstance(known[name], int | float | str | None):
            simple = [key for key, value in known.items() if isinstance(value, int | float | str | None)]
            raise TrainingError(f"--sweep {entry!r}: no setting {name!r}; there are {', '.join(simple)}")
        grid[name] = [_value(part, known[name], entry) for part in _parts(text, known[name])]
        if len(set(grid[name])) < len(grid[name]):
            raise TrainingError(f"--sweep {entry!r}: a value is there twice")
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
) -> list[Outcome]:
    """Train every combination of the grid, in ``OUT/NAME=VALUE,NAME=VALUE``.

    Parameters
    ----------
    base : Config
        What the combinations have in common.
    grid : mapping of str to sequence
        Values of each setting.
    out : Path
    jobs : int, optional
        Runs at a time; by default as many as there are cores, or GPUs.
    device : str, optional
        With several GPUs, ``cuda`` deals the runs out to them.
    resume : bool
        Go on with the runs that are there; without it they are reported as failed and left as they are.
    progress : bool
    together : bool
        Train all runs as one batched program in this process, in place of one process a run. Made for small networks
        on a GPU, which a single one leaves idle; on a CPU separate processes take about half the time (LeNet-5). The
        grid may then be over what :func:`trainers.runs.strategies.train_together` allows.

    Returns
    -------
    list of Outcome
        In the order of the grid.

    Raises
    ------
    TrainingError
        If a process of the sweep is killed from outside, or the runs cannot be trained together.
    """
    configs = [
        (replace(base, **dict(zip(grid, values, strict=True))), dict(zip(grid, values, strict=True)))
        for values in itertools.product(*grid.values())
    ]
    if together:
        paths = [out / _folder(settings) for _, settings in configs]
        every = [config for config, _ in configs]
        ended = train_together(every, paths, device=device, resume=resume, progress=progress)
        return [
            Outcome(path, settings, str(end) if isinstance(end, PnError) else None)
            for path, (_, settings), end in zip(paths, configs, ended, strict=True)
        ]
    where = resolve_device(device)
    kind = where.type if where.index is None else str(where)
    n_devices = (
        (torch.cuda.device_count() if where.index is None else 1) if where.type == "cuda" else joblib.cpu_count()
    )
    jobs = max(min(jobs or n_devices, len(configs)), 1)
    threads = max(joblib.cpu_count() // jobs, 1)
    places = [f"cuda:{i % n_devices}" if kind == "cuda" else kind for i in range(len(configs))]
    calls = [
        joblib.delayed(_one)(config, settings, out / _folder(settings), place, resume, threads)
        for (config, settings), place in zip(configs, places, strict=True)
    ]
    found: dict[Path, Outcome] = {}
    with progress_bar(f"{len(calls)} runs", len(calls), progress) as advance:
        try:
            for outcome in joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")(calls):
                found[outcome.path] = outcome
                advance(1)
        except TerminatedWorkerError as error:
            raise TrainingError(
                f"a process of the sweep was killed, for want of memory perhaps; {len(found)} of {len(calls)} runs are "
                "complete: go on with --resume, and fewer --jobs"
            ) from error
    return [found[out / _folder(settings)] for _, settings in configs]


def _one(
    config: Config, settings: dict[str, Any], path: Path, device: str, resume: bool, threads: int
) -> Outcome:  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if resume or not (path / MANIFEST).exists():
            train(config, path, device=device, resume=resume, progress=False)
            return Outcome(path, settings, None)
        return Outcome(path, settings, "is there already; go on with it by --resume")
    except PnError as error:
        return Outcome(path, settings, str(error))
    except Exception as error:  # whatever a user's model may raise: it must not stop the other runs
        return Outcome(path, settings, f"{type(error).__name__}: {error}")
    finally:
        torch.set_num_threads(before)


def _folder(settings: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in settings.items()).replace("/", "-")


def _parts(text: str, like: Any) -> list[str]:
    first, colon, last = text.partition(":")
    if colon and isinstance(like, int) and first.lstrip("-").isdigit() and last.lstrip("-").isdigit():
        return [str(i) for i in range(int(first), int(last))]
    return text.split(",")


def _value(text: str, like: Any, entry: str) -> Any:
    if isinstance(like, bool):
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
    elif isinstance(like, str):
        return text
    else:
        try:
            return int(text) if isinstance(like, int) else float(text)
        except ValueError:
            pass
    raise TrainingError(f"--sweep {entry!r}: {text!r} is not a {'number' if like is None else type(like).__name__}")

"""Run directories: what training writes and every analysis reads.

Layout::

    run.json                                  the manifest: recipe, configuration, seeds, versions, champion
    history.nc                                loss and errors, dims iteration x epoch
    checkpoints/iter03/epoch015.safetensors   weights and buffers; epoch 0 is the starting point
    resume.safetensors                        present while training can be resumed
    analysis/hessian.nc ...                   results of analyses, a NetCDF file or Zarr store per kind

Iteration 0 is the plain model. Every file is written to a temporary name, synced and renamed, so that a kill at
any moment leaves either the old file or the new one. Opening a run never executes code from it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pnanalysis.errors import RunError
from pnanalysis.io import netcdf, zarr_store
from pnanalysis.io.datasets import load
from pnanalysis.io.lock import is_held
from pnanalysis.io.manifest import read_manifest
from pnanalysis.io.weights import State, StateDicts, holds_weights, read_state_dicts, sole

MANIFEST, HISTORY, RESUME, CHECKPOINTS, ANALYSIS = (
    "run.json",
    "history.nc",
    "resume.safetensors",
    "checkpoints",
    "analysis",
)
_ROLES = ("plain", "champion", "challenger", "start")
_CHECKPOINT_FILE = re.compile(r"iter(\d+)/epoch(\d+)\.safetensors$")


@dataclass(frozen=True)
class Checkpoint:
    """Weights and buffers of one model at one moment.

    Attributes
    ----------
    name : str
        ``iter03/epoch015``, or the file's own name for weights that belong to no run.
    path : pathlib.Path
    iteration, epoch : int
        Both -1 for weights that belong to no run.
    run : pathlib.Path or None
        The directory of the run to which it belongs: links do not lead out of it.
    """

    name: str
    path: Path
    iteration: int = -1
    epoch: int = -1
    run: Path | None = field(default=None, compare=False)

    @property
    def origin(self) -> str:
        """What messages call it."""
        return str(self.path)

    @property
    def identity(self) -> object:
        """Equal for two checkpoints that are the same file."""
        return self.path.resolve()

    def load(self) -> State:
        """Tensors by name, on the CPU."""
        return sole(self.state_dicts(), self.path)

    def equals(self, other: Checkpoint) -> bool:
        """Whether both hold the same weights, to the last bit."""
        own, others = self.load(), other.load()
        return own.keys() == others.keys() and all(own[name].equal(others[name]) for name in own)

    def state_dicts(self) -> StateDicts:
        """Every state dict in the file: see :func:`pnanalysis.io.weights.read_state_dicts`."""
        return read_state_dicts(self.path, self.run)


class Run:
    """A run directory, of finished or unfinished training, read from disk. Made by :func:`open_run`."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}: {self.manifest['recipe']}, {len(self.checkpoints)} checkpoints)"

    @property
    def id(self) -> str:
        return str(self.manifest["id"])

    @property
    def status(self) -> str:
        """How its training goes: running, finished, interrupted, failed or diverged.

        A process that was killed could not say so: where the manifest says running, and no process holds the run's
        lock, it is interrupted.
        """
        status = str(self.manifest.get("status", "?"))
        if status != "running" or is_held(self.path):
            return status
        status = str(read_manifest(self.path / MANIFEST).get("status", "?"))  # it may have ended meanwhile
        return "interrupted" if status == "running" else status

    @cached_property
    def checkpoints(self) -> list[Checkpoint]:
        """Every checkpoint on disk, by iteration and epoch."""
        return sorted(_find_checkpoints(self.path), key=lambda c: (c.iteration, c.epoch))

    @property
    def ends(self) -> list[Checkpoint]:
        """The end point of every finished iteration."""
        return [self._at(i, epoch) for i, epoch in enumerate(self.manifest["ends"])]

    @property
    def start(self) -> Checkpoint:
        """The initial point w_ini of the plain model."""
        return self._at(0, 0)

    @property
    def plain(self) -> Checkpoint:
        """The end point of iteration 0."""
        return self._end(0)

    @property
    def champion(self) -> Checkpoint:
        """The end point of the iteration with the lowest validation error."""
        return self._end(self.manifest["champion"] or 0)

    @property
    def challenger(self) -> Checkpoint:
        """The end point with the lowest validation error among the iterations after the plain model.

        It is the champion, unless that is the plain model.
        """
        n = len(self.manifest["ends"])
        if n < 2:
            raise RunError(f"{self.path}: no iteration after the plain model has finished; resume the training")
        return self._end(best_iteration(self.history.isel(iteration=slice(1, n))))

    @property
    def contenders(self) -> tuple[str, str]:
        """Names of the end points to compare: plain and champion, or plain and challenger where the former are one."""
        is_plain_best = self.manifest["champion"] == 0 and len(self.manifest["ends"]) > 1
        return "plain", "challenger" if is_plain_best else "champion"

    @property
    def control(self) -> Run | None:
        """The restart control that ``pntrain --control`` has trained beside this run; ``None`` if there is none."""
        path = self.path.resolve()
        path = path.with_name(f"{path.name}-restart")
        if not (path / MANIFEST).is_file():
            return None
        found = open_run(path)
        is_control = found.manifest.get("strategy") == "restart" and found.has_setting_of(self)
        return found if is_control and found.manifest["ends"] else None

    def has_setting_of(self, other: Run) -> bool:
        """Whether both are of one recipe, model and data set."""
        return all(self.manifest.get(key) == other.manifest.get(key) for key in ("recipe", "model", "data"))

    @property
    def challengers(self) -> str:
        """What the challenger is among them, in words."""
        last = len(self.manifest["ends"]) - 1
        return "the only later iteration" if last == 1 else f"the best of iterations 1 to {last}"

    def champion_beside(self, others: Iterable[Run]) -> str:
        """The name of the end point that stands for this run in a comparison with others.

        The plain model of a run is also the first restart of its control. Where it is the champion of both, the
        challenger stands for the run, lest a network be compared with itself.
        """
        is_replaceable = self.contenders[1] == "challenger" and self.manifest.get("strategy") != "restart"
        return "challenger" if is_replaceable and any(self.plain.equals(run.champion) for run in others) else "champion"

    @cached_property
    def history(self) -> xr.Dataset:
        """Loss, penalty and errors, dims (iteration, epoch)."""
        path = self.path / HISTORY
        if not os.path.lexists(path):
            raise RunError(f"{self.path}: no {HISTORY} yet; train for at least one epoch")
        return netcdf.load(path, within=self.path)

    @property
    def results(self) -> xr.DataTree:
        """The history and every saved analysis as one tree, a group per kind (history, hessian, saturation...)."""
        groups = {name: load(file, within=self.path, large=False) for name, file in self.files.items()}
        return xr.DataTree.from_dict(groups, name=self.path.name)

    @property
    def files(self) -> dict[str, Path]:
        """The files of the history and of every saved analysis, by kind; of a NetCDF file and a Zarr store, the newer.

        The history is always the one that training wrote: an analysis of several runs may have saved another.
        """
        own = self.path / HISTORY
        saved = [
            file
            for file in (self.path / ANALYSIS).glob("[!.]*")  # a killed save leaves a hidden temporary file
            if file.suffix in (".nc", zarr_store.SUFFIX) and file.stem != own.stem
        ]
        saved.sort(key=lambda file: (file.stem, _modified(file)))
        return ({own.stem: own} if os.path.lexists(own) else {}) | {file.stem: file for file in saved}

    def trajectory(self, iteration: int) -> list[Checkpoint]:
        """The checkpoints of one iteration in order, its starting point first.

        Raises
        ------
        RunError
            If there are none, or its starting point or the end point of a finished iteration is missing.
        """
        own = [c for c in self.checkpoints if c.iteration == iteration]
        if not own:
            raise RunError(f"{self.path}: no checkpoints of iteration {iteration}")
        if own[0].epoch > 0:  # iterations that share w_ini store it once, with iteration 0
            own.insert(0, self._at(iteration, 0) if self.manifest.get("strategy") == "restart" else self.start)
        if iteration < len(self.manifest["ends"]):
            self._end(iteration)
        return own

    def select(self, names: Iterable[str]) -> dict[str, Checkpoint]:
        """Checkpoints by name.

        Names are ``plain``, ``champion``, ``challenger`` (the best iteration after the plain one), ``start``,
        ``iter03`` (its end), ``iter03/epoch015``, or the groups ``ends`` and ``all``, which give each checkpoint under
        its full name.

        Raises
        ------
        RunError
            If a name matches nothing; the message lists those that exist.
        """
        chosen: dict[str, Checkpoint] = {}
        for name in [names] if isinstance(names, str) else names:
            if name in ("ends", "all"):
                chosen |= {c.name: c for c in (self.ends if name == "ends" else self.checkpoints)}
            else:
                chosen[name] = self._named(str(name))
        if not chosen:
            raise RunError(
                f"{self.path}: no checkpoints selected; name some, such as plain and champion, or train the run"
            )
        return chosen

    def _named(self, name: str) -> Checkpoint:
        if name in _ROLES:
            found: Checkpoint = getattr(self, name)
            return found
        match = re.fullmatch(r"iter(\d+)(?:/epoch(\d+))?", name)
        if not match:
            raise RunError(
                f"{self.path}: no checkpoint {name!r}; use {', '.join(_ROLES)}, ends, all, iterNN or iterNN/epochNNN"
            )
        return self._end(int(match[1])) if match[2] is None else self._at(int(match[1]), int(match[2]))

    def _end(self, iteration: int) -> Checkpoint:
        ends = self.manifest["ends"]
        if iteration >= len(ends):
            raise RunError(
                f"{self.path}: iteration {iteration} has not finished ({len(ends)} have); resume the training"
            )
        return self._at(iteration, ends[iteration])

    def _at(self, iteration: int, epoch: int) -> Checkpoint:
        for checkpoint in self.checkpoints:
            if (checkpoint.iteration, checkpoint.epoch) == (iteration, epoch):
                return checkpoint
        existing = ", ".join(c.name for c in self.checkpoints[:12]) or "none"
        raise RunError(f"{self.path}: no checkpoint iter{iteration:02d}/epoch{epoch:03d}; choose one of: {existing}")


def best_iteration(history: xr.Dataset) -> int:
    """The iteration with the lowest final validation error, or training loss if there is no validation split.

    One whose training loss is not finite is never chosen.

    Raises
    ------
    RunError
        If there is no other.
    """
    last = history.isel(epoch=-1)
    is_validated = bool(last.validation_error.notnull().any())
    scores = (last.validation_error if is_validated else last.train_loss).where(np.isfinite(last.train_loss))
    if not scores.notnull().any():
        raise RunError("no iteration ended with finite numbers, so there is no champion; train with a smaller --lr")
    return int(history.iteration[int(np.nanargmin(scores.values))])


def is_run(path: Path) -> bool:
    """Whether a path can only be meant as that of a run: a folder that is not one of weights."""
    return path.is_dir() and ((path / MANIFEST).is_file() or not holds_weights(path))


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open a run directory.

    Parameters
    ----------
    path : str or path
        The directory that holds ``run.json``.

    Returns
    -------
    Run

    Raises
    ------
    RunError
        If the directory is missing, was not written by this project, is damaged, or is of a newer version.

    Examples
    --------
    >>> run = open_run("runs/lenet5")  # doctest: +SKIP
    >>> run.champion.name  # doctest: +SKIP
    'iter03/epoch005'
    """
    path = Path(path)
    if not path.is_dir():
        raise RunError(f"{path}: no such run directory; train one with `pntrain RECIPE --out {path}`")
    file = path / MANIFEST
    if not os.path.lexists(file):
        raise RunError(f"{path}: not a run directory (it holds no {MANIFEST}); name a folder that pntrain has written")
    return Run(path, read_manifest(file))


def _find_checkpoints(path: Path) -> Iterator[Checkpoint]:
    for file in (path / CHECKPOINTS).glob("iter*/epoch*.safetensors"):
        match = _CHECKPOINT_FILE.search(file.as_posix())
        if match:
            yield Checkpoint(f"{file.parent.name}/{file.stem}", file, int(match[1]), int(match[2]), path)


def _modified(file: Path) -> float:
    """When a file was written; 0 while another process replaces it."""
    try:
        return file.lstat().st_mtime
    except OSError:
        return 0.0

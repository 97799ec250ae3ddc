"""A run in training: where each iteration starts, what it writes, and where an interrupted one resumes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from pnanalysis import schema
from pnanalysis.checks import human
from pnanalysis.errors import DataError, RunError
from pnanalysis.inputs.data import SPLITS, AnySplit, Split, Splits
from pnanalysis.inputs.models import build_model, parameter_layers, resolve_loss
from pnanalysis.io.runs import MANIFEST, Run, best_iteration, open_run
from pnanalysis.io.weights import State
from pnanalysis.io.writer import RunWriter, check_new
from pnanalysis.schema import error_name
from pnanalysis.terminal.console import error_cell, print_status, text
from trainers.loop.fit import Epoch, error_kind, fit, optimizer_tensors
from trainers.loop.persistence import PersistentPenalty, choose_layers
from trainers.loop.processes import OneProcess
from trainers.recipes import Config, check_same
from trainers.runs.curvature import Every, RunCurvature
from trainers.runs.manifest import describe, mark_unfinished, now
from trainers.runs.preflight import check_trainable
from trainers.seeds import derive_seed
from trainers.zoo.models import initialise_normal

_SERIES = tuple(entry.name for entry in fields(Epoch) if entry.name != "epoch")


def check_settings(config: Config, out: Path, resume: bool) -> None:
    """Check a configuration and its run directory before any data are loaded.

    Raises
    ------
    PnError
        If a layer or the loss does not exist, the directory is taken, or its run was begun with other settings.
    """
    if resume and (out / MANIFEST).is_file():
        check_same(open_run(out).manifest["config"], config, out)
    else:
        check_new(out)
    resolve_loss(config.loss)
    names = [name for name, _ in parameter_layers(build_model(config.model, config.model_options))]
    for iteration in range(config.iterations):
        draw_layers(config, iteration, names)  # raises an error for names that do not exist


def draw_layers(config: Config, iteration: int, names: list[str]) -> list[str]:
    """The layers that are repelled in one iteration.

    Raises
    ------
    TrainingError
        If a name does not exist.
    """
    if config.layers == "random":
        return choose_layers(names, "random", derive_seed(config.seed, "layer"))
    if config.layers == "random-each":
        return choose_layers(names, "random", derive_seed(config.seed, "layer", iteration))
    return choose_layers(names, "all" if config.layers == "all" else config.layers.split(","))


@dataclass(frozen=True)
class PreparedIteration:
    """An iteration ready to be trained, from its beginning or from where it was interrupted."""

    model: nn.Module
    seed: int
    penalty: PersistentPenalty | None
    start_epoch: int
    optimizer_state: dict[str, Tensor] | None
    recorder: _Recorder


class _ResumeState(NamedTuple):
    """Weights and optimiser state as they were after an epoch of an unfinished iteration."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    iteration: int
    epoch: int


class Session:
    """A run in training: the fits of one configuration on one device, into one directory.

    Of several processes, the first one reads and writes the directory, and tells the others what they need from it.

    Raises
    ------
    PnError
        If the directory is taken or belongs to other settings, the disk is too small, or network, loss and data do not
        fit together.
    """

    def __init__(
        self, config: Config, data: Splits, device: torch.device, out: Path, resume: bool, save_interval: float,
        parents: bool = True, processes: OneProcess | None = None, curvature: Every | None = None,
    ) -> None:  # fmt: skip
        self.config, self.data, self.device, self.save_interval = config, data, device, save_interval
        self.out, self.processes = out, processes or OneProcess()
        initial = self.initial_model(0)
        self.layer_names = [name for name, _ in parameter_layers(initial)]
        self.layers = [draw_layers(config, i, self.layer_names) for i in range(config.iterations)]
        self.history = _empty_history(config)
        self.processes.from_first(lambda: _check_disk(config, initial, out))
        self.processes.from_first(lambda: check_trainable(initial.to(device), data, config))
        self._check_same_data()
        self.error_kind = error_kind(resolve_loss(config.loss), self.train_split.targets)
        # Last of all: everything above may still fail, and must not leave a run directory behind.
        self._writer: RunWriter | None = None
        self.iteration, self.resume_state = self.processes.from_first(lambda: self._open(resume, parents))
        self.curvature = None if curvature is None else self._opened_curvature(curvature)

    def _open(self, resume: bool, parents: bool) -> tuple[int, _ResumeState | None]:
        """Open the run directory; returns the next iteration and what it is resumed from."""
        self._writer = _open_writer(self.config, self, self.out, resume, parents)
        try:
            ends, state = self.writer.manifest["ends"], _load_resume_state(self.writer)
            if ends or state:
                self.history = _restored_history(self.history, open_run(self.out).history)
        except BaseException:
            self.release()
            raise
        return len(ends), state

    def _opened_curvature(self, every: Every) -> RunCurvature:
        try:
            return RunCurvature(every, self.config, self.train_split, self.out)
        except BaseException:
            self.release()
            raise

    def _check_same_data(self) -> None:
        expected = self.processes.from_first(lambda: self.data.fingerprint)
        if self.data.fingerprint != expected:
            raise DataError(f"{self.config.data}: differs between processes; give all of them the same files")

    @property
    def writer(self) -> RunWriter:
        """Of the run directory, in the first process."""
        assert self._writer is not None
        return self._writer

    @property
    def train_split(self) -> Split:
        """The training examples."""
        assert isinstance(self.data.train, Split)  # loaders are refused when the data are loaded
        return self.data.train

    def resume_message(self) -> str:
        """Where an interrupted run resumes; empty for a new one."""
        if not (self.iteration or self.resume_state):
            return ""
        if self.iteration == self.config.iterations:
            return f"{self.out}: is complete"
        state = self.resume_state
        done = f", after epoch {state.epoch} of {self.config.epochs}" if state and self._is_current(state) else ""
        return f"{self.out}: resuming {self._numbered(self.iteration)}{done}"

    def n_to_see(self) -> int:
        """How many examples the rest of the run will see, each counted once per epoch."""
        return (self.config.iterations - self.iteration) * self.config.epochs * len(self.train_split)

    def initial_model(self, iteration: int) -> nn.Module:
        """The network at its starting point: that of all iterations, or a fresh one for each restart."""
        index = iteration if self.config.strategy == "restart" else 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.config.seed, "init", index))
            model = build_model(self.config.model, self.config.model_options)
            if self.config.init_std is not None:
                initialise_normal(model, self.config.init_std)
        return model

    def run(self, advance: Callable[..., None], verbose: bool) -> None:
        """Train the remaining iterations, one after the other."""
        for iteration in range(self.iteration, self.config.iterations):
            ready = self.prepare(advance)
            fit(
                ready.model, **self.fit_options(), seed=ready.seed, penalty=ready.penalty,
                start_epoch=ready.start_epoch, optimizer_state=ready.optimizer_state,
                on_epoch=ready.recorder.on_epoch, on_batch=ready.recorder.on_batch, distributed=self.processes.n > 1,
                watched_by=(self.curvature and partial(self.curvature.watching, iteration, ready.start_epoch)) or None,
            )  # fmt: skip
            self.end_iteration()
            if verbose:
                print_status(self._summary(iteration))

    def prepare(self, advance: Callable[..., None]) -> PreparedIteration:
        """The next iteration, at its beginning or where it was interrupted."""
        config, iteration = self.config, self.iteration
        model = self.initial_model(iteration)
        if iteration == 0 or config.strategy == "restart":
            self.processes.from_first(lambda: self.writer.save_checkpoint(iteration, 0, model.state_dict()))
        start_epoch, optimizer_state = 0, None
        state = self.resume_state
        if state is not None and self._is_current(state):
            start_epoch, optimizer_state = state.epoch, state.optimizer
            model.load_state_dict(state.model)
            advance(start_epoch * len(self.train_split))
        model = model.to(self.device)
        # Persistent iterations all see the batches in one order, so that they differ by the penalty only.
        seed = derive_seed(config.seed, "fit", iteration if config.strategy == "restart" else 0)
        recorder = _Recorder(self, iteration, advance)
        return PreparedIteration(model, seed, self._penalty(model, iteration), start_epoch, optimizer_state, recorder)

    def fit_options(self) -> dict[str, Any]:
        """The arguments of :func:`trainers.fit` that all iterations have in common."""
        names = ("epochs", "batch_size", "lr", "optimizer", "momentum", "weight_decay", "loss", "augment", "amp",
                 "compile")  # fmt: skip
        data = self.data
        splits = {"train": data.train, "validation": data.validation, "test": data.test}
        return {**splits, **{name: getattr(self.config, name) for name in names}}

    def _penalty(self, model: nn.Module, iteration: int) -> PersistentPenalty | None:
        if iteration == 0 or self.config.strategy not in ("persistent", "partial"):
            return None
        origin = self.initial_model(0) if self.config.origin == "start" else None
        penalty = PersistentPenalty(
            model, self.config.lam, self.layers[iteration], form=self.config.penalty, origin=origin
        )
        for k in range(iteration):
            penalty.add(self.processes.from_first(partial(self._end, k)))
        return penalty

    def _end(self, iteration: int) -> State:
        return open_run(self.out).ends[iteration].load()

    def end_iteration(self) -> None:
        """Record that the current iteration is finished."""
        self.processes.from_first(self._save_end)
        self.iteration += 1

    def save_curvature(self) -> None:
        """Save what has been measured along the trainings so far."""
        if self.curvature is not None:
            self.curvature.save(
                run=self.writer.path.name, run_id=self.writer.manifest["id"], recipe=self.config.recipe,
                strategy=self.config.strategy, champion=self.writer.manifest["champion"], data=self.config.data,
                data_fingerprint=self.data.fingerprint,
            )  # fmt: skip

    def _save_end(self) -> None:
        self.save_curvature()
        # The history is saved on both sides of the manifest: before, so that an iteration which the manifest counts as
        # finished has its history whenever the process is killed; after, because it names the champion.
        self.writer.save_history(self.dataset())
        champion = best_iteration(self.history.isel(iteration=slice(self.iteration + 1)))
        self.writer.update(ends=[*self.writer.manifest["ends"], self.config.epochs], champion=champion)
        self.writer.save_history(self.dataset())

    def finish(self) -> Run:
        """Mark the run as finished."""
        self.processes.from_first(self._save_finished)
        return open_run(self.out)

    def _save_finished(self) -> None:
        self.writer.save_history(self.dataset())  # once more: a run may have been killed before the last time
        self.save_curvature()  # with the champion
        self.writer.update(status="finished", ended=now())
        self.writer.drop_state()
        self.release()

    def fail(self, error: BaseException) -> None:
        """Mark the run as failed, diverged or interrupted."""
        if self._writer is not None:
            mark_unfinished(self._writer, error)
        self.release()

    def release(self) -> None:
        """Let others write the run directory."""
        if self._writer is not None:
            self._writer.release()

    def dataset(self) -> xr.Dataset:
        """The history so far, with its attributes."""
        writer, champion = self.writer, self.writer.manifest["champion"]
        for split in SPLITS:
            name = error_name("training" if split == "train" else split, self.error_kind)
            self.history[f"{split}_error"].attrs["long_name"] = name
        return schema.finish(
            self.history, "history", run=writer.path.name, run_id=writer.manifest["id"], recipe=self.config.recipe,
            strategy=self.config.strategy, champion=champion, seed=self.config.seed, device=str(self.device),
            data=self.config.data, data_fingerprint=self.data.fingerprint, dtype="float32",
            n_validation=_length(self.data.validation), n_test=_length(self.data.test), error=self.error_kind,
        )  # fmt: skip

    def _is_current(self, state: _ResumeState) -> bool:
        """Whether a resume state belongs to the iteration that is next to train."""
        return state.iteration == self.iteration

    def _numbered(self, iteration: int) -> str:
        return f"iteration {iteration} ({iteration + 1} of {self.config.iterations})"

    def _summary(self, iteration: int) -> str:
        """A finished iteration as one line of progress."""
        last = self.history.isel(iteration=iteration, epoch=-1)
        images_per_second = len(self.train_split) * self.config.epochs / float(self.history.seconds[iteration].sum())
        errors = [self.error_text(split, float(last[f"{split}_error"])) for split in ("validation", "test")]
        return (
            f"{self.config.recipe} {self.config.strategy} {self._numbered(iteration)}: "
            f"loss {float(last.train_loss):.4f}, {', '.join(errors)}, {images_per_second:,.0f} images/s"
        )

    def error_text(self, split: str, error: float) -> str:
        """The error of a split with its name, for progress."""
        return f"{error_name(split, self.error_kind)} {text(error_cell(error, self.error_kind))}"


class _Recorder:
    """Writes one iteration's history, checkpoints and resume states as its epochs end, and reports progress."""

    def __init__(self, session: Session, iteration: int, advance: Callable[..., None]) -> None:
        self.session, self.iteration, self.advance = session, iteration, advance
        self.text = f"iteration {iteration}"
        self.saved = self.shown = time.monotonic()
        self.pending = 0

    def on_batch(self, n: int) -> None:
        self.pending += n
        elapsed = time.monotonic() - self.shown
        if elapsed > 0.5:  # redrawing a bar at every step would take longer than a small network's step
            self.advance(self.pending, f"{self.text}, {self.pending / elapsed:,.0f} images/s")
            self.shown, self.pending = time.monotonic(), 0

    def on_epoch(self, record: Epoch, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        session, writer, epoch = self.session, self.session.writer, record.epoch
        for name in _SERIES:
            session.history[name][self.iteration, epoch - 1] = getattr(record, name)
        if epoch % session.config.checkpoint_every == 0 or epoch == session.config.epochs:
            writer.save_checkpoint(self.iteration, epoch, model.state_dict())
        if time.monotonic() - self.saved >= session.save_interval and epoch < session.config.epochs:
            writer.save_history(session.dataset())
            session.save_curvature()  # before the state: a run resumes from no later step than was measured up to
            tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
            tensors |= {f"optimizer.{name}": value for name, value in optimizer_tensors(optimizer).items()}
            writer.save_state(tensors, iteration=self.iteration, epoch=epoch)
            self.saved = time.monotonic()
        self.text = (
            f"iteration {self.iteration} epoch {epoch}: loss {record.train_loss:.3f}, "
            f"{session.error_text('validation', record.validation_error)}"
        )


def _load_resume_state(writer: RunWriter) -> _ResumeState | None:
    saved = writer.load_state()
    if saved is None:
        return None
    tensors, position = saved
    model, optimizer = (_without_prefix(tensors, prefix) for prefix in ("model.", "optimizer."))
    return _ResumeState(model, optimizer, position["iteration"], position["epoch"])


def _open_writer(config: Config, session: Session, out: Path, resume: bool, parents: bool) -> RunWriter:
    if resume and (out / MANIFEST).is_file():
        writer = RunWriter(out, open_run(out).manifest)
        check_same(writer.manifest["config"], config, out)
        recorded = writer.manifest["data"]["fingerprint"]
        if recorded != session.data.fingerprint:
            raise DataError(f"{config.data}: has changed since {out} was begun; resume with the same data")
        writer.lock()
        writer.manifest = open_run(out).manifest  # another process may have gone on until it gave the lock back
        n_processes = session.processes.n
        writer.update(
            status="running", failure=None, config=config.to_dict(), layers=session.layers, n_processes=n_processes
        )
        return writer
    data = session.data
    description = describe(
        config,
        session.device,
        data={
            "name": _portable(config.data),
            "fingerprint": data.fingerprint,
            "split_seed": config.split_seed,
            "split_hash": data.split_hash,
            **{f"n_{name}": _length(getattr(data, name)) for name in ("train", "validation", "test")},
        },
        layer_names=session.layer_names,
        layers=session.layers,
        n_processes=session.processes.n,
    )
    return RunWriter.create(out, description, parents)


def _check_disk(config: Config, model: nn.Module, out: Path) -> None:
    """Check that the disk can hold all checkpoints; those already written count as free space.

    Raises
    ------
    RunError
    """
    checkpoint_size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    starts = config.iterations if config.strategy == "restart" else 1
    n_checkpoints = starts + config.iterations * -(-config.epochs // config.checkpoint_every)
    existing = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.is_dir())
    written = sum(file.stat().st_size for file in out.glob("checkpoints/*/*.safetensors"))
    free = shutil.disk_usage(existing).free + written
    if n_checkpoints * checkpoint_size > free:
        raise RunError(
            f"{out}: {n_checkpoints:,} checkpoints need {human(n_checkpoints * checkpoint_size)}, "
            f"the disk has {human(free)} free; raise checkpoint_every, or lower iterations or epochs"
        )


def _empty_history(config: Config) -> xr.Dataset:
    shape = (config.iterations, config.epochs)
    coords = {"iteration": np.arange(config.iterations), "epoch": np.arange(1, config.epochs + 1)}
    return xr.Dataset({name: (("iteration", "epoch"), np.full(shape, np.nan)) for name in _SERIES}, coords)


def _restored_history(empty: xr.Dataset, saved: xr.Dataset) -> xr.Dataset:
    return empty.combine_first(saved[list(_SERIES)])


def _portable(spec: str) -> str:
    """A data set's name with its folder made absolute, as the user has to give it again for analyses."""
    name, _, path = spec.partition(":")
    return f"{name}:{Path(path).expanduser().resolve()}" if name == "imagefolder" and path else spec


def _length(split: AnySplit | None) -> int:
    return len(split) if isinstance(split, Split) else 0


def _without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

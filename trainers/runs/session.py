"""A run in training: where each iteration starts, what it writes, and how an interrupted one goes on."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from pnanalysis import schema
from pnanalysis.analyses.history import error_name
from pnanalysis.errors import DataError, RunError
from pnanalysis.inputs.data import SPLITS, Split, Splits
from pnanalysis.inputs.models import build_model, parameter_layers, resolve_loss
from pnanalysis.io.runs import MANIFEST, Run, open_run
from pnanalysis.io.writer import RunWriter, check_new
from pnanalysis.spectra.memory import human
from pnanalysis.terminal.console import error_cell, text
from trainers.loop.fit import Epoch, error_kind, fit, optimizer_tensors
from trainers.loop.persistence import PersistentPenalty, choose_layers
from trainers.recipes import Config, check_same
from trainers.runs.manifest import describe, failure_of, now
from trainers.runs.preflight import try_out
from trainers.seeds import derive_seed
from trainers.zoo.models import initialise_normal

_SERIES = tuple(entry.name for entry in fields(Epoch) if entry.name != "epoch")


def check_settings(config: Config, out: Path, resume: bool) -> None:
    """Refuse what cannot be trained, or not there, before any data are loaded.

    Raises
    ------
    PnError
        If a layer or the loss does not exist, the directory is taken, or it was begun with other settings.
    """
    if resume and (out / MANIFEST).is_file():
        check_same(open_run(out).manifest["config"], config, out)
    else:
        check_new(out)
    resolve_loss(config.loss)
    names = [name for name, _ in parameter_layers(build_model(config.model, config.model_options))]
    for iteration in range(config.iterations):
        draw_layers(config, iteration, names)


def draw_layers(config: Config, iteration: int, names: list[str]) -> list[str]:
    """The layers that iteration ``iteration`` repels.

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
class Start:
    """What one iteration starts from."""

    model: nn.Module
    seed: int
    penalty: PersistentPenalty | None
    start_epoch: int
    optimizer_state: dict[str, Tensor] | None
    recorder: _Recorder


class Session:
    """A run in training: the fits of one configuration on one device, into one directory.

    Raises
    ------
    PnError
        If the directory is taken, belongs to other settings, the disk is too small, or network, loss and data do not
        go together.
    """

    def __init__(
        self, config: Config, data: Splits, device: torch.device, out: Path, resume: bool, save_interval: float
    ) -> None:
        self.config, self.data, self.device, self.save_interval = config, data, device, save_interval
        initial = self.initial_model(0)
        self.layer_names = [name for name, _ in parameter_layers(initial)]
        self.layers = [draw_layers(config, i, self.layer_names) for i in range(config.iterations)]
        self.history = _empty_history(config)
        _check_disk(config, initial, out)
        try_out(initial.to(device), data, config)
        self.error_kind = error_kind(resolve_loss(config.loss), data.train.targets)  # type: ignore[union-attr]
        self.writer = _open_writer(config, self, out, resume)
        self.state = self.writer.load_state()
        if self.writer.manifest["ends"] or self.state:
            self.history = _restored_history(self.history, open_run(out).history)

    @property
    def iteration(self) -> int:
        """The iteration that is next to train."""
        return len(self.writer.manifest["ends"])

    def going_on(self) -> str:
        """Where an interrupted run is taken up again; empty for one that begins."""
        if not (self.iteration or self.state):
            return ""
        if self.iteration == self.config.iterations:
            return f"{self.writer.path}: is complete"
        epoch = self.state[1]["epoch"] if self.state and self.state[1]["iteration"] == self.iteration else 0
        done = f", after epoch {epoch} of {self.config.epochs}" if epoch else ""
        return f"{self.writer.path}: going on with {self._place(self.iteration)}{done}"

    def n_to_see(self) -> int:
        """Examples still to be seen."""
        return (self.config.iterations - self.iteration) * self.config.epochs * length(self.data.train)

    def initial_model(self, iteration: int) -> nn.Module:
        """The network at its starting point: w_ini, or a fresh one for restarts."""
        index = iteration if self.config.strategy == "restart" else 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.config.seed, "init", index))
            model = build_model(self.config.model, self.config.model_options)
            if self.config.init_std is not None:
                initialise_normal(model, self.config.init_std)
        return model

    def run(self, advance: Callable[..., None], verbose: bool) -> None:
        """Train the iterations that are not trained yet, one after the other."""
        for iteration in range(self.iteration, self.config.iterations):
            one = self.prepare(advance)
            fit(
                one.model, **self.fit_options(), seed=one.seed, penalty=one.penalty, start_epoch=one.start_epoch,
                optimizer_state=one.optimizer_state, on_epoch=one.recorder.on_epoch, on_batch=one.recorder.on_batch,
            )  # fmt: skip
            self.end_iteration()
            if verbose:
                print(self._line(iteration), file=sys.stderr, flush=True)

    def prepare(self, advance: Callable[..., None]) -> Start:
        """The next iteration, at its beginning or where it was interrupted."""
        config, iteration = self.config, self.iteration
        model = self.initial_model(iteration)
        if iteration == 0 or config.strategy == "restart":
            self.writer.save_checkpoint(iteration, 0, model.state_dict())
        start_epoch, optimizer_state = 0, None
        if self.state is not None and self.state[1]["iteration"] == iteration:
            tensors, position = self.state
            start_epoch = position["epoch"]
            model.load_state_dict(_prefixed(tensors, "model."))
            optimizer_state = _prefixed(tensors, "optimizer.")
            advance(start_epoch * length(self.data.train))
        model = model.to(self.device)
        seed = derive_seed(config.seed, "fit", iteration if config.strategy == "restart" else 0)
        recorder = _Recorder(self, iteration, advance)
        return Start(model, seed, self._penalty(model, iteration), start_epoch, optimizer_state, recorder)

    def fit_options(self) -> dict[str, Any]:
        """What all iterations have in common, as arguments of :func:`trainers.fit`."""
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
        for end in open_run(self.writer.path).ends:
            penalty.add(end.load())
        return penalty

    def end_iteration(self) -> None:
        """Write what the iteration came to."""
        self.writer.save_history(self.dataset())
        champion = _champion(self.history.isel(iteration=slice(self.iteration + 1)))
        self.writer.update(ends=[*self.writer.manifest["ends"], self.config.epochs], champion=champion)
        self.writer.save_history(self.dataset())

    def finish(self) -> Run:
        """The run is complete."""
        self.writer.update(status="finished", ended=now())
        self.writer.drop_state()
        return open_run(self.writer.path)

    def fail(self, error: Exception) -> None:
        """The run ends here."""
        self.writer.update(status="failed", failure=failure_of(error))

    def dataset(self) -> xr.Dataset:
        """The history so far, labelled."""
        writer, champion = self.writer, self.writer.manifest["champion"]
        for split in SPLITS:
            name = error_name("training" if split == "train" else split, self.error_kind)
            self.history[f"{split}_error"].attrs["long_name"] = name
        return schema.finish(
            self.history, "history", run=writer.path.name, run_id=writer.manifest["id"], recipe=self.config.recipe,
            strategy=self.config.strategy, champion=champion, seed=self.config.seed, device=str(self.device),
            data=self.config.data, data_fingerprint=self.data.fingerprint, dtype="float32",
            n_validation=length(self.data.validation), n_test=length(self.data.test), error=self.error_kind,
        )  # fmt: skip

    def _place(self, iteration: int) -> str:
        """An iteration by its number, and which of all it is."""
        return f"iteration {iteration} ({iteration + 1} of {self.config.iterations})"

    def _line(self, iteration: int) -> str:
        last = self.history.isel(iteration=iteration, epoch=-1)
        images_per_second = len(self.data.train) * self.config.epochs / float(self.history.seconds[iteration].sum())  # type: ignore[arg-type]
        errors = [self.told(split, float(last[f"{split}_error"])) for split in ("validation", "test")]
        return (
            f"{self.config.recipe} {self.config.strategy} {self._place(iteration)}: "
            f"loss {float(last.train_loss):.4f}, {', '.join(errors)}, {images_per_second:,.0f} images/s"
        )

    def told(self, split: str, error: float) -> str:
        """The error of a split by its name, for progress."""
        return f"{error_name(split, self.error_kind)} {text(error_cell(error, self.error_kind))}"


class _Recorder:
    """Writes one iteration's history, checkpoints and resume states as its epochs come in."""

    def __init__(self, session: Session, iteration: int, advance: Callable[..., None]) -> None:
        self.session, self.writer, self.iteration, self.advance = session, session.writer, iteration, advance
        self.text = f"iteration {iteration}"
        self.saved = self.shown = time.monotonic()
        self.pending = 0

    def on_batch(self, n: int) -> None:
        self.pending += n
        elapsed = time.monotonic() - self.shown
        if elapsed > 0.5:
            self.advance(self.pending, f"{self.text}, {self.pending / elapsed:,.0f} images/s")
            self.shown, self.pending = time.monotonic(), 0

    def on_epoch(self, record: Epoch, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        session, epoch = self.session, record.epoch
        for name in _SERIES:
            session.history[name][self.iteration, epoch - 1] = getattr(record, name)
        if epoch % session.config.checkpoint_every == 0 or epoch == session.config.epochs:
            self.writer.save_checkpoint(self.iteration, epoch, model.state_dict())
        if time.monotonic() - self.saved >= session.save_interval and epoch < session.config.epochs:
            self.writer.save_history(session.dataset())
            tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
            tensors |= {f"optimizer.{name}": value for name, value in optimizer_tensors(optimizer).items()}
            self.writer.save_state(tensors, iteration=self.iteration, epoch=epoch)
            self.saved = time.monotonic()
        self.text = (
            f"iteration {self.iteration} epoch {epoch}: loss {record.train_loss:.3f}, "
            f"{session.told('validation', record.validation_error)}"
        )


def _open_writer(config: Config, session: Session, out: Path, resume: bool) -> RunWriter:
    if resume and (out / MANIFEST).is_file():
        writer = RunWriter(out, open_run(out).manifest)
        check_same(writer.manifest["config"], config, out)
        recorded = writer.manifest["data"]["fingerprint"]
        if recorded != session.data.fingerprint:
            raise DataError(f"{config.data}: has changed since {out} was begun; resume needs the same data")
        writer.update(status="running", failure=None, config=config.to_dict(), layers=session.layers)
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
            **{f"n_{name}": length(getattr(data, name)) for name in ("train", "validation", "test")},
        },
        layer_names=session.layer_names,
        layers=session.layers,
    )
    return RunWriter.create(out, description)


def _check_disk(config: Config, model: nn.Module, out: Path) -> None:
    """Refuse to begin what the disk cannot hold; checkpoints that are there already count as room.

    Raises
    ------
    RunError
    """
    a_checkpoint = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    starts = config.iterations if config.strategy == "restart" else 1
    n_checkpoints = starts + config.iterations * -(-config.epochs // config.checkpoint_every)
    existing = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.is_dir())
    there = sum(file.stat().st_size for file in out.glob("checkpoints/*/*.safetensors"))
    free = shutil.disk_usage(existing).free + there
    if n_checkpoints * a_checkpoint > free:
        raise RunError(
            f"{out}: {n_checkpoints:,} checkpoints need {human(n_checkpoints * a_checkpoint)}, "
            f"the disk has {human(free)} free; raise checkpoint_every, or lower iterations or epochs"
        )


def _champion(history: xr.Dataset) -> int:
    """The iteration with the lowest validation error at its end, or training loss where nothing validates."""
    last = history.isel(epoch=-1)
    scores = last.validation_error.values
    if np.isnan(scores).all():
        scores = last.train_loss.values
    return int(np.nanargmin(scores))


def _empty_history(config: Config) -> xr.Dataset:
    shape = (config.iterations, config.epochs)
    coords = {"iteration": np.arange(config.iterations), "epoch": np.arange(1, config.epochs + 1)}
    return xr.Dataset({name: (("iteration", "epoch"), np.full(shape, np.nan)) for name in _SERIES}, coords)


def _restored_history(empty: xr.Dataset, saved: xr.Dataset) -> xr.Dataset:
    return empty.combine_first(saved[list(_SERIES)])


def _portable(spec: str) -> str:
    """A data set's name with its folder made absolute, so that the run can be analysed from anywhere."""
    name, _, path = spec.partition(":")
    return f"{name}:{Path(path).expanduser().resolve()}" if name == "imagefolder" and path else spec


def length(split: object) -> int:
    return len(split) if isinstance(split, Split) else 0


def _prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

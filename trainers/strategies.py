"""Sequences of fits: plain, persistent, partial and restart, into a run directory that can be resumed.

Iteration 0 is the plain training. ``persistent`` and ``partial`` train every further iteration from the same
initial point, repelled from all earlier end points; ``restart`` trains it from a fresh one, unrepelled. Batch order
and augmentation depend on the run's seed and the epoch alone in persistent runs, so that iterations differ by the
penalty and by nothing else; restarts draw their own.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from pnanalysis import schema
from pnanalysis.curvature.memory import human
from pnanalysis.data import Split, Splits, load_data
from pnanalysis.errors import DataError, PnError, RunError
from pnanalysis.models import build_model, parameter_layers
from pnanalysis.progress import progress_bar
from pnanalysis.runs import MANIFEST, Run, RunWriter, open_run
from pnanalysis.sources import resolve_device
from trainers.fit import Epoch, fit, optimizer_tensors
from trainers.manifest import describe, now
from trainers.models import initialise_normal
from trainers.persistence import PersistentPenalty, choose_layers
from trainers.recipes import RECIPES, Config, check_same
from trainers.seeds import derive_seed
from trainers.studies import RUNNERS

_SERIES = tuple(entry.name for entry in fields(Epoch) if entry.name != "epoch")
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
    data = load_data(config.data, _input_shape(config), config.split_seed)
    if not isinstance(data.train, Split):
        raise DataError(f"{config.data}: training needs tensors (inputs, targets), not a loader")
    session = _Session(config, data.to(torch_device), torch_device, save_interval)
    _check_disk(config, session.initial_model(0), Path(out))
    writer = _open_writer(config, session, Path(out), resume)
    total = (config.iterations - len(writer.manifest["ends"])) * config.epochs * len(data.train)
    try:
        with progress_bar(f"{config.recipe}/{config.strategy}", total, progress) as advance:
            session.run(writer, advance, progress and not sys.stderr.isatty())
    except PnError as error:
        writer.update(status="failed", failure=str(error))
        raise
    writer.update(status="finished", ended=now())
    writer.drop_state()
    return open_run(out)


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


class _Session:
    """The fits of one configuration on one device."""

    def __init__(self, config: Config, data: Splits, device: torch.device, save_interval: float) -> None:
        self.config, self.data, self.device, self.save_interval = config, data, device, save_interval
        self.layer_names = [name for name, _ in parameter_layers(self.initial_model(0))]
        self.layers = [draw_layers(config, i, self.layer_names) for i in range(config.iterations)]
        self.history = _empty_history(config)

    def initial_model(self, iteration: int) -> nn.Module:
        """The network at its starting point: w_ini, or a fresh one for restarts."""
        index = iteration if self.config.strategy == "restart" else 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.config.seed, "init", index))
            model = build_model(self.config.model, self.config.model_options)
            if self.config.init_std is not None:
                initialise_normal(model, self.config.init_std)
        return model

    def run(self, writer: RunWriter, advance: Callable[..., None], verbose: bool) -> None:
        state = writer.load_state()
        if writer.manifest["ends"] or state:
            self.history = _restored_history(self.history, open_run(writer.path).history)
        for iteration in range(len(writer.manifest["ends"]), self.config.iterations):
            here = state if state and state[1]["iteration"] == iteration else None
            self._iterate(writer, iteration, here, advance)
            if verbose:
                print(self._line(iteration), file=sys.stderr, flush=True)

    def _iterate(
        self,
        writer: RunWriter,
        iteration: int,
        state: tuple[dict[str, Tensor], dict[str, int]] | None,
        advance: Callable[..., None],
    ) -> None:
        config = self.config
        model = self.initial_model(iteration)
        if iteration == 0 or config.strategy == "restart":
            writer.save_checkpoint(iteration, 0, model.state_dict())
        start_epoch, optimizer_state = 0, None
        if state is not None:
            tensors, position = state
            start_epoch = position["epoch"]
            model.load_state_dict(_prefixed(tensors, "model."))
            optimizer_state = _prefixed(tensors, "optimizer.")
            advance(start_epoch * len(self.data.train))  # type: ignore[arg-type]
        model = model.to(self.device)
        recorder = _Recorder(self, writer, iteration, advance)
        data = self.data
        fit(
            model,
            data.train,  # type: ignore[arg-type]
            epochs=config.epochs,
            batch_size=config.batch_size,
            lr=config.lr,
            optimizer=config.optimizer,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            loss=config.loss,
            penalty=self._penalty(model, writer, iteration),
            validation=data.validation,  # type: ignore[arg-type]
            test=data.test,  # type: ignore[arg-type]
            augment=config.augment,
            seed=derive_seed(config.seed, "fit", iteration if config.strategy == "restart" else 0),
            amp=config.amp,
            compile=config.compile,
            start_epoch=start_epoch,
            optimizer_state=optimizer_state,
            on_epoch=recorder.on_epoch,
            on_batch=recorder.on_batch,
        )
        self._finish(writer, iteration)

    def _penalty(self, model: nn.Module, writer: RunWriter, iteration: int) -> PersistentPenalty | None:
        if iteration == 0 or self.config.strategy not in ("persistent", "partial"):
            return None
        origin = self.initial_model(0) if self.config.origin == "start" else None
        penalty = PersistentPenalty(
            model, self.config.lam, self.layers[iteration], form=self.config.penalty, origin=origin
        )
        for end in open_run(writer.path).ends:
            penalty.add(end.load())
        return penalty

    def _finish(self, writer: RunWriter, iteration: int) -> None:
        writer.save_history(self.dataset(writer))
        champion = _champion(self.history.isel(iteration=slice(iteration + 1)))
        writer.update(ends=[*writer.manifest["ends"], self.config.epochs], champion=champion)
        writer.save_history(self.dataset(writer))

    def dataset(self, writer: RunWriter) -> xr.Dataset:
        """The history so far, labelled."""
        champion = writer.manifest["champion"]
        return schema.finish(
            self.history, "history", run=writer.path.name, run_id=writer.manifest["id"], recipe=self.config.recipe,
            strategy=self.config.strategy, champion=champion, seed=self.config.seed, device=str(self.device),
            data=self.config.data, data_fingerprint=self.data.fingerprint, dtype="float32",
            n_validation=_length(self.data.validation), n_test=_length(self.data.test),
        )  # fmt: skip

    def _line(self, iteration: int) -> str:
        last = self.history.isel(iteration=iteration, epoch=-1)
        images_per_second = len(self.data.train) * self.config.epochs / float(self.history.seconds[iteration].sum())  # type: ignore[arg-type]
        return (
            f"{self.config.recipe} {self.config.strategy} iteration {iteration + 1}/{self.config.iterations}: "
            f"loss {float(last.train_loss):.4f}, validation error {float(last.validation_error):.2%}, "
            f"test error {float(last.test_error):.2%}, {images_per_second:,.0f} images/s"
        )


class _Recorder:
    """Writes one iteration's history, checkpoints and resume states as its epochs come in."""

    def __init__(self, session: _Session, writer: RunWriter, iteration: int, advance: Callable[..., None]) -> None:
        self.session, self.writer, self.iteration, self.advance = session, writer, iteration, advance
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
            self.writer.save_history(session.dataset(self.writer))
            tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
            tensors |= {f"optimizer.{name}": value for name, value in optimizer_tensors(optimizer).items()}
            self.writer.save_state(tensors, iteration=self.iteration, epoch=epoch)
            self.saved = time.monotonic()
        self.text = (
            f"iteration {self.iteration} epoch {epoch}: loss {record.train_loss:.3f}, "
            f"validation error {record.validation_error:.1%}"
        )


def _open_writer(config: Config, session: _Session, out: Path, resume: bool) -> RunWriter:
    if resume and (out / MANIFEST).is_file():
        writer = RunWriter(out, open_run(out).manifest)
        check_same(writer.manifest["config"], config, out)
        recorded = writer.manifest["data"]["fingerprint"]
        if recorded != session.data.fingerprint:
            raise DataError(f"{config.data}: has changed since {out} was begun; resume needs the same data")
        writer.update(status="running", config=config.to_dict(), layers=session.layers)
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


def _input_shape(config: Config) -> tuple[int, ...] | None:
    shape: tuple[int, ...] | None = getattr(build_model(config.model, config.model_options), "input_shape", None)
    return shape


def _portable(spec: str) -> str:
    """A data set's name with its folder made absolute, so that the run can be analysed from anywhere."""
    name, _, path = spec.partition(":")
    return f"{name}:{Path(path).expanduser().resolve()}" if name == "imagefolder" and path else spec


def _length(split: object) -> int:
    return len(split) if isinstance(split, Split) else 0


def _prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

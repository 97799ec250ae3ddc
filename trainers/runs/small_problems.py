"""The small problems S1 and S2 as run directories: a dataset next to the manifest, an end point for every iteration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from pnanalysis import schema
from pnanalysis.errors import TrainingError
from pnanalysis.inputs.data import downloads_allowed, load_data
from pnanalysis.inputs.sources import resolve_device
from pnanalysis.io import netcdf
from pnanalysis.io.runs import ANALYSIS, MANIFEST, Run, open_run
from pnanalysis.io.writer import RunWriter
from trainers.problems import basins, kink_ensemble, two_well
from trainers.problems.batched_relu import unpack
from trainers.problems.escape import escape
from trainers.recipes import Config, check_same
from trainers.runs.manifest import describe, mark_unfinished, now
from trainers.zoo.kink import kink_data

_SAMPLES = 500
_WIDTH = 32

State = dict[str, torch.Tensor]
#: ``(iteration, step) -> state dict`` of the network there.
StateAt = Callable[[int, int], State]
#: ``(config, out, device, resume, progress) -> Run``.
TrainProblem = Callable[[Config, Path, str, bool, bool], Run]


def train_two_well(config: Config, out: Path, device: str, resume: bool, progress: bool) -> Run:
    """S1: descents on the two-well surface, its penalised surfaces and the basins of the plain one."""
    record = _RunRecord(config, out, torch.device("cpu"), resume, "descent")
    settings: dict[str, Any] = {
        "iterations": config.iterations, "lr": config.lr, "steps": config.epochs, "samples": _SAMPLES,
    }  # fmt: skip
    with record.failures_marked():
        if config.strategy == "restart":
            ds = two_well.descend_restarts(seed=config.seed, **settings)
            record.save(ds)
        else:
            ds = two_well.descend(
                lam=config.lam, progress=progress, on_iteration=record.save, resume=record.saved, **settings
            )
            record.add("surface", two_well.surfaces(two_well.two_well, ds))
            record.add("basin", basins.basin_map())

        def state_at(iteration: int, step: int) -> State:
            return {"w": torch.tensor(ds.path.sel(iteration=iteration, step=step).values)}

        steps = ds.step.values
        return record.finish(
            losses=ds.value.values, steps=steps, champion=int(ds.champion), state_at=state_at,
            kept=steps[:: max(1, len(steps) // 50)],
        )  # fmt: skip


def train_kink(config: Config, out: Path, device: str, resume: bool, progress: bool) -> Run:
    """S2: one persistent chain, or as many re-initialisations, on the kink data."""
    torch_device = resolve_device(device)
    x, y = kink_data(config.data)
    record = _RunRecord(config, out, torch_device, resume, "ensemble")
    settings: dict[str, Any] = {
        "lr": config.lr, "momentum": config.momentum, "steps": config.epochs, "width": _WIDTH, "samples": _SAMPLES,
        "device": torch_device, "progress": progress, "on_iteration": record.save, "resume": record.saved,
    }  # fmt: skip
    with record.failures_marked():
        if config.strategy == "restart":  # all at once: here a member of the ensemble is an iteration of the run
            seeds = range(config.seed, config.seed + config.iterations)
            ds = kink_ensemble.train_restarts(x, y, seeds=seeds, iterations=1, **settings)
            trainings = ds.isel(iteration=0)
        else:
            ds = kink_ensemble.train_chains(
                x, y, seeds=[config.seed], lams=[config.lam], iterations=config.iterations, **settings
            )
            trainings = ds.isel(member=0)
            record.add("escape", escape(ds))

        def state_at(iteration: int, step: int) -> State:
            if step == 0:
                seed = config.seed + (iteration if config.strategy == "restart" else 0)
                return unpack(kink_ensemble.initial_parameters(seed, _WIDTH), _WIDTH)
            return unpack(torch.tensor(trainings.parameters.values[iteration], dtype=torch.float32), _WIDTH)

        losses = trainings.loss.values
        steps = ds.step.values
        return record.finish(
            losses=losses, steps=steps, champion=int(losses[:, -1].argmin()), state_at=state_at, kept=steps[[0, -1]]
        )


SMALL_PROBLEMS: dict[str, TrainProblem] = {"two-well": train_two_well, "kink": train_kink}


class _RunRecord:
    """Writes a run whose iterations are the rows of one dataset, saved after each of them."""

    def __init__(self, config: Config, out: Path, device: torch.device, resume: bool, kind: str) -> None:
        if config.strategy == "partial":
            raise TrainingError(f"{config.recipe} has no layers to choose from; use plain, persistent or restart")
        self.config, self.kind = config, kind
        self.saved: xr.Dataset | None = None
        if resume and (out / MANIFEST).is_file():
            self.writer = RunWriter(out, open_run(out).manifest)
            self.writer.lock()
            check_same(self.writer.manifest["config"], config, out)
            path = self._path(kind)
            self.saved = netcdf.load(path) if path.is_file() else None
            self.writer.update(status="running", failure=None, config=config.to_dict())
            return
        self.writer = RunWriter.create(out, describe(config, device, data=_data_entry(config)))

    @contextmanager
    def failures_marked(self) -> Iterator[None]:
        """Mark the run as failed, diverged or interrupted if the body does not finish; it can be resumed."""
        try:
            yield
        except BaseException as error:
            mark_unfinished(self.writer, error)
            raise
        finally:
            self.writer.release()

    def save(self, ds: xr.Dataset) -> None:
        """Save the dataset of the iterations so far."""
        self.add(self.kind, ds)

    def add(self, kind: str, ds: xr.Dataset) -> None:
        """Save another dataset of the run."""
        netcdf.save(ds, self._path(kind))

    def finish(self, losses: np.ndarray, steps: np.ndarray, champion: int, state_at: StateAt, kept: np.ndarray) -> Run:
        """Write history and checkpoints.

        Parameters
        ----------
        losses : ndarray, shape (iteration, step)
        steps : ndarray, shape (step,)
        champion : int
        state_at : callable
            ``state_at(iteration, step)`` is the state dict there.
        kept : ndarray
            Steps at which to keep a checkpoint; the first and the last are always kept.
        """
        config, writer = self.config, self.writer
        last = int(steps[-1])
        for iteration in range(len(losses)):
            # Persistent iterations start where iteration 0 did: its checkpoint serves them all.
            new_start = iteration == 0 or config.strategy == "restart"
            for step in sorted({*map(int, kept), 0, last} - (set() if new_start else {0})):
                writer.save_checkpoint(iteration, step, state_at(iteration, step))
        unknown = np.full((len(losses), len(steps) - 1), np.nan)
        series = dict.fromkeys(("penalty", "validation_error", "test_error"), unknown) | {"train_loss": losses[:, 1:]}
        history = xr.Dataset(
            {name: (("iteration", "epoch"), values) for name, values in series.items()},
            # History has no dim for steps: here its epochs are steps, and labelled so.
            coords={"iteration": np.arange(len(losses)), "epoch": ("epoch", steps[1:], {"long_name": "step"})},
        )
        labelled = schema.finish(
            history, "history", run=writer.path.name, run_id=writer.manifest["id"], recipe=config.recipe,
            strategy=config.strategy, champion=champion, seed=config.seed, data=config.data,
        )  # fmt: skip
        writer.save_history(labelled)
        writer.update(ends=[last] * len(losses), champion=champion, status="finished", ended=now())
        return open_run(writer.path)

    def _path(self, kind: str) -> Path:
        return self.writer.path / ANALYSIS / f"{kind}.nc"


def _data_entry(config: Config) -> dict[str, Any]:
    if not config.data:
        return {"name": "", "fingerprint": ""}
    with downloads_allowed():
        data = load_data(config.data).in_memory()
    return {"name": config.data, "fingerprint": data.fingerprint}

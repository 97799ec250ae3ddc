"""Curvature along the trainings of a run: a monitor for each, and one file of all of them in the run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import xarray as xr
from torch import nn

from pnanalysis import schema
from pnanalysis.errors import RunError
from pnanalysis.inputs.data import Split
from pnanalysis.io.datasets import load, save
from pnanalysis.io.runs import ANALYSIS
from pnanalysis.monitoring.monitor import CurvatureMonitor
from trainers.recipes import Config

#: How often to measure: every so many steps, or as often as the monitor's default cost allows.
Every = int | Literal["auto"]
#: The file's name, which is its kind.
_KIND = "curvature_monitor"
_SECONDS = "seconds_by_iteration"


class RunCurvature:
    """Measures along each iteration of a run, on its training examples without augmentation.

    Parameters
    ----------
    every : int or "auto"
    config : Config
    train : Split
    out : Path
        The run directory. Measurements that are there are kept, up to where the training resumes.

    Raises
    ------
    PnError
        If there is something else where they are saved.
    """

    def __init__(self, every: Every, config: Config, train: Split, out: Path) -> None:
        self.every, self.config, self.train = every, config, train
        self.path = out / ANALYSIS / f"{_KIND}.nc"
        self._done: dict[int, xr.Dataset] = {}
        if self.path.exists():
            self._done = _by_iteration(load(self.path, within=out), self.path)
        self._now: tuple[int, CurvatureMonitor] | None = None

    @contextmanager
    def watching(
        self, iteration: int, start_epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> Iterator[None]:
        """In the body, this iteration is trained, from the end of an epoch on."""
        config, before = self.config, self._done.get(iteration)
        every = None if self.every == "auto" else self.every
        monitor = CurvatureMonitor(
            model, optimizer, {"train": self.train}, config.loss, every=every, seed=max(config.seed, 0),
            first_step=start_epoch * -(-len(self.train) // config.batch_size),
        )  # fmt: skip
        if start_epoch and before is not None:
            monitor.resume(before)
        with monitor:
            self._now = iteration, monitor
            try:
                yield
            finally:
                self._done[iteration], self._now = monitor.dataset(), None

    def save(self, **attrs: Any) -> None:
        """Write what has been measured so far into the run."""
        found = dict(self._done)
        if self._now is not None:
            found[self._now[0]] = self._now[1].dataset()
        if not found:
            return
        last = found[max(found)].attrs
        ds = xr.concat(
            [found[i].drop_attrs(deep=False) for i in sorted(found)],
            xr.Variable("iteration", sorted(found)), join="outer", combine_attrs="drop", data_vars="all",
        )  # fmt: skip
        seconds = {i: float(one.attrs["training_seconds"]) for i, one in found.items()}
        measuring = sum(float(one.attrs.get("cost", 0.0)) * seconds[i] for i, one in found.items())
        total = sum(seconds.values())
        totals = {
            "training_seconds": total, "cost": measuring / total if total else None,
            "n_failed": sum(int(one.attrs.get("n_failed", 0)) for one in found.values()) or None,
            _SECONDS: {str(i): [seconds[i], float(one.attrs.get("cost", 0.0))] for i, one in found.items()},
        }  # fmt: skip
        own = {*totals, *schema.provenance(), "kind", "schema_version"}
        kept = {str(name): value for name, value in last.items() if name not in own}
        save(schema.finish(ds, _KIND, **{**kept, **totals, **attrs}), self.path)


def _by_iteration(ds: xr.Dataset, path: Path) -> dict[int, xr.Dataset]:
    """The measurements of each iteration, with what they took."""
    if ds.attrs.get("kind") != _KIND or "iteration" not in ds.dims:
        raise RunError(f"{path}: is not what pntrain --curvature saves; move it elsewhere")
    took = json.loads(ds.attrs.get(_SECONDS, "{}"))
    found = {}
    for i in ds.iteration.values.tolist():
        training, cost = took.get(str(i), (0.0, 0.0))
        one = ds.sel(iteration=i, drop=True)
        found[i] = one.sel(step=one.seconds.notnull()).assign_attrs(training_seconds=training, cost=cost)
        found[i].attrs.pop("n_failed", None)
    return found

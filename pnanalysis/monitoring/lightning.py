"""The curvature monitor as a callback of PyTorch Lightning, which has to be installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import xarray as xr
from torch import nn

from pnanalysis.errors import ModelError
from pnanalysis.inputs.data import DataLike
from pnanalysis.inputs.models import Loss
from pnanalysis.monitoring.monitor import CurvatureMonitor

#: Of the package that is installed; a Trainer takes those of its own only.
Callback: Any = import_module("lightning.pytorch" if find_spec("lightning") else "pytorch_lightning").Callback


class CurvatureCallback(Callback):
    """Record curvature while a ``lightning.Trainer`` fits: see :class:`pnanalysis.CurvatureMonitor`.

    Only the first process measures. Of several optimizers, which are taken to make as many steps each, the first is
    watched. A training that is resumed goes on after the measurements of its first part.

    Parameters
    ----------
    data, loss
        As for :class:`pnanalysis.CurvatureMonitor`.
    network : callable, optional
        The network of a module, ``lambda module: module.network``; the module itself by default.
    **options
        Of :class:`pnanalysis.CurvatureMonitor`.
    """

    def __init__(
        self,
        data: DataLike,
        loss: str | Loss = "cross_entropy",
        *,
        network: Callable[[nn.Module], nn.Module] | None = None,
        **options: Any,
    ) -> None:
        self.data, self.loss, self.network, self.options = data, loss, network, options
        self.monitor: CurvatureMonitor | None = None

    def dataset(self) -> xr.Dataset:
        """All measurements of the last fit.

        Raises
        ------
        ModelError
            If there are none.
        """
        if self.monitor is None:
            raise ModelError("nothing has been measured: no fit has begun with this callback in this process")
        return self.monitor.dataset()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        network = pl_module if self.network is None else self.network(pl_module)
        self.monitor = CurvatureMonitor(
            network, trainer.optimizers[0], self.data, self.loss,
            first_step=trainer.global_step // len(trainer.optimizers), **self.options,
        )  # fmt: skip
        self.monitor.__enter__()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.monitor is not None:
            self.monitor.__exit__(None, None, None)

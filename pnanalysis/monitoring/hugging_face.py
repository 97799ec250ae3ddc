"""The curvature monitor as a callback of the Trainer of transformers, which has to be installed."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import xarray as xr
from torch import Tensor, nn
from transformers import TrainerCallback

from pnanalysis.errors import ModelError
from pnanalysis.inputs.data import DataLike
from pnanalysis.inputs.models import Loss
from pnanalysis.monitoring.monitor import CurvatureMonitor


def own_loss(model: nn.Module, batch: tuple[Any, Any]) -> Tensor:
    """The loss that a model of transformers computes from a batch with labels."""
    loss: Tensor = model(**batch[0]).loss
    return loss


class CurvatureCallback(TrainerCallback):
    """Record curvature while a ``transformers.Trainer`` trains: see :class:`pnanalysis.CurvatureMonitor`.

    Only the first process measures. A training that is resumed goes on after the measurements of its first part.

    Parameters
    ----------
    data
        Batches with labels, such as a list of mappings, or ``trainer.get_train_dataloader()``.
    loss : str or callable
        That of the model by default.
    **options
        Of :class:`pnanalysis.CurvatureMonitor`.
    """

    def __init__(self, data: DataLike, loss: str | Loss = own_loss, **options: Any) -> None:
        self.data, self.loss, self.options = data, loss, options
        self.monitor: CurvatureMonitor | None = None
        self._hooks = ExitStack()

    def dataset(self) -> xr.Dataset:
        """All measurements of the last training.

        Raises
        ------
        ModelError
            If there are none.
        """
        if self.monitor is None:
            raise ModelError("nothing has been measured: no training has begun with this callback in this process")
        return self.monitor.dataset()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.monitor = CurvatureMonitor(
                kwargs["model"], kwargs["optimizer"], self.data, self.loss, first_step=state.global_step, **self.options
            )
            self.monitor.start()

    # watched from step to step: a training that is stopped by an error has no event that would end it
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.monitor is not None:
            self._hooks.enter_context(self.monitor.watching())

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hooks.close()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.monitor is not None:
            self.monitor.stop()

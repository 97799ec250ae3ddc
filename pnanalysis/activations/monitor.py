"""Saturation while a network trains: statistics of the training batches themselves, in any training loop."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import xarray as xr
from torch import Tensor, nn

from pnanalysis import schema
from pnanalysis.activations.axis_tracker import Known
from pnanalysis.activations.functions import Activation
from pnanalysis.activations.hooks import no_activations, watch_activations
from pnanalysis.activations.quantile_sketch import RELATIVE_ERROR
from pnanalysis.activations.statistics import (
    MARGIN,
    PERCENTILES,
    LayerActivity,
    Measures,
    common_range,
    to_dataset,
    warn_of_unknown,
)
from pnanalysis.checks import ascending, at_least
from pnanalysis.errors import ModelError

_EXACT_LIMIT = 65_536  # numbers; sorting more would cost more than the sketch


class SaturationMonitor:
    """Record the saturation of a network's activations during training, without additional forward passes.

    Every ``every``-th forward pass in training mode is watched: some examples of its batch give the same statistics as
    :func:`pnanalysis.saturation`. Other passes cost one Python call; only the end of a watched pass waits for the
    device. Passes in ``eval`` mode are neither counted nor watched.

    Works with plain modules and with the result of ``torch.compile(module)`` (pass the compiled module; its watched
    passes run uncompiled), on any device, under autocast, and for activations that are called as functions. It does
    not see into the replicas of ``DataParallel``, and refuses scripted modules.

    Parameters
    ----------
    model : torch.nn.Module
        The module that the loop calls; examples lie along the first dim of its batches.
    every : int
        Number of training passes from one record to the next; the first pass is recorded.
    n_examples : int or None
        How many examples of a batch to use, the first ones; all if ``None``.
    percentiles, bins, saturation_bins, per_unit
        As for :func:`pnanalysis.saturation`.
    bin_range : (float, float), optional
        Range of the histograms. By default from asymptote to asymptote, and for unbounded activations four times the
        range in the first record.

    Examples
    --------
    In a plain loop:

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with SaturationMonitor(model, every=10) as monitor:
    ...     for _ in range(30):
    ...         optimiser.zero_grad()
    ...         model(torch.randn(16, 2)).square().mean().backward()
    ...         optimiser.step()
    >>> ds = monitor.dataset()
    >>> ds.step.values.tolist(), ds.saturation_measure.dims
    ([0, 10, 20], ('step', 'layer'))

    ``pn.plots.plot(ds)`` draws it, and ``pn.save(ds, "saturation.nc")`` saves it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 50,
        n_examples: int | None = 64,
        percentiles: Sequence[float] = PERCENTILES,
        bins: int = 100,
        bin_range: tuple[float, float] | None = None,
        saturation_bins: int = 10,
        per_unit: bool = False,
    ) -> None:
        at_least(1, every=every, n_examples=n_examples)
        ascending("bin_range", bin_range, 2)
        self.model = model
        self.every = every
        self.n_examples = n_examples
        self.step = 0
        self._measures = Measures(tuple(percentiles), bins, saturation_bins, per_unit, _EXACT_LIMIT)
        self._bin_range = bin_range
        self._inner: nn.Module = getattr(model, "_orig_mod", model)  # of a compiled module
        self._seen: list[tuple[str, Activation, Tensor, Known]] = []
        self._records: list[xr.Dataset] = []
        self._hooks = ExitStack()
        self._watch = ExitStack()
        self._watching = False

    def __enter__(self) -> SaturationMonitor:
        self._hooks.callback(self.model.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        self._hooks.callback(self.model.register_forward_hook(self._end, always_call=True).remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()
        self._watch.close()

    def dataset(self) -> xr.Dataset:
        """All records so far: kind ``saturation``, along ``step`` (training passes, from 0).

        Raises
        ------
        ModelError
            If no training pass was recorded, or the activation layers differ between records.
        """
        if not self._records:
            raise ModelError(
                f"no training pass of this {type(self._inner).__name__} was seen; call the model that the monitor was "
                "given (the compiled one, if it is compiled), in training mode, within the monitor's `with`"
            )
        layers = {tuple(record.layer.values) for record in self._records}
        if len(layers) > 1:
            raise ModelError(
                "the network called different activation layers in different steps; monitor a module that always calls "
                "the same ones"
            )
        ds = xr.concat(self._records, dim="step", combine_attrs="drop")
        exact = all(record.attrs["exact"] for record in self._records)
        return schema.finish(
            ds.drop_attrs(deep=False), "saturation", model=type(self._inner).__name__, split="training batches",
            n=self.n_examples, every=self.every, margin=MARGIN, saturation_bins=self._measures.saturation_bins,
            relative_error=0.0 if exact else RELATIVE_ERROR, dtype="float32",
        )  # fmt: skip

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not module.training:
            return
        if self.step % self.every == 0:
            self._watching = True
            self._watch.enter_context(watch_activations(self._inner, self._observe, (args, kwargs)))
        self.step += 1

    def _observe(self, name: str, activation: Activation, values: Tensor, known: Known) -> None:
        # a copy, since the network may overwrite its tensor in place before the pass ends
        part = values.detach()[: self.n_examples if known.examples else None]
        self._seen.append((name, activation, part.clone(), known))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._watching:
            return
        self._watching = False
        self._watch.close()
        seen, self._seen = self._seen, []
        if output is None:  # the forward pass raised an error
            return
        if not seen:
            raise no_activations(self._inner)
        if self._bin_range is None:
            self._bin_range = _wide_range(seen)
        layers: dict[str, LayerActivity] = {}
        for name, activation, values, known in seen:
            layers[name] = LayerActivity(activation, self._measures, self._bin_range)
            layers[name].add(values, known)
        record = to_dataset(layers)
        if not self._records:
            warn_of_unknown([record], stacklevel=2)
        self._records.append(record.assign_coords(step=self.step - 1))


def _wide_range(seen: list[tuple[str, Activation, Tensor, Known]]) -> tuple[float, float]:
    """The bins' range: between asymptotes, or four times that of unbounded activations, which grow in training."""
    extremes = [(activation, 4 * float(values.min()), 4 * float(values.max())) for _, activation, values, _ in seen]
    # With zero inside, four times the extremes is always a wider range.
    return common_range([(activation, min(low, 0.0), max(high, 0.0)) for activation, low, high in extremes])

"""Activation saturation: percentiles and histograms of every activation, layer by layer (the paper's section 5)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from pnanalysis import schema
from pnanalysis.activations import Activation, watch_activations
from pnanalysis.data import LoaderSplit, Split
from pnanalysis.errors import ModelError
from pnanalysis.progress import progress_bar
from pnanalysis.quantiles import RELATIVE_ERROR, QuantileSketch
from pnanalysis.runs import Checkpoint, Run
from pnanalysis.sources import Source, as_source, resolve_device

PERCENTILES = (2.0, 25.0, 50.0, 75.0, 98.0)
MARGIN = 0.05


def saturation(
    *runs: Run | Source,
    checkpoints: Sequence[str] = ("all",),
    split: str = "validation",
    n: int | None = 1000,
    percentiles: Sequence[float] = PERCENTILES,
    bins: int = 100,
    batch_size: int = 500,
    exact_limit: int = 4_000_000,
    device: str | None = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Percentiles and histograms of every activation at every checkpoint.

    Parameters
    ----------
    *runs : Run or Source
        Runs, or a user's own model and weights (:func:`pnanalysis.sources.open_files`). Several are laid side by
        side along ``run``.
    checkpoints : sequence of str
        See :meth:`pnanalysis.runs.Run.select`.
    split : {"validation", "train", "test"}
        Images to look at. Data sets without that split fall back to ``train``.
    n : int or None
        How many, drawn by ``seed``; all if ``None`` or if there are fewer.
    percentiles : sequence of float
        In percent; of the signed activations and of their absolute values.
    bins : int
        Of the histograms. Bounded activations are binned between their asymptotes, others over the range that the
        first checkpoint shows.
    exact_limit : int
        Up to so many numbers a layer, percentiles are exact; beyond, relative error at most 2^-9 (see
        :class:`pnanalysis.quantiles.QuantileSketch`).
    device : str or None
    progress : bool

    Returns
    -------
    xarray.Dataset
        Kind ``saturation``; dims (iteration, epoch, layer, quantile) and (..., bin) for a run, (checkpoint, ...) for a
        user's own weights. Where an iteration has no checkpoint at an epoch, NaN.

    Raises
    ------
    ModelError
        If the network has no activation functions, or networks of different layers are mixed.

    References
    ----------
    X. Glorot, Y. Bengio, "Understanding the difficulty of training deep feedforward neural networks", AISTATS 2010.
    Y. Min, "Persistent Neurons", arXiv:2007.01419, fig. 14 and 15.
    """
    sources = [as_source(run) for run in runs]
    chosen = [(source, checkpoint) for source in sources for checkpoint in source.select(checkpoints).values()]
    torch_device = resolve_device(device)
    edges: NDArray[np.float64] | None = None
    results: dict[str, dict[Checkpoint, xr.Dataset]] = {source.label: {} for source in sources}
    size = 0
    with progress_bar("saturation", len(chosen), progress) as advance:
        for source, checkpoint in chosen:
            part = _examples(source, split, n, seed, torch_device)
            size = len(part) if isinstance(part, Split) else n or 0
            layers = _observe(source.model(checkpoint, torch_device), part, batch_size, exact_limit)
            if edges is None:
                edges = _edges(layers.values(), bins)
            results[source.label][checkpoint] = _measure(layers, percentiles, edges)
            advance(text=checkpoint.name)
    exact = all(part.attrs.pop("exact") for parts in results.values() for part in parts.values())
    arranged = [_arrange(parts) for parts in results.values()]
    ds = (
        arranged[0]
        if len(arranged) == 1
        else xr.concat(arranged, dim="run", join="outer").assign_coords(run=list(results))
    )
    first = sources[0]
    return schema.finish(
        ds, "saturation", **first.dataset_attrs(), split=split, n=size, seed=seed, device=str(torch_device),
        dtype="float32", margin=MARGIN, relative_error=0.0 if exact else RELATIVE_ERROR,
        champion=None if first.run is None else first.run.manifest["champion"],
    )  # fmt: skip


def _examples(source: Source, split: str, n: int | None, seed: int, device: torch.device) -> Split | LoaderSplit:
    """``n`` examples of the split, or of the training data where there is no such split; fewer if there are fewer."""
    part = source.data.get(split if getattr(source.data, split, None) is not None else "train")
    if n is not None and isinstance(part, Split):
        n = min(n, len(part))
    return part.subset(n, seed).to(device)


@dataclass
class _Layer:
    """What is known of one activation after a pass over the data."""

    activation: Activation
    sketch: QuantileSketch
    total: float = 0.0
    squares: float = 0.0
    saturated: float = 0.0
    low: float = inf
    high: float = -inf
    _sums: list[Tensor] = field(default_factory=list)

    def add(self, values: Tensor) -> None:
        values = values.detach().float()
        self.sketch.add(values)
        near = torch.zeros_like(values, dtype=torch.bool)
        for asymptote in (self.activation.low, self.activation.high):
            if isfinite(asymptote):
                near |= (values - asymptote).abs() <= MARGIN
        parts = [values.sum(dtype=torch.float64), values.double().square().sum(), near.sum().double()]
        self._sums.append(torch.stack([*parts, values.min().double(), values.max().double()]))

    def close(self) -> None:
        table = torch.stack(self._sums).cpu()
        self.total, self.squares, self.saturated = table[:, :3].sum(0).tolist()
        self.low, self.high = float(table[:, 3].min()), float(table[:, 4].max())


def _observe(model: nn.Module, part: Split | LoaderSplit, batch_size: int, exact_limit: int) -> dict[str, _Layer]:
    layers: dict[str, _Layer] = {}

    def observe(name: str, activation: Activation, output: Tensor) -> None:
        if name not in layers:
            layers[name] = _Layer(activation, QuantileSketch(exact_limit))
        layers[name].add(output)

    with torch.no_grad(), watch_activations(model, observe):
        for inputs, _ in part.batches(batch_size):
            model(inputs)
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no activation functions that are known here (tanh, sigmoid, the ReLU family, "
            "GELU, SiLU...); saturation has nothing to measure"
        )
    for layer in layers.values():
        layer.close()
    return layers


def _edges(layers: Iterable[_Layer], bins: int) -> NDArray[np.float64]:
    lows, highs = [], []
    for layer in layers:
        lows.append(layer.activation.low if isfinite(layer.activation.low) else layer.low)
        highs.append(layer.activation.high if isfinite(layer.activation.high) else layer.high)
    low, high = min(lows), max(highs)
    return np.linspace(low, high if high > low else low + 1.0, bins + 1)


def _measure(layers: dict[str, _Layer], percentiles: Sequence[float], edges: NDArray[np.float64]) -> xr.Dataset:
    levels = np.asarray(percentiles, dtype=np.float64)
    count = np.array([layer.sketch.count for layer in layers.values()], dtype=np.float64)
    mean = np.array([layer.total for layer in layers.values()]) / count
    square = np.array([layer.squares for layer in layers.values()]) / count
    bounded = [isfinite(layer.activation.low) or isfinite(layer.activation.high) for layer in layers.values()]
    share = np.array([layer.saturated for layer in layers.values()]) / count
    sketches = [layer.sketch for layer in layers.values()]
    return xr.Dataset(
        {
            "percentile": (("layer", "quantile"), np.stack([s.quantiles(levels / 100) for s in sketches])),
            "abs_percentile": (("layer", "quantile"), np.stack([s.quantiles(levels / 100, True) for s in sketches])),
            "histogram": (("layer", "bin"), np.stack([s.histogram(edges) for s in sketches])),
            "mean": (("layer",), mean),
            "std": (("layer",), np.sqrt(np.maximum(square - mean**2, 0.0))),
            "saturated_share": (("layer",), np.where(bounded, share, np.nan)),
        },
        coords={
            "layer": list(layers),
            "activation": ("layer", [layer.activation.name for layer in layers.values()]),
            "quantile": ("quantile", levels, {"units": "%", "long_name": "percentile"}),
            "bin": ("bin", (edges[:-1] + edges[1:]) / 2, {"units": "1", "long_name": "activation"}),
        },
        attrs={"exact": all(sketch.exact for sketch in sketches)},
    )


def _arrange(results: dict[Checkpoint, xr.Dataset]) -> xr.Dataset:
    """Stack checkpoints into iteration x epoch, or along ``checkpoint`` where they belong to no run."""
    parts = list(results.values())
    layers = [tuple(part.layer.values) for part in parts]
    if len(set(layers)) > 1:
        raise ModelError("the checkpoints are of networks with different activation layers; compare one kind at a time")
    stacked = xr.concat(parts, dim="checkpoint")
    if any(checkpoint.iteration < 0 for checkpoint in results):
        stacked = stacked.assign_coords(checkpoint=[checkpoint.name for checkpoint in results])
    else:
        index = {
            "iteration": ("checkpoint", [checkpoint.iteration for checkpoint in results]),
            "epoch": ("checkpoint", [checkpoint.epoch for checkpoint in results]),
        }
        stacked = stacked.assign_coords(index).set_index(checkpoint=("iteration", "epoch")).unstack("checkpoint")
        own = {name: [d for d in array.dims if d not in ("iteration", "epoch")] for name, array in stacked.items()}
        for name, dims in own.items():
            stacked[name] = stacked[name].transpose("iteration", "epoch", *dims)
    return stacked

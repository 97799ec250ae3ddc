"""Activation saturation: percentiles, histograms, saturation and dead units, layer by layer (the paper's section 5)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
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
from pnanalysis.checks import ascending, at_least, check_seed, one_of
from pnanalysis.errors import DataError, ModelError, RunError
from pnanalysis.evaluation.diagnosis import clear_errors
from pnanalysis.evaluation.forward import forward
from pnanalysis.evaluation.randomness import check_repeatable
from pnanalysis.inputs.batches import batch_size as size_of
from pnanalysis.inputs.batches import first_examples, move
from pnanalysis.inputs.copies import in_precision
from pnanalysis.inputs.data import SPLITS, Batch, DataLike, LoaderSplit, Split
from pnanalysis.inputs.models import ModelLike
from pnanalysis.inputs.selection import Given, SelectedCheckpoint, Selection, select
from pnanalysis.inputs.sources import Source, resolve_device
from pnanalysis.terminal.progress import progress_bar

_N_FOR_RANGE = 64  # examples that the range of unbounded activations is taken from


def saturation(
    *given: Given,
    model: ModelLike | None = None,
    data: DataLike | None = None,
    checkpoints: Sequence[str] = ("all",),
    split: str = "validation",
    n: int | None = 1000,
    percentiles: Sequence[float] = PERCENTILES,
    bins: int = 100,
    bin_range: tuple[float, float] | None = None,
    saturation_bins: int = 10,
    per_unit: bool = False,
    batch_size: int = 500,
    exact_limit: int = 4_000_000,
    device: str | None = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    r"""Percentiles, histograms, saturation and dead units of every activation at every checkpoint.

    One pass over the examples per checkpoint, in memory that does not grow with their number.

    Parameters
    ----------
    *given, model, data
        See :func:`pnanalysis.hessian`. Several runs lie side by side along ``run``.
    checkpoints : sequence of str
        See :meth:`pnanalysis.io.runs.Run.select`; all by default.
    split : {"validation", "train", "test"}
        The examples; of data without that split, ``train``. The dataset says which it was.
    n : int or None
        How many, drawn by ``seed``; all if ``None`` or if there are fewer.
    percentiles : sequence of float
        In percent; of the signed activations and of their absolute values.
    bins : int
        Number of histogram bins, over one range for all layers.
    bin_range : (float, float), optional
        That range. By default it contains the asymptotes of bounded activations, and for others the outputs for some
        images at every checkpoint; numbers outside count in a histogram's total only.
    saturation_bins : int
        Of the saturation measure, B below.
    per_unit : bool
        Also give ``unit_saturated_share``, ``unit_saturation_measure`` and ``unit_dead``, dims (..., layer, unit), NaN
        beyond a layer's own units. A unit is a channel of a convolution, or a feature of a linear layer, on whatever
        axis it is when the activation is called.
    exact_limit : int
        Percentiles are exact up to this many numbers per layer; beyond, their relative error is at most 2^-9 (see
        :class:`pnanalysis.activations.quantile_sketch.QuantileSketch`).
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
        If the network has no activation functions, parts of it are scripted (``torch.jit``), which hides them, or
        networks of different layers are mixed.
    PnError
        If a percentile lies outside 0 to 100, or there are no bins.

    Notes
    -----
    ``saturation_measure`` is :math:`\varphi_B = \sum_b |\bar g_b| f_b / \sum_b f_b`: the range between the two
    asymptotes is cut into B equal bins, :math:`f_b` counts the activations in a bin and :math:`\bar g_b` is their mean,
    scaled so that the asymptotes lie at -1 and 1. It is 0 for activations half-way between the asymptotes, 1/2 for
    uniform and 1 for saturated ones, and NaN for activations without two asymptotes. Bins on one side of the middle
    share their sign, so an even B gives the mean absolute scaled signal whatever B is.

    ``saturated_share`` is the fraction of activations within 0.05 of an asymptote. A unit is dead if no image moves it:
    the output of a rectifier (the ReLU family, GELU, SiLU...) never exceeds zero, that of another activation is always
    within 0.05 of an asymptote. A unit that is dead over n images is active for less than a fraction 3/n of all
    images, with 95 % confidence.

    The axes of units and of examples are followed from the layers and inputs through every operation
    (:mod:`pnanalysis.activations.axis_tracker`). Where one of them is lost, a warning names the activation, and what
    depends on it is NaN: ``dead_units``, ``n_units`` and all that is per unit, or the standard errors. Units of
    different layers that are stacked are unknown, too. Positions that a mask pads count like any other, since the
    network computes them. Of a layer with activations that are NaN nothing is known, and a warning names it.

    An activation function inside a module that is one itself (tanh in a GELU, sigmoid in a Swish;
    :func:`pnanalysis.activations.hooks.composite`) is not counted on its own: the output of the module is.

    What a fused operation applies within itself, such as the tanh and the gates of ``nn.RNN``, ``nn.LSTM`` and
    ``nn.GRU``, is not seen.

    Networks in double precision are computed in it, and so are means and standard deviations; percentiles,
    histograms and saturation are of numbers rounded to single precision. Others are computed in single precision.

    Every ``*_se`` is a standard error over images: activations of one image are dependent, so means, fractions and
    histograms get the error of per-image sums, and percentiles Woodruff's with the design effect of the images
    (:mod:`pnanalysis.activations.cluster_errors`).

    References
    ----------
    X. Glorot, Y. Bengio, "Understanding the difficulty of training deep feedforward neural networks", AISTATS 2010.
    A. Rakitianskaia, A. Engelbrecht, "Measuring saturation in neural networks", IEEE SSCI 2015.
    Y. Min, "Persistent Neurons", arXiv:2007.01419, fig. 14 and 15.
    """
    at_least(1, n=n, batch_size=batch_size)
    at_least(0, exact_limit=exact_limit)
    check_seed(seed=seed)
    one_of(SPLITS, split=split)
    ascending("bin_range", bin_range, 2)
    measures = Measures(tuple(percentiles), bins, saturation_bins, per_unit, exact_limit)
    selection, torch_device = select(given, checkpoints, model=model, data=data), resolve_device(device)
    if len({source.run is None for source in selection.sources}) > 1:
        raise RunError("runs lie along iterations and epochs, networks do not: look at them one after the other")
    parts = {source.label: examples_of(selection, source, split, n, seed, torch_device) for source in selection.sources}
    if bin_range is None:
        bin_range = _bin_range(selection, parts, torch_device)
    found: dict[tuple[str, object], xr.Dataset] = {}
    dtypes: set[torch.dtype] = set()
    with progress_bar("saturation", len(selection.distinct()), progress) as advance:
        for item in selection.distinct():
            network, part = _network(selection, item, torch_device), parts[item.source.label]
            dtypes.add(_dtype(network))
            with clear_errors(item.origin, network, part.stream(2)):
                found[item.key] = network_saturation(network, part.stream(batch_size), measures, bin_range)
            advance(text=item.checkpoint.name)
    warn_of_unknown(found.values(), stacklevel=2)
    exact, size = all(ds.attrs["exact"] for ds in found.values()), next(iter(found.values())).attrs["n"]
    arranged = {
        source.label: _arrange([(item, found[item.key]) for item in selection if item.source is source])
        for source in selection.sources
    }
    if len(arranged) == 1:
        ds = next(iter(arranged.values()))
    else:
        ds = xr.concat(arranged.values(), dim="run", join="outer").assign_coords(run=list(arranged))
    runs = [source.run for source in selection.sources]
    if len(runs) > 1 and None not in runs:
        ds = ds.assign_coords(champion=("run", [run.manifest["champion"] for run in runs if run is not None]))
    precision = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return schema.finish(
        ds.drop_attrs(deep=False), "saturation", **selection.sources[0].dataset_attrs(),
        split=" and ".join(sorted({_there(source, split) for source in selection.sources})), n=size,
        seed=seed, device=str(torch_device), dtype=precision, margin=MARGIN, saturation_bins=saturation_bins,
        relative_error=0.0 if exact else RELATIVE_ERROR,
        champion=None if runs[0] is None else runs[0].manifest["champion"],
    )  # fmt: skip


def network_saturation(
    network: nn.Module, batches: Iterable[Batch], measures: Measures, bin_range: tuple[float, float]
) -> xr.Dataset:
    """Saturation of one network over batches in memory, dims ``layer``, ``quantile`` and ``bin``.

    Parameters
    ----------
    network : Module
        In eval mode.
    batches : iterable of (inputs, targets)
        On the network's device; targets play no part.
    measures : Measures
    bin_range : (float, float)
        Of the histograms; see :func:`pnanalysis.activations.statistics.common_range`.

    Raises
    ------
    ModelError
        If the network has no activation functions that are known.
    """
    layers: dict[str, LayerActivity] = {}

    def observe(name: str, activation: Activation, values: Tensor, known: Known) -> None:
        if name not in layers:
            layers[name] = LayerActivity(activation, measures, bin_range)
        layers[name].add(values, known)

    batches = _tried(network, batches)
    with watch_activations(network, observe):
        n = _run(network, batches)
    if not layers:
        raise no_activations(network)
    return to_dataset(layers).assign_attrs(n=n)


def activation_ranges(network: nn.Module, inputs: Any) -> list[tuple[Activation, float, float]]:
    """Each activation of a network, and the range of its outputs for some inputs."""
    ranges: list[tuple[Activation, float, float]] = []

    def observe(name: str, activation: Activation, values: Tensor, known: Known) -> None:
        ranges.append((activation, float(values.min()), float(values.max())))

    batches = _tried(network, [(inputs, None)])
    with watch_activations(network, observe):
        _run(network, batches)
    if not ranges:
        raise no_activations(network)
    return ranges


def _network(selection: Selection, item: SelectedCheckpoint, device: torch.device, last: bool = True) -> nn.Module:
    """A network of the analysis's own: double precision stays, anything else is computed in single precision."""
    network = selection.network(item, device, last=last)
    return in_precision(network, _dtype(network))


def _dtype(network: nn.Module) -> torch.dtype:
    double = any(weight.dtype in (torch.float64, torch.complex128) for weight in network.parameters())
    return torch.float64 if double else torch.float32


@torch.no_grad()
def _tried(network: nn.Module, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, after passes over a few examples, which show whether the network takes gradients itself, or draws.

    Raises
    ------
    DataError
        If there are no examples.
    ModelError
        If the network draws at random.
    """
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise DataError("there are no examples to compute activations of; give data that are not empty")
    few = first_examples(first, 2)
    check_repeatable(f"this {type(network).__name__}", network, (_moved(network, few[0]), few[1]))
    return chain([first], rest)


@torch.no_grad()
def _run(network: nn.Module, batches: Iterable[Batch]) -> int:
    """Forward passes, and how many examples there are."""
    n = 0
    for inputs, targets in batches:
        forward(network, _moved(network, inputs))
        n += size_of((inputs, targets))
    return n


def _moved(network: nn.Module, inputs: Any) -> Any:
    """Inputs in the precision of the network, on its device."""
    weight = next(network.parameters(), None)
    return inputs if weight is None else move(inputs, weight.device, _dtype(network))


def examples_of(
    selection: Selection, source: Source, split: str, n: int | None, seed: int, device: torch.device
) -> Split | LoaderSplit:
    """Examples of the split, or of the training data where there is no such split."""
    return selection.split(source, _there(source, split), n, seed, device)


def _there(source: Source, split: str) -> str:
    """The split that a source's data have."""
    return split if getattr(source.data, split) is not None else "train"


def _bin_range(
    selection: Selection, parts: dict[str, Split | LoaderSplit], device: torch.device
) -> tuple[float, float]:
    """One range for the histograms of all checkpoints, from a few examples."""
    ranges: list[tuple[Activation, float, float]] = []
    bounded: set[str] = set()  # runs whose networks have asymptotes only, which are the range at every checkpoint
    for item in selection.distinct():
        if item.source.label in bounded:
            continue
        network = _network(selection, item, device, last=False)
        inputs, _ = next(iter(parts[item.source.label].stream(_N_FOR_RANGE)), (None, None))
        if inputs is None:
            raise DataError("there are no examples to compute activations of; give data that are not empty")
        with clear_errors(item.origin, network, [(inputs, inputs)]):
            own = activation_ranges(network, inputs)
        ranges += own
        if item.source.run is not None and all(activation.bounded for activation, _, _ in own):
            bounded.add(item.source.label)
    return common_range(ranges)


def _arrange(rows: Sequence[tuple[SelectedCheckpoint, xr.Dataset]]) -> xr.Dataset:
    """Stack checkpoints into iteration x epoch, or along ``checkpoint`` where they belong to no run."""
    if any(item.checkpoint.iteration >= 0 for item, _ in rows):  # plain may be the champion: one place in the table
        rows = list({item.checkpoint.identity: (item, ds) for item, ds in rows}.values())
    parts, checkpoints = [ds for _, ds in rows], [item.checkpoint for item, _ in rows]
    if len({tuple(part.layer.values) for part in parts}) > 1:
        raise ModelError("the checkpoints are of networks with different activation layers; compare one kind at a time")
    stacked = xr.concat(parts, dim="checkpoint")
    if any(checkpoint.iteration < 0 for checkpoint in checkpoints):
        return stacked.assign_coords(checkpoint=[checkpoint.name for checkpoint in checkpoints])
    index = {
        "iteration": ("checkpoint", [checkpoint.iteration for checkpoint in checkpoints]),
        "epoch": ("checkpoint", [checkpoint.epoch for checkpoint in checkpoints]),
    }
    stacked = stacked.assign_coords(index).set_index(checkpoint=("iteration", "epoch")).unstack("checkpoint")
    own = {name: [d for d in array.dims if d not in ("iteration", "epoch")] for name, array in stacked.items()}
    for name, dims in own.items():
        stacked[name] = stacked[name].transpose("iteration", "epoch", *dims)
    return stacked

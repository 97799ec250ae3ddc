"""Activation saturation: percentiles, histograms, saturation and dead units, layer by layer (the paper's section 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xarray as xr
from torch import Tensor, nn

from pnanalysis import schema
from pnanalysis.activations.hooks import Activation, no_activations, watch_activations
from pnanalysis.activations.quantile_sketch import RELATIVE_ERROR
from pnanalysis.activations.statistics import MARGIN, PERCENTILES, LayerActivity, Measures, common_range, to_dataset
from pnanalysis.checks import ascending, at_least, one_of
from pnanalysis.errors import ModelError, RunError
from pnanalysis.evaluation.diagnosis import clear_errors
from pnanalysis.evaluation.forward import forward
from pnanalysis.inputs.data import SPLITS, LoaderSplit, Split
from pnanalysis.inputs.sources import Source, as_sources, resolve_device
from pnanalysis.io.runs import Checkpoint, Run
from pnanalysis.terminal.progress import progress_bar

_PROBED = 64  # examples that the range of unbounded activations is taken from


def saturation(
    *runs: Run | Source,
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

    One pass over the images a checkpoint, in memory that does not grow with their number.

    Parameters
    ----------
    *runs : Run or Source
        Runs, or a user's own model and weights (:func:`pnanalysis.inputs.sources.open_files`). Several are laid side by
        side along ``run``.
    checkpoints : sequence of str
        See :meth:`pnanalysis.io.runs.Run.select`.
    split : {"validation", "train", "test"}
        Images to look at. Data sets without that split fall back to ``train``.
    n : int or None
        How many, drawn by ``seed``; all if ``None`` or if there are fewer.
    percentiles : sequence of float
        In percent; of the signed activations and of their absolute values.
    bins : int
        Of the histograms, which share one range.
    bin_range : (float, float), optional
        That range. By default it holds the asymptotes of bounded activations, and for others what some images show at
        any of the checkpoints; numbers outside count in a histogram's total only.
    saturation_bins : int
        Of the saturation measure, B below.
    per_unit : bool
        Give ``unit_saturated_share``, ``unit_saturation_measure`` and ``unit_dead`` too, dims (..., layer, unit), NaN
        beyond a layer's own units. A unit is a channel of a convolution, or a feature of a linear layer.
    exact_limit : int
        Up to so many numbers a layer, percentiles are exact; beyond, relative error at most 2^-9 (see
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
        If the network has no activation functions, or networks of different layers are mixed.
    PnError
        If a percentile lies outside 0 to 100, or there are no bins.

    Notes
    -----
    ``saturation_measure`` is :math:`\varphi_B = \sum_b |\bar g_b| f_b / \sum_b f_b`: the range between the two
    asymptotes is cut into B equal bins, :math:`f_b` counts the activations in a bin and :math:`\bar g_b` is their mean,
    scaled so that the asymptotes lie at -1 and 1. It is 0 for activations half-way between the asymptotes, 1/2 for
    uniform and 1 for saturated ones, and NaN for activations without two asymptotes. Bins on one side of the middle
    share their sign, so an even B gives the mean absolute scaled signal whatever B is.

    ``saturated_share`` is the share of activations within 0.05 of an asymptote. A unit is dead if no image moves it:
    the output of a rectifier (the ReLU family, GELU, SiLU...) never exceeds zero, that of another activation is always
    within 0.05 of an asymptote. A unit that is called dead over n images is active for less than a share 3/n of all
    images, with 95 % confidence.

    Every ``*_se`` is a standard error over images: activations of one image are dependent, so means, shares and
    histograms get the error of per-image sums, and percentiles Woodruff's with the design effect of the images
    (:mod:`pnanalysis.activations.cluster_errors`).

    References
    ----------
    X. Glorot, Y. Bengio, "Understanding the difficulty of training deep feedforward neural networks", AISTATS 2010.
    A. Rakitianskaia, A. Engelbrecht, "Measuring saturation in neural networks", IEEE SSCI 2015.
    Y. Min, "Persistent Neurons", arXiv:2007.01419, fig. 14 and 15.
    """
    at_least(1, n=n, batch_size=batch_size)
    at_least(0, exact_limit=exact_limit, seed=seed)
    one_of(SPLITS, split=split)
    ascending("bin_range", bin_range, 2)
    measures = Measures(tuple(percentiles), bins, saturation_bins, per_unit, exact_limit)
    sources = as_sources(runs)
    if not sources:
        raise RunError("name a run, or your own model and weights")
    chosen = [(source, checkpoint) for source in sources for checkpoint in source.select(checkpoints).values()]
    torch_device = resolve_device(device)
    parts = {source.label: _examples(source, split, n, seed, torch_device) for source in sources}
    if bin_range is None:
        bin_range = _range(chosen, parts, torch_device)
    results: dict[str, dict[Checkpoint, xr.Dataset]] = {source.label: {} for source in sources}
    with progress_bar("saturation", len(chosen), progress) as advance:
        for source, checkpoint in chosen:
            model = source.model(checkpoint, torch_device)
            with clear_errors(_name(source, checkpoint), model, parts[source.label].stream(2)):
                layers = _observe(model, parts[source.label], batch_size, measures, bin_range)
            results[source.label][checkpoint] = to_dataset(layers)
            advance(text=checkpoint.name)
    every = [part for found in results.values() for part in found.values()]
    exact, size = all(part.attrs["exact"] for part in every), every[0].attrs["n"]
    arranged = [_arrange(found) for found in results.values()]
    ds = (
        arranged[0]
        if len(arranged) == 1
        else xr.concat(arranged, dim="run", join="outer").assign_coords(run=list(results))
    )
    first = sources[0]
    if len(arranged) > 1 and all(source.run is not None for source in sources):
        champions = [source.run.manifest["champion"] for source in sources if source.run is not None]
        ds = ds.assign_coords(champion=("run", champions))
    return schema.finish(
        ds.drop_attrs(deep=False), "saturation", **first.dataset_attrs(), split=split, n=size, seed=seed,
        device=str(torch_device), dtype="float32", margin=MARGIN, saturation_bins=saturation_bins,
        relative_error=0.0 if exact else RELATIVE_ERROR,
        champion=None if first.run is None else first.run.manifest["champion"],
    )  # fmt: skip


def _examples(source: Source, split: str, n: int | None, seed: int, device: torch.device) -> Split | LoaderSplit:
    """Those of the split, or of the training data where there is no such split."""
    return source.split(split if getattr(source.data, split) is not None else "train", n, seed, device)


def _name(source: Source, checkpoint: Checkpoint) -> str:
    return f"{source.label}/{checkpoint.name}"


def _range(
    chosen: list[tuple[Source, Checkpoint]], parts: dict[str, Split | LoaderSplit], device: torch.device
) -> tuple[float, float]:
    """The bins' range; a few images of each checkpoint tell that of unbounded activations."""
    shown: list[tuple[Activation, float, float]] = []

    def observe(name: str, activation: Activation, output: Tensor) -> None:
        shown.append((activation, float(output.min()), float(output.max())))

    for source, checkpoint in chosen:
        model = source.model(checkpoint, device)
        inputs, _ = next(parts[source.label].stream(_PROBED))
        name = _name(source, checkpoint)
        with clear_errors(name, model, [(inputs, inputs)]), torch.no_grad(), watch_activations(model, observe):
            forward(model, inputs)
        if not shown:
            raise no_activations(model)
        if all(activation.bounded for activation, _, _ in shown):
            break
    return common_range(shown)


def _observe(
    model: nn.Module,
    part: Split | LoaderSplit,
    batch_size: int,
    measures: Measures,
    bin_range: tuple[float, float],
) -> dict[str, LayerActivity]:
    layers: dict[str, LayerActivity] = {}

    def observe(name: str, activation: Activation, output: Tensor) -> None:
        if name not in layers:
            layers[name] = LayerActivity(activation, measures, bin_range)
        layers[name].add(output)

    with torch.no_grad(), watch_activations(model, observe):
        for inputs, _ in part.stream(batch_size):
            forward(model, inputs)
    if not layers:
        raise no_activations(model)
    return layers


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

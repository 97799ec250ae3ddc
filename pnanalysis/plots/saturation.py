"""Saturation of activations (the paper's figures 14 and 15)."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pnanalysis.errors import PnError
from pnanalysis.plots.style import CHAMPION, DASHES, PAGE, PLAIN, new_figure

_PER_ROW = 3
_BOUNDED = {"tanh", "sigmoid", "hardtanh", "hardsigmoid", "softsign"}


def saturation(ds: xr.Dataset, *, quantile: float = 98.0, absolute: bool = True) -> Figure:
    """A percentile of the activations against epoch, a panel a layer: plain in bold, later iterations lighter.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``saturation``; several runs are told apart by line style, a user's own weights lie along the axis.
    quantile : float
        In percent.
    absolute : bool
        Of the absolute activations, or of the signed ones.

    Returns
    -------
    Figure
    """
    name = "abs_percentile" if absolute else "percentile"
    values = ds[name].sel(quantile=quantile)
    figure, axes = _panels(ds, shared=True)
    champion = int(ds.attrs.get("champion", -1))
    for ax, layer in zip(axes, ds.layer.values, strict=True):
        at = values.sel(layer=layer)
        if "checkpoint" in at.dims:
            ax.plot(range(at.sizes["checkpoint"]), at, "o-", color=PLAIN)
            ax.set_xticks(
                range(at.sizes["checkpoint"]), [str(c) for c in at.checkpoint.values], rotation=30, ha="right"
            )
            ax.set_xlabel("checkpoint")
            continue
        runs = [at] if "run" not in at.dims else [at.sel(run=run) for run in at.run.values]
        for one, dashes in zip(runs, DASHES, strict=False):
            for iteration in one.iteration.values[::-1]:
                curve = one.sel(iteration=iteration).dropna("epoch")
                colour, width = _line(int(iteration), ds.sizes["iteration"], champion)
                ax.plot(curve.epoch, curve, color=colour, lw=width, ls=dashes, label=_name(iteration, champion, one))
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    what = "|activation|" if absolute else "activation"
    for ax in axes[::_PER_ROW]:
        ax.set_ylabel(f"{quantile:g}th percentile\nof {what}")
    if "checkpoint" not in ds.dims:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside right center")
    return figure


def activation_histogram(ds: xr.Dataset, epochs: list[int] | None = None) -> Figure:
    """Normalised histograms of the activations, a column a layer and a row an epoch, plain against champion.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``saturation`` of one run, or of a user's own weights.
    epochs : list of int, optional
        By default the middle and the last of training.

    Returns
    -------
    Figure

    Raises
    ------
    PnError
        If an epoch has not been saved.
    """
    if "run" in ds.dims:
        ds = ds.isel(run=0)
    n_layers = ds.sizes["layer"]
    if "checkpoint" in ds.dims:
        rows = [("", [(str(name), ds.sel(checkpoint=name)) for name in ds.checkpoint.values])]
    else:
        rows = _rows_of_run(ds, epochs)
    figure = new_figure(PAGE, 1.5 * len(rows) + 0.4)
    axes = figure.subplots(len(rows), n_layers, sharex=True, sharey="row", squeeze=False)
    for line, (title, entries) in zip(axes, rows, strict=True):
        for ax, layer in zip(line, ds.layer.values, strict=True):
            for (name, one), colour, dashes in zip(entries, _ends(len(entries)), DASHES * len(entries), strict=False):
                density = one.histogram.sel(layer=layer).values
                ax.stairs(density, _edges(ds.bin.values), color=colour, ls=dashes, lw=0.9, label=name)
        line[0].set_ylabel(f"density{title}")
    for ax, layer in zip(axes[0], ds.layer.values, strict=True):
        ax.set_title(str(layer))
    if not set(ds.activation.values.ravel()) <= _BOUNDED:  # a spike at zero and a long tail
        for ax in axes.ravel():
            ax.set_yscale("log")
    for ax in axes[-1]:
        ax.set_xlabel("activation")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=len(rows[0][1]))
    return figure


def _rows_of_run(ds: xr.Dataset, epochs: list[int] | None) -> list[tuple[str, list[tuple[str, xr.Dataset]]]]:
    plain = ds.histogram.sel(iteration=0)
    saved = ds.epoch.values[plain.notnull().any(["layer", "bin"]).values]
    if epochs is None:
        epochs = sorted({int(saved[len(saved) // 2]), int(saved[-1])})
    missing = [epoch for epoch in epochs if epoch not in ds.epoch.values]
    if missing:
        raise PnError(f"epoch {missing[0]} has not been saved; there are {', '.join(map(str, saved))}")
    champion = int(ds.attrs.get("champion", 0))
    wanted = [("plain", 0)] + ([(f"iteration {champion} (champion)", champion)] if champion else [])
    if not champion and ds.sizes["iteration"] > 1:
        wanted.append((f"iteration {int(ds.iteration[-1])}", int(ds.iteration[-1])))
    return [
        (f", epoch {epoch}", [(name, ds.sel(iteration=iteration, epoch=epoch)) for name, iteration in wanted])
        for epoch in epochs
    ]


def _panels(ds: xr.Dataset, shared: bool) -> tuple[Figure, list[Any]]:
    n = ds.sizes["layer"]
    n_rows = -(-n // _PER_ROW)
    figure = new_figure(PAGE, 1.6 * n_rows + 0.3)
    axes = figure.subplots(n_rows, min(n, _PER_ROW), sharex=shared, sharey=shared, squeeze=False).ravel()
    for ax, layer in zip(axes, ds.layer.values, strict=False):
        ax.set_title(str(layer))
    for ax in axes[n:]:
        ax.remove()
    return figure, list(axes[:n])


def _line(iteration: int, n: int, champion: int) -> tuple[object, float]:
    if iteration == 0:
        return PLAIN, 1.8
    if iteration == champion:
        return CHAMPION, 1.5
    return colormaps["Greys"](0.35 + 0.45 * iteration / max(n - 1, 1)), 0.7


def _name(iteration: int, champion: int, one: xr.DataArray) -> str:
    text = "plain" if iteration == 0 else f"iteration {iteration}"
    text += " (champion)" if iteration == champion else ""
    return f"{one.run.item()}: {text}" if "run" in one.coords else text


def _ends(n: int) -> list[str]:
    return [PLAIN, CHAMPION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"][:n] if n <= 7 else [PLAIN] * n


def _edges(middles: np.ndarray) -> np.ndarray:
    half = (middles[1] - middles[0]) / 2
    return np.append(middles - half, middles[-1] + half)

"""Saturation of activations (the paper's figures 14 and 15)."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pnanalysis.errors import PnError
from pnanalysis.plots.style import CHAMPION, DASHES, PAGE, PLAIN, champion_of, new_figure

_PER_ROW = 3
_BOUNDED = {"tanh", "sigmoid", "hardtanh", "hardsigmoid", "softsign"}


def saturation(ds: xr.Dataset, *, quantile: float = 98.0, absolute: bool = True) -> Figure:
    """A percentile of the activations against epoch, a panel a layer: plain in bold, later iterations over it.

    Bands are one standard error over the images to either side.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``saturation``; several runs are told apart by line style, a user's own weights lie along the axis, and
        what a :class:`pnanalysis.SaturationMonitor` has recorded lies along training steps.
    quantile : float
        In percent.
    absolute : bool
        Of the absolute activations, or of the signed ones.

    Returns
    -------
    Figure

    Raises
    ------
    PnError
        If the percentile has not been measured.
    """
    if quantile not in ds["quantile"].values:
        measured = ", ".join(f"{level:g}" for level in ds["quantile"].values)
        raise PnError(f"the {quantile:g}th percentile has not been measured; there are {measured}")
    name = "abs_percentile" if absolute else "percentile"
    values, errors = ds[name].sel(quantile=quantile), ds[f"{name}_se"].sel(quantile=quantile)
    figure, axes = _panels(ds, shared=True)
    for ax, layer in zip(axes, ds.layer.values, strict=True):
        at, error = values.sel(layer=layer), errors.sel(layer=layer)
        if "checkpoint" in at.dims:
            places = range(at.sizes["checkpoint"])
            ax.errorbar(places, at, error, fmt="o-", color=PLAIN)
            ax.set_xticks(places, [str(c) for c in at.checkpoint.values], rotation=30, ha="right")
            ax.set_xlabel("checkpoint")
            continue
        if "step" in at.dims:
            _curve(ax, at, error, "step", color=PLAIN, lw=1.2)
        else:
            runs = [(at, error)] if "run" not in at.dims else [(at.sel(run=r), error.sel(run=r)) for r in at.run.values]
            for (one, band), dashes in zip(runs, DASHES, strict=False):
                champion = champion_of(one) if "run" in at.dims else champion_of(ds)
                for iteration in one.iteration.values:
                    colour, width = _line(int(iteration), ds.sizes["iteration"], champion)
                    look = {"color": colour, "lw": width, "ls": dashes, "label": _name(iteration, champion, one)}
                    _curve(ax, one.sel(iteration=iteration), band.sel(iteration=iteration), "epoch", **look)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    what = "|activation|" if absolute else "activation"
    for ax in axes[::_PER_ROW]:
        ax.set_ylabel(f"{quantile:g}th percentile\nof {what}")
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right center")
    return figure


def saturated_layers(ds: xr.Dataset, epoch: int | None = None) -> Figure:
    """Layer by layer, how saturated activations are (left) and how many units are dead (right).

    On the left the saturation measure, or for networks without bounded activations the share of activations within
    0.05 of an asymptote; bars are one standard error over the images.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``saturation``.
    epoch : int, optional
        Of a run; by default the last saved one.

    Returns
    -------
    Figure

    Raises
    ------
    PnError
        If the epoch has not been saved.
    """
    entries = _entries(ds, epoch)
    bounded = bool(ds.saturation_measure.notnull().any())
    name = "saturation_measure" if bounded else "saturated_share"
    figure = new_figure(PAGE, 2.4)
    left, right = figure.subplots(1, 2, sharex=True)
    places = np.arange(ds.sizes["layer"])
    width = 0.8 / len(entries)
    for i, (text, one, colour) in enumerate(entries):
        shift = (i - (len(entries) - 1) / 2) * width
        left.errorbar(places + shift, one[name], one[f"{name}_se"], fmt="o", color=colour, ms=3, label=text)
        right.bar(places + shift, one.dead_units / one.n_units, width, color=colour)
    left.set_ylabel("saturation measure" if bounded else f"share within {ds.attrs.get('margin', 0.05)} of an asymptote")
    left.set_ylim(0, 1.03 if bounded else None)
    right.set_ylabel("share of dead units")
    most = max(float(one.dead_units.max()) for _, one, _ in entries)
    right.set_ylim(0, None if most else 0.05)
    if not most:
        right.text(0.5, 0.5, "none", transform=right.transAxes, ha="center", color="0.4")
    for ax in (left, right):
        ax.set_xticks(places, [str(layer) for layer in ds.layer.values], **_tilted(ds))
        for place in places[1:]:
            ax.axvline(place - 0.5, color="0.9", lw=0.5, zorder=0)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center")
    return figure


def activation_histogram(ds: xr.Dataset, epochs: list[int] | None = None) -> Figure:
    """Normalised histograms of the activations, a column a layer and a row an epoch, plain against champion.

    Bands are one standard error over the images.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``saturation`` of one run, of a user's own weights, or of a monitor.
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
    if "iteration" not in ds.dims:
        rows = [("", [(text, one) for text, one, _ in _entries(ds, None)])]
    else:
        rows = _rows_of_run(ds, epochs)
    figure = new_figure(PAGE, 1.5 * len(rows) + 0.4)
    axes = figure.subplots(len(rows), n_layers, sharex=True, sharey="row", squeeze=False)
    for line, (title, entries) in zip(axes, rows, strict=True):
        for ax, layer in zip(line, ds.layer.values, strict=True):
            for (name, one), colour, dashes in zip(entries, _ends(len(entries)), DASHES * len(entries), strict=False):
                density = one.histogram.sel(layer=layer).values
                error, edges = one.histogram_se.sel(layer=layer).values, _edges(ds.bin.values)
                ax.stairs(density, edges, color=colour, ls=dashes, lw=0.9, label=name)
                if np.isfinite(error).all():
                    low = np.maximum(density - error, 0)
                    ax.stairs(density + error, edges, baseline=low, fill=True, color=colour, alpha=0.2, lw=0)
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
    champion = max(champion_of(ds), 0)
    wanted = [("plain", 0)] + ([(f"iteration {champion} (champion)", champion)] if champion else [])
    if not champion and ds.sizes["iteration"] > 1:
        wanted.append((f"iteration {int(ds.iteration[-1])}", int(ds.iteration[-1])))
    return [
        (f", epoch {epoch}", [(name, ds.sel(iteration=iteration, epoch=epoch)) for name, iteration in wanted])
        for epoch in epochs
    ]


def _entries(ds: xr.Dataset, epoch: int | None) -> list[tuple[str, xr.Dataset, Any]]:
    """What to lay side by side, each with its name and colour: iterations, checkpoints, or three steps of training."""
    if "run" in ds.dims:
        ds = ds.isel(run=0)
    if "iteration" in ds.dims:
        champion = champion_of(ds)
        found = []
        for iteration in ds.iteration.values:
            one = ds.sel(iteration=iteration).dropna("epoch", how="all", subset=["n_units"])
            if epoch is not None and epoch not in one.epoch.values:
                raise PnError(f"epoch {epoch} has not been saved; there are {', '.join(map(str, one.epoch.values))}")
            colour, _ = _line(int(iteration), ds.sizes["iteration"], champion)
            at = one.isel(epoch=-1) if epoch is None else one.sel(epoch=epoch)
            found.append((_name(iteration, champion, one.n_units), at, colour))
        return found
    if "step" in ds.dims:
        places = sorted({0, ds.sizes["step"] // 2, ds.sizes["step"] - 1})
        chosen = [(f"step {int(ds.step[i])}", ds.isel(step=i)) for i in places]
    else:
        chosen = [(str(name), ds.sel(checkpoint=name)) for name in ds.checkpoint.values]
    return [(text, one, colour) for (text, one), colour in zip(chosen, _ends(len(chosen)), strict=True)]


def _curve(ax: Axes, values: xr.DataArray, errors: xr.DataArray, along: str, **look: Any) -> None:
    """A line and its band of one standard error."""
    there = values.notnull().values
    x, y, error = values[along].values[there], values.values[there], errors.values[there]
    ax.plot(x, y, **look)
    ax.fill_between(x, y - error, y + error, color=look["color"], alpha=0.2, lw=0)
    ax.set_xlabel("training step" if along == "step" else along)


def _tilted(ds: xr.Dataset) -> dict[str, Any]:
    long = max(len(str(layer)) for layer in ds.layer.values) * ds.sizes["layer"] > 40
    return {"rotation": 45, "ha": "right"} if long else {}


def _panels(ds: xr.Dataset, shared: bool) -> tuple[Figure, list[Any]]:
    n = ds.sizes["layer"]
    n_rows = -(-n // _PER_ROW)
    figure = new_figure(PAGE, 1.6 * n_rows + 0.3)
    axes = figure.subplots(n_rows, min(n, _PER_ROW), sharex=shared, sharey=shared, squeeze=False).ravel()
    for ax, layer in zip(axes, ds.layer.values, strict=False):
        ax.set_title(str(layer))
    for ax in axes[max(n - _PER_ROW, 0) : n]:  # the lowest of their columns
        ax.xaxis.set_tick_params(labelbottom=True)
    for ax in axes[n:]:
        ax.remove()
    return figure, list(axes[:n])


def _line(iteration: int, n: int, champion: int) -> tuple[object, float]:
    if iteration == 0:
        return PLAIN, 2.4
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

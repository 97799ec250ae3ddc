"""Layer by layer, how saturated and how dead a network is, and histograms (the paper's figure 15)."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pnanalysis.errors import PnError
from pnanalysis.plots.saturation import BOUNDED, iteration_look, iteration_name
from pnanalysis.plots.style import (
    CHAMPION,
    COLOURS,
    DASHES,
    MARKERS,
    PAGE,
    PLAIN,
    champion_of,
    legend_above,
    new_figure,
    tilted,
)

_PER_ROW = 7  # histograms
_ENDS = (PLAIN, CHAMPION, *(colour for colour in COLOURS if colour not in (PLAIN, CHAMPION)))
_SPIKY = 10.0  # times the mean: densities so high leave nothing of the rest on a linear axis


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
    layers = [str(layer) for layer in ds.layer.values]
    figure = new_figure(PAGE, max(2.4, 0.5 + 0.17 * len(entries)))
    left, right = figure.subplots(1, 2, sharex=True)
    places = np.arange(len(layers))
    width = 0.8 / len(entries)
    for i, (text, one, look) in enumerate(entries):
        at = places + (i - (len(entries) - 1) / 2) * width
        left.errorbar(at, one[name], one[f"{name}_se"], ls="none", ms=3.5, elinewidth=0.8, capsize=1.5, label=text,
                      **look)  # fmt: skip
        right.bar(at, one.dead_units / one.n_units, width, color=look["color"], ec="white", lw=0.3,
                  hatch="////" if look["color"] == CHAMPION else None)  # fmt: skip
    left.set_ylabel("saturation measure" if bounded else f"share within {ds.attrs.get('margin', 0.05)} of an asymptote")
    left.set_ylim(0, 1.03 if bounded else None)
    right.set_ylabel("share of dead units")
    most = max(float(one.dead_units.max()) for _, one, _ in entries)
    right.set_ylim(0, None if most else 0.05)
    if not most:
        right.text(0.5, 0.5, "none", transform=right.transAxes, ha="center", color="0.4")
    for ax in (left, right):
        ax.set_xticks(places, layers, **tilted(layers, 2.3))
        ax.set_xlim(-0.5, len(layers) - 0.5)
        for place in places[1:]:
            ax.axvline(place - 0.5, color="0.9", lw=0.5, zorder=0)
    handles, names = left.get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside right center", title="± standard error", title_fontsize=7, alignment="left"
    )
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
    if "iteration" not in ds.dims:
        rows = [("", [(text, one) for text, one, _ in _entries(ds, None)])]
    else:
        rows = _rows_of_run(ds, epochs)
    n_lines = -(-ds.sizes["layer"] // _PER_ROW)
    columns = -(-ds.sizes["layer"] // n_lines)
    figure = new_figure(PAGE, 1.5 * len(rows) * n_lines + 0.4)
    axes = figure.subplots(len(rows) * n_lines, columns, sharex=True, sharey="row", squeeze=False)
    for k, layer in enumerate(ds.layer.values):
        place, column = divmod(k, columns)
        block = axes[place * len(rows) : (place + 1) * len(rows), column]
        block[0].set_title(str(layer))
        block[-1].set_xlabel("activation")
        block[-1].xaxis.set_tick_params(labelbottom=True)
        for ax, (title, entries) in zip(block, rows, strict=True):
            _histograms(ax, entries, layer)
            if column == 0:
                ax.set_ylabel(f"density{title}")
    for ax in axes.ravel()[[not ax.has_data() for ax in axes.ravel()]]:
        ax.remove()
    densities = ds.histogram.values[np.isfinite(ds.histogram.values)]
    if not set(ds.activation.values.ravel()) <= BOUNDED or densities.max() > _SPIKY * densities.mean():
        for ax in axes.ravel():  # a spike, and a long tail
            ax.set_yscale("log")
            ax.set_ylim(bottom=densities[densities > 0].min() / 2)
    legend_above(figure, *axes[0][0].get_legend_handles_labels())
    return figure


def _histograms(ax: Axes, entries: list[tuple[str, xr.Dataset]], layer: Any) -> None:
    for i, (name, one) in enumerate(entries):
        at = one.sel(layer=layer)
        density, error, edges = at.histogram.values, at.histogram_se.values, _edges(one.bin.values)
        colour, dashes = _ENDS[i % len(_ENDS)], DASHES[i % len(DASHES)]
        ax.stairs(density, edges, color=colour, ls=dashes, lw=0.9, label=name)
        if np.isfinite(error).all():
            low = np.maximum(density - error, 0)
            ax.stairs(density + error, edges, baseline=low, fill=True, color=colour, alpha=0.2, lw=0)


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


def _entries(ds: xr.Dataset, epoch: int | None) -> list[tuple[str, xr.Dataset, dict[str, Any]]]:
    """What to lay side by side, each with its name and look: iterations, checkpoints, or three steps of training."""
    if "run" in ds.dims:
        ds = ds.isel(run=0)
    if "iteration" in ds.dims:
        champion = champion_of(ds)
        found = []
        for place, iteration in enumerate(ds.iteration.values):
            one = ds.sel(iteration=iteration).dropna("epoch", how="all", subset=["n_units"])
            if epoch is not None and epoch not in one.epoch.values:
                raise PnError(f"epoch {epoch} has not been saved; there are {', '.join(map(str, one.epoch.values))}")
            at = one.isel(epoch=-1) if epoch is None else one.sel(epoch=epoch)
            look = iteration_look(int(iteration), champion, place, ds.sizes["iteration"], 1)
            look = {name: look[name] for name in ("color", "marker", "mfc") if name in look}
            found.append((iteration_name(iteration, champion, one.n_units), at, look))
        return found
    if "step" in ds.dims:
        places = sorted({0, ds.sizes["step"] // 2, ds.sizes["step"] - 1})
        chosen = [(f"step {int(ds.step[i])}", ds.isel(step=i)) for i in places]
    else:
        chosen = [(str(name), ds.sel(checkpoint=name)) for name in ds.checkpoint.values]
    looks = ({"color": _ENDS[i % len(_ENDS)], "marker": MARKERS[i % len(MARKERS)]} for i in range(len(chosen)))
    return [(text, one, look) for (text, one), look in zip(chosen, looks, strict=True)]


def _edges(middles: np.ndarray) -> np.ndarray:
    half = (middles[1] - middles[0]) / 2
    return np.append(middles - half, middles[-1] + half)

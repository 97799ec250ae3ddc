"""Activations layer by layer: saturated and dead units, and histograms (the paper's figure 15)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pnanalysis.activations.functions import BOUNDED_BY_ONE
from pnanalysis.errors import PnError
from pnanalysis.plots.saturation import iteration_look, iteration_name
from pnanalysis.plots.style import (
    CHAMPION,
    COLOURS,
    DASHES,
    MARKERS,
    PAGE,
    PLAIN,
    cell_edges,
    champion_of,
    legend_above,
    new_figure,
    tilted,
)

_PER_ROW = 7  # histograms
_ENDS = (PLAIN, CHAMPION, *(colour for colour in COLOURS if colour not in (PLAIN, CHAMPION)))
_SPIKY = 10.0  # times the mean: next to a density so high, a linear axis shows nothing of the rest


class _Entry(NamedTuple):
    """One network at one moment: its name in the legend, its data and its marker."""

    name: str
    ds: xr.Dataset
    look: dict[str, Any]


class _Row(NamedTuple):
    """One row of histograms: what is added to its axis label, and what it overlays."""

    suffix: str
    entries: list[_Entry]


def saturated_layers(ds: xr.Dataset, epoch: int | None = None) -> Figure:
    """Layer by layer, how saturated activations are (left) and how many units are dead (right).

    On the left the saturation measure, or for networks without bounded activations the fraction of activations within
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
    layers = [str(layer) for layer in ds.layer.values]
    figure = new_figure(PAGE, max(2.4, 0.5 + 0.17 * len(entries)))
    left, right = figure.subplots(1, 2, sharex=True)
    _saturation_by_layer(ds, entries, left)
    _dead_units_by_layer(entries, layers, right)
    for ax in (left, right):
        ax.set_xticks(range(len(layers)), layers, **tilted(layers, 2.3))
        ax.set_xlim(-0.5, len(layers) - 0.5)
        for place in range(1, len(layers)):
            ax.axvline(place - 0.5, color="0.9", lw=0.5, zorder=0)
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", title="± standard error", alignment="left")
    return figure


def _saturation_by_layer(ds: xr.Dataset, entries: list[_Entry], ax: Axes) -> None:
    is_bounded = bool(ds.saturation_measure.notnull().any())
    name = "saturation_measure" if is_bounded else "saturated_share"
    places, width = np.arange(ds.sizes["layer"]), 0.8 / len(entries)
    for i, entry in enumerate(entries):
        shifted = places + (i - (len(entries) - 1) / 2) * width  # side by side within a layer
        ax.errorbar(
            shifted, entry.ds[name], entry.ds[f"{name}_se"], ls="none", ms=3.5, elinewidth=0.8, capsize=1.5,
            label=entry.name, **entry.look,
        )  # fmt: skip
    margin = ds.attrs.get("margin", 0.05)
    ax.set_ylabel("saturation measure" if is_bounded else f"fraction within {margin} of an asymptote")
    ax.set_ylim(0, 1.03 if is_bounded else None)


def _dead_units_by_layer(entries: list[_Entry], layers: list[str], ax: Axes) -> None:
    import seaborn as sns

    fractions = [entry.ds.dead_units.values / entry.ds.n_units.values for entry in entries]
    sns.barplot(
        x=np.tile(layers, len(entries)), y=np.concatenate(fractions), ax=ax, errorbar=None, legend=False,
        hue=np.repeat([entry.name for entry in entries], len(layers)), saturation=1.0,
        palette=[entry.look["color"] for entry in entries], edgecolor="white", linewidth=0.3,
    )  # fmt: skip
    for bars, entry in zip(ax.containers, entries, strict=True):
        if entry.look["color"] == CHAMPION:  # also to be recognised in a grey print
            for bar in bars:
                bar.set_hatch("////")
    ax.set(xlabel="", ylabel="fraction of dead units")
    known = [fraction for fraction in np.concatenate(fractions) if not np.isnan(fraction)]
    if any(known):
        ax.set_ylim(bottom=0)
    else:
        ax.set_ylim(0, 0.05)
        ax.text(0.5, 0.5, "none" if known else "unknown", transform=ax.transAxes, ha="center", color="0.4")


def activation_histogram(ds: xr.Dataset, epochs: list[int] | None = None) -> Figure:
    """Normalised histograms of the activations, a column per layer and a row per epoch, plain and champion overlaid.

    Bands are one standard error over the images.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``saturation`` of one run, of your own weights, or of a monitor.
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
    rows = _rows_of_run(ds, epochs) if "iteration" in ds.dims else [_Row("", _entries(ds, None))]
    n_blocks = -(-ds.sizes["layer"] // _PER_ROW)  # many layers wrap into blocks of rows
    n_columns = -(-ds.sizes["layer"] // n_blocks)
    figure = new_figure(PAGE, 1.5 * len(rows) * n_blocks + 0.4)
    axes = figure.subplots(len(rows) * n_blocks, n_columns, sharex=True, sharey="row", squeeze=False)
    for k, layer in enumerate(ds.layer.values):
        block, column = divmod(k, n_columns)
        panels = axes[block * len(rows) : (block + 1) * len(rows), column]
        panels[0].set_title(str(layer))
        for ax, row in zip(panels, rows, strict=True):
            _overlay_histograms(row.entries, layer, ax)
            ax.set(xlabel="", ylabel=f"density{row.suffix}" if column == 0 else "")
        panels[-1].set_xlabel("activation")
        panels[-1].xaxis.set_tick_params(labelbottom=True)
    for ax in axes.ravel():
        if not ax.has_data():
            ax.remove()
    _scale_densities(ds, axes)
    legend_above(figure, *axes[0][0].get_legend_handles_labels())
    return figure


def _overlay_histograms(entries: list[_Entry], layer: Any, ax: Axes) -> None:
    import seaborn as sns

    for i, entry in enumerate(entries):
        at = entry.ds.sel(layer=layer)
        density, se, edges = at.histogram.values, at.histogram_se.values, cell_edges(at.bin.values)
        colour, dashes = _ENDS[i % len(_ENDS)], DASHES[i % len(DASHES)]
        # the densities are known: as weights of the bins' middles they come out as the heights
        sns.histplot(
            x=at.bin.values, weights=np.nan_to_num(density), bins=list(edges), element="step", fill=False, color=colour,
            ls=dashes, lw=0.9, label=entry.name, ax=ax,
        )  # fmt: skip
        if np.isfinite(se).all():
            low = np.maximum(density - se, 0)
            ax.stairs(density + se, edges, baseline=low, fill=True, color=colour, alpha=0.2, lw=0)


def _scale_densities(ds: xr.Dataset, axes: np.ndarray) -> None:
    """Linear from zero, or logarithmic for unbounded activations (a long tail) and for spikes."""
    densities = ds.histogram.values[np.isfinite(ds.histogram.values)]
    is_bounded = set(ds.activation.values.ravel()) <= BOUNDED_BY_ONE
    is_log = not is_bounded or densities.max() > _SPIKY * densities.mean()
    for ax in axes.ravel():
        if is_log:
            ax.set_yscale("log")
        ax.set_ylim(bottom=densities[densities > 0].min() / 2 if is_log else 0)


def _rows_of_run(ds: xr.Dataset, epochs: list[int] | None) -> list[_Row]:
    """Plain and champion, or plain and the last iteration if plain is the champion, at each epoch."""
    plain = ds.histogram.sel(iteration=0)
    saved = ds.epoch.values[plain.notnull().any(["layer", "bin"]).values]
    if epochs is None:
        epochs = sorted({int(saved[len(saved) // 2]), int(saved[-1])})
    missing = [epoch for epoch in epochs if epoch not in ds.epoch.values]
    if missing:
        raise PnError(f"epoch {missing[0]} has not been saved; the saved epochs are {', '.join(map(str, saved))}")
    champion = max(champion_of(ds), 0)
    overlaid = {"plain": 0}
    if champion:
        overlaid[f"iteration {champion} (champion)"] = champion
    elif ds.sizes["iteration"] > 1:
        overlaid[f"iteration {int(ds.iteration[-1])}"] = int(ds.iteration[-1])
    return [
        _Row(f", epoch {epoch}", [_Entry(name, ds.sel(iteration=i, epoch=epoch), {}) for name, i in overlaid.items()])
        for epoch in epochs
    ]


def _entries(ds: xr.Dataset, epoch: int | None) -> list[_Entry]:
    """The networks to compare: iterations of a run, checkpoints, or three steps that a monitor has recorded."""
    if "run" in ds.dims:
        ds = ds.isel(run=0)
    if "iteration" in ds.dims:
        return _entries_of_run(ds, epoch)
    if "step" in ds.dims:
        places = sorted({0, ds.sizes["step"] // 2, ds.sizes["step"] - 1})
        chosen = [(f"step {int(ds.step[i])}", ds.isel(step=i)) for i in places]
    else:
        chosen = [(str(name), ds.sel(checkpoint=name)) for name in ds.checkpoint.values]
    return [
        _Entry(name, one, {"color": _ENDS[i % len(_ENDS)], "marker": MARKERS[i % len(MARKERS)]})
        for i, (name, one) in enumerate(chosen)
    ]


def _entries_of_run(ds: xr.Dataset, epoch: int | None) -> list[_Entry]:
    """Each iteration at an epoch, by default its last."""
    champion = champion_of(ds)
    entries = []
    for place, iteration in enumerate(ds.iteration.values):
        one = ds.sel(iteration=iteration).dropna("epoch", how="all", subset=["abs_percentile"])
        if epoch is not None and epoch not in one.epoch.values:
            saved = ", ".join(map(str, one.epoch.values))
            raise PnError(f"epoch {epoch} has not been saved; the saved epochs are {saved}")
        at = one.isel(epoch=-1) if epoch is None else one.sel(epoch=epoch)
        look = iteration_look(int(iteration), champion, place, ds.sizes["iteration"], 1)
        marker: dict[str, Any] = {name: look[name] for name in ("color", "marker", "mfc") if name in look}
        entries.append(_Entry(iteration_name(iteration, champion, one.n_units), at, marker))
    return entries

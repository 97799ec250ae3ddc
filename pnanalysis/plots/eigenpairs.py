"""Eigenvalues with their errors, where the eigenvectors lie, what they owe to classes, and how far spaces coincide."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from pnanalysis.analyses.diagnostics import short_names
from pnanalysis.plots.style import (
    BLUE,
    COLOURS,
    DASHES,
    GREY,
    MARKERS,
    ORANGE,
    PAGE,
    SKY,
    VERMILION,
    integer_axis,
    new_figure,
    tilted,
)

#: Checkpoints that have panels of their own; the figure says so where there are more.
_MOST = 3
#: Eigenvalues of parts of the Gauss-Newton matrix.
_PREDICTIONS = {"class_value": "of class means alone", "cross_value": "of means of pairs of classes"}
_SAMPLE = "#555555"  # of the legend's samples
_LEVELS = {
    "class": (BLUE, "class means"),
    "cross": (SKY, "pairs of classes"),
    "within": (ORANGE, "within pairs"),
    "same": (GREY, "own label"),
}


def eigenpairs(ds: xr.Dataset) -> Figure:
    """Eigenvalues, overlaps of the spaces, parts of the vectors by layer, and their class structure.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``eigenpairs``.

    Returns
    -------
    Figure
        Bars are 95 % intervals where the error for the choice of examples is known, else bounds; hollow markers have
        not converged. In the overlap matrix, the diagonal is that of spaces over two halves of the examples: the
        ceiling for different networks.
    """
    if "checkpoint" not in ds.dims:
        ds = ds.expand_dims("checkpoint") if "checkpoint" in ds.coords else ds.expand_dims(checkpoint=[""])
    if "other" in ds.dims:
        ds = ds.sel(other=ds.checkpoint.values)  # of checkpoints that were selected since
    shown = ds.isel(checkpoint=slice(_MOST))
    rows = [2.3]
    if "layer_part" in ds:
        rows.append(0.75 + 0.16 * ds.sizes["layer"])
    if "level_part" in ds:
        rows.append(1.8)
    figure = new_figure(PAGE, sum(rows))
    parts = list(figure.subfigures(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0])
    _values_and_spaces(ds, parts[0])
    if "layer_part" in ds:
        _layers(shown, parts[1])
    if "level_part" in ds:
        _levels(shown, parts[-1])
    return figure


def _values_and_spaces(ds: xr.Dataset, figure: SubFigure) -> None:
    has_overlap, has_directions = "overlap" in ds and ds.sizes["checkpoint"] > 1, "gradient_top" in ds
    n = 1 + has_overlap + has_directions
    axes = figure.subplots(1, n, squeeze=False, width_ratios=(1.5, *[1.0] * (n - 1)))[0]
    _values(ds, axes[0])
    if has_overlap:
        _overlap(ds, axes[1])
    if has_directions:
        _directions(ds, axes[-1])


def _values(ds: xr.Dataset, ax: Axes) -> None:
    names, k = short_names(ds), ds.sizes["checkpoint"]
    for i, name in enumerate(names):
        at, colour = ds.isel(checkpoint=i), COLOURS[i % len(COLOURS)]
        x = at.pair.values + 0.5 * (i - (k - 1) / 2) / max(k, 3)
        low, high = (np.abs(at[f"value_{end}"] - at.value) for end in ("low", "high"))
        ax.errorbar(x, at.value, (low, high), fmt="none", ecolor=colour, elinewidth=0.8, capsize=1.5)
        done, marker = at.converged.values == 1, MARKERS[i % len(MARKERS)]
        ax.plot(x[done], at.value[done], marker, color=colour, ls="", label=name or "eigenvalue")
        if not done.all():
            ax.plot(x[~done], at.value[~done], marker, color=colour, mfc="white", ls="", label="not converged")
    for j, (variable, text) in enumerate(_PREDICTIONS.items(), start=1):
        for i in range(k if variable in ds else 0):
            predicted = ds[variable].isel(checkpoint=i).values[: ds.sizes["pair"]]
            ax.plot(
                ds.pair.values[: len(predicted)], predicted, color=COLOURS[i % len(COLOURS)], ls=DASHES[2 * j - 1],
                lw=0.8,
            )  # fmt: skip
        if variable in ds:  # in a colour of no checkpoint, as it is about all of them
            ax.plot([], [], color=_SAMPLE, ls=DASHES[2 * j - 1], lw=0.8, label=text)
    ax.axhline(0, color="#bbbbbb", lw=0.6, zorder=0)
    integer_axis(ax, ds.pair.values)
    ax.set_xlabel("eigenpair")
    ax.set_ylabel("eigenvalue [loss]")
    has_error = "value_data_se" in ds
    ax.set_title(f"eigenvalues, bars: {'95 % intervals' if has_error else 'bounds'}", loc="left", fontsize=7)
    ax.legend(fontsize=6)
    ax.set_label("values")


def _overlap(ds: xr.Dataset, ax: Axes) -> None:
    """Off the diagonal the overlap of two checkpoints, on it the ceiling."""
    import seaborn as sns

    names, values = short_names(ds), ds.overlap.values.copy()
    on = np.eye(len(names), dtype=bool)
    values[on] = ds.overlap_halves.values[on] if "overlap_halves" in ds else np.nan
    sns.heatmap(
        values, mask=np.isnan(values), annot=len(names) <= 6, fmt=".2f", ax=ax, cbar=len(names) > 6, vmin=0, vmax=1.6,
        cmap=sns.light_palette(BLUE, as_cmap=True), annot_kws={"fontsize": 7, "color": "0.15"}, linewidths=1,
        xticklabels=False, yticklabels=False,
    )  # fmt: skip
    middles = np.arange(len(names)) + 0.5
    ax.set_yticks(middles, names)
    ax.set_xticks(middles, names, **tilted(names, 1.8))
    ax.tick_params(length=0)
    chance = float(np.nanmean(ds.overlap_chance))
    diagonal = "\ndiagonal: over halves of the examples" if "overlap_halves" in ds else ""
    ax.set_title(f"overlap of spaces, by chance {chance:.2g}{diagonal}", loc="left", fontsize=7)
    ax.set_label("overlap")


def _directions(ds: xr.Dataset, ax: Axes) -> None:
    """Parts of the gradient and of the last update in the top space, beside that of a random vector."""
    names, places = short_names(ds), np.arange(ds.sizes["checkpoint"])
    ax.errorbar(places - 0.1, 100 * ds.gradient_top, 196 * ds.gradient_top_se.fillna(0), fmt="o", color=VERMILION,
                capsize=2, elinewidth=0.8, label="gradient")  # fmt: skip
    if "update_top" in ds:
        ax.plot(places + 0.1, 100 * ds.update_top, "s", color=BLUE, mfc="white", label="last update")
        if "update_top_data_se" in ds:
            ax.errorbar(places + 0.1, 100 * ds.update_top, 196 * ds.update_top_data_se.fillna(0), fmt="none",
                        ecolor=BLUE, capsize=2, elinewidth=0.8)  # fmt: skip
    ax.plot(places, 100 * ds.top_chance, "_", color="black", ms=14, label="random vector")
    ax.set_xlim(-0.6, places[-1] + 0.6)
    ax.set_ylim(0, 1.45 * ax.get_ylim()[1])  # room for the legend
    ax.set_xticks(places, names, **tilted(names, 1.8))
    ax.set_ylabel(f"part in the top {ds.attrs.get('n_top', 'k')} [%]")
    ax.set_title("gradient and update,\nbars: 95 % for the examples", loc="left", fontsize=7)
    ax.legend(fontsize=6)
    ax.set_label("directions")


def _layers(ds: xr.Dataset, figure: SubFigure) -> None:
    """A heat map per checkpoint; the last column is the layer's share of the parameters."""
    axes = figure.subplots(1, ds.sizes["checkpoint"], squeeze=False, sharey=True)[0]
    layers = [str(name) for name in ds.layer.values]
    drawn = None
    for i, (ax, name) in enumerate(zip(axes, short_names(ds), strict=True)):
        at = ds.isel(checkpoint=i).dropna("pair", subset=["value"])
        parts = 100 * np.concatenate([at.layer_part.values.T, at.layer_share.values[:, None]], axis=1)
        drawn = ax.pcolormesh(parts, cmap="cividis", vmin=0, vmax=100, edgecolors="white", linewidth=0.4)
        ax.axvline(at.sizes["pair"], color="black", lw=1.2)
        labels = [*map(str, at.pair.values), "θ"]
        step = -(-len(labels) // 14)
        kept = [*range(0, len(labels) - 1, step), len(labels) - 1]
        ax.set_xticks([j + 0.5 for j in kept], [labels[j] for j in kept])
        ax.set_xlabel("eigenvector (θ: all parameters)")
        ax.set_title(f"{name}: part in each layer" if name else "part in each layer", loc="left", fontsize=7)
        ax.set_label(f"layers {name}")
    axes[0].set_yticks(np.arange(len(layers)) + 0.5, layers)
    axes[0].invert_yaxis()
    axes[0].set_ylabel("layer")
    if drawn is not None:
        figure.colorbar(drawn, ax=list(axes), pad=0.01, fraction=0.05).set_label("part [%]")


def _levels(ds: xr.Dataset, figure: SubFigure) -> None:
    """What the Gauss-Newton curvature along each eigenvector is made of, and where the vector lies."""
    axes = figure.subplots(1, ds.sizes["checkpoint"], squeeze=False, sharey=True)[0]
    for i, (ax, name) in enumerate(zip(axes, short_names(ds), strict=True)):
        at = ds.isel(checkpoint=i).dropna("pair", subset=["value"])
        below = np.zeros(at.sizes["pair"])
        for level, (colour, text) in _LEVELS.items():
            height = 100 * at.level_part.sel(level=level).values
            ax.bar(at.pair, height, 0.8, below, color=colour, label=text)
            below = below + height
        ax.plot(at.pair, 100 * at.class_part, "D", color="black", mfc="white", clip_on=False,
                label="vector in span of class means")  # fmt: skip
        step = -(-at.sizes["pair"] // 12)
        ax.set_xticks(at.pair.values[::step])
        ax.set_xlabel("eigenpair")
        ax.set_title(name or "Gauss-Newton curvature", loc="left", fontsize=7)
        ax.set_label(f"levels {name}")
    axes[0].set_ylabel("part of the curvature [%]")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=6)

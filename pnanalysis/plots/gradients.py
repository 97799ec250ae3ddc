"""The persistent gradient compared with the loss gradient, and the signs that determine it."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from pnanalysis.plots.style import (
    BLUE,
    CHAMPION,
    COLUMN,
    PAGE,
    PLAIN,
    RESTART,
    cell_edges,
    few,
    integer_axis,
    legend_above,
    log_axis,
    new_figure,
)

_PER_ROW = 4
_NONE = ": none"
_POSITIVE, _NEGATIVE = BLUE, "#f5c76a"  # dark and light: the signs also differ in a grey print


def gradients(ds: xr.Dataset, iteration: int | None = None) -> Figure:
    """Norms against epoch, one panel per layer, above the signs of the inner products with the earlier end points.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``gradients``.
    iteration : int, optional
        The last one by default.

    Returns
    -------
    Figure
    """
    at = ds.isel(iteration=-1) if iteration is None else ds.sel(iteration=iteration)
    at = at.isel(layer=at.constant_norm.notnull().values).dropna("epoch", subset=["loss_gradient_norm"])
    n = at.sizes["layer"]
    columns = min(n, _PER_ROW)
    n_rows = -(-n // columns)
    figure = new_figure(PAGE if n > 1 else COLUMN * 1.5, 0.3 + 2.9 * n_rows)
    panels = figure.subplots(2 * n_rows, columns, squeeze=False, height_ratios=(2, 1) * n_rows)
    pairs = [(panels[2 * (k // columns), k % columns], panels[2 * (k // columns) + 1, k % columns]) for k in range(n)]
    # pairs of panels in the order of layers; those after the last layer go
    for ax in panels.reshape(n_rows, 2, columns).transpose(0, 2, 1).reshape(-1, 2)[n:].ravel():
        ax.remove()
    drawn: list[float] = []
    for k, ((top, bottom), layer) in enumerate(zip(pairs, at.layer.values, strict=True)):
        if k:
            top.sharey(pairs[0][0])
        top.sharex(bottom)
        drawn += _norms(at.sel(layer=layer), top)
        _signs(at.sel(layer=layer), bottom)
        top.set_title(str(layer), loc="left")
        top.tick_params(labelbottom=False)
        top.tick_params(axis="y", which="both", labelleft=k % columns == 0)
        bottom.tick_params(labelleft=k % columns == 0)
        bottom.set_xlabel("epoch")
        if k % columns == 0:
            top.set_ylabel("norm [loss]")
            bottom.set_ylabel("earlier end")
    if drawn:
        log_axis(pairs[0][0], min(drawn), max(drawn))
    # a layer may have no fluctuation where another has one: the legend, which they share, says none if none has
    legends = [top.get_legend_handles_labels() for top, _ in pairs]
    handles, names = min(legends, key=lambda each: any(name.endswith(_NONE) for name in each[1]))
    signs = [Patch(fc=_POSITIVE, label="inner product > 0"), Patch(fc=_NEGATIVE, label="inner product < 0")]
    legend_above(figure, [*handles, *signs], [*names, *(str(patch.get_label()) for patch in signs)])
    figure.suptitle(f"iteration {int(at.iteration)}", x=0.01, ha="left", fontsize="medium")
    return figure


def _norms(one: xr.Dataset, ax: Axes) -> list[float]:
    """Draw the three curves; returns the positive values among them."""
    ax.plot(one.epoch, one.loss_gradient_norm, color=PLAIN, marker=few(one.sizes["epoch"]), label="loss gradient")
    ax.axhline(float(one.constant_norm), color=CHAMPION, ls="--", label="constant push")
    # round-off in place of a fluctuation would stretch the logarithmic axis by many decades
    fluctuation = one.fluctuation_norm.where(one.fluctuation_norm > 1e-9 * float(one.constant_norm))
    none = "" if bool(fluctuation.notnull().any()) else _NONE
    ax.plot(one.epoch, fluctuation, color=RESTART, ls=":", marker="s", ms=2.5, label=f"fluctuation{none}")
    shown = np.concatenate([one.loss_gradient_norm.values, fluctuation.values, [float(one.constant_norm)]])
    return [float(norm) for norm in shown if norm > 0]


def _signs(one: xr.Dataset, ax: Axes) -> None:
    # seaborn.heatmap spaces columns evenly, but epochs need not be: cells between true borders share the axis above
    signs = one.sign.dropna("end", how="all")
    ax.pcolormesh(
        cell_edges(one.epoch.values), np.arange(signs.sizes["end"] + 1) - 0.5, signs.transpose("end", "epoch").values,
        cmap=ListedColormap([_NEGATIVE, "#FFFFFF", _POSITIVE]), vmin=-1, vmax=1, lw=0.3,
        edgecolors="white" if few(one.sizes["epoch"]) else "none", rasterized=True,
    )  # fmt: skip
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    integer_axis(ax, one.epoch.values)

"""Two or more minima at a glance: every diagnostic with its interval, disagreement, and layers."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pnanalysis.measured import Measured
from pnanalysis.plots.style import COLOURS, DASHES, PAGE, QUIET, new_figure
from pnanalysis.verdict import Diagnostic, diagnostics, short_names

_PER_ROW = 4
_MARKERS = "osD^vP*X"
_LEFT_OUT = {"norm of the parameters", "negative eigenvalues"}


def comparison(ds: xr.Dataset) -> Figure:
    """A small panel a diagnostic, then how far the checkpoints differ as functions, and layer by layer.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``comparison``.

    Returns
    -------
    Figure
        Bars are 95 % intervals. A marker is hollow where the (paired) difference from the first checkpoint, the
        reference, is not told from zero; these differences are known better than the bars suggest.
    """
    rows = [row for row in diagnostics(ds) if row.values and row.title not in _LEFT_OUT]
    k = ds.sizes["checkpoint"]
    n_rows = -(-len(rows) // _PER_ROW)
    height, foot = 0.55 + 0.2 * k, 1.6 + 0.22 * k
    figure = new_figure(PAGE, n_rows * height + foot + 0.2)
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(n_rows * height, foot))[:, 0]
    panels = upper.subplots(n_rows, _PER_ROW, sharey=True, squeeze=False).ravel()
    sigmas = float(ds.attrs["sigmas"])
    for ax, row in zip(panels, rows, strict=False):
        _dots(row, sigmas, ax)
    for ax in panels[len(rows) :]:
        ax.remove()
    panels[0].set_yticks(range(k), short_names(ds))
    panels[0].set_ylim(k - 0.5, -0.5)
    _functions(ds, lower)
    lower.supxlabel(
        "bars: 95 % intervals, none where no error is known or it is too small to see; hollow: the (paired) difference "
        "from the first is not told from zero", x=0.01, ha="left", fontsize=6.5, color="#555555",
    )  # fmt: skip
    return figure


def functional(ds: xr.Dataset) -> Figure:
    """How far the checkpoints differ as functions: a matrix of disagreement, and CKA layer by layer.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``functional`` or ``comparison``.

    Returns
    -------
    Figure
    """
    figure = new_figure(PAGE, 1.6 + 0.22 * ds.sizes["checkpoint"])
    _functions(ds, figure)
    return figure


def _functions(ds: xr.Dataset, figure: FigureBase) -> None:
    labels, layered = short_names(ds), "cka" in ds
    axes = figure.subplots(1, 1 + layered, squeeze=False, width_ratios=(1.0, 1.2)[: 1 + layered])[0]
    _heat(ds, "disagreement" if "disagreement" in ds else "rms_difference", labels, axes[0])
    if layered:
        _layers(ds, labels, axes[1])


def _dots(row: Diagnostic, sigmas: float, ax: Axes) -> None:
    """One number of every checkpoint, the first as a line."""
    for i, value in enumerate(row.values):
        colour = COLOURS[i % len(COLOURS)]
        solid = i == 0 or row.beside[i - 1].told(sigmas) or not _has_error(row.beside[i - 1])
        low, high = _interval(value)
        ax.plot([low, high], [i, i], color=colour, lw=1.0, zorder=2)
        ax.plot(value.value, i, _MARKERS[i % len(_MARKERS)], color=colour, mfc=colour if solid else "white", zorder=3)
    ax.axvline(row.values[0].value, color=QUIET, lw=0.6, ls=":", zorder=0)
    ax.set_title(f"{row.title} [%]" if row.percent else row.title, loc="left", fontsize=7)
    ax.xaxis.set_major_locator(MaxNLocator(3))
    if row.percent:
        ax.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    ax.tick_params(axis="y", length=0)
    ax.margins(x=0.12)


def _has_error(value: Measured) -> bool:
    return math.isfinite(value.se) or math.isfinite(value.low)


def _interval(value: Measured) -> tuple[float, float]:
    if math.isfinite(value.se):
        return value.value - 1.96 * value.se, value.value + 1.96 * value.se
    return value.low, value.high


def _heat(ds: xr.Dataset, name: str, labels: list[str], ax: Axes) -> None:
    """How far each two differ, as a matrix with its numbers."""
    share = name == "disagreement"
    values = ds[name].values * (100 if share else 1)
    k = len(labels)
    top = float(np.nanmax(values)) or 1.0
    ax.imshow(np.where(np.eye(k, dtype=bool), np.nan, values), cmap="Greys", vmin=0, vmax=2.5 * top, aspect="auto")
    for i in range(k):
        for j in range(k):
            if i != j:
                text = f"{values[i, j]:.1f}" if share else f"{values[i, j]:.2g}"
                ax.text(j, i, text, ha="center", va="center", fontsize=7)
    ax.set_yticks(range(k), labels)
    ax.set_xticks(range(k), labels, rotation=20, ha="right")
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.tick_params(length=0)
    split = str(ds.attrs["function_split"])
    title = f"disagreement on {split} examples [%]" if share else f"rms difference of outputs, {split} examples"
    ax.set_title(title, loc="left", fontsize=7)


def _layers(ds: xr.Dataset, labels: list[str], ax: Axes) -> None:
    """CKA of each layer with that of the first checkpoint."""
    places = range(ds.sizes["layer"])
    for i in range(1, len(labels)):
        at = ds.isel(checkpoint=i, other=0)
        ax.errorbar(
            places, at.cka, 1.96 * at.cka_se, color=COLOURS[i % len(COLOURS)], ls=DASHES[(i - 1) % len(DASHES)],
            marker=_MARKERS[i % len(_MARKERS)], elinewidth=0.8, capsize=1.5, label=labels[i],
        )  # fmt: skip
    ax.set_xticks(places, [str(name) for name in ds.layer.values], rotation=30, ha="right")
    lowest = float(np.nanmin((ds.cka - 1.96 * ds.cka_se.fillna(0)).isel(other=0)))
    ax.set_ylim(min(lowest, 0.98) - 0.02, 1.01) if lowest > 0.5 else ax.set_ylim(min(lowest, 0.0) - 0.02, 1.03)
    ax.set_title(f"CKA with {labels[0]}", loc="left", fontsize=7)
    ax.legend(loc="best")

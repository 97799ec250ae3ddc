"""Two or more minima at a glance: every diagnostic with its interval, disagreement, and layers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pnanalysis.analyses.verdict import Diagnostic, diagnostics, measured, short_names, told_layers
from pnanalysis.estimates import Estimate
from pnanalysis.plots.style import COLOURS, DASHES, MARKERS, PAGE, QUIET, new_figure, tilted

_PER_ROW = 4
_TOLD, _SAME, _UNKNOWN = "full", "none", "left"  # how markers are filled
_SAID = {
    _TOLD: "the first, or told from it",
    _SAME: "not told from the first",
    _UNKNOWN: "difference of unknown error",
}
_NEVER_NEGATIVE = ("loss", "error", "outliers", "effective rank")
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
        reference, is not told from zero, and half filled where its error is not known; paired differences are known
        better than the bars suggest.
    """
    rows = [row for row in diagnostics(ds) if row.values and row.title not in _LEFT_OUT]
    k = ds.sizes["checkpoint"]
    n_rows = -(-len(rows) // _PER_ROW)
    height, foot = 0.6 + 0.2 * k, 1.6 + 0.22 * k
    figure = new_figure(PAGE, n_rows * height + foot + 0.2)
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(n_rows * height, foot))[:, 0]
    panels = upper.subplots(n_rows, _PER_ROW, sharey=True, squeeze=False).ravel()
    sigmas = float(ds.attrs["sigmas"])
    fills = [_TOLD]
    for ax, row in zip(panels, rows, strict=False):
        fills += _dots(row, sigmas, ax)
    for ax in panels[len(rows) :]:
        ax.remove()
    panels[0].set_yticks(range(k), short_names(ds))
    panels[0].set_ylim(k - 0.5, -0.5)
    _functions(ds, lower)
    _explain(fills, figure)
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
    draw = _pair if len(labels) == 2 else _heat
    draw(ds, "disagreement" if "disagreement" in ds else "rms_difference", labels, axes[0])
    if layered:
        _layers(ds, labels, axes[1])


def _dots(row: Diagnostic, sigmas: float, ax: Axes) -> list[str]:
    """One number of every checkpoint, the first as a line; how their markers are filled."""
    fills = [_TOLD, *(_fill(beside, sigmas) for beside in row.beside)]
    for i, (value, fill) in enumerate(zip(row.values, fills, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        low, high = _interval(value)
        if row.title.endswith(_NEVER_NEGATIVE):
            low = max(low, 0.0)
        ax.plot([low, high], [i, i], color=colour, lw=1.0, zorder=2)
        ax.plot(value.value, i, MARKERS[i % len(MARKERS)], zorder=3, **_filled(fill, colour))
    ax.axvline(row.values[0].value, color=QUIET, lw=0.6, ls=":", zorder=0)
    ax.set_title(f"{row.title} [%]" if row.percent else row.title, loc="left", fontsize=7)
    ax.xaxis.set_major_locator(MaxNLocator(3))
    if row.percent:
        ax.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    else:
        ax.ticklabel_format(axis="x", useOffset=False)
    ax.tick_params(axis="y", length=0)
    ax.margins(x=0.12)
    low, high = ax.get_xlim()
    size = max(abs(low), abs(high))
    least = 2e-3 * size if size > 1e-9 else 1.0  # differences below are round-off, or of no interest
    if high - low < least:
        ax.set_xlim((low + high - least) / 2, (low + high + least) / 2)
    if row.title.endswith(_NEVER_NEGATIVE) and not any(value.value for value in row.values):
        ax.set_xlim(-0.002, 0.02)  # all zero: nothing lies to the left of it
    return fills


def _fill(beside: Estimate, sigmas: float) -> str:
    """What a marker says of the difference from the first checkpoint."""
    if not (math.isfinite(beside.se) or math.isfinite(beside.low)):
        return _UNKNOWN
    return _TOLD if beside.is_significant(sigmas) else _SAME


def _filled(fill: str, colour: str) -> dict[str, Any]:
    inside = "white" if fill == _SAME else colour
    return {"color": colour, "mfc": inside, "mfcalt": "white", "fillstyle": "left" if fill == _UNKNOWN else "full"}


def _explain(fills: list[str], figure: Figure) -> None:
    """What bars and fillings mean, of those that there are."""
    bar = Line2D([], [], color="#555555", lw=1.0, label="95 % interval, where known")
    marks = [Line2D([], [], marker="o", ls="none", label=_SAID[fill], **_filled(fill, "#555555")) for fill in _SAID
             if fill in fills]  # fmt: skip
    figure.legend(handles=[bar, *marks], loc="outside lower left", ncols=4, fontsize=6.5)


def _interval(value: Estimate) -> tuple[float, float]:
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
    ax.set_xticks(range(k), labels, **tilted(labels, 2.4))
    ax.set_xticks(np.arange(k - 1) + 0.5, minor=True)
    ax.set_yticks(np.arange(k - 1) + 0.5, minor=True)
    ax.grid(which="minor", color="0.8", lw=0.5)
    for spine in ax.spines.values():
        spine.set(visible=True, color="0.8")
    ax.tick_params(which="both", length=0)
    ax.set_title(_apart(ds, name), loc="left", fontsize=7)


def _pair(ds: xr.Dataset, name: str, labels: list[str], ax: Axes) -> None:
    """How far two differ, as a bar with its 95 % interval, above what independent networks would."""
    share = name == "disagreement"
    at = ds.isel(checkpoint=1, other=0)
    bars = {f"{labels[0]},\n{labels[1]}": measured(at, name)}
    if share and "expected_disagreement" in ds:
        bars["independent\nnetworks"] = measured(at, "expected_disagreement")
    scale, form = (100, ".1f") if share else (1, ".3g")
    farthest = 0.0
    for i, (value, colour) in enumerate(zip(bars.values(), (COLOURS[1], "0.8"), strict=False)):
        top, error = scale * value.value, 1.96 * scale * np.nan_to_num(value.se)
        ax.barh(i, top, 0.5, color=colour)
        if error:
            ax.errorbar(top, i, xerr=error, color="black", elinewidth=0.8, capsize=1.5)
        ax.annotate(f"{top:{form}}", (top + error, i), (4, 0), textcoords="offset points", va="center")
        farthest = np.nanmax([farthest, top + error])
    ax.set_yticks(range(len(bars)), list(bars))
    ax.set_ylim(len(bars) - 0.4, -0.6)
    ax.set_xlim(0, 1.2 * farthest or 1.0)
    ax.tick_params(axis="y", length=0)
    ax.set_title(_apart(ds, name), loc="left", fontsize=7)


def _apart(ds: xr.Dataset, name: str) -> str:
    """The title of how far functions differ."""
    split = str(ds.attrs["function_split"])
    share = name == "disagreement"
    return f"disagreement on {split} examples [%]" if share else f"rms difference of outputs, {split} examples"


def _layers(ds: xr.Dataset, labels: list[str], ax: Axes) -> None:
    """CKA of each layer with that of the first checkpoint."""
    ds = told_layers(ds)
    places = range(ds.sizes["layer"])
    for i in range(1, len(labels)):
        at = ds.isel(checkpoint=i, other=0)
        shifted = np.array(places) + 0.06 * (i - len(labels) / 2)
        ax.errorbar(
            shifted, at.cka, 1.96 * at.cka_se, color=COLOURS[i % len(COLOURS)], ls=DASHES[(i - 1) % len(DASHES)],
            marker=MARKERS[i % len(MARKERS)], elinewidth=0.8, capsize=1.5, label=labels[i],
        )  # fmt: skip
    layers = [str(name) for name in ds.layer.values]
    ax.set_xticks(places, layers, **tilted(layers, 2.8))
    lowest = float(np.nanmin((ds.cka - 1.96 * ds.cka_se.fillna(0)).isel(other=0)))
    ax.set_ylim(min(lowest, 0.98) - 0.02, 1.01) if lowest > 0.5 else ax.set_ylim(min(lowest, 0.0) - 0.02, 1.03)
    ax.set_title(f"CKA with {labels[0]}, bars: 95 % intervals", loc="left", fontsize=7)
    ax.legend(loc="best")

"""Two or more minima at a glance: every diagnostic with its interval, disagreement, and layers."""

from __future__ import annotations

import math
import textwrap
from enum import Enum
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pnanalysis.analyses.diagnostics import Diagnostic, diagnostics, estimate_of, layers_without_output, short_names
from pnanalysis.estimates import Estimate
from pnanalysis.plots.style import COLOURS, DASHES, MARKERS, PAGE, PLAIN, QUIET, new_figure, tilted

_PER_ROW = 4
_LETTERS = 30  # of a line above a panel
_Z95 = 1.96  # standard errors to either side that make a 95 % interval
_NEVER_NEGATIVE = {"loss", "error", "n_outliers", "effective_rank"}
_LEFT_OUT = {"norm", "negative_mass", "block_trace", "block_norm", "eigenvalue"}
_DARK = "#555555"  # of the legend's samples
_THIN, _THICK = 1.0, 2.4  # bars of both errors, and of the probes alone


class _Fill(Enum):
    """How a marker is filled, and what that says of the difference from the first checkpoint."""

    FULL = "first, or significantly different"
    HOLLOW = "not significantly different"
    HALF = "difference of unknown error"

    def marker(self, colour: str) -> dict[str, Any]:
        inside = "white" if self is _Fill.HOLLOW else colour
        style = "left" if self is _Fill.HALF else "full"
        return {"color": colour, "mfc": inside, "mfcalt": "white", "fillstyle": style}


def comparison(ds: xr.Dataset) -> Figure:
    """A small panel per diagnostic, then how far the checkpoints differ as functions, overall and layer by layer.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``comparison``.

    Returns
    -------
    Figure
        Bars are 95 % intervals; where numbers have the errors of probes and of examples, the thick inner part is the
        interval of the probes alone. A marker is hollow if the (paired) difference from the first checkpoint is not
        significant, and half filled if the error of the difference is unknown. Paired differences have smaller errors
        than the bars suggest. Each panel's label (``ax.get_label()``) is the key of its diagnostic.
    """
    rows = [row for row in diagnostics(ds) if row.values and row.variable not in _LEFT_OUT]
    k = ds.sizes["checkpoint"]
    n_rows = -(-len(rows) // _PER_ROW)
    height, foot = 0.6 + 0.2 * k, 1.6 + 0.22 * k
    figure = new_figure(PAGE, n_rows * height + foot + 0.2)
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(n_rows * height, foot))[:, 0]
    panels = upper.subplots(n_rows, _PER_ROW, sharey=True, squeeze=False).ravel()
    used = {_Fill.FULL}
    for ax, row in zip(panels, rows, strict=False):
        fills = [_Fill.FULL, *(_fill(difference) for difference in row.against_first)]
        _dots(row, fills, ax)
        used.update(fills)
    for ax in panels[len(rows) :]:
        ax.remove()
    panels[0].set_yticks(range(k), short_names(ds))
    panels[0].set_ylim(k - 0.5, -0.5)
    _functions(ds, lower)
    bars = [Line2D([], [], color=_DARK, lw=_THIN, label="95 % interval")]
    if any(math.isfinite(value.data_se) for row in rows for value in row.values):
        bars.append(Line2D([], [], color=_DARK, lw=_THICK, label="its part from probes"))
    marks = [Line2D([], [], marker="o", ls="none", label=f.value, **f.marker(_DARK)) for f in _Fill if f in used]
    samples = [*bars, *marks]
    figure.legend(handles=samples, loc="outside lower left", ncols=4 if len(samples) <= 4 else 3, fontsize=6.5)
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
    names, has_layers = short_names(ds), "cka" in ds
    axes = figure.subplots(1, 1 + has_layers, squeeze=False, width_ratios=(1.0, 1.2)[: 1 + has_layers])[0]
    variable = "disagreement" if "disagreement" in ds else "rms_difference"
    if len(names) == 2:
        _pair_as_bar(ds, variable, names, axes[0])
    else:
        _heat_map(ds, variable, names, axes[0])
    axes[0].set_label(variable)
    axes[0].set_title(_title_of_distance(ds, variable), loc="left", fontsize=7)
    if has_layers:
        _cka_by_layer(ds, names, axes[1])
        axes[1].set_label("cka")


def _dots(row: Diagnostic, fills: list[_Fill], ax: Axes) -> None:
    """One number of each checkpoint with its interval; the first is also a line to compare with."""
    is_never_negative = row.variable in _NEVER_NEGATIVE
    for i, (value, fill) in enumerate(zip(row.values, fills, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        low, high = _interval(value)
        low = max(low, 0.0) if is_never_negative else low
        ax.plot([low, high], [i, i], color=colour, lw=_THIN, zorder=2)
        if math.isfinite(value.data_se):
            half = _Z95 * math.sqrt(max(value.se**2 - value.data_se**2, 0.0))
            inner = [max(value.value - half, low), value.value + half]
            ax.plot(inner, [i, i], color=colour, lw=_THICK, solid_capstyle="butt", zorder=2)
        ax.plot(value.value, i, MARKERS[i % len(MARKERS)], zorder=3, **fill.marker(colour))
    ax.axvline(row.values[0].value, color=QUIET, lw=0.6, ls=":", zorder=0)
    ax.set_label(row.key)
    ax.set_title(textwrap.fill(f"{row.title} [%]" if row.percent else row.title, _LETTERS), loc="left", fontsize=7)
    ax.xaxis.set_major_locator(MaxNLocator(3))
    if row.percent:
        ax.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    else:
        ax.ticklabel_format(axis="x", useOffset=False)
    ax.tick_params(axis="y", length=0)
    ax.margins(x=0.12)
    is_all_zero = not any(value.value for value in row.values)
    if is_never_negative and is_all_zero:
        ax.set_xlim(-0.002, 0.02)  # nothing lies to the left of zero
    else:
        _widen(ax)


def _widen(ax: Axes) -> None:
    """Give the x axis a least width: differences far below it are round-off or of no interest."""
    low, high = ax.get_xlim()
    size = max(abs(low), abs(high))
    least = 2e-3 * size if size > 1e-9 else 1.0
    if high - low < least:
        ax.set_xlim((low + high - least) / 2, (low + high + least) / 2)


def _fill(difference: Estimate) -> _Fill:
    if math.isnan(difference.p):
        return _Fill.HALF
    return _Fill.FULL if difference.is_significant else _Fill.HOLLOW


def _interval(value: Estimate) -> tuple[float, float]:
    if math.isfinite(value.low):
        return value.low, value.high
    return value.value - _Z95 * value.se, value.value + _Z95 * value.se


def _heat_map(ds: xr.Dataset, variable: str, names: list[str], ax: Axes) -> None:
    """How far each two differ, as a matrix with its numbers."""
    import seaborn as sns

    is_fraction = variable == "disagreement"
    values = ds[variable].values * (100 if is_fraction else 1)
    is_self = np.eye(len(names), dtype=bool)
    top = float(np.nanmax(values)) or 1.0
    sns.heatmap(
        values, mask=is_self | np.isnan(values), annot=True, fmt=".1f" if is_fraction else ".2g", ax=ax, cbar=False,
        cmap=sns.light_palette(PLAIN, as_cmap=True), vmin=0, vmax=2 * top,  # light cells under dark numbers
        annot_kws={"fontsize": 7, "color": "0.15"}, linewidths=1, xticklabels=False, yticklabels=False,
    )  # fmt: skip
    middles = np.arange(len(names)) + 0.5
    ax.set_yticks(middles, names)
    ax.set_xticks(middles, names, **tilted(names, 2.4))
    ax.tick_params(length=0)


def _pair_as_bar(ds: xr.Dataset, variable: str, names: list[str], ax: Axes) -> None:
    """How far two differ, as a bar with its 95 % interval; below it, the value for independent networks."""
    is_fraction = variable == "disagreement"
    at = ds.isel(checkpoint=1, other=0)
    bars = {f"{names[0]},\n{names[1]}": estimate_of(at, variable)}
    if is_fraction and "expected_disagreement" in ds:
        bars["independent\nnetworks"] = estimate_of(at, "expected_disagreement")
    scale, form = (100, ".1f") if is_fraction else (1, ".3g")
    farthest = 0.0
    for i, (value, colour) in enumerate(zip(bars.values(), (COLOURS[1], "0.8"), strict=False)):
        top, error = scale * value.value, _Z95 * scale * np.nan_to_num(value.se)
        ax.barh(i, top, 0.5, color=colour)
        if error:
            ax.errorbar(top, i, xerr=error, color="black", elinewidth=0.8, capsize=1.5)
        ax.annotate(f"{top:{form}}", (top + error, i), (4, 0), textcoords="offset points", va="center")
        farthest = np.nanmax([farthest, top + error])
    ax.set_yticks(range(len(bars)), list(bars))
    ax.set_ylim(len(bars) - 0.4, -0.6)
    ax.set_xlim(0, 1.2 * farthest or 1.0)
    ax.tick_params(axis="y", length=0)


def _title_of_distance(ds: xr.Dataset, variable: str) -> str:
    split = str(ds.attrs["function_split"])
    if variable == "disagreement":
        return f"disagreement on {split} examples [%]"
    return f"rms difference of outputs, {split} examples"


def _cka_by_layer(ds: xr.Dataset, names: list[str], ax: Axes) -> None:
    """CKA of each layer with the same layer of the first checkpoint."""
    ds = layers_without_output(ds)
    places = np.arange(ds.sizes["layer"])
    for i in range(1, len(names)):
        at = ds.isel(checkpoint=i, other=0)
        shifted = places + 0.06 * (i - len(names) / 2)  # so that error bars do not hide one another
        ax.errorbar(
            shifted, at.cka, _Z95 * at.cka_se, color=COLOURS[i % len(COLOURS)], ls=DASHES[(i - 1) % len(DASHES)],
            marker=MARKERS[i % len(MARKERS)], elinewidth=0.8, capsize=1.5, label=names[i],
        )  # fmt: skip
    layers = [str(name) for name in ds.layer.values]
    ax.set_xticks(places, layers, **tilted(layers, 2.8))
    lowest = float(np.nanmin((ds.cka - _Z95 * ds.cka_se.fillna(0)).isel(other=0)))
    if lowest > 0.5:  # zoom in on the similar
        ax.set_ylim(min(lowest, 0.98) - 0.02, 1.01)
    else:
        ax.set_ylim(min(lowest, 0.0) - 0.02, 1.03)
    ax.set_title(f"CKA with {names[0]}, bars: 95 % intervals", loc="left", fontsize=7)
    ax.legend(loc="best")

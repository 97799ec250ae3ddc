"""Percentiles of activations as training goes on (the paper's figure 14)."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pnanalysis.errors import PnError
from pnanalysis.plots.style import (
    CHAMPION,
    COLUMN,
    DASHES,
    MARKERS,
    PAGE,
    PLAIN,
    QUIET,
    RESTART,
    champion_of,
    few,
    grid,
    integer_axis,
    leftmost,
    legend_in_gap,
    log_axis,
    lowest,
    panels,
    tilted,
)

#: Activations with two asymptotes, and those among them that cannot exceed one in size.
BOUNDED = {"tanh", "sigmoid", "hardtanh", "hardsigmoid", "softsign"}
_PLAIN = (PLAIN, RESTART, "#CC79A7", "#000000")  # of each run
_FINEST = 2.0**-24  # from one to the next single-precision number below it


def saturation(ds: xr.Dataset, *, quantile: float = 98.0, absolute: bool = True, gap: bool = False) -> Figure:
    """A percentile of the activations against epoch, a panel a layer: plain thick below, later iterations thin over it.

    Bands, or bars, are one standard error over the images to either side. Markers are spread over the epochs, so that
    iterations of equal values are all to be seen.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``saturation``; several runs are told apart by line style, a user's own weights are points beside one
        another, and what a :class:`pnanalysis.SaturationMonitor` has recorded lies along training steps.
    quantile : float
        In percent.
    absolute : bool
        Of the absolute activations, or of the signed ones.
    gap : bool
        Draw how far the percentile of the absolute activations is from one, on a logarithmic axis: where networks
        saturate, all else is next to one. Layers of activations that may exceed one are left out, and gaps below the
        resolution of single precision, 6e-8, are drawn there.

    Returns
    -------
    Figure

    Raises
    ------
    PnError
        If the percentile has not been measured, or no activation is bounded by one of which to draw gaps.
    """
    if quantile not in ds["quantile"].values:
        measured = ", ".join(f"{level:g}" for level in ds["quantile"].values)
        raise PnError(f"the {quantile:g}th percentile has not been measured; there are {measured}")
    if gap:
        ds = ds.isel(layer=bounded_layers(ds))
        if not ds.sizes["layer"]:
            raise PnError("no activation of this network is bounded by 1, so that none has a distance from it")
    name = "abs_percentile" if absolute or gap else "percentile"
    values, errors = ds[name].sel(quantile=quantile), ds[f"{name}_se"].sel(quantile=quantile)
    names = [str(c) for c in ds.checkpoint.values] if "checkpoint" in ds.dims else []
    turned = tilted(names, PAGE / grid(ds.sizes["layer"])[1]) if names else {}
    height = 1.6 + (0.035 * max(map(len, names)) if turned else 0)
    figure, axes = panels(ds.sizes["layer"], height, alone=COLUMN * 1.6, sharex=True, sharey=True)
    for ax, layer in zip(axes, ds.layer.values, strict=True):
        at, error = (1 - values if gap else values).sel(layer=layer), errors.sel(layer=layer)
        if names:
            low, high = _band(at.values, error.values, gap)
            middle = np.clip(at.values, low, high)
            ax.errorbar(range(len(names)), middle, [middle - low, high - middle], fmt="o", color=PLAIN, capsize=2)
            ax.set_xticks(range(len(names)), names, **turned)
            ax.set_xlim(-0.5, len(names) - 0.5)
        elif "step" in at.dims:
            _curve(ax, at, error, "step", gap, color=PLAIN, lw=1.2)
        else:
            _iterations(ax, ds, at, error, gap)
        if not names:
            integer_axis(ax, at["step" if "step" in at.dims else "epoch"].values)
        ax.set_title(str(layer))
    if gap:
        drawn = np.maximum(1 - values.values[np.isfinite(values.values)], _FINEST)
        log_axis(axes[0], float(drawn.min()), float(drawn.max()))
        if drawn.min() <= _FINEST:
            for ax in axes:
                ax.axhline(_FINEST, color=QUIET, lw=0.8, ls=":", zorder=0, label="least gap that is resolved")
    what = f"{quantile:g}th percentile\nof {'|activation|' if absolute or gap else 'activation'}"
    for ax in leftmost(axes):
        ax.set_ylabel(f"1 − {what}" if gap else what)
    for ax in lowest(axes):
        ax.set_xlabel("checkpoint" if names else "training step" if "step" in ds.dims else "epoch")
    handles, labels = axes[0].get_legend_handles_labels()
    if handles and not legend_in_gap(figure, handles, labels, len(axes)):
        figure.legend(handles, labels, loc="outside right center")
    return figure


def saturation_gap(ds: xr.Dataset, quantile: float = 98.0) -> Figure:
    """:func:`saturation` as the distance of the percentile from the asymptote at one, on a logarithmic axis."""
    return saturation(ds, quantile=quantile, gap=True)


def bounded_layers(ds: xr.Dataset) -> np.ndarray:
    """Which layers, ``(layer,)``, have activations that cannot exceed one in size."""
    return np.isin(ds.activation.values, sorted(BOUNDED))


def _iterations(ax: Axes, ds: xr.Dataset, values: xr.DataArray, errors: xr.DataArray, gap: bool) -> None:
    """A curve an iteration; runs differ by dashes."""
    several = "run" in values.dims
    runs = [(values.sel(run=r), errors.sel(run=r)) for r in values.run.values] if several else [(values, errors)]
    for k, ((one, band), dashes) in enumerate(zip(runs, DASHES, strict=False)):
        champion = champion_of(one) if several else champion_of(ds)
        there = [int(i) for i in one.iteration.values if bool(one.sel(iteration=i).notnull().any())]
        for place, iteration in enumerate(there):
            at = one.sel(iteration=iteration)
            look = iteration_look(iteration, champion, place, len(there), int(at.notnull().sum()))
            if iteration == 0:
                look |= {"color": _PLAIN[k % len(_PLAIN)], "lw": 3.0 / (1 + k)}
            look |= {"ls": dashes, "label": iteration_name(iteration, champion, one)}
            _curve(ax, at, band.sel(iteration=iteration), "epoch", gap, **look)


def _curve(ax: Axes, values: xr.DataArray, errors: xr.DataArray, along: str, gap: bool, **look: Any) -> None:
    """A line and its band of one standard error."""
    there = values.notnull().values
    x, y, error = values[along].values[there], values.values[there], errors.values[there]
    low, high = _band(y, error, gap)
    ax.plot(x, np.maximum(y, _FINEST) if gap else y, **look)
    ax.fill_between(x, low, high, color=look["color"], alpha=0.15, lw=0)


def _band(values: np.ndarray, errors: np.ndarray, gap: bool) -> tuple[np.ndarray, np.ndarray]:
    """One standard error to either side; on a logarithmic axis, from what single precision resolves upwards."""
    low, high = values - errors, values + errors
    return (np.maximum(low, _FINEST), np.maximum(high, _FINEST)) if gap else (low, high)


def iteration_look(iteration: int, champion: int, place: int, n: int, n_points: int) -> dict[str, Any]:
    """How an iteration is drawn, the ``place``-th of ``n``: plain thick below, others thin, with markers in turn."""
    if iteration == 0:
        return {"color": PLAIN, "lw": 3.0, "alpha": 0.8, "marker": few(n_points), "ms": 5, "solid_capstyle": "round"}
    colour = CHAMPION if iteration == champion else colormaps["Greys"](0.45 + 0.5 * place / n)
    step = max(1, min(n - 1, n_points // 2))
    return {
        "color": colour, "lw": 1.4 if iteration == champion else 0.8, "marker": MARKERS[place % len(MARKERS)],
        "mfc": colour if iteration == champion else "white", "mew": 0.8,
        "ms": 3.5 if step >= n - 1 else 3 + 4 * (n - place) / n,  # within one another where all lie on one point
        "markevery": ((place - 1) % step, step), "zorder": 4 if iteration == champion else 3,
    }  # fmt: skip


def iteration_name(iteration: int, champion: int, one: xr.DataArray) -> str:
    text = "plain" if iteration == 0 else f"iteration {iteration}"
    text += " (champion)" if iteration == champion else ""
    return f"{one.run.item()}: {text}" if "run" in one.coords else text

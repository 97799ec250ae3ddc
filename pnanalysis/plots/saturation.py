"""Percentiles of activations during training (the paper's figure 14)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pnanalysis.activations.functions import BOUNDED_BY_ONE
from pnanalysis.errors import PnError
from pnanalysis.plots.style import (
    BLACK,
    CHAMPION,
    COLUMN,
    DASHES,
    MARKERS,
    PAGE,
    PLAIN,
    PURPLE,
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

_PLAIN = (PLAIN, RESTART, PURPLE, BLACK)  # one for each run
_FINEST = 2.0**-24  # distance from one to the next smaller single-precision number


def saturation(ds: xr.Dataset, *, quantile: float = 98.0, absolute: bool = True, gap: bool = False) -> Figure:
    """A percentile of the activations against epoch, one panel per layer: plain thick, later iterations thin over it.

    Bands, or bars, are one standard error over the images to either side. Markers of different iterations lie at
    different epochs, so that curves of equal values all stay visible.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``saturation``. Several runs differ by line style; your own weights are points side by side; records of a
        :class:`pnanalysis.SaturationMonitor` lie along training steps.
    quantile : float
        In percent.
    absolute : bool
        Use absolute rather than signed activations.
    gap : bool
        Draw the distance of the percentile of the absolute activations from one, on a logarithmic axis: in saturated
        networks the percentiles themselves are all close to one. Layers whose activations may exceed one are left
        out, and gaps below the resolution of single precision are drawn at it, 6e-8.

    Returns
    -------
    Figure

    Raises
    ------
    PnError
        If the percentile has not been measured, or gaps are requested and no activation is bounded by one.
    """
    if quantile not in ds["quantile"].values:
        levels = ", ".join(f"{level:g}" for level in ds["quantile"].values)
        raise PnError(f"the {quantile:g}th percentile has not been measured; choose one of {levels}")
    if gap:
        ds = ds.isel(layer=bounded_layers(ds))
        if not ds.sizes["layer"]:
            raise PnError("no activation of this network is bounded by 1, so none has a distance from it")
    name = "abs_percentile" if absolute or gap else "percentile"
    values, errors = ds[name].sel(quantile=quantile), ds[f"{name}_se"].sel(quantile=quantile)
    values = 1 - values if gap else values
    names = [str(c) for c in ds.checkpoint.values] if "checkpoint" in ds.dims else []
    rotation = tilted(names, PAGE / grid(ds.sizes["layer"])[1]) if names else {}
    height = 1.6 + (0.035 * max(map(len, names)) if rotation else 0)
    figure, axes = panels(ds.sizes["layer"], height, alone=COLUMN * 1.6, sharex=True, sharey=True)
    along = "checkpoint" if names else "step" if "step" in ds.dims else "epoch"
    for ax, layer in zip(axes, ds.layer.values, strict=True):
        at, se = values.sel(layer=layer), errors.sel(layer=layer)
        if along == "checkpoint":
            _points(ax, at, se, gap)
            ax.set_xticks(range(len(names)), names, **rotation)
        elif along == "step":
            _curve(ax, at, se, "step", gap, color=PLAIN, lw=1.2)
        else:
            _iterations(ax, ds, at, se, gap)
        if along != "checkpoint":
            integer_axis(ax, at[along].values)
        ax.set(title=str(layer), xlabel="", ylabel="")
    if gap:
        _scale_gaps(values.values[np.isfinite(values.values)], axes)
    quantity = f"{quantile:g}th percentile\nof {'|activation|' if absolute or gap else 'activation'}"
    for ax in leftmost(axes):
        ax.set_ylabel(f"1 − {quantity}" if gap else quantity)
    for ax in lowest(axes):
        ax.set_xlabel("training step" if along == "step" else along)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles and not legend_in_gap(figure, handles, labels, len(axes)):
        figure.legend(handles, labels, loc="outside right center")
    return figure


def saturation_gap(ds: xr.Dataset, quantile: float = 98.0) -> Figure:
    """:func:`saturation` as the distance of the percentile from the asymptote at one, on a logarithmic axis."""
    return saturation(ds, quantile=quantile, gap=True)


def bounded_layers(ds: xr.Dataset) -> np.ndarray:
    """Whether each layer's activations, ``(layer,)``, are bounded by one in size."""
    return np.isin(ds.activation.values, sorted(BOUNDED_BY_ONE))


def _scale_gaps(gaps: np.ndarray, axes: Sequence[Axes]) -> None:
    """A logarithmic axis; a line marks the smallest gap that single precision resolves if any gap reaches it."""
    drawn = np.maximum(gaps, _FINEST)
    log_axis(axes[0], float(drawn.min()), float(drawn.max()))
    if drawn.min() <= _FINEST:
        for ax in axes:
            ax.axhline(_FINEST, color=QUIET, lw=0.8, ls=":", zorder=0, label="smallest gap that is resolved")


def _points(ax: Axes, values: xr.DataArray, errors: xr.DataArray, gap: bool) -> None:
    """Checkpoints side by side: unrelated files are not joined by a line."""
    low, high = _band(values.values, errors.values, gap)
    middle = np.clip(values.values, low, high)
    ax.errorbar(range(len(middle)), middle, [middle - low, high - middle], fmt="o", color=PLAIN, capsize=2)
    ax.set_xlim(-0.5, len(middle) - 0.5)


def _iterations(ax: Axes, ds: xr.Dataset, values: xr.DataArray, errors: xr.DataArray, gap: bool) -> None:
    """A curve for each iteration; runs differ by dashes."""
    several = "run" in values.dims
    runs = [(values.sel(run=r), errors.sel(run=r)) for r in values.run.values] if several else [(values, errors)]
    for k, ((one, band), dashes) in enumerate(zip(runs, DASHES, strict=False)):
        champion = champion_of(one) if several else champion_of(ds)
        # of several runs, the shorter ones are padded with NaN iterations
        present = [int(i) for i in one.iteration.values if bool(one.sel(iteration=i).notnull().any())]
        for place, iteration in enumerate(present):
            at = one.sel(iteration=iteration)
            look = iteration_look(iteration, champion, place, len(present), int(at.notnull().sum()))
            if iteration == 0:
                look |= {"color": _PLAIN[k % len(_PLAIN)], "lw": 3.0 / (1 + k)}
            look |= {"ls": dashes, "label": iteration_name(iteration, champion, one)}
            _curve(ax, at, band.sel(iteration=iteration), "epoch", gap, **look)


def _curve(ax: Axes, values: xr.DataArray, errors: xr.DataArray, along: str, gap: bool, **look: Any) -> None:
    """A line and its band of one standard error."""
    import seaborn as sns

    known = values.notnull().values
    x, y, se = values[along].values[known], values.values[known], errors.values[known]
    low, high = _band(y, se, gap)
    shown = np.maximum(y, _FINEST) if gap else y
    sns.lineplot(x=x, y=shown, ax=ax, errorbar=None, legend=False, mec=look["color"], **look)
    ax.fill_between(x, low, high, color=look["color"], alpha=0.15, lw=0)  # errors come with the data


def _band(values: np.ndarray, errors: np.ndarray, gap: bool) -> tuple[np.ndarray, np.ndarray]:
    """One standard error to either side; on a logarithmic axis cut at what single precision resolves."""
    low, high = values - errors, values + errors
    return (np.maximum(low, _FINEST), np.maximum(high, _FINEST)) if gap else (low, high)


def iteration_look(iteration: int, champion: int, place: int, n: int, n_points: int) -> dict[str, Any]:
    """Line style of an iteration, the ``place``-th of ``n``: plain thick, others thin, each with its own marker."""
    if iteration == 0:
        return {"color": PLAIN, "lw": 3.0, "alpha": 0.8, "marker": few(n_points), "ms": 5, "solid_capstyle": "round"}
    colour = CHAMPION if iteration == champion else colormaps["Greys"](0.45 + 0.5 * place / n)
    step = max(1, min(n - 1, n_points // 2))
    return {
        "color": colour, "lw": 1.4 if iteration == champion else 0.8, "marker": MARKERS[place % len(MARKERS)],
        "mfc": colour if iteration == champion else "white", "mew": 0.8,
        # too few points for a place each: markers of different size stay visible inside one another
        "ms": 3.5 if step >= n - 1 else 3 + 4 * (n - place) / n,
        "markevery": ((place - 1) % step, step), "zorder": 4 if iteration == champion else 3,
    }  # fmt: skip


def iteration_name(iteration: int, champion: int, one: xr.DataArray) -> str:
    """An iteration's name in a legend, after its run's if several runs have been stacked."""
    text = "plain" if iteration == 0 else f"iteration {iteration}"
    text += " (champion)" if iteration == champion else ""
    return f"{one.run.item()}: {text}" if "run" in one.coords else text

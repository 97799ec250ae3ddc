"""Descents on a surface of two parameters, such as the two-well function: paths, surfaces and basins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from pnanalysis.plots.style import (
    BLUE,
    COLUMN,
    DASHES,
    GREEN,
    ORANGE,
    OVERLAY,
    PAGE,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
    new_figure,
    own_axes,
)

_COLOURS = (VERMILION, SKY, ORANGE, GREEN, PURPLE, YELLOW, BLUE)  # bright first: they lie on dark contours
_NO_WELL = "#dddddd"
_LEVELS = 24  # contours


def descent(ds: xr.Dataset, surfaces: xr.Dataset | None = None, iteration: int = 0, ax: Axes | None = None) -> Axes:
    """Paths of the descents over the contours of the surface.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``descent``.
    surfaces : xarray.Dataset, optional
        Kind ``surface``; without it only the paths are drawn.
    iteration : int
        Which iteration's surface to draw; 0 is the unpenalised one.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ax = own_axes(ax, COLUMN * 1.4, 2.8)
    if surfaces is not None:
        drawn = _contours(surfaces.sel(iteration=iteration), ax)
        figure = ax.get_figure()
        assert figure is not None
        figure.colorbar(drawn, ax=ax, label="value", fraction=0.05)
    for k in ds["iteration"].values:
        _path(ds.sel(iteration=k), _legend_text(ds, k), k, ax)
    _label_axes(ax)
    ax.set_aspect("equal", adjustable="box")
    ax.legend(**OVERLAY)
    return ax


def surface(ds: xr.Dataset, descents: xr.Dataset | None = None) -> Figure:
    """The surface of each iteration, f, f_1, f_2, ..., with the path that descends it.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``surface``.
    descents : xarray.Dataset, optional
        Kind ``descent``, of the same iterations.

    Returns
    -------
    Figure
    """
    iterations = ds["iteration"].values
    n_columns = min(len(iterations), 3)
    n_rows = -(-len(iterations) // n_columns)
    width = max(PAGE * n_columns / 3, COLUMN * 1.3)
    height = (width - 1.2) / n_columns * float(np.ptp(ds.y.values) / np.ptp(ds.x.values))  # of a panel without labels
    figure = new_figure(width, (height + 0.4) * n_rows + 0.15)
    axes = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
    levels = MaxNLocator(_LEVELS).tick_values(float(ds["value"].min()), float(ds["value"].max()))
    for ax in axes.flat[len(iterations) :]:
        ax.set_visible(False)
    for k, ax in zip(iterations, axes.flat, strict=False):
        drawn = _contours(ds.sel(iteration=k), ax, levels)
        ax.set_title("$f$" if k == 0 else f"$f_{{{k}}}$")
        if descents is not None:
            _path(descents.sel(iteration=k), _legend_text(descents, k), k, ax)
            ax.legend(**OVERLAY)
        _label_axes(ax)
        ax.set_aspect("equal", adjustable="box")
        ax.xaxis.set_major_locator(MaxNLocator(5, prune="upper"))
        ax.label_outer()
    figure.colorbar(drawn, ax=axes, label="value", fraction=0.05)
    return figure


def surface_3d(ds: xr.Dataset, descents: xr.Dataset | None = None, iteration: int = 0) -> Figure:
    """One iteration's surface in perspective with the path that descends it, at the height of this surface.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``surface``.
    descents : xarray.Dataset, optional
        Kind ``descent``.
    iteration : int

    Returns
    -------
    Figure
    """
    value = ds["value"].sel(iteration=iteration)
    figure = new_figure(COLUMN * 1.3, 3.6)
    ax = figure.add_subplot(projection="3d", computed_zorder=False)  # else parts of the path vanish in the surface
    x, y = np.meshgrid(ds["x"], ds["y"])
    ax.plot_surface(x, y, value, cmap="cividis", alpha=0.85, linewidth=0, rcount=80, ccount=80)
    if descents is not None:
        path = descents["path"].sel(iteration=iteration)
        xs, ys = path.sel(component="x"), path.sel(component="y")
        height = value.interp(x=xs, y=ys).values
        ax.plot(
            xs, ys, height, color=_COLOURS[iteration % len(_COLOURS)], lw=2, label=_legend_text(descents, iteration)
        )
        ax.legend(**OVERLAY)
    _label_axes(ax)
    ax.set_zlabel("value")
    return figure


def basin(ds: xr.Dataset, ax: Axes | None = None) -> Axes:
    """A map of the well that each start ends in; grey starts end in none.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``basin``.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ax = own_axes(ax, COLUMN * 1.4, 2.8)
    n = ds.sizes["well"]
    colours = [_NO_WELL, *(_COLOURS[k % len(_COLOURS)] for k in range(n))]
    # wells are numbered from 0 and "no well" is -1: limits half-way between put each number in its own colour
    limits: dict[str, Any] = {"vmin": -1.5, "vmax": n - 0.5}
    ax.pcolormesh(ds["x"], ds["y"], ds["basin"], cmap=ListedColormap(colours), alpha=0.75, rasterized=True, **limits)
    for k in range(n):
        x, y = ds["minimum"].isel(well=k).values
        text = f"value {_number(float(ds['minimum_value'][k]))}: {float(ds['share'][k]):.0%} of starts"
        ax.plot(x, y, "*", ms=10, mec="black", mfc=colours[k + 1], label=text, ls="")
        ax.contour(ds["x"], ds["y"], ds["basin"] == k, levels=[0.5], colors="black", linewidths=0.5)
    fraction_in_none = float((ds["basin"] < 0).mean())
    handles = ax.get_legend_handles_labels()[0]
    if fraction_in_none:
        handles.append(Patch(fc=_NO_WELL, alpha=0.75, label=f"in no well: {fraction_in_none:.0%}"))
    _label_axes(ax)
    ax.set_aspect("equal", adjustable="box")
    ax.legend(handles=handles, **OVERLAY)
    return ax


def _contours(ds: xr.Dataset, ax: Axes, levels: int | Sequence[float] = _LEVELS) -> ContourSet:
    drawn = ax.contourf(ds["x"], ds["y"], ds["value"], levels=levels, cmap="cividis")
    ax.contour(ds["x"], ds["y"], ds["value"], levels=levels, colors="white", linewidths=0.3, alpha=0.6)
    return drawn


def _path(ds: xr.Dataset, label: str, iteration: int, ax: Axes) -> None:
    """A path in the dashes of its iteration, with a dark rim that sets it off from the contours."""
    x, y = ds["path"].sel(component="x").values, ds["path"].sel(component="y").values
    colour, dashes = _COLOURS[iteration % len(_COLOURS)], DASHES[iteration % len(DASHES)]
    ax.plot(x, y, color="black", lw=2.8)
    ax.plot(x, y, color=colour, lw=1.6, ls=dashes, label=label)
    ax.plot(x[0], y[0], "o", color="white", mec="black", ms=4)
    ax.plot(x[-1], y[-1], "*", color=colour, mec="black", ms=9)


def _legend_text(ds: xr.Dataset, iteration: int) -> str:
    """The iteration and the unpenalised value at its end point."""
    name = "plain" if iteration == 0 else f"{ds.attrs.get('strategy', 'iteration')} {iteration}"
    return f"{name}: {_number(float(ds['end_value'].sel(iteration=iteration)))}"


def _number(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def _label_axes(ax: Axes) -> None:
    ax.set_xlabel("x")
    ax.set_ylabel("y")

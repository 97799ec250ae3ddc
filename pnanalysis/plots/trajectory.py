"""Trajectories through parameter space (the paper's figure 6)."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pnanalysis.errors import PnError
from pnanalysis.plots.style import CHAMPION, COLUMN, PAGE, PLAIN, QUIET, RESTART, new_figure, own_axes

_WHOLE = "all"
_PER_ROW = 3
#: Each projection's title, and the variable with its axes' shares.
_PROJECTIONS = {
    "plane": ("plane through the end points", "explained_variance_plane"),
    "pca": ("principal components", "explained_variance"),
    "pca_end": ("principal components about the plain end", "explained_variance_end"),
    "random": ("random plane", "explained_variance_random"),
}


def trajectory(ds: xr.Dataset, ax: Axes | None = None, *, projection: str | None = None, layer: str = _WHOLE) -> Axes:
    """The paths of all iterations on a plane; plain and champion in colour, restarts dotted.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``trajectory``.
    ax : Axes, optional
    projection : {"plane", "pca", "pca_end", "random"}
        By default the first of these that the dataset has.
    layer : str
        Of a dataset with layers.

    Returns
    -------
    Axes

    Raises
    ------
    PnError
        If the dataset does not have the projection or the layer.
    """
    projection = projection or next(name for name in [*_PROJECTIONS, "none"] if name in ds or name == "none")
    if projection not in ds:
        raise PnError(f"the trajectory has no projection {projection!r}; there are {', '.join(_there(ds)) or 'none'}")
    ax = own_axes(ax, COLUMN * 1.3, COLUMN * 1.1)
    at = _at_layer(ds, layer)
    _paths(ax, at, projection)
    first, second = _shares(at, projection)
    if projection == "plane":
        farthest = float(np.nanmax(at.plane_residual))
        ax.set_xlabel(f"along start to plain end [parameter units]{first}")
        ax.set_ylabel(f"across, towards the other end{second}")
        ax.set_title(f"distance of the points from this plane: up to {farthest:.2g}", loc="left", fontsize=7)
    else:
        noun = "direction" if projection == "random" else "component"
        ax.set_xlabel(f"first {noun}{first}")
        ax.set_ylabel(f"second {noun}{second}")
        ax.set_title(_PROJECTIONS[projection][0], loc="left", fontsize=7)
    ax.legend(fontsize=6.5)
    return ax


def principal_components(ds: xr.Dataset, ax: Axes | None = None) -> Axes:
    """:func:`trajectory` on the first two principal components."""
    return trajectory(ds, ax, projection="pca")


def trajectories(ds: xr.Dataset) -> Figure:
    """The paths on every projection that the dataset has, a panel each."""
    names = _there(ds)
    if not names:
        raise PnError("the trajectory has no projections; give some to pn.trajectory")
    columns = min(len(names), 2)
    figure = new_figure(PAGE, 3.1 * -(-len(names) // columns))
    axes = figure.subplots(-(-len(names) // columns), columns, squeeze=False).ravel()
    for ax, name in zip(axes, names, strict=False):
        trajectory(ds, ax, projection=name)
        ax.get_legend().remove()
    for ax in axes[len(names) :]:
        ax.remove()
    handles, texts = axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper right", ncols=len(texts))
    return figure


def trajectory_layers(ds: xr.Dataset, projection: str | None = None) -> Figure:
    """The paths on one projection, a panel a layer.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``trajectory``, made with ``per_layer=True``.
    projection : str, optional
        By default ``pca``, or the first that the dataset has.

    Returns
    -------
    Figure

    Raises
    ------
    PnError
        If the dataset has no layers.
    """
    if "layer" not in ds.dims:
        raise PnError("the trajectory has no layers; make it with per_layer=True (--per-layer)")
    projection = projection or ("pca" if "pca" in ds else _there(ds)[0])
    figure, axes = _panels(ds)
    for ax, layer in zip(axes, ds.layer.values, strict=True):
        at = ds.sel(layer=layer)
        ax.set_title(_title(layer), loc="left")
        if not bool(at[projection].isel(component=slice(2)).notnull().any()):
            ax.text(0.5, 0.5, "spans no plane", transform=ax.transAxes, ha="center", color="0.4")
            continue
        _paths(ax, at, projection)
        first, second = _shares(at, projection)
        ax.set_xlabel(f"first axis{first}")
        ax.set_ylabel(f"second{second}")
    figure.suptitle(_PROJECTIONS[projection][0], x=0.01, ha="left", fontsize="medium")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=4)
    return figure


def cosines(ds: xr.Dataset) -> Figure:
    """Cosines with the earlier end points, which the penalty pushes down, against epoch; a panel a layer.

    A faint line for each later iteration and earlier end, a bold one for each iteration's mean over these ends.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``trajectory`` of a run with more than one iteration.

    Returns
    -------
    Figure

    Raises
    ------
    PnError
        If there are no earlier end points.
    """
    ends = ds.isel(end=(ds.end_run == ds.run.values[0]).values)
    iterations = [int(i) for i in dict.fromkeys(ds.iteration.values[(ds.run == ds.run.values[0]).values])]
    later = [i for i in iterations if (ends.end_iteration < i).any()]
    if not later:
        raise PnError("no iteration has earlier end points; cosines need a run of several iterations")
    figure, axes = _panels(ds, shared=True)
    champion = int(ds.attrs.get("champion", -1))
    for ax, layer in zip(axes, ds.layer.values if "layer" in ds.dims else [_WHOLE], strict=True):
        at = _at_layer(ends, layer)
        ax.set_title(_title(layer), loc="left")
        for i in later:
            chosen = ((ds.run == ds.run.values[0]) & (ds.iteration == i)).values
            one = at.cosine.isel(checkpoint=chosen, end=(ends.end_iteration < i).values)
            colour = CHAMPION if i == champion else QUIET
            mean = one.mean("end")
            ax.plot(one.epoch, one.values, color=colour, lw=0.5, alpha=0.6, zorder=3 if i == champion else 2)
            text = f"champion (iteration {i})" if i == champion else "other iterations"
            ax.plot(one.epoch, mean, color=colour, lw=1.6, marker=".", zorder=4 if i == champion else 2, label=text)
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    for ax in axes[::_PER_ROW]:
        ax.set_ylabel("cosine with earlier ends")
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=2)
    figure.suptitle("bold: mean over the earlier ends", x=0.01, ha="left", fontsize="medium")
    return figure


def _paths(ax: Axes, ds: xr.Dataset, projection: str) -> None:
    points = ds[projection].isel(component=slice(2))
    points = points.isel(draw=0) if "draw" in points.dims else points
    champion, first = int(ds.attrs.get("champion", -1)), str(ds.run.values[0])
    paths = list(dict.fromkeys(zip(ds.run.values.tolist(), ds.iteration.values.tolist(), strict=True)))
    named: set[str] = set()
    for run, iteration in sorted(paths, key=lambda path: _rank(path, first, champion)):
        chosen = (ds.run == run).values & (ds.iteration == iteration).values
        x, y = points.values[chosen].T
        colour, width, dashes, text = _look(run == first, iteration, champion, run)
        ax.plot(x, y, marker=".", ms=2.5, color=colour, lw=width, ls=dashes, label=None if text in named else text)
        ax.plot(x[-1], y[-1], "s", color=colour, ms=4.5, zorder=4)
        named.add(text)
    ax.plot(*points.values[0], "o", color="black", ms=5, zorder=5, label="start")
    ax.set_aspect("equal", adjustable="datalim")


def _panels(ds: xr.Dataset, shared: bool = False) -> tuple[Figure, list[Any]]:
    n = ds.sizes.get("layer", 1)
    columns = min(n, _PER_ROW)
    n_rows = -(-n // columns)
    figure = new_figure(PAGE if n > 1 else COLUMN * 1.3, 2.0 * n_rows + 0.4)
    axes = list(figure.subplots(n_rows, columns, squeeze=False, sharey=shared).ravel())
    for ax in axes[n:]:
        ax.remove()
    return figure, axes[:n]


def _at_layer(ds: xr.Dataset, layer: str) -> xr.Dataset:
    if "layer" not in ds.dims:
        if layer != _WHOLE:
            raise PnError("the trajectory has no layers; make it with per_layer=True (--per-layer)")
        return ds
    if layer not in ds.layer.values:
        raise PnError(f"no layer {layer!r}; there are {', '.join(map(str, ds.layer.values))}")
    return ds.sel(layer=layer)


def _there(ds: xr.Dataset) -> list[str]:
    return [name for name in _PROJECTIONS if name in ds]


def _shares(ds: xr.Dataset, projection: str) -> list[str]:
    """What the axes explain, as text behind their names."""
    shares = ds[_PROJECTIONS[projection][1]]
    shares = shares.isel(draw=0) if "draw" in shares.dims else shares
    return [" (below 0.1%)" if share < 1e-3 else f" ({share:.1%})" for share in shares.values[:2]]


def _title(layer: str) -> str:
    return "whole network" if layer == _WHOLE else str(layer)


def _rank(path: tuple[str, int], first: str, champion: int) -> int:
    run, iteration = path
    return 0 if run != first else 1 if iteration not in (0, champion) else 2 if iteration else 3


def _look(own: bool, iteration: int, champion: int, run: str) -> tuple[str, float, str, str]:
    if not own:
        return RESTART, 0.7, ":", run
    if iteration == 0:
        return PLAIN, 1.6, "-", "plain" + (" (champion)" if champion == 0 else "")
    if iteration == champion:
        return CHAMPION, 1.4, "--", f"champion (iteration {iteration})"
    return QUIET, 0.7, "-", "other iterations"

"""Trajectories through parameter space (the paper's figure 6)."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pnanalysis.errors import PnError
from pnanalysis.plots.style import (
    CHAMPION,
    COLUMN,
    OTHERS,
    PLAIN,
    RESTART,
    few,
    integer_axis,
    leftmost,
    legend_above,
    legend_in_gap,
    lowest,
    others,
    own_axes,
    panels,
)

_WHOLE = "all"
_ROUNDING = 1e-6  # of what coordinates are sums of
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
    _on_plane(ax, at_layer(ds, layer), projection)
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
    figure, axes = panels(len(names), 2.8, alone=COLUMN * 1.4, per_row=2)
    for ax, name in zip(axes, names, strict=True):
        _on_plane(ax, at_layer(ds), name)
    handles, texts = axes[0].get_legend_handles_labels()
    if not legend_in_gap(figure, handles, texts, len(axes), per_row=2):
        legend_above(figure, handles, texts)
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
    figure, axes = panels(ds.sizes["layer"], 2.0)
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
    handles, texts = axes[0].get_legend_handles_labels()
    if not legend_in_gap(figure, handles, texts, len(axes)):
        legend_above(figure, handles, texts)
    return figure


def cosines(ds: xr.Dataset) -> Figure:
    """Cosines with the earlier end points, which the penalty pushes down, against epoch; a panel a layer.

    A faint line for each later iteration and earlier end, a stronger one for each iteration's mean over these ends.

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
    figure, axes = panels(ds.sizes.get("layer", 1), 1.9, alone=COLUMN * 1.5, sharex=True, sharey=True)
    champion = int(ds.attrs.get("champion", -1))
    for ax, layer in zip(axes, ds.layer.values if "layer" in ds.dims else [_WHOLE], strict=True):
        at = at_layer(ends, layer)
        ax.set_title(_title(layer), loc="left")
        for i in later:
            chosen = ((ds.run == ds.run.values[0]) & (ds.iteration == i)).values
            one = at.cosine.isel(checkpoint=chosen, end=(ends.end_iteration < i).values)
            best = i == champion
            colour, width, dashes = (CHAMPION, 1.6, "--") if best else (OTHERS, 1.0, "-")
            mean = one.mean("end")
            ax.plot(one.epoch, one.values, color=colour, lw=0.4, alpha=0.4)
            text = f"champion (iteration {i})" if best else others(later, champion)
            ax.plot(one.epoch, mean, color=colour, lw=width, ls=dashes, marker=few(len(mean)), zorder=2 + width,
                    label=text)  # fmt: skip
        integer_axis(ax, one.epoch.values)
    for ax in lowest(axes):
        ax.set_xlabel("epoch")
    for ax in leftmost(axes):
        ax.set_ylabel("cosine with earlier ends")
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    handles["a single earlier end"] = Line2D([], [], color=OTHERS, lw=0.4)
    legend_above(figure, list(handles.values()), [name if "single" in name else f"{name}, mean" for name in handles])
    return figure


def _on_plane(ax: Axes, at: xr.Dataset, projection: str) -> None:
    _paths(ax, at, projection)
    first, second = _shares(at, projection)
    if projection == "plane":
        farthest, size = float(np.nanmax(at.plane_residual)), float(np.nanmax(np.abs(at.plane)))
        far = f"points lie up to {farthest:.3g} off this plane"
        ax.set_xlabel(f"along start to plain end [parameter units]{first}")
        ax.set_ylabel(f"across, towards the other end{second}")
        title = far if farthest > _ROUNDING * size else "all points lie in this plane"
        ax.set_title(title, loc="left", fontsize=7)
    else:
        noun = "direction" if projection == "random" else "component"
        ax.set_xlabel(f"first {noun}{first}")
        ax.set_ylabel(f"second {noun}{second}")
        ax.set_title(_PROJECTIONS[projection][0], loc="left", fontsize=7)


def _paths(ax: Axes, ds: xr.Dataset, projection: str) -> None:
    points = ds[projection].isel(component=slice(2))
    points = points.isel(draw=0) if "draw" in points.dims else points
    champion, first = int(ds.attrs.get("champion", -1)), str(ds.run.values[0])
    paths = list(dict.fromkeys(zip(ds.run.values.tolist(), ds.iteration.values.tolist(), strict=True)))
    named: set[str] = set()
    rest = others([iteration for run, iteration in paths if run == first], champion)
    for run, iteration in sorted(paths, key=lambda path: _rank(path, first, champion)):
        chosen = (ds.run == run).values & (ds.iteration == iteration).values
        x, y = points.values[chosen].T
        colour, width, dashes, text = _look(run == first, iteration, champion, run, rest)
        ax.plot(x, y, marker=".", ms=2.5, color=colour, lw=width, ls=dashes, label=None if text in named else text)
        ax.plot(x[-1], y[-1], "s", color=colour, ms=3.5 + width, zorder=2 + 1 / width)
        named.add(text)
    ax.plot(*points.values[0], "o", color="black", ms=5, zorder=5, ls="none", label="start")
    ax.set_aspect("equal", adjustable="datalim")


def at_layer(ds: xr.Dataset, layer: str = _WHOLE) -> xr.Dataset:
    """One layer of trajectories, the whole network by default; all of a dataset that has no layers."""
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
    return 0 if run != first else 1 if iteration == 0 else 3 if iteration == champion else 2


def _look(own: bool, iteration: int, champion: int, run: str, rest: str) -> tuple[str, float, str, str]:
    if not own:
        return RESTART, 0.7, ":", run
    if iteration == 0:
        return PLAIN, 2.2, "-", "plain" + (" (champion)" if champion == 0 else "")
    if iteration == champion:
        return CHAMPION, 1.4, "--", f"champion (iteration {iteration})"
    return OTHERS, 0.7, "-", rest

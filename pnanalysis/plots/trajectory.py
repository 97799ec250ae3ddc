"""Trajectories through parameter space (the paper's figure 6)."""

from __future__ import annotations

from typing import Any, NamedTuple

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
#: Below the title of a plane.
_AXES = "axes in parameter units, with their shares of variance"
_ROUND_OFF = 1e-6  # relative to the size of the coordinates
#: Each projection's title, and the variable with the fractions of variance that its axes explain.
_PROJECTIONS = {
    "plane": ("plane through the end points", "explained_variance_plane"),
    "pca": ("principal components", "explained_variance"),
    "pca_end": ("principal components about the plain end", "explained_variance_end"),
    "random": ("random plane", "explained_variance_random"),
}


def trajectory(ds: xr.Dataset, ax: Axes | None = None, *, projection: str | None = None, layer: str = _WHOLE) -> Axes:
    """The paths of all iterations on a plane; plain and champion in colour, other runs dotted.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``trajectory``.
    ax : Axes, optional
    projection : {"plane", "pca", "pca_end", "random"}
        By default the first of these that the dataset has.
    layer : str
        One of the layers, if the dataset has any; by default the whole network.

    Returns
    -------
    Axes

    Raises
    ------
    PnError
        If the dataset does not have the projection or the layer.
    """
    projection = projection or next(iter(_projections(ds)), "none")
    if projection not in ds:
        known = ", ".join(_projections(ds)) or "none"
        raise PnError(f"the trajectory has no projection {projection!r}; available: {known}")
    ax = own_axes(ax, COLUMN * 1.3, COLUMN * 1.1)
    _on_plane(ax, at_layer(ds, layer), projection)
    ax.legend(fontsize=6.5)
    return ax


def principal_components(ds: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Draw :func:`trajectory` on the first two principal components."""
    return trajectory(ds, ax, projection="pca")


def trajectories(ds: xr.Dataset) -> Figure:
    """The paths on each projection that the dataset has, one panel per projection."""
    names = _projections(ds)
    if not names:
        raise PnError("the trajectory has no projections; pass some to pn.trajectory")
    figure, axes = panels(len(names), 2.8, alone=COLUMN * 1.4, per_row=2)
    for ax, name in zip(axes, names, strict=True):
        _on_plane(ax, at_layer(ds), name)
    handles, texts = axes[0].get_legend_handles_labels()
    if not legend_in_gap(figure, handles, texts, len(axes), per_row=2):
        legend_above(figure, handles, texts)
    return figure


def trajectory_layers(ds: xr.Dataset, projection: str | None = None) -> Figure:
    """The paths on one projection, one panel per layer.

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
    projection = projection or ("pca" if "pca" in ds else _projections(ds)[0])
    figure, axes = panels(ds.sizes["layer"], 2.0)
    for ax, layer in zip(axes, ds.layer.values, strict=True):
        at = ds.sel(layer=layer)
        ax.set_title(_title(layer), loc="left")
        if not bool(at[projection].isel(component=slice(2)).notnull().any()):
            ax.text(0.5, 0.5, "spans no plane", transform=ax.transAxes, ha="center", color="0.4")
            continue
        _paths(ax, at, projection)
        first, second = _explained(at, projection)
        ax.set_xlabel(f"first axis{first}")
        ax.set_ylabel(f"second{second}")
    figure.suptitle(_PROJECTIONS[projection][0], x=0.01, ha="left", fontsize="medium")
    handles, texts = axes[0].get_legend_handles_labels()
    if not legend_in_gap(figure, handles, texts, len(axes)):
        legend_above(figure, handles, texts)
    return figure


def cosines(ds: xr.Dataset) -> Figure:
    """Cosines with the earlier end points, which the penalty reduces, against epoch; one panel per layer.

    A thin line for each later iteration and earlier end point, a thick one for the mean over these end points.

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
        raise PnError("no iteration has earlier end points; draw cosines of a run with several iterations")
    figure, axes = panels(ds.sizes.get("layer", 1), 1.9, alone=COLUMN * 1.5, sharex=True, sharey=True)
    champion = int(ds.attrs.get("champion", -1))
    for ax, layer in zip(axes, ds.layer.values if "layer" in ds.dims else [_WHOLE], strict=True):
        at = at_layer(ends, layer)
        ax.set_title(_title(layer), loc="left")
        for i in later:
            chosen = ((ds.run == ds.run.values[0]) & (ds.iteration == i)).values
            one = at.cosine.isel(checkpoint=chosen, end=(ends.end_iteration < i).values)
            if i == champion:
                _cosines_of_iteration(ax, one, f"champion (iteration {i})", color=CHAMPION, lw=1.6, ls="--")
            else:
                _cosines_of_iteration(ax, one, others(later, champion), color=OTHERS, lw=1.0, ls="-")
        integer_axis(ax, one.epoch.values)
        ax.set(xlabel="", ylabel="")
    for ax in lowest(axes):
        ax.set_xlabel("epoch")
    for ax in leftmost(axes):
        ax.set_ylabel("cosine with earlier ends")
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    single = Line2D([], [], color=OTHERS, lw=0.4)
    texts = [*(f"{name}, mean" for name in handles), "a single earlier end"]
    legend_above(figure, [*handles.values(), single], texts)
    return figure


def _cosines_of_iteration(ax: Axes, one: xr.DataArray, text: str, **look: Any) -> None:
    """Cosines ``(checkpoint, end)`` of one iteration: a thin line for each end, a thick one for their mean."""
    import seaborn as sns

    n_ends = one.sizes["end"]
    long = {
        "x": np.repeat(one.epoch.values, n_ends),
        "y": one.transpose("checkpoint", "end").values.ravel(),
        "units": np.tile(np.arange(n_ends), one.sizes["checkpoint"]),
    }
    sns.lineplot(**long, estimator=None, color=look["color"], lw=0.4, alpha=0.4, legend=False, ax=ax)
    del long["units"]
    sns.lineplot(
        **long, estimator="mean", errorbar=None, marker=few(one.sizes["checkpoint"]), mec=look["color"], label=text,
        zorder=2 + look["lw"], legend=False, ax=ax, **look,
    )  # fmt: skip


def _on_plane(ax: Axes, at: xr.Dataset, projection: str) -> None:
    _paths(ax, at, projection)
    first, second = _explained(at, projection)
    if projection == "plane":
        farthest, size = float(np.nanmax(at.plane_residual)), float(np.nanmax(np.abs(at.plane)))
        far = f"points lie up to {farthest:.3g} off this plane"
        ax.set_xlabel(f"along start to plain end{first}")
        ax.set_ylabel(f"across, towards the other end{second}")
        title = far if farthest > _ROUND_OFF * size else "all points lie in this plane"
    else:
        noun = "direction" if projection == "random" else "component"
        ax.set_xlabel(f"first {noun}{first}")
        ax.set_ylabel(f"second {noun}{second}")
        title = _PROJECTIONS[projection][0]
    ax.set_title(f"{title}\n{_AXES}", loc="left", fontsize=7)


def _paths(ax: Axes, ds: xr.Dataset, projection: str) -> None:
    points = ds[projection].isel(component=slice(2))
    points = points.isel(draw=0) if "draw" in points.dims else points
    champion, first = int(ds.attrs.get("champion", -1)), str(ds.run.values[0])
    paths = list(dict.fromkeys(zip(ds.run.values.tolist(), ds.iteration.values.tolist(), strict=True)))
    named: set[str] = set()
    rest = others([iteration for run, iteration in paths if run == first], champion)
    for run, iteration in sorted(paths, key=lambda path: _drawing_order(path, first, champion)):
        chosen = (ds.run == run).values & (ds.iteration == iteration).values
        x, y = points.values[chosen].T
        look = _look(run == first, iteration, champion, run, rest)
        text = None if look.text in named else look.text
        ax.plot(x, y, marker=".", ms=2.5, color=look.colour, lw=look.width, ls=look.dashes, label=text)
        # thin paths have small squares on top, so that ends at one place are all visible
        ax.plot(x[-1], y[-1], "s", color=look.colour, ms=3.5 + look.width, zorder=2 + 1 / look.width)
        named.add(look.text)
    ax.plot(*points.values[0], "o", color="black", ms=5, zorder=5, ls="none", label="start")
    ax.set_aspect("equal", adjustable="datalim")


def at_layer(ds: xr.Dataset, layer: str = _WHOLE) -> xr.Dataset:
    """One layer of trajectories, by default the whole network; a dataset without layers as it is."""
    if "layer" not in ds.dims:
        if layer != _WHOLE:
            raise PnError("the trajectory has no layers; make it with per_layer=True (--per-layer)")
        return ds
    if layer not in ds.layer.values:
        raise PnError(f"no layer {layer!r}; the layers are {', '.join(map(str, ds.layer.values))}")
    return ds.sel(layer=layer)


def _projections(ds: xr.Dataset) -> list[str]:
    return [name for name in _PROJECTIONS if name in ds]


def _explained(ds: xr.Dataset, projection: str) -> list[str]:
    """Fractions of variance that the axes explain, as text after the axes' names."""
    fractions = ds[_PROJECTIONS[projection][1]]
    fractions = fractions.isel(draw=0) if "draw" in fractions.dims else fractions
    return [" (below 0.1%)" if fraction < 1e-3 else f" ({fraction:.1%})" for fraction in fractions.values[:2]]


def _title(layer: str) -> str:
    return "whole network" if layer == _WHOLE else str(layer)


def _drawing_order(path: tuple[str, int], first: str, champion: int) -> int:
    """Other runs lie below the plain path, then other iterations, and the champion on top."""
    run, iteration = path
    return 0 if run != first else 1 if iteration == 0 else 3 if iteration == champion else 2


class _Look(NamedTuple):
    """How a path is drawn and called."""

    colour: str
    width: float
    dashes: str
    text: str


def _look(is_own: bool, iteration: int, champion: int, run: str, rest: str) -> _Look:
    if not is_own:
        return _Look(RESTART, 0.7, ":", run)
    if iteration == 0:
        return _Look(PLAIN, 2.2, "-", "plain" + (" (champion)" if champion == 0 else ""))
    if iteration == champion:
        return _Look(CHAMPION, 1.4, "--", f"champion (iteration {iteration})")
    return _Look(OTHERS, 0.7, "-", rest)

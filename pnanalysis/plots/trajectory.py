"""Trajectories through parameter space (the paper's figure 6)."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from pnanalysis.plots.style import CHAMPION, COLUMN, PLAIN, QUIET, RESTART, own_axes


def trajectory(ds: xr.Dataset, ax: Axes | None = None, *, projection: str = "plane") -> Axes:
    """The paths of all iterations on a plane; plain and champion in colour, restarts dotted.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``trajectory``.
    ax : Axes, optional
    projection : {"plane", "pca"}
        The plane through start and end points, or the first two principal components.

    Returns
    -------
    Axes
    """
    ax = own_axes(ax, COLUMN * 1.3, COLUMN * 1.1)
    points = ds[projection].isel(component=slice(2))
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
    start = points.values[0]
    ax.plot(*start, "o", color="black", ms=5, zorder=5, label="start")
    ax.set_aspect("equal", adjustable="datalim")
    shares = ds.explained_variance.values
    names = ("first", "second")
    if projection == "pca":
        ax.set_xlabel(f"{names[0]} principal component ({shares[0]:.1%} of the variance)")
        ax.set_ylabel(f"{names[1]} principal component ({shares[1]:.1%})")
    else:
        farthest = float(np.nanmax(ds.plane_residual))
        ax.set_xlabel("along start to plain end [parameter units]")
        ax.set_ylabel("across, towards the other end")
        ax.set_title(f"distance of the points from this plane: up to {farthest:.2g}", loc="left", fontsize=7)
    ax.legend(fontsize=6.5)
    return ax


def principal_components(ds: xr.Dataset, ax: Axes | None = None) -> Axes:
    """:func:`trajectory` on the first two principal components."""
    return trajectory(ds, ax, projection="pca")


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

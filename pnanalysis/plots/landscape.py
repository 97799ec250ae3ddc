"""The loss between and around minima: profiles along paths, contours on planes."""

from __future__ import annotations

import json
from textwrap import fill

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from pnanalysis.errors import PnError
from pnanalysis.estimates import Estimate
from pnanalysis.plots.style import (
    BLACK,
    CHAMPION,
    COLUMN,
    ORANGE,
    PAGE,
    PLAIN,
    QUIET,
    RESTART,
    SKY,
    label,
    new_figure,
    others,
    own_axes,
)
from pnanalysis.plots.trajectory import at_layer

_LOOKS = {"line": (PLAIN, "-", "o"), "aligned": (ORANGE, "--", "s"), "curve": (BLACK, ":", "^")}
_LEVELS = 16  # contours
_ROUND_OFF = 1e-6  # relative to the loss: in single precision a barrier of zero comes out this large


def barrier(ds: xr.Dataset) -> Figure:
    """Loss, and error if available, along each path, with bands of one standard error; barriers in the legend.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``barrier``.

    Returns
    -------
    Figure
        One column per quantity, one row per split.
    """
    quantities = [("loss", "barrier")] + ([("error", "error_barrier")] if "error" in ds else [])
    n_splits = ds.sizes["split"]
    figure = new_figure(PAGE if len(quantities) > 1 else COLUMN * 1.2, 0.4 + 2.1 * n_splits)
    panels = figure.subplots(n_splits, len(quantities), squeeze=False, sharex=True)
    for row, split in zip(panels, ds.split.values, strict=True):
        for ax, (name, top) in zip(row, quantities, strict=True):
            _profiles(ax, ds.sel(split=split), name, top)
            ax.set_ylabel(f"{split} {label(ds[name])}")
    names = json.loads(ds.attrs.get("checkpoints", '["first end", "second end"]'))
    for ax in panels[-1]:
        ax.set_xlabel(f"position, {names[0]} (0) to {names[1]} (1)")
    return figure


def landscape(
    ds: xr.Dataset,
    ax: Axes | None = None,
    *,
    trajectory: xr.Dataset | None = None,
    quantity: str = "loss",
    split: str | None = None,
) -> Axes:
    """Contours on a plane with the checkpoints that span it and, optionally, trajectories.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``landscape``.
    ax : Axes, optional
    trajectory : xarray.Dataset, optional
        Kind ``trajectory``, on the same plane (:func:`same_plane`), onto which its points are projected. If it has
        layers, the paths of the whole network are drawn.
    quantity : {"loss", "error"}
        Contours are denser at low values; everything above the 95 % quantile of the grid has one colour.
    split : str, optional
        By default the first.

    Returns
    -------
    Axes

    Raises
    ------
    PnError
        If the trajectories lie on another plane.
    """
    at = ds.isel(split=0) if split is None else ds.sel(split=split)
    values = at[quantity].values
    shape = float((ds.y[-1] - ds.y[0]) / (ds.x[-1] - ds.x[0]))
    ax = own_axes(ax, COLUMN / np.clip(shape, 1, 2) + 1.6, COLUMN * min(shape, 1) + 1.0)
    _contours(ds, values, f"{at.split.item()} {label(ds[quantity])}", ax)
    if trajectory is not None:
        _paths(ds, trajectory, ax)
    for marker, (name, (x, y)) in zip("osD", zip(ds.point.values, ds.point_position.values, strict=True), strict=False):
        ax.plot(x, y, marker, color="white", mec="black", ms=6, zorder=6, label=str(name), ls="")
    ax.set_xlim(float(ds.x[0]), float(ds.x[-1]))
    ax.set_ylim(float(ds.y[0]), float(ds.y[-1]))
    ax.set_aspect("equal", adjustable="box")
    ax.set_xlabel(label(ds.x))
    ax.set_ylabel(fill(label(ds.y), 26))
    ax.legend(fontsize=6.5, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, columnspacing=1.0)
    return ax


def same_plane(ds: xr.Dataset, trajectory: xr.Dataset | None) -> bool:
    """Whether trajectories have coordinates on the landscape's plane, one spanned by the same points."""
    points = ds.attrs.get("plane_points")
    return trajectory is not None and points is not None and points == trajectory.attrs.get("plane_points")


def _contours(ds: xr.Dataset, values: NDArray[np.float64], name: str, ax: Axes) -> None:
    """Filled contours and their colour bar."""
    levels = _levels(values[np.isfinite(values)])
    values = np.ma.masked_invalid(values)
    norm = BoundaryNorm(levels, 256, extend="max")  # evenly spaced colours for unevenly spaced levels
    drawn = ax.contourf(ds.x, ds.y, values, levels=levels, cmap="cividis", norm=norm, extend="max")
    ax.contour(ds.x, ds.y, values, levels=levels, colors="white", linewidths=0.3, alpha=0.6)
    figure = ax.get_figure()
    assert figure is not None
    bar = figure.colorbar(drawn, ax=ax, fraction=0.05, pad=0.03, spacing="uniform")
    bar.set_label(name)
    bar.set_ticks(levels[::3].tolist(), labels=[f"{level:.3g}" for level in levels[::3]])


def _levels(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Contour levels ``(_LEVELS + 1,)`` whose height above the lowest point grows by a constant factor."""
    low, high = values.min(), np.quantile(values, 0.95)
    return np.asarray(low + max(high - low, 1e-12) * np.append(0.0, np.geomspace(0.01, 1.0, _LEVELS)))


def _height(one: xr.Dataset, name: str, top: str) -> str:
    """A barrier's height as text; one of the size of round-off is none."""
    barrier = Estimate(float(one[top]), float(one[f"{top}_se"]))
    if abs(barrier.value) <= _ROUND_OFF * float(np.abs(one[name]).max()):
        return "no barrier"
    return barrier.text(percent=name == "error")


def _profiles(ax: Axes, ds: xr.Dataset, name: str, top: str) -> None:
    """One quantity along each path; ``top`` names the variable with its barrier."""
    n_paths = ds.sizes["path"]
    for k, path in enumerate(ds.path.values):
        one = ds.sel(path=path)
        _profile(ax, one, name, str(path), f"{path}: {_height(one, name, top)}", k / n_paths)
    if name == "error":
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    for end in (0.0, 1.0):
        ax.axvline(end, color="#bbbbbb", lw=0.6, zorder=0)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.13 * (n_paths + 1) * (high - low))  # room for the legend
    title = f"barrier of the {name} ± standard error"
    ax.legend(title=title, title_fontsize=6.5, fontsize=6.5, loc="upper left", alignment="left")


def _profile(ax: Axes, one: xr.Dataset, name: str, path: str, text: str, shift: float) -> None:
    """One path; ``shift`` in [0, 1) moves and shrinks its markers, so that paths of equal values stay visible."""
    colour, dashes, marker = _LOOKS.get(path, (QUIET, "-", "x"))
    x, y, se = one.position.values, one[name].values, np.nan_to_num(one[f"{name}_se"].values)
    step = max(1, len(x) // 8)
    ax.fill_between(x, y - se, y + se, color=colour, alpha=0.15, lw=0)
    ax.plot(x, y, color=colour, ls=dashes, marker=marker, ms=4.5 - 3 * shift, mfc="white",
            markevery=(int(shift * step), step), label=text)  # fmt: skip


def _paths(ds: xr.Dataset, trajectory: xr.Dataset, ax: Axes) -> None:
    """Trajectories over the contours, in bright colours; iterations other than plain and champion in black."""
    if not same_plane(ds, trajectory):
        raise PnError("these trajectories lie on another plane than the landscape; make both from the same runs")
    trajectory = at_layer(trajectory)
    champion, first = int(trajectory.attrs.get("champion", -1)), str(trajectory.run.values[0])
    seen: set[str] = set()
    paths = dict.fromkeys(zip(trajectory.run.values.tolist(), trajectory.iteration.values.tolist(), strict=True))
    rest = others([iteration for run, iteration in paths if run == first], champion)
    for run, iteration in paths:
        chosen = (trajectory.run == run).values & (trajectory.iteration == iteration).values
        x, y = trajectory.plane.values[chosen, :2].T
        colour, dashes, text = "black", ":", rest
        if run != first:
            colour, dashes, text = RESTART, ":", str(run)
        elif iteration == 0:
            colour, dashes, text = SKY, "-", "path of plain"
        elif iteration == champion:
            colour, dashes, text = CHAMPION, "--", "path of champion"
        ax.plot(x, y, color=colour, ls=dashes, marker=".", ms=3, lw=1.2, zorder=4, label=None if text in seen else text)
        seen.add(text)

"""The kink regression, many small networks trained at once: predictors, losses, probability of leaving a plateau."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pnanalysis.plots.style import (
    BLUE,
    COLUMN,
    DASHES,
    GREEN,
    MARKERS,
    OVERLAY,
    PAGE,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
    new_figure,
    own_axes,
)

_DARK_GREY = "#666666"
_GROUPS = (BLUE, VERMILION, GREEN, PURPLE, SKY)  # of one penalty weight each
_STRATEGY = {"persistent": BLUE, "restart": VERMILION}


def ensemble(ds: xr.Dataset) -> Figure:
    """Predictors, and next to them the losses: by iteration, or by seed if there is only one iteration.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``ensemble``.

    Returns
    -------
    Figure
    """
    figure = new_figure(PAGE, 2.8)
    left, right = figure.subplots(1, 2)
    predictors(ds, ax=left)
    (losses_by_iteration if ds.sizes["iteration"] > 1 else losses_by_seed)(ds, ax=right)
    for ax in (left, right):
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2)
    return figure


def predictors(ds: xr.Dataset, restarts: xr.Dataset | None = None, member: int = 0, ax: Axes | None = None) -> Axes:
    """The learned functions and the data: plain, the best of this dataset, and the best restart.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``ensemble``. With several iterations, plain and best are those of ``member``; with one, the first and the
        best of all members.
    restarts : xarray.Dataset, optional
        Kind ``ensemble``, the control; the best of all its trainings is drawn.
    member : int
        Which chain to draw.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ax = own_axes(ax, COLUMN * 1.4, 2.8)
    own = ds.isel(member=[member]) if ds.sizes["iteration"] > 1 else ds
    _predictor(own, (0, 0), "plain", _DARK_GREY, "-", ax)
    if restarts is not None:
        _best_predictor(restarts, ax)
    _best_predictor(own, ax)
    ax.plot(ds["data_x"], ds["data_y"], "o", color="black", ms=4.5, zorder=5, label="data")
    ax.set_xlabel("input")
    ax.set_ylabel("output")
    ax.legend(**OVERLAY)
    return ax


def losses_by_seed(ds: xr.Dataset, plateau: float | None = None, ax: Axes | None = None) -> Axes:
    """Final loss of the plain training of each member against its seed, with a histogram at the side.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``ensemble``.
    plateau : float, optional
        A loss to mark with a line.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ax = own_axes(ax, COLUMN * 1.4, 2.8)
    loss, seed = ds["final_loss"].isel(iteration=0), ds["seed"]
    best = int(loss.values.argmin())
    _plateau(plateau, ax)
    ax.plot(seed, loss, "o", ms=4, color=VERMILION, label=f"{len(loss)} trainings")
    ax.plot(
        seed[best], loss[best], "*", ms=10, color=VERMILION, mec="black", ls="", label=f"best: {float(loss[best]):.3g}"
    )
    ax.set_xlabel("seed")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylabel("mean squared error")
    ax.legend(**OVERLAY)
    _histogram_at_side(loss.values, ax)
    return ax


def _histogram_at_side(values: np.ndarray, ax: Axes) -> None:
    """How many values lie where along the y axis, in a narrow panel on the right."""
    import seaborn as sns

    side = ax.inset_axes((1.02, 0.0, 0.2, 1.0), sharey=ax)
    sns.histplot(y=values, bins=20, color=VERMILION, alpha=0.5, linewidth=0, ax=side)
    side.tick_params(axis="y", which="both", left=False, labelleft=False)
    side.xaxis.set_major_locator(MaxNLocator(2, integer=True))
    side.set(xlabel="trainings", ylabel="")
    sns.despine(ax=side, left=True)


def losses_by_iteration(ds: xr.Dataset, plateau: float | None = None, ax: Axes | None = None) -> Axes:
    """Loss at the end of each iteration of each chain; the champion of all chains is marked.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``ensemble``.
    plateau : float, optional
        A loss to mark with a line.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ax = own_axes(ax, COLUMN * 1.4, 2.8)
    loss = ds["final_loss"].transpose("member", "iteration").values
    iteration = ds["iteration"].values
    _plateau(plateau, ax)
    lams = ds["lam"].values
    groups = [(float(lam), lams == lam) for lam in np.unique(lams[~np.isnan(lams)])]
    if not groups:  # restarts have no penalty
        groups = [(np.nan, np.ones(len(loss), dtype=bool))]
    for k, (lam, mine) in enumerate(groups):
        colour = _STRATEGY["restart"] if np.isnan(lam) else _GROUPS[k % len(_GROUPS)]
        label = "restart" if np.isnan(lam) else f"persistent, λ = {lam:g}"
        labels = [label, *[None] * (mine.sum() - 1)]  # one entry in the legend for all chains of a group
        ax.plot(
            iteration, loss[mine].T, color=colour, lw=0.8, ls=DASHES[k % len(DASHES)], alpha=0.7,
            marker=MARKERS[k % len(MARKERS)], ms=3, label=labels,
        )  # fmt: skip
    member, best = np.unravel_index(loss.argmin(), loss.shape)
    champion = f"champion: {loss.min():.3g} at iteration {iteration[best]}"
    ax.plot(iteration[best], loss[member, best], "*", ms=10, color=YELLOW, mec="black", ls="", label=champion)
    ax.set_xlabel("iteration")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylabel("mean squared error")
    ax.legend(**OVERLAY)
    return ax


def escape(ds: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Probability of having left the plateau against iteration, with its interval, for each strategy.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``escape``.
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ax = own_axes(ax, PAGE, 2.8)
    for k, label in enumerate(ds["strategy"].values.tolist()):
        arm = ds.sel(strategy=label)
        is_control = bool(np.isnan(arm["lam"]))
        colour = _DARK_GREY if is_control else _GROUPS[k % len(_GROUPS)]
        text = f"{label} ({int(arm['n_starts'])} starts)"
        dashes, marker = DASHES[k % len(DASHES)], MARKERS[k % len(MARKERS)]
        ax.plot(ds["iteration"], arm["probability"], marker=marker, ls=dashes, ms=4, color=colour, label=text)
        ax.fill_between(ds["iteration"], arm["probability_low"], arm["probability_high"], fc=to_rgba(colour, 0.13),
                        ec=to_rgba(colour, 0.7), lw=0.5, ls=dashes)  # fmt: skip
    ax.set_ylim(-0.02, 1.02)
    ax.set_xlabel("iteration (trainings after the plain one)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylabel("fraction of starts off the plateau")
    level = f"bands: {ds.attrs.get('confidence', 0.95):.0%} intervals"
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title=level, alignment="left")
    return ax


def _best_predictor(ds: xr.Dataset, ax: Axes) -> None:
    loss = ds["final_loss"].transpose("iteration", "member").values
    iteration, member = np.unravel_index(loss.argmin(), loss.shape)
    strategy = ds.attrs.get("strategy", "training")
    _predictor(ds, (int(iteration), int(member)), f"best {strategy}", _STRATEGY.get(strategy, GREEN), "-", ax)


def _predictor(ds: xr.Dataset, which: tuple[int, int], label: str, colour: str, style: str, ax: Axes) -> None:
    one = ds.isel(iteration=which[0], member=which[1])
    text = f"{label} (loss {float(one['final_loss']):.3g})"
    ax.plot(ds["x"], one["prediction"], style, color=colour, lw=1.6, label=text)


def _plateau(plateau: float | None, ax: Axes) -> None:
    if plateau is not None:
        ax.axhline(plateau, color=_DARK_GREY, lw=1, ls=":", label=f"two-sided linear fit: {plateau:.3g}")

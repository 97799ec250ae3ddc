"""The figures of the page of results."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pnanalysis.plots.style import BLUE, GREEN, PAGE, VERMILION, log_axis, new_figure, style
from pnanalysis.reproduce.settings import PERSISTENT, RESTART

_COLOURS = {PERSISTENT: VERMILION, RESTART: GREEN}
_MARKERS = {PERSISTENT: "o", RESTART: "s"}
_DASHES = {PERSISTENT: "-", RESTART: "--"}


def errors(ds: xr.Dataset) -> Figure:
    """Test errors of single networks by iteration, and of ensembles by their size: a line for each seed."""
    with style():
        figure = new_figure(PAGE, 2.6)
        single, ensemble = figure.subplots(1, 2, sharey=True)
        _by_arm(single, ds, "test_error", "iteration", 0)
        single.set_ylabel("test error [%]")
        if "ensemble_error" in ds:
            _by_arm(ensemble, ds, "ensemble_error", "number of networks averaged", 1)
        single.legend()
    return figure


def _by_arm(ax: Axes, ds: xr.Dataset, name: str, label: str, first: int) -> None:
    for arm in (PERSISTENT, RESTART):
        rows = ds.isel(run=ds.arm.values == arm)
        for i, row in enumerate(rows[name].values):
            x = np.arange(len(row)) + first
            ax.plot(x, 100 * row, color=_COLOURS[arm], ls=_DASHES[arm], marker=_MARKERS[arm], lw=0.8, alpha=0.8,
                    label=arm if i == 0 else None)  # fmt: skip
    ax.set_xlabel(label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def kink(losses: Mapping[str, Mapping[str, np.ndarray]], left: float) -> Figure:
    """Share of starts that have left the plateau, and the median of the lowest loss, by number of trainings.

    Parameters
    ----------
    losses : mapping
        By data set and arm, shape (iteration, start).
    left : float
        The loss below which a network has left.
    """
    with style():
        figure = new_figure(PAGE, 2.6)
        share, best = figure.subplots(1, 2)
        widths = {name: 1.4 if i == 0 else 0.7 for i, name in enumerate(losses)}
        lowest, highest = np.inf, 0.0
        for name, by_arm in losses.items():
            for arm, values in by_arm.items():
                so_far = np.minimum.accumulate(values, axis=0)
                x = np.arange(1, len(values) + 1)
                options = {"color": _COLOURS[arm], "ls": _DASHES[arm], "lw": widths[name], "label": f"{name}, {arm}"}
                share.plot(x, (so_far < left).mean(1), **options)
                median = np.median(so_far, axis=1)
                best.plot(x, median, **options)
                lowest, highest = min(lowest, float(median.min())), max(highest, float(median.max()))
        share.set(xlabel="number of trainings", ylabel="share of starts off the plateau", xscale="log")
        share.set_ylim(-0.03, 1.03)
        best.set(xlabel="number of trainings", ylabel="lowest loss so far, median", xscale="log")
        log_axis(best, lowest, highest)
        share.legend()
    return figure


def saturation(values: Mapping[str, np.ndarray]) -> Figure:
    """The saturation measure by iteration, a line for each seed, persistent beside restarts."""
    with style():
        figure = new_figure(PAGE / 2, 2.4)
        ax = figure.add_subplot()
        for arm, rows in values.items():
            for i, row in enumerate(rows):
                ax.plot(np.arange(len(row)), row, color=_COLOURS[arm], ls=_DASHES[arm], marker=_MARKERS[arm], lw=0.8,
                        alpha=0.8, label=arm if i == 0 else None)  # fmt: skip
        ax.set(xlabel="iteration", ylabel="saturation measure, mean of layers")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend()
    return figure


def spectra(found: list[tuple[str, xr.Dataset]]) -> Figure:
    """Densities of the plain model and of the champion, or best restart, of one seed."""
    with style():
        figure = new_figure(PAGE, 2.6)
        axes = figure.subplots(1, len(found), squeeze=False, sharex=True, sharey=True).ravel()
        for ax, (title, ds) in zip(axes, found, strict=True):
            arm = title.partition(",")[0]
            names = {"plain": BLUE, "champion": _COLOURS[arm]}
            for contender, colour in names.items():
                density = ds.contender_density.sel(contender=contender)
                label = "best restart" if arm == RESTART and contender == "champion" else contender
                ax.plot(ds.eigenvalue, density, color=colour, label=label, ls="-" if contender == "plain" else "--")
            top = float(ds.contender_density.max())
            ax.set(xlabel="eigenvalue [loss]", yscale="log", ylim=(top * 1e-7, top * 2), title=title)
            ax.legend()
        axes[0].set_ylabel("spectral density [1 / loss]")
    return figure

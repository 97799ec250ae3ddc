"""The figures of the page of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pnanalysis.estimates import Estimate
from pnanalysis.plots.style import (
    BLUE,
    COLOURS,
    DASHES,
    GREEN,
    GREY,
    MARKERS,
    ORANGE,
    PAGE,
    VERMILION,
    legend_above,
    log_axis,
    new_figure,
    style,
)
from pnanalysis.plots.two_well import descent
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


def two_wells(descents: xr.Dataset, starts: np.ndarray, is_deep: np.ndarray) -> Figure:
    """The two descents of S1 over the surface, and random starts by the well that they lead to.

    Parameters
    ----------
    descents : xarray.Dataset
        Kind ``descent``.
    starts : ndarray, shape (start, 2)
    is_deep : ndarray of bool, shape (start,)
        Whether plain descent from there ends in the deeper well.
    """
    x, y = np.linspace(-4, 4, 161), np.linspace(-4, 2, 121)[:, None]
    surface = -np.exp(-((x - 2) ** 2 + (y + 2) ** 2) / 5) - 1.5 * np.exp(-((x + 2) ** 2 + (y + 1) ** 2))
    values = xr.Dataset({"value": (("iteration", "y", "x"), surface[None])}, {"iteration": [0], "y": y[:, 0], "x": x})
    with style():
        figure = new_figure(PAGE * 0.8, 4.2)
        ax = figure.add_subplot()
        descent(descents, values, ax=ax)
        for chosen, colour, marker, text in (
            (is_deep, GREEN, "^", "restart that finds the deeper well"), (~is_deep, "white", "v", "other restart")
        ):  # fmt: skip
            x_start, y_start = starts[chosen].T
            ax.scatter(x_start, y_start, s=18, c=colour, marker=marker, label=text, zorder=3, ec="black", lw=0.5)
        handles, names = ax.get_legend_handles_labels()
        if own := ax.get_legend():
            own.remove()
        legend_above(figure, handles, names)
    return figure


def activity(ds: xr.Dataset, champion: int) -> Figure:
    """Percentiles of activations by epoch, and their histograms at two stages: plain model, champion, last iteration.

    Parameters
    ----------
    ds : xarray.Dataset
        What is kept of a saturation dataset.
    champion : int
    """
    last = ds.sizes["iteration"] - 1
    shown = {last: ("last iteration", ORANGE, ":"), champion: ("champion", VERMILION, "--"), 0: ("plain", BLUE, "-")}
    if champion == 0:
        shown[0] = ("plain, the champion", BLUE, "-")
    stages = ds.stage_epoch.values if "stage_epoch" in ds else []
    with style():
        figure = new_figure(PAGE, 2.6)
        axes = figure.subplots(1, 1 + len(stages), squeeze=False).ravel()
        for iteration, (name, colour, dashes) in shown.items():
            at = ds.sel(iteration=iteration)
            percentile = at.abs_percentile.sel(quantile=98)
            for k, layer in enumerate(ds.layer.values):
                strength = 0.3 + 0.7 * k / max(ds.sizes["layer"] - 1, 1)
                axes[0].plot(ds.epoch, percentile.sel(layer=layer), color=colour, ls=dashes, alpha=strength, lw=1.0)
            for stage, ax in enumerate(axes[1:]):
                ax.plot(ds.bin, at.stage_histogram.isel(stage=stage).mean("layer"), color=colour, ls=dashes, label=name)
        axes[0].set(xlabel="epoch", ylabel="98th percentile of |activation|", title="by layer, later ones darker")
        for epoch, ax in zip(stages, axes[1:], strict=True):
            ax.set(xlabel="activation", title=f"epoch {int(epoch)}, mean of layers", yscale="log")
        if len(stages):
            axes[1].set_ylabel("density")
            axes[1].legend()
    return figure


def sweep(changes: Sequence[tuple[str, str, float, Estimate]]) -> Figure:
    """Changes of the saturation measure by strength, a panel for each width and a line for each initial scale.

    Parameters
    ----------
    changes : sequence of (str, str, float, Estimate)
        Width, initial scale, strength and change of each point.
    """
    widths = list(dict.fromkeys(width for width, *_ in changes))
    with style():
        figure = new_figure(PAGE, 2.6)
        axes = figure.subplots(1, len(widths), squeeze=False, sharey=True).ravel()
        for ax, width in zip(axes, widths, strict=True):
            mine = [each for each in changes if each[0] == width]
            scales = list(dict.fromkeys(scale for _, scale, *_ in mine))
            for k, scale in enumerate(scales):
                lams, found = zip(*((lam, change) for _, s, lam, change in mine if s == scale), strict=True)
                value = np.array([change.value for change in found])
                ends = np.array([[c.value - c.low, c.high - c.value] for c in found]).T
                look = {"color": COLOURS[k], "ls": DASHES[k % len(DASHES)], "marker": MARKERS[k]}
                x = np.array(lams) * 1.08 ** (k - len(scales) / 2)  # a little apart, so that no interval hides another
                ax.errorbar(x, value, np.nan_to_num(ends), lw=0.9, capsize=2, label=scale, **look)
            ax.axhline(0, color=GREY, lw=0.7)
            ax.set(xlabel="strength λ", xscale="log", title=f"width {width}")
            ax.legend(title="initial std")
        axes[0].set_ylabel("saturation, iterations − plain")
    return figure


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
        figure.legend(loc="outside upper right", ncols=2)  # lines of several seeds leave no room
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

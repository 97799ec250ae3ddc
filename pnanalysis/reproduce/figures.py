"""The figures of the page of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pnanalysis.plots.style import (
    BLACK,
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
from pnanalysis.reproduce.saturated import Change
from pnanalysis.reproduce.settings import PERSISTENT, RESTART

_COLOURS = {PERSISTENT: VERMILION, RESTART: GREEN}
_DASHES = {PERSISTENT: "-", RESTART: "--"}
_PERCENTILE_DIGITS = 1e-6  # to which cells keep percentiles near 1


def errors(ds: xr.Dataset) -> Figure:
    """Test errors of single networks by iteration, and of ensembles by their size: a line for each seed."""
    with style():
        figure = new_figure(PAGE, 2.8)
        single, ensemble = figure.subplots(1, 2, sharey=True)
        _by_arm(single, ds, "test_error", 0)
        single.set(xlabel="iteration", ylabel="test error [%]")
        if "ensemble_error" in ds:
            _by_arm(ensemble, ds, "ensemble_error", 1)
        ensemble.set_xlabel("number of networks averaged")
        legend_above(figure, *single.get_legend_handles_labels())
    return figure


def _by_arm(ax: Axes, ds: xr.Dataset, name: str, first: int) -> None:
    for arm in (PERSISTENT, RESTART):
        rows = ds.isel(run=ds.arm.values == arm)
        _by_seed(ax, arm, dict(zip(rows.seed.values.tolist(), 100 * rows[name].values, strict=True)), first)


def _by_seed(ax: Axes, arm: str, rows: Mapping[int, np.ndarray], first: int = 0) -> None:
    """A line for each seed of an arm, which has the seed's marker: the plain model is the same one in both arms."""
    for seed, row in rows.items():
        ax.plot(np.arange(len(row)) + first, row, color=_COLOURS[arm], ls=_DASHES[arm], lw=0.8,
                marker=MARKERS[seed % len(MARKERS)], label=f"{arm}, seed {seed}")  # fmt: skip
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def two_wells(descents: xr.Dataset, starts: np.ndarray, wells: np.ndarray) -> Figure:
    """The two descents of S1 over the surface, and random starts by the well that they lead to.

    Parameters
    ----------
    descents : xarray.Dataset
        Kind ``descent``.
    starts : ndarray, shape (start, 2)
    wells : ndarray of int, shape (start,)
        Where plain descent from there ends: 2 in the deeper well, 1 in the other, 0 on the way to either.
    """
    x, y = np.linspace(-4, 4, 161), np.linspace(-4, 2, 121)[:, None]
    surface = -np.exp(-((x - 2) ** 2 + (y + 2) ** 2) / 5) - 1.5 * np.exp(-((x + 2) ** 2 + (y + 1) ** 2))
    values = xr.Dataset({"value": (("iteration", "y", "x"), surface[None])}, {"iteration": [0], "y": y[:, 0], "x": x})
    with style():
        figure = new_figure(PAGE * 0.8, 4.2)
        ax = figure.add_subplot()
        descent(descents, values, ax=ax)
        for well, colour, marker, text in (
            (2, GREEN, "^", "start that leads to the deeper well"), (1, "white", "v", "to the other"),
            (0, BLACK, "X", "not arrived at the end"),
        ):  # fmt: skip
            x_start, y_start = starts[wells == well].T
            if x_start.size:
                ax.scatter(x_start, y_start, s=18, c=colour, marker=marker, label=text, zorder=3, ec=BLACK, lw=0.5)
        handles, names = ax.get_legend_handles_labels()
        if own := ax.get_legend():
            own.remove()
        legend_above(figure, handles, names)
    return figure


def activity(ds: xr.Dataset, champion: int) -> Figure:
    """How far the 98th percentile of activations is from the asymptote, by epoch, and histograms at two stages.

    Parameters
    ----------
    ds : xarray.Dataset
        What is kept of a saturation dataset.
    champion : int
        Drawn beside the plain model and the last iteration.
    """
    last = ds.sizes["iteration"] - 1
    shown = {0: ("plain, the champion" if champion == 0 else "plain", BLUE, "-", "o")}
    shown |= {last: ("last iteration", ORANGE, ":", "s"), champion: ("champion", VERMILION, "--", "^")} | shown
    stages = ds.stage_epoch.values if "stage_epoch" in ds else []
    with style():
        figure = new_figure(PAGE, 2.8)
        axes = figure.subplots(1, 1 + len(stages), squeeze=False).ravel()
        for iteration, (name, colour, dashes, marker) in shown.items():
            at = ds.sel(iteration=iteration)
            distance = 1 - at.abs_percentile.sel(quantile=98)
            for k, layer in enumerate(ds.layer.values):
                strength = 0.3 + 0.7 * k / max(ds.sizes["layer"] - 1, 1)
                axes[0].plot(ds.epoch, distance.sel(layer=layer).clip(_PERCENTILE_DIGITS), color=colour, ls=dashes,
                             marker=marker, alpha=strength, lw=1.0, label=name if strength == 1 else None)  # fmt: skip
            for stage, ax in enumerate(axes[1:]):
                ax.plot(ds.bin, at.stage_histogram.isel(stage=stage).mean("layer"), color=colour, ls=dashes)
        axes[0].set(xlabel="epoch", ylabel="1 − 98th percentile of |activation|", title="by layer, later ones darker",
                    yscale="log")  # fmt: skip
        for epoch, ax in zip(stages, axes[1:], strict=True):
            ax.set(xlabel="activation", title=f"epoch {int(epoch)}, mean of layers")
            densities = ds.stage_histogram.sel(iteration=list(shown)).mean("layer")
            lowest, highest = float(densities.where(densities > 0).min()), float(densities.max())
            log_axis(ax, lowest, highest)
            ax.set_ylim(0.9 * lowest, 1.1 * highest)
        if len(stages):
            axes[1].set_ylabel("density")
        legend_above(figure, *axes[0].get_legend_handles_labels())
    return figure


def sweep(changes: Sequence[Change]) -> Figure:
    """Changes of the saturation measure by strength: a row for each width, a column for each layer that is repelled,
    and a line for each initial scale.
    """
    widths, layers, scales = (
        list(dict.fromkeys(getattr(each, name) for each in changes)) for name in ("width", "layer", "scale")
    )
    lines: dict[str, Line2D] = {}
    with style():
        figure = new_figure(PAGE, 0.4 + 1.9 * len(widths))
        axes = figure.subplots(len(widths), len(layers), squeeze=False, sharex=True, sharey=True)
        for (row, width), (column, layer) in product(enumerate(widths), enumerate(layers)):
            ax = axes[row, column]
            for k, scale in enumerate(scales):
                mine = [each for each in changes if (each.width, each.layer, each.scale) == (width, layer, scale)]
                look = {"color": COLOURS[k], "ls": DASHES[k % len(DASHES)], "marker": MARKERS[k]}
                x, y = [each.lam for each in mine], [each.value for each in mine]
                (lines[scale],) = ax.plot(x, y, lw=0.9, **look)
            ax.axhline(0, color=GREY, lw=0.7)
            ax.set(xscale="log", title=f"{layer}, width {width}")
        for ax in axes[-1]:
            ax.set_xlabel("strength λ")
        figure.supylabel("saturation measure, iterations − plain", fontsize="medium")
        legend_above(figure, [*lines.values()], [f"initial std {scale}" for scale in lines])
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
                median = np.quantile(so_far, 0.5, axis=1, method="inverted_cdf")  # of one start: two may lie far apart
                best.plot(x, median, **options)
                lowest, highest = min(lowest, float(median.min())), max(highest, float(median.max()))
        share.set(xlabel="number of trainings", ylabel="share of starts off the plateau", xscale="log")
        share.set_ylim(-0.03, 1.03)
        best.set(xlabel="number of trainings", ylabel="lowest loss so far, median", xscale="log")
        log_axis(best, lowest, highest)
        share.legend()
    return figure


def saturation(values: Mapping[str, Mapping[int, np.ndarray]]) -> Figure:
    """The saturation measure by iteration, of both arms by seed."""
    with style():
        figure = new_figure(PAGE / 2, 2.8)
        ax = figure.add_subplot()
        for arm, rows in values.items():
            _by_seed(ax, arm, rows)
        ax.set(xlabel="iteration", ylabel="saturation measure, mean of layers")
        legend_above(figure, *ax.get_legend_handles_labels())
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
            widths = ds.kernel_width.values if "kernel_width" in ds else []
            title += f", kernel of width {widths[0]:.2g}" if len(widths) else ""
            ax.set(xlabel="eigenvalue [loss]", yscale="log", ylim=(top * 1e-7, top * 2), title=title)
            ax.legend()
        axes[0].set_ylabel("spectral density [1 / loss]")
    return figure

"""Sharpness over radii: the worst and the average case in each neighbourhood."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from pnanalysis.analyses.diagnostics import short_names
from pnanalysis.perturbation.neighbourhoods import KINDS
from pnanalysis.plots.style import (
    CHAMPION,
    COLOURS,
    DASHES,
    MARKERS,
    PAGE,
    PLAIN,
    QUIET,
    legend_above,
    log_axis,
    new_figure,
    tilted,
)

#: Of a panel without a title, in inches.
_HEIGHT = 1.75
_Z95 = 1.96


def sharpness(ds: xr.Dataset) -> Figure:
    """Rises of the loss over radii, a panel for each definition; those of single radii by checkpoint.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``sharpness``.

    Returns
    -------
    Figure
        The upper row shows the largest rises found, the lower one mean rises over random directions. Bands (or bars)
        are one standard error; dotted lines are what the second-order expansion of the loss gives.
    """
    return _over_radii(ds) if "radius_index" in ds.dims else _single(ds)


def _over_radii(ds: xr.Dataset) -> Figure:
    rows = [(name, f"{name}_quadratic", radius, title) for name, radius, title in _ROWS if name in ds]
    kinds = ds.neighbourhood.values
    has_flatness = "relative_flatness" in ds and bool(ds.relative_flatness.notnull().any())
    flat = (0.5 + 0.2 * ds.sizes["checkpoint"]) if has_flatness else 0.0
    figure = new_figure(PAGE, _HEIGHT * len(rows) + flat + 0.4)
    parts = [part for part in (_HEIGHT * len(rows), flat) if part]
    pieces = figure.subfigures(len(parts), 1, squeeze=False, height_ratios=parts)[:, 0]
    if rows:
        axes = pieces[0].subplots(len(rows), len(kinds), squeeze=False)
        for line, (name, quadratic, radius, title) in zip(axes, rows, strict=True):
            for ax, kind in zip(line, kinds, strict=True):
                _curves(ax, ds.sel(neighbourhood=kind), name, quadratic, radius)
                ax.set_title(f"{kind}", loc="left")
                ax.set_xlabel("radius" if name == "rise" else _spread(kind))
            line[0].set_ylabel(f"{title} [nat]")
        samples = [*axes[0, 0].get_legend_handles_labels()[0], *_samples(ds)]
        legend_above(figure, samples, [str(sample.get_label()) for sample in samples])
    if has_flatness:
        _flatness(pieces[-1].subplots(), ds)
    return figure


def _samples(ds: xr.Dataset) -> list[Artist]:
    """What the legend shows of expansions and bands."""
    found: list[Artist] = []
    if any(quadratic in ds and bool(ds[quadratic].notnull().any()) for quadratic in _QUADRATIC):
        found.append(Line2D([], [], color=_SAMPLE, ls=":", lw=0.8, label="second order"))
    return [*found, Patch(color=_SAMPLE, alpha=0.25, lw=0, label="± 1 standard error")]


#: Variables, their radii and what they are called.
_ROWS = (("rise", "radius", "largest rise found"), ("average", "average_radius", "mean rise"))
_QUADRATIC = tuple(f"{name}_quadratic" for name, _, _ in _ROWS)
_SAMPLE = "#555555"  # of the legend's samples


def _spread(kind: str) -> str:
    """What the radius of the average case is."""
    return "half width" if kind in KINDS and KINDS[kind].is_box else "standard deviation"


def _curves(ax: Axes, ds: xr.Dataset, name: str, quadratic: str, radius: str) -> None:
    """A curve for each checkpoint, with a band of one standard error."""
    at = ds[radius].values
    lowest, highest = np.inf, 0.0
    for i, label in enumerate(short_names(ds)):
        one = ds.isel(checkpoint=i)
        looks: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)]}
        value, se = one[name].values, np.nan_to_num(one[f"{name}_se"].values)
        ax.fill_between(at, value - se, value + se, alpha=0.2, lw=0, **looks)
        ax.plot(at, value, ls=DASHES[i % len(DASHES)], marker=MARKERS[i % len(MARKERS)], label=label, **looks)
        lowest, highest = min(lowest, float((value - se).min())), max(highest, float((value + se).max()))
        if quadratic in one and bool(one[quadratic].notnull().any()):
            ax.plot(at, one[quadratic].values, ls=":", lw=0.8, **looks)
    ax.set_xscale("log", base=2)
    ax.set_xticks(at, [f"{value:.2g}" for value in at])
    ax.minorticks_off()
    if lowest > 0:
        log_axis(ax, lowest, highest)


def _flatness(ax: Axes, ds: xr.Dataset) -> None:
    """Relative flatness with 95 % intervals, a row for each checkpoint."""
    places = np.arange(ds.sizes["checkpoint"])
    value = ds.relative_flatness.values
    bars = np.stack([value - ds.relative_flatness_low, ds.relative_flatness_high - value])
    for i in places:
        ax.errorbar(value[i], i, xerr=np.maximum(bars[:, [i]], 0), fmt=MARKERS[i % len(MARKERS)], capsize=2,
                    color=COLOURS[i % len(COLOURS)])  # fmt: skip
    ax.set_yticks(places, short_names(ds))
    ax.set_ylim(places[-1] + 0.5, -0.5)
    ax.set_xlabel("relative flatness [nat], 95 % intervals")


def _single(ds: xr.Dataset) -> Figure:
    """Rises at one radius, by checkpoint; hollow markers are the rise after one step, crosses mean rises."""
    places, names = np.arange(ds.sizes["checkpoint"]), short_names(ds)
    rotation = tilted(names, PAGE / ds.sizes["neighbourhood"] - 0.5)
    figure = new_figure(PAGE, 2.2 + (0.035 * max(map(len, names)) if rotation else 0))
    panels = figure.subplots(1, ds.sizes["neighbourhood"], squeeze=False)[0]
    for ax, kind in zip(panels, ds.neighbourhood.values, strict=True):
        at = ds.sel(neighbourhood=kind)
        titles, lowest = [], 0.0
        if "rise" in at:
            ax.errorbar(places, at.rise, at.rise_se, fmt="o", color=CHAMPION, capsize=2, label="largest found")
            ax.errorbar(places + 0.1, at.one_step, at.one_step_se, fmt="s", color=PLAIN, mfc="white", capsize=2,
                        label="one step")  # fmt: skip
            titles.append(f"radius {float(at.radius):.3g}")
            lowest = min(lowest, float(at.one_step.min()))
        if "average" in at:
            ax.errorbar(places + 0.2, at.average, at.average_se, fmt="^", color=QUIET, capsize=2, label="mean")
            titles.append(f"mean {float(at.average_radius):.3g}")
            lowest = min(lowest, float(at.average.min()))
        ax.set_xticks(places, names, **rotation)
        ax.set_xlim(-0.5, places[-1] + 0.6)
        ax.margins(y=0.1)
        ax.set_ylim(bottom=0 if lowest >= 0 else None)
        ax.set_title(f"{kind}, {', '.join(titles)}", loc="left")
    panels[0].set_ylabel("rise of the loss [nat]")
    legend_above(figure, *panels[0].get_legend_handles_labels())
    figure.suptitle("bars: ± 1 standard error", x=0.01, ha="left", fontsize=7)
    return figure

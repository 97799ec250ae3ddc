"""Rank correlations with a target: intervals of all diagnostics, and the runs of the strongest."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pnanalysis.plots.style import CHAMPION, COLOURS, MARKERS, PAGE, PLAIN, QUIET, legend_above, new_figure
from pnanalysis.significance import LEVEL

#: Panels of single diagnostics, and diagnostics that are drawn at most.
_SCATTERS, _MOST = 3, 40
_LINE = 0.17  # inches a diagnostic


def correlation(ds: xr.Dataset) -> Figure:
    """Kendall's tau of each diagnostic with its 95 % interval, the strongest first, and the runs of the first three.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``correlation``.

    Returns
    -------
    Figure
        Markers are full where tau is significant after Holm's step-down for all diagnostics. Diamonds are taus among
        runs that differ in one setting only. Bars of the runs are one standard error.
    """
    order = np.argsort(-np.abs(np.nan_to_num(ds.tau.values)), kind="stable")[:_MOST]
    ds = ds.isel(diagnostic=order)
    figure = new_figure(PAGE, max(0.9 + _LINE * len(order), 3.9))
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.9, 1])[0]
    ax = left.subplots()
    _forest(ax, ds)
    n = min(_SCATTERS, len(order))
    for i, panel in enumerate(right.subplots(n, 1, squeeze=False)[:, 0]):
        _scatter(panel, ds.isel(diagnostic=i), i == n // 2)
    legend_above(figure, *ax.get_legend_handles_labels())
    return figure


def _forest(ax: Axes, ds: xr.Dataset) -> None:
    places = np.arange(ds.sizes["diagnostic"])
    bars = np.stack([ds.tau - ds.tau_low, ds.tau_high - ds.tau])
    is_sure = (ds.tau_p <= LEVEL).values
    for chosen, inside, text in ((is_sure, CHAMPION, "significant"), (~is_sure, "white", "not significant")):
        if chosen.any():
            ax.errorbar(ds.tau.values[chosen], places[chosen], xerr=np.maximum(bars[:, chosen], 0), fmt="o", mfc=inside,
                        color=CHAMPION, elinewidth=0.9, label=f"$\\tau$, 95 % interval, {text}")  # fmt: skip
    if bool(ds.psi.notnull().any()):
        ax.plot(ds.psi, places + 0.25, "D", ms=2.6, color=PLAIN, mfc="white", mew=0.8, label="one setting at a time")
    ax.axvline(0, color=QUIET, lw=0.6, zorder=0)
    ax.set_yticks(places, [str(name).replace("_", " ") for name in ds.diagnostic.values])
    ax.set_ylim(places[-1] + 0.7, -0.7)
    ax.set_xlim(-1.05, 1.05)
    target, n = str(ds.attrs.get("target_name", "target")).replace("_", " "), int(ds.n_runs.max())
    ax.set_xlabel(f"Kendall's $\\tau$ with the {target}, {n} runs")


def _scatter(ax: Axes, one: xr.Dataset, labels_target: bool) -> None:
    """The runs of one diagnostic, with a colour for each value of the first setting."""
    name = str(one.diagnostic.item()).replace("_", " ")
    groups, values = _groups(one)
    for k, value in enumerate(values):
        own = groups == k
        errors = [np.nan_to_num(one[f"{part}_se"].values[own]) for part in ("target", "value")]
        ax.errorbar(one.value.values[own], one.target.values[own], errors[0], errors[1], fmt=MARKERS[k % len(MARKERS)],
                    color=COLOURS[k % len(COLOURS)], elinewidth=0.5, label=value or None)  # fmt: skip
    known = one.value.values[np.isfinite(one.value.values)]
    if len(known) and known.min() > 0 and known.max() > 20 * known.min():
        ax.set_xscale("log")
    ax.set_title(f"{name}, $\\tau$ = {float(one.tau):.2f}", loc="left")
    if labels_target:
        ax.set_ylabel(str(one.attrs.get("target_name", "target")).replace("_", " "))
    if 1 < len(values) <= 5:
        ax.legend(fontsize=5.5, handletextpad=0.2, borderpad=0.2)


def _groups(one: xr.Dataset) -> tuple[np.ndarray, list[str]]:
    """Numbers of groups of runs by the first setting that counts, and what these are called."""
    for axis in map(str, one.axis.values):
        values = one.coords.get(f"{axis}_setting")
        if values is not None and 1 < len(set(values.values.tolist())) <= len(COLOURS):
            names = list(dict.fromkeys(values.values.tolist()))
            shown = [f"{axis} {value:g}" if isinstance(value, float) else f"{axis} {value}" for value in names]
            return np.array([names.index(value) for value in values.values.tolist()]), shown
    return np.zeros(one.sizes["run"], dtype=int), [""]

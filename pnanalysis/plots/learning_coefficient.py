"""Local learning coefficients: estimates beside their chains, and their dependence on step size and localization."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from pnanalysis.analyses.diagnostics import short_names
from pnanalysis.plots.style import (
    CHAMPION,
    COLOURS,
    DASHES,
    GOLDEN,
    MARKERS,
    PAGE,
    PLAIN,
    QUIET,
    legend_above,
    new_figure,
    panels,
    tilted,
)

#: Means of a chain that are drawn, at least.
_BLOCKS = 40


def learning_coefficient(ds: xr.Dataset) -> Figure:
    """Estimates with 95 % intervals beside the chains they come from; of a calibration, estimates over step sizes,
    or over localizations where these alone differ.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``learning_coefficient``.
    """
    if "step_size" in ds.dims:
        return _calibration(ds)
    if "localization" in ds.dims:
        return _over_localizations(ds)
    names, places = short_names(ds), np.arange(ds.sizes["checkpoint"])
    rotation = tilted(names, PAGE / 2 - 0.5)
    figure = new_figure(PAGE, 2.6 + (0.035 * max(map(len, names)) if rotation else 0))
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.4])
    value = ds.learning_coefficient
    bars = np.maximum(np.stack([value - ds.learning_coefficient_low, ds.learning_coefficient_high - value]), 0)
    left.errorbar(places, value, bars, fmt="o", color=CHAMPION, capsize=2, label="estimate, 95 % interval")
    left.plot(places + 0.12, ds.gaussian, "s", color=PLAIN, mfc="white", label="Gaussian")
    unsettled = np.where(ds.converged == 1, np.nan, _mean(ds))
    if np.isfinite(unsettled).any():
        left.plot(places, unsettled, "x", color=QUIET, label="not converged")
    left.set_xticks(places, names, **rotation)
    left.set_xlim(-0.5, places[-1] + 0.6)
    left.set_ylabel("local learning coefficient")
    left.margins(y=0.15)
    for i, name in enumerate(names):
        one = ds.isel(checkpoint=i)
        steps = np.flatnonzero(one.excess.notnull().all("chain").values)  # single batches measure some of them
        size = max(1, len(steps) // _BLOCKS)
        steps = steps[: len(steps) // size * size]
        trace = float(one.nbeta) * one.excess.values[:, steps]
        blocks = trace.reshape(len(trace), -1, size).mean(axis=2)
        middles = steps.reshape(-1, size).mean(axis=1) + 0.5
        looks: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}
        for k, means in enumerate(blocks):
            right.plot(middles, means, label=None if k else name, linewidth=0.8, **looks)
        right.axvline(float(one.burn_in), color=QUIET, linewidth=0.6, label=None if i else "end of burn-in")
    right.set_xlabel("step")
    right.set_ylabel("$n\\beta\\,(L - L^*)$, means of chains")
    shown = [ax.get_legend_handles_labels() for ax in (left, right)]
    legend_above(figure, [h for handles, _ in shown for h in handles], [n for _, texts in shown for n in texts])
    return figure


def _calibration(ds: xr.Dataset) -> Figure:
    """Estimates over step sizes, a line for each localization; crosses have not converged."""
    ds = ds.expand_dims("localization") if "localization" not in ds.dims else ds
    figure, axes = panels(ds.sizes["checkpoint"], height=PAGE / 2 * GOLDEN)
    for ax, name, checkpoint in zip(axes, short_names(ds), ds.checkpoint.values, strict=False):
        at = ds.sel(checkpoint=checkpoint).transpose("localization", "step_size", ...)
        for k in range(at.sizes["localization"]):
            one = at.isel(localization=k)
            looks: dict[str, Any] = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)]}
            epsilon, value, se = one.epsilon.values, one.learning_coefficient.values, one.learning_coefficient_se.values
            gamma = f"$\\gamma$ = {float(one.localization):g}"
            ax.errorbar(epsilon, value, 1.96 * se, capsize=2, label=gamma, linewidth=0.9, **looks)
            ax.plot(epsilon, np.where(one.converged == 1, np.nan, _mean(one)), "x", color=looks["color"])
            ax.axhline(float(np.ravel(one.gaussian)[0]), color=looks["color"], linewidth=0.6, linestyle=":")
        ax.set_xscale("log")
        ax.set_title(name, loc="left")
        ax.set_xlabel("step size")
        ax.set_ylabel("local learning coefficient")
    legend_above(figure, *axes[0].get_legend_handles_labels())
    return figure


def _over_localizations(ds: xr.Dataset) -> Figure:
    """Estimates and Gaussian values over localizations, a panel for each network; crosses have not converged."""
    figure, axes = panels(ds.sizes["checkpoint"], height=PAGE / 2 * GOLDEN)
    for ax, name, checkpoint in zip(axes, short_names(ds), ds.checkpoint.values, strict=False):
        one = ds.sel(checkpoint=checkpoint).sortby("localization")
        gamma, value, bars = one.localization, one.learning_coefficient, 1.96 * one.learning_coefficient_se
        ax.errorbar(gamma, value, bars, color=CHAMPION, marker="o", capsize=2, label="estimate, 95 % interval")
        ax.plot(gamma, one.gaussian, "s:", color=PLAIN, mfc="white", label="Gaussian")
        unsettled = np.where(one.converged == 1, np.nan, _mean(one))
        if np.isfinite(unsettled).any():
            ax.plot(gamma, unsettled, "x", color=QUIET, label="not converged")
        ax.set_xscale("log")
        ax.set_title(name, loc="left")
        ax.set_xlabel("localization γ")
        ax.set_ylabel("local learning coefficient")
    shown = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    legend_above(figure, list(shown.values()), list(shown))
    return figure


def _mean(ds: xr.Dataset) -> np.ndarray:
    """What the chains say, whether or not they have converged."""
    late = ds.excess.where(xr.DataArray(np.arange(ds.sizes["draw"]), dims="draw") >= ds.burn_in)
    found: np.ndarray = (ds.nbeta * late.mean(["chain", "draw"])).values
    return found

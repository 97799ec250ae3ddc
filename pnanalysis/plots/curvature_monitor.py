"""Curvature along training beside the threshold at which the optimizer's steps are unstable."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pnanalysis.plots.style import (
    BLACK,
    BLUE,
    CHAMPION,
    COLOURS,
    DASHES,
    GREEN,
    MARKERS,
    OTHERS,
    PAGE,
    PLAIN,
    QUIET,
    SKY,
    VERMILION,
    champion_of,
    few,
    log_axis,
    new_figure,
)

_SAMPLE = "#555555"  # of the band in the legend
_HESSIAN = "$\\lambda_{\\max}$ of the Hessian [loss]"


def curvature_monitor(ds: xr.Dataset) -> Figure:
    """The largest eigenvalue that the optimizer sees with its threshold, those of the Hessian, loss and gradient.

    Critical sharpness is beside the eigenvalue that bounds it for quadratic losses. Of several iterations of a run, the
    plain one and the champion are in colour, the others in grey. Bands are one standard error for the choice of
    examples, around critical sharpness beyond the interval that it is in; of single batches, 10 to 90 %.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``curvature_monitor``.
    """
    if "iteration" in ds.dims and ds.sizes["iteration"] > 1:
        return _of_iterations(ds)
    if "iteration" in ds.dims:
        ds = ds.isel(iteration=0)
    figure = new_figure(PAGE, 4.0)
    (stability, spectrum), (loss, gradient) = figure.subplots(2, 2, sharex=True)
    _stability(ds, stability)
    _curves(ds, ds.eigenvalue, spectrum)
    if "batch_lambda_max" in ds:
        low, middle, high = ds.batch_lambda_max.quantile([0.1, 0.5, 0.9], "batch").transpose("quantile", ...).values
        spectrum.fill_between(
            ds.step, low, high, color=QUIET, alpha=0.35, linewidth=0, label="single batches, 10 to 90 %"
        )
        spectrum.plot(ds.step, middle, color=QUIET, linewidth=0.8)
        spectrum.legend()
    spectrum.set_ylabel("eigenvalues [loss]")
    for ax, name, colour in ((loss, "loss", BLUE), (gradient, "gradient_norm", GREEN)):
        ax.plot(ds.step, ds[name], color=colour, **_marks(ds))
        _band(ax, ds, name, colour)
        ax.set_ylabel({"loss": "loss", "gradient_norm": "norm of the gradient [loss]"}[name])
        ax.set_xlabel("step of the optimizer")
        found = ds[name].values[np.isfinite(ds[name].values)]
        if len(found) and found.min() > 0:
            log_axis(ax, float(found.min()), float(found.max()))
    figure.align_ylabels()
    return figure


def _of_iterations(ds: xr.Dataset) -> Figure:
    """The same panels with a curve for each training of a run."""
    figure = new_figure(PAGE, 4.0)
    axes = figure.subplots(2, 2, sharex=True)
    seen = "preconditioned_lambda_max" if "preconditioned_lambda_max" in ds else "lambda_max"
    for ax, name in zip(axes.flat, (seen, "lambda_max", "loss", "gradient_norm"), strict=True):
        _along_iterations(ds, name, ax)
    axes[0, 0].set_ylabel("preconditioned $\\lambda_{\\max}$ [loss]" if _is_adaptive(ds) else _HESSIAN)
    for ax, text in ((axes[0, 1], _HESSIAN), (axes[1, 0], "loss"), (axes[1, 1], "norm of the gradient [loss]")):
        ax.set_ylabel(text)
    if "threshold" in ds:
        threshold = ds.threshold.where(np.isfinite(ds.threshold)).max("iteration")
        axes[0, 0].plot(ds.step, threshold, color=BLACK, linestyle="--", linewidth=0.9, label="stability threshold")
    for ax in axes.flat:
        heights = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in ax.lines])
        heights = heights[np.isfinite(heights)]
        if len(heights) and heights.min() > 0:
            log_axis(ax, float(heights.min()), float(heights.max()))
    for ax in axes[1]:
        ax.set_xlabel("step of the optimizer")
    _legend(axes[0, 0], ds)
    figure.align_ylabels()
    return figure


def _along_iterations(ds: xr.Dataset, name: str, ax: Axes) -> None:
    iterations, champion = [int(i) for i in ds.iteration.values], champion_of(ds)
    looks: dict[int, dict[str, Any]] = {
        champion: {"color": CHAMPION, "label": f"champion (iteration {champion})", "lw": 1.2},
        0: {"color": PLAIN, "label": "plain", "lw": 1.2},
    }
    first = next((i for i in iterations if i not in looks), None)
    for i in sorted(iterations, key=lambda i: i in looks):
        found = ds[name].sel(iteration=i).dropna("step")
        grey = {"color": OTHERS, "lw": 0.7, "label": "other iterations" if i == first else None}
        ax.plot(found.step, found, **looks.get(i, grey), marker=few(found.sizes["step"]), ms=3)
        if i in looks:
            _band(ax, ds.sel(iteration=i, step=found.step), name, looks[i]["color"])


def _is_adaptive(ds: xr.Dataset) -> bool:
    return ds.attrs.get("optimizer") != "SGD" and "preconditioned_lambda_max" in ds


def _stability(ds: xr.Dataset, ax: Axes) -> None:
    """The preconditioned eigenvalue and its threshold; that of the Hessian where there is none."""
    if "preconditioned_lambda_max" not in ds or not bool(ds.preconditioned_lambda_max.notnull().any()):
        ax.plot(ds.step, ds.lambda_max, color=VERMILION, **_marks(ds))
        _band(ax, ds, "lambda_max", VERMILION)
        ax.set_ylabel(_HESSIAN)
        if _critical(ds, ax):
            ax.lines[0].set_label("largest eigenvalue")
            _legend(ax, ds)
        return
    ax.plot(ds.step, ds.preconditioned_lambda_max, color=VERMILION, label="largest eigenvalue", **_marks(ds))
    _band(ax, ds, "preconditioned_lambda_max", VERMILION)
    threshold = ds.threshold.where(np.isfinite(ds.threshold))  # infinite where the learning rate is 0
    ax.plot(ds.step, threshold, color=BLACK, linestyle="--", linewidth=0.9, label="stability threshold")
    _critical(ds, ax)
    ax.set_ylabel("preconditioned $\\lambda_{\\max}$ [loss]" if _is_adaptive(ds) else _HESSIAN)
    ax.set_ylim(bottom=min(0.0, 1.1 * float(ds.preconditioned_lambda_max.min())))
    _legend(ax, ds)


def _legend(ax: Axes, ds: xr.Dataset) -> None:
    """Above the panels, as curves may be anywhere in this one."""
    assert isinstance(ax.figure, Figure)
    handles: list[Artist] = [*ax.get_legend_handles_labels()[0]]
    if "lambda_max_se" in ds:
        handles.append(Patch(color=_SAMPLE, alpha=0.25, lw=0, label="± 1 standard error"))
    ax.figure.legend(handles=handles, loc="outside upper left", ncols=4)


def _critical(ds: xr.Dataset, ax: Axes) -> bool:
    """Critical sharpness, where there is any, with the interval that it is in and an outer band of one standard error
    beyond; says whether it is drawn.
    """
    if "critical_sharpness" not in ds or not bool(ds.critical_sharpness.notnull().any()):
        return False
    found = ds.dropna("step", subset=["critical_sharpness"])
    ax.fill_between(
        found.step, found.critical_sharpness_low, found.critical_sharpness_high, color=SKY, alpha=0.35, linewidth=0
    )
    if "critical_sharpness_se" in found:
        se = found.critical_sharpness_se
        low, high = found.critical_sharpness_low - se, found.critical_sharpness_high + se
        ax.fill_between(found.step, low, high, color=SKY, alpha=0.2, linewidth=0)
    ax.plot(found.step, found.critical_sharpness, color=SKY, linestyle=":", label="critical sharpness", **_marks(ds))
    return True


def _curves(ds: xr.Dataset, values: xr.DataArray, ax: Axes) -> None:
    for i, pair in enumerate(ds.pair.values):
        looks: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}
        looks["marker"] = few(ds.sizes["step"]) and MARKERS[i % len(MARKERS)]
        ax.plot(ds.step, values.sel(pair=pair), label=f"{pair}", **looks)
        _band(ax, ds.sel(pair=pair), "eigenvalue", looks["color"])
    if ds.sizes["pair"] > 1:
        ax.legend(title="rank", ncols=min(ds.sizes["pair"], 5))


def _band(ax: Axes, ds: xr.Dataset, name: str, colour: str) -> None:
    """One standard error to either side, for the choice of examples, where that is known."""
    if f"{name}_se" in ds:
        value, se = ds[name], ds[f"{name}_se"]
        ax.fill_between(ds.step, value - se, value + se, color=colour, alpha=0.25, linewidth=0)


def _marks(ds: xr.Dataset) -> dict[str, Any]:
    """A marker for each point where there are few."""
    return {"marker": few(ds.sizes["step"])}

"""Curvature along training beside the threshold at which the optimizer's steps are unstable."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pnanalysis.plots.style import (
    BLACK,
    BLUE,
    COLOURS,
    DASHES,
    GREEN,
    MARKERS,
    PAGE,
    QUIET,
    SKY,
    VERMILION,
    few,
    log_axis,
    new_figure,
)


def curvature_monitor(ds: xr.Dataset) -> Figure:
    """The largest eigenvalue that the optimizer sees with its threshold, those of the Hessian, loss and gradient.

    Critical sharpness is beside the eigenvalue that bounds it for quadratic losses.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``curvature_monitor``.
    """
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
        ax.set_ylabel({"loss": "loss", "gradient_norm": "norm of the gradient [loss]"}[name])
        ax.set_xlabel("step of the optimizer")
        found = ds[name].values[np.isfinite(ds[name].values)]
        if len(found) and found.min() > 0:
            log_axis(ax, float(found.min()), float(found.max()))
    figure.align_ylabels()
    return figure


def _stability(ds: xr.Dataset, ax: Axes) -> None:
    """The preconditioned eigenvalue and its threshold; that of the Hessian where there is none."""
    if "preconditioned_lambda_max" not in ds or not bool(ds.preconditioned_lambda_max.notnull().any()):
        ax.plot(ds.step, ds.lambda_max, color=VERMILION, **_marks(ds))
        ax.set_ylabel("$\\lambda_{\\max}$ of the Hessian [loss]")
        if _critical(ds, ax):
            ax.lines[0].set_label("largest eigenvalue")
            _legend(ax)
        return
    ax.plot(ds.step, ds.preconditioned_lambda_max, color=VERMILION, label="largest eigenvalue", **_marks(ds))
    threshold = ds.threshold.where(np.isfinite(ds.threshold))  # infinite where the learning rate is 0
    ax.plot(ds.step, threshold, color=BLACK, linestyle="--", linewidth=0.9, label="stability threshold")
    _critical(ds, ax)
    adaptive = ds.attrs.get("optimizer") != "SGD"
    ax.set_ylabel(
        "preconditioned $\\lambda_{\\max}$ [loss]" if adaptive else "$\\lambda_{\\max}$ of the Hessian [loss]"
    )
    ax.set_ylim(bottom=min(0.0, 1.1 * float(ds.preconditioned_lambda_max.min())))
    _legend(ax)


def _legend(ax: Axes) -> None:
    """Above the panels, as curves may be anywhere in this one."""
    assert isinstance(ax.figure, Figure)
    ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside upper left", ncols=3)


def _critical(ds: xr.Dataset, ax: Axes) -> bool:
    """Critical sharpness with the interval that it is in, where there is any; says whether it is drawn."""
    if "critical_sharpness" not in ds or not bool(ds.critical_sharpness.notnull().any()):
        return False
    found = ds.dropna("step", subset=["critical_sharpness"])
    ax.fill_between(
        found.step, found.critical_sharpness_low, found.critical_sharpness_high, color=SKY, alpha=0.35, linewidth=0
    )
    ax.plot(found.step, found.critical_sharpness, color=SKY, linestyle=":", label="critical sharpness", **_marks(ds))
    return True


def _curves(ds: xr.Dataset, values: xr.DataArray, ax: Axes) -> None:
    for i, pair in enumerate(ds.pair.values):
        looks: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}
        looks["marker"] = few(ds.sizes["step"]) and MARKERS[i % len(MARKERS)]
        ax.plot(ds.step, values.sel(pair=pair), label=f"{pair}", **looks)
    if ds.sizes["pair"] > 1:
        ax.legend(title="rank", ncols=min(ds.sizes["pair"], 5))


def _marks(ds: xr.Dataset) -> dict[str, Any]:
    """A marker for each point where there are few."""
    return {"marker": few(ds.sizes["step"])}

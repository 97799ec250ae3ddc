"""Training curves, and errors against iteration (the paper's figures 7 to 11 and 13)."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from pnanalysis.errors import PnError
from pnanalysis.plots.style import (
    CHAMPION,
    OTHERS,
    PAGE,
    PLAIN,
    QUIET,
    RESTART,
    champion_of,
    few,
    integer_axis,
    label,
    log_axis,
    new_figure,
    others,
    own_axes,
)
from pnanalysis.schema import error_kind


def history(ds: xr.Dataset) -> Figure:
    """Loss and validation error against epoch: plain model and champion in colour, other iterations in grey.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``history`` of one run, or of several along ``run``, which get one row each.

    Returns
    -------
    Figure
    """
    runs = [(None, ds)] if "run" not in ds.dims else [(str(name), ds.sel(run=name)) for name in ds.run.values]
    has_error = bool(ds.validation_error.notnull().any())
    figure = new_figure(PAGE if has_error else PAGE / 2, 2.3 * len(runs))
    axes = figure.subplots(len(runs), 1 + has_error, squeeze=False)
    for row, (name, one) in zip(axes, runs, strict=True):
        _curves(one, "train_loss", row[0])
        least, most = float(one.train_loss.min()), float(one.train_loss.max())
        if least > 0:
            log_axis(row[0], least, most)
        if has_error:
            _curves(one, "validation_error", row[1])
            if error_kind(one) == "share":
                row[1].yaxis.set_major_formatter(PercentFormatter(1.0))
        if name is not None:
            row[0].set_title(name, loc="left")
        row[-1].legend()
    return figure


def errors(ds: xr.Dataset, control: xr.Dataset | None = None, ax: Axes | None = None) -> Axes:
    """Validation and test error at the end of each iteration; horizontal lines mark the plain model.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``history`` of one run.
    control : xarray.Dataset, optional
        The history of its restart control, drawn as hollow markers of the same shapes.
    ax : Axes, optional

    Returns
    -------
    Axes
        Error bars are binomial standard errors; squared errors have none.

    Raises
    ------
    PnError
        If the dataset has several runs.
    """
    if "run" in ds.dims:
        raise PnError(f"errors are drawn for one run; select one of {', '.join(map(str, ds.run.values))}")
    ax = own_axes(ax, PAGE * 0.7, 2.4)
    last, is_rate = ds.isel(epoch=-1), error_kind(ds) == "share"
    entries: list[Any] = []
    for name, colour, marker, text, shift in (
        ("validation_error", PLAIN, "o", "validation", -0.06),
        ("test_error", CHAMPION, "s", "test", 0.06),
    ):  # shifted, so that error bars do not hide one another
        size = int(ds.attrs.get(f"n_{name.split('_')[0]}", 0)) if is_rate else 0
        values = last[name].values
        bars = ax.errorbar(ds.iteration + shift, values, _binomial_se(values, size), color=colour, marker=marker,
                           ls="--", lw=0.8, capsize=1.5, elinewidth=0.6, label=text)  # fmt: skip
        entries.append(bars)
        ax.axhline(values[0], color=colour, lw=0.8, ls="-" if marker == "o" else "-.")
        if control is not None:
            entries += ax.plot(control.iteration + shift, control.isel(epoch=-1)[name], marker, mfc="none",
                               color=RESTART, ls="none", label=f"{text}, restart")  # fmt: skip
    champion = int(ds.attrs.get("champion", 0))
    ax.axvline(champion, color=QUIET, lw=0.6, ls=":", zorder=0)
    ax.annotate(
        "champion", (champion, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", color="#555555"
    )
    ax.set_xlabel("iteration (0 is the plain model)")
    ax.set_ylabel(("error" if is_rate else error_kind(ds)) + " at the end of training")
    ax.set_xlim(-0.5, float(ds.iteration.max()) + 0.5)
    integer_axis(ax, ds.iteration.values)
    if is_rate:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    title = "± standard error; lines:\nplain model" if is_rate else "lines: plain model"
    ax.legend(handles=entries, loc="upper left", bbox_to_anchor=(1.0, 1.0), title=title, alignment="left")
    return ax


def _curves(ds: xr.Dataset, name: str, ax: Axes) -> None:
    champion = champion_of(ds)
    strategy = str(ds.coords["strategy"].item() if "strategy" in ds.coords else ds.attrs.get("strategy", "persistent"))
    iterations = [int(i) for i in ds.iteration.values]
    marker = few(int(ds[name].notnull().any("iteration").sum()))
    ax.plot(ds.epoch, ds[name].sel(iteration=0), color=PLAIN, lw=2.2, marker=marker, ms=5, label="plain")
    for i in iterations:
        if i not in (0, champion):
            text = others(iterations, champion)
            known = ax.get_legend_handles_labels()[1]
            ax.plot(ds.epoch, ds[name].sel(iteration=i), color=OTHERS, lw=0.7, marker=marker, ms=2.5,
                    label=None if text in known else text)  # fmt: skip
    if champion > 0:
        text = "best restart" if strategy == "restart" else "champion"
        ax.plot(ds.epoch, ds[name].sel(iteration=champion), color=CHAMPION, ls="--", marker=marker and "s", ms=3.5,
                label=f"{text} (iteration {champion})")  # fmt: skip
    ax.set_xlabel(str(ds.epoch.attrs.get("long_name", "epoch")))
    ax.set_ylabel(label(ds[name]))
    integer_axis(ax, ds.epoch.values)


def _binomial_se(rate: np.ndarray, n: int) -> np.ndarray | None:
    return np.sqrt(rate * (1 - rate) / n) if n else None

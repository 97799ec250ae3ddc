"""Training curves, and errors against iteration (the paper's figures 7 to 11 and 13)."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pnanalysis.plots.style import CHAMPION, PAGE, PLAIN, QUIET, RESTART, champion_of, label, new_figure, own_axes


def history(ds: xr.Dataset) -> Figure:
    """Loss and validation error against epoch: plain and champion in colour, the other iterations in grey.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``history`` of one run; of several, those along ``run`` are drawn below one another.

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
        if bool((one.train_loss > 0).all() | one.train_loss.isnull().all()) and float(one.train_loss.max()) > 0:
            row[0].set_yscale("log")
        if has_error:
            _curves(one, "validation_error", row[1])
            row[1].yaxis.set_major_formatter(PercentFormatter(1.0))
        if name is not None:
            row[0].set_title(name, loc="left")
        row[-1].legend()
    return figure


def errors(ds: xr.Dataset, control: xr.Dataset | None = None, ax: Axes | None = None) -> Axes:
    """Validation and test error at the end of each iteration, the plain model's as lines.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``history`` of one run.
    control : xarray.Dataset, optional
        The history of its restart control: hollow markers of the same shapes.
    ax : Axes, optional

    Returns
    -------
    Axes
        Error bars are binomial standard errors.
    """
    ax = own_axes(ax, PAGE * 0.7, 2.4)
    last = ds.isel(epoch=-1)
    for name, colour, marker, text in (
        ("validation_error", PLAIN, "o", "validation"),
        ("test_error", CHAMPION, "s", "test"),
    ):
        size = int(ds.attrs.get(f"n_{name.split('_')[0]}", 0))
        values = last[name].values
        ax.errorbar(ds.iteration, values, _binomial_se(values, size), color=colour, marker=marker, ls="--", lw=0.8,
                    capsize=1.5, elinewidth=0.6, label=text)  # fmt: skip
        ax.axhline(values[0], color=colour, lw=0.8)
        if control is not None:
            ax.plot(control.iteration, control.isel(epoch=-1)[name], marker, mfc="none", color=RESTART, ls="none",
                    label=f"{text}, restart")  # fmt: skip
    champion = int(ds.attrs.get("champion", 0))
    ax.axvline(champion, color=QUIET, lw=0.6, ls=":", zorder=0)
    ax.annotate(
        "champion", (champion, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", color="#555555"
    )
    ax.set_xlabel("iteration (0 is the plain model)")
    ax.set_ylabel("error at the end of training")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def _curves(ds: xr.Dataset, name: str, ax: Axes) -> None:
    champion = champion_of(ds)
    strategy = str(ds.coords["strategy"].item() if "strategy" in ds.coords else ds.attrs.get("strategy", "persistent"))
    others = [i for i in ds.iteration.values if i not in (0, champion)]
    for k, i in enumerate(others):
        ax.plot(
            ds.epoch, ds[name].sel(iteration=i), color=QUIET, lw=0.6, alpha=0.7, label=None if k else "other iterations"
        )
    ax.plot(ds.epoch, ds[name].sel(iteration=0), color=PLAIN, label="plain")
    if champion > 0:
        text = "best restart" if strategy == "restart" else "champion"
        ax.plot(
            ds.epoch, ds[name].sel(iteration=champion), color=CHAMPION, ls="--", label=f"{text} (iteration {champion})"
        )
    ax.set_xlabel(str(ds.epoch.attrs.get("long_name", "epoch")))
    ax.set_ylabel(label(ds[name]))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _binomial_se(share: np.ndarray, n: int) -> np.ndarray | None:
    return np.sqrt(share * (1 - share) / n) if n else None

"""The persistent gradient beside the loss gradient, and the signs that decide it."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from pnanalysis.plots.style import CHAMPION, PAGE, PLAIN, RESTART, new_figure


def gradients(ds: xr.Dataset, iteration: int | None = None) -> Figure:
    """Norms against epoch, a panel a layer, above the signs of the inner products with the earlier end points.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``gradients``.
    iteration : int, optional
        The last one by default.

    Returns
    -------
    Figure
    """
    at = ds.isel(iteration=-1) if iteration is None else ds.sel(iteration=iteration)
    at = at.isel(layer=at.constant_norm.notnull().values).dropna("epoch", subset=["loss_gradient_norm"])
    figure = new_figure(PAGE, 3.2)
    panels = figure.subplots(2, at.sizes["layer"], sharex=True, sharey="row", squeeze=False, height_ratios=(2, 1))
    for (top, bottom), layer in zip(panels.T, at.layer.values, strict=True):
        one = at.sel(layer=layer)
        top.plot(one.epoch, one.loss_gradient_norm, color=PLAIN, label="loss gradient")
        top.axhline(float(one.constant_norm), color=CHAMPION, ls="--", label="constant push")
        moving = one.fluctuation_norm.where(one.fluctuation_norm > 1e-9 * float(one.constant_norm))
        top.plot(one.epoch, moving, color=RESTART, ls=":", marker=".", label="fluctuation")
        top.set_yscale("log")
        top.set_title(str(layer), loc="left")
        signs = one.sign.dropna("end", how="all")
        bottom.pcolormesh(
            _edges(one.epoch.values), np.arange(signs.sizes["end"] + 1) - 0.5, signs.transpose("end", "epoch").values,
            cmap=ListedColormap(["#E69F00", "#FFFFFF", "#0072B2"]), vmin=-1, vmax=1, rasterized=True,
        )  # fmt: skip
        bottom.set_xlabel("epoch")
    panels[0, 0].set_ylabel("norm")
    panels[1, 0].set_ylabel("earlier end point\n(sign: blue +, orange −)")
    panels[1, 0].yaxis.get_major_locator().set_params(integer=True)
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=3)
    figure.suptitle(f"iteration {int(at.iteration)}", x=0.01, ha="left", fontsize="medium")
    return figure


def _edges(epochs: np.ndarray) -> np.ndarray:
    """Cell borders half-way between epochs."""
    if len(epochs) == 1:
        return epochs[0] + np.array([-0.5, 0.5])
    middle = (epochs[1:] + epochs[:-1]) / 2
    return np.concatenate([[epochs[0] - (middle[0] - epochs[0])], middle, [epochs[-1] + (epochs[-1] - middle[-1])]])

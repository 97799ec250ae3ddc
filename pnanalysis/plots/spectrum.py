"""Spectral densities (the paper's figure 12)."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from pnanalysis.plots.style import COLOURS, COLUMN, DASHES, PAGE, label, legend_above, new_figure, own_axes, symlog_axis

_DECADES = 8.0  # below the largest density
_RUG = "outliers"
#: Opacity of bands: around both errors, around that of the probes, of one alone.
_OUTER, _INNER, _ALONE = 0.15, 0.45, 0.3
_SAMPLE = "#555555"  # of the legend's samples


def spectral_density(ds: xr.Dataset, ax: Axes | None = None, *, symlog: bool = False) -> Axes:
    """Density of eigenvalues on a logarithmic scale, with its standard errors as bands and outliers as a rug.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``spectral_density`` or ``hessian``; the spectra along a dim ``checkpoint`` are overlaid.
    ax : Axes, optional
    symlog : bool
        Draw eigenvalues on a scale that is linear near zero and logarithmic beyond.

    Returns
    -------
    Axes
        Ticks at the bottom, one row per checkpoint, mark the outliers: eigenvalues beyond a gap (``n_outliers``,
        ``n_outliers_negative``). The band is one standard error to either side; where the error of the choice of
        examples is known (``density_data_se``), an inner band shows that of the probes and an outer one both together.
    """
    ax = own_axes(ax, PAGE if "checkpoint" in ds.dims else COLUMN, 2.6)
    parts = [("", ds)]
    if "checkpoint" in ds.dims:
        parts = [(str(name), ds.isel(checkpoint=i)) for i, name in enumerate(ds.checkpoint.values)]
    top = float(ds.density.max())
    floor = top * 10**-_DECADES
    has_rug = False
    for row, (name, one) in enumerate(parts):
        _curve(one, ax, row, name, floor)
        has_rug |= _rug(one, ax, row)
    ax.set_yscale("log")
    ax.set_ylim(floor, top * 4)
    if symlog:
        symlog_axis(ax, max(_bulk_edge(ds), _linear_out_to(ds)))
    ax.axvline(0.0, color="#bbbbbb", lw=0.6, zorder=0)
    ax.set_xlabel(_eigenvalue_label(ds))
    ax.set_ylabel(label(ds.density))
    handles: list[Artist] = list(ax.get_legend_handles_labels()[0])
    if bool((ds.density_se > 0).any()):
        handles += _band_samples(has_both="density_data_se" in ds)
    if has_rug:
        handles.append(Line2D([], [], marker="|", ls="none", color="#555555", ms=5, label=_RUG))
    if handles:
        ax.legend(handles=handles, framealpha=0.8, frameon=True, edgecolor="none")
    return ax


def layer_spectra(ds: xr.Dataset) -> Figure:
    """Spectra of layers as ridges: one row per layer, its density on a logarithmic scale of eight decades.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``hessian`` with a coordinate ``layer`` (``per_layer=True``); checkpoints of one layer share its row.

    Returns
    -------
    Figure
        Eigenvalues lie on a scale that is linear where the kernel blurs them and logarithmic beyond.
    """
    import seaborn as sns

    layers = list(dict.fromkeys(ds.layer.values.tolist()))
    names = [
        str(name).rsplit(f":{layer}", 1)[0] for name, layer in zip(ds.checkpoint.values, ds.layer.values, strict=True)
    ]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(names))}
    figure = new_figure(PAGE, max(0.55 * len(layers) + 0.6, 1.6))
    axes = figure.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0]
    for ax, layer in zip(axes, layers, strict=True):
        for i in np.flatnonzero(ds.layer.values == layer):
            one, name = ds.isel(checkpoint=i), names[i]
            floor = float(one.density.max()) * 10**-_DECADES
            density = np.maximum(one.density.values, floor)
            dashes = DASHES[list(colours).index(name) % len(DASHES)]
            ax.fill_between(one.eigenvalue, floor, density, color=colours[name], alpha=0.2, lw=0)
            ax.plot(one.eigenvalue, density, color=colours[name], lw=0.9, ls=dashes, label=name)
        ax.set_yscale("log")
        ax.set_yticks([], minor=False)
        ax.minorticks_off()
        ax.set_ylabel(layer, rotation=0, ha="right", va="center")
    sns.despine(figure, left=True)
    axes[-1].set_xscale("symlog", linthresh=_linear_out_to(ds), linscale=2)
    axes[-1].set_xlabel(_eigenvalue_label(ds))
    figure.suptitle("spectral density on a log scale, eight decades per row", x=0.01, ha="left", fontsize=7)
    handles, labels = axes[0].get_legend_handles_labels()
    if len(labels) > 1:
        legend_above(figure, handles, labels)
    return figure


def _bulk_edge(ds: xr.Dataset) -> float:
    """The farthest end of a bulk that outliers lie beyond; 0 if there are none, as the bulk then is all there is."""
    if "bulk_edge_high" not in ds or "n_outliers" not in ds:
        return 0.0
    edges = np.abs(ds.bulk_edge_high.values)[ds.n_outliers.values > 0]
    return float(np.nanmax(edges)) if np.isfinite(edges).any() else 0.0


def _linear_out_to(ds: xr.Dataset) -> float:
    """Four kernel widths: the narrowest kernel's, unless it is too narrow to be seen next to the widest."""
    widest = float(np.max(ds.kernel_width))
    return 4 * max(float(np.min(ds.kernel_width)), 1e-3 * widest)


def _eigenvalue_label(ds: xr.Dataset) -> str:
    return "eigenvalue" + (f" [{ds.node.attrs['units']}]" if "units" in ds.node.attrs else "")


def _curve(ds: xr.Dataset, ax: Axes, row: int, name: str, floor: float) -> None:
    """One density and its band; what lies below ``floor`` is drawn at it, as a logarithm of zero cannot be."""
    colour, dashes = COLOURS[row % len(COLOURS)], DASHES[row % len(DASHES)]
    grid, density = ds.eigenvalue.values, ds.density.values
    bands = ("density_se", "density_probe_se") if "density_data_se" in ds else ("density_se",)
    for band, shade in zip(bands, (_OUTER, _INNER) if len(bands) > 1 else (_ALONE,), strict=True):
        se = np.nan_to_num(ds[band].values)
        low, high = np.maximum(density - se, floor), np.maximum(density + se, floor)
        ax.fill_between(grid, low, high, fc=to_rgba(colour, shade), lw=0, zorder=1)
        for edge in (low, high):  # not along the floor, nor down to it from point to point
            ax.plot(grid, np.where(edge > floor, edge, np.nan), color=to_rgba(colour, 0.8), lw=0.4, zorder=1)
    ax.plot(grid, np.maximum(density, floor), color=colour, ls=dashes, lw=1.0, label=name or None)


def _band_samples(has_both: bool) -> list[Artist]:
    """What the legend shows of the bands."""
    if not has_both:
        return [Patch(fc=to_rgba(_SAMPLE, _ALONE), ec=_SAMPLE, lw=0.4, label="± 1 standard error")]
    shades = {"± 1 standard error, probes": _INNER + _OUTER, "± 1 standard error, also examples": _OUTER}
    return [Patch(fc=to_rgba(_SAMPLE, shade), ec=_SAMPLE, lw=0.4, label=text) for text, shade in shades.items()]


def _rug(ds: xr.Dataset, ax: Axes, row: int) -> bool:
    """Draw a tick for each outlier; returns whether there are any."""
    if "deflated_value" not in ds or "bulk_edge_high" not in ds:
        return False
    values = ds.deflated_value.values[np.isfinite(ds.deflated_value.values)]
    above = values[values > float(ds.bulk_edge_high)] if ds.n_outliers > 0 else values[:0]
    below = values[values < float(ds.bulk_edge_low)] if ds.n_outliers_negative > 0 else values[:0]
    outside = np.concatenate([above, below])
    height = 0.02 + 0.035 * row
    # heights in fractions of the axis, so that ticks stay at the bottom whatever the densities
    look: dict[str, Any] = {"color": COLOURS[row % len(COLOURS)], "ms": 5, "transform": ax.get_xaxis_transform()}
    ax.plot(outside, np.full(len(outside), height), "|", **look)
    return len(outside) > 0

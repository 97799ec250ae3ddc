"""Curvature by blocks: traces and norms with errors, couplings, distances of spectra, and ranks by rounding."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, NullLocator

from pnanalysis.analyses.diagnostics import short_names
from pnanalysis.arrays import Array
from pnanalysis.plots.style import COLOURS, GREY, MARKERS, PAGE, VERMILION, new_figure

#: Standard errors to either side that make a 95 % interval.
_Z95 = 1.96
#: Ratios of numbers beyond which an axis is logarithmic, and that it shows at most.
_WIDE, _WIDEST = 30, 1e4
#: Variables of the first row, and what they are multiplied by.
_COLUMNS = {"trace": 1.0, "frobenius_norm": 1.0, "off_diagonal_share": 100.0}
#: Names of blocks along an axis, at most.
_MOST_NAMES = 40
#: Names beside a heat map that have room for a larger font.
_FEW_NAMES = 12
#: Between spectra of blocks.
_DISTANCES = {"js_divergence": "Jensen-Shannon divergence [nat]", "wasserstein1": "Wasserstein-1 distance [loss]"}
#: Checkpoints whose couplings are drawn.
_MOST = 3


def blocks(ds: xr.Dataset) -> Figure:
    """Traces, Frobenius norms and couplings of all blocks, and where there are any, distances of spectra and ranks.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``blocks``.

    Returns
    -------
    Figure
        Bars are 95 % intervals, whose thick part is from the random signs alone. Couplings that are not above zero by
        two standard errors are white. Diagonals of distances between spectra are what chance alone gives; pairs with
        a dot have 95 % intervals that reach down to that. Traces over decades have a logarithmic axis, with a linear
        piece about zero where some are negative.
    """
    ds = ds if "checkpoint" in ds.dims else ds.expand_dims(checkpoint=[""])
    n = ds.sizes["block"]
    tall = 0.9 + min(0.16 * n, 5.0)
    rows = [tall, 2.6] + ([tall + 0.4] if "sensitivity" in ds else [])
    figure = new_figure(PAGE, sum(rows))
    parts = list(figure.subfigures(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0])
    _numbers(ds, parts[0])
    _matrices(ds, parts[1])
    if "sensitivity" in ds:
        _ranks(ds, parts[-1])
    return figure


def _numbers(ds: xr.Dataset, figure: SubFigure) -> None:
    """A row per block: trace, Frobenius norm, and the part of its energy that it shares with other blocks."""
    axes = figure.subplots(1, 3, sharey=True)
    names, k = short_names(ds), ds.sizes["checkpoint"]
    places = np.arange(ds.sizes["block"])
    for i, name in enumerate(names):
        at, y = ds.isel(checkpoint=i), places + 0.5 * (i - (k - 1) / 2) / max(k, 3)
        for ax, (variable, scale) in zip(axes, _COLUMNS.items(), strict=True):
            value, probe_se, se = (scale * at[f"{variable}{end}"].values for end in ("", "_probe_se", "_se"))
            colour = COLOURS[i % len(COLOURS)]
            ax.errorbar(value, y, xerr=_Z95 * se, fmt="none", ecolor=colour, elinewidth=0.8)
            ax.errorbar(value, y, xerr=_Z95 * probe_se, fmt="none", ecolor=colour, elinewidth=2.4)
            ax.plot(value, y, MARKERS[i % len(MARKERS)], color=colour, ls="", label=name or None)
    labels = ("trace [loss]", "Frobenius norm [loss]", "energy with other blocks [%]")
    for ax, label in zip(axes, labels, strict=True):
        ax.set_xlabel(label)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.grid(axis="y", color="0.92", lw=0.6)
        ax.set_axisbelow(True)
        ax.set_label(label.partition(" [")[0])
    _scaled(axes[0], ds.trace.values, ds.trace_se.values)
    _scaled(axes[1], ds.frobenius_norm.values)
    axes[2].set_xlim(0, 100)
    _name_rows(axes[0], ds)
    covers = "examples and signs" if ds.attrs.get("data_error") == "examples" else "signs"
    axes[0].set_title(f"blocks, bars: 95 % for {covers}", loc="left", fontsize=7)
    if len(names) > 1:
        axes[1].legend(fontsize=6, loc="best")


def _scaled(ax: Axes, values: Array, se: Array | None = None) -> None:
    """A logarithmic axis where numbers span decades; with a linear piece about zero where some are not positive.

    The linear piece reaches out to the smallest number that differs from zero, if errors are given.
    """
    known = values[np.isfinite(values)]
    if known.size and known.min() > 0 and known.max() > _WIDE * known.min():
        ax.set_xscale("log")
        ax.set_xlim(known.min() / 2, known.max() * 2)
    elif known.size and known.min() <= 0 and se is not None:
        apart = np.abs(values[np.abs(values) > _Z95 * se])
        if apart.size and apart.max() > _WIDE * apart.min():
            _signed_log(ax, max(apart.min(), apart.max() / _WIDEST), apart.max(), np.nanmin(values - _Z95 * se))


def _name_rows(ax: Axes, ds: xr.Dataset) -> None:
    names = [str(name) for name in ds.block.values]
    step = -(-len(names) // _MOST_NAMES)
    ax.set_yticks(np.arange(0, len(names), step), names[::step], fontsize=6)
    ax.set_ylim(len(names) - 0.5, -0.5)


def _matrices(ds: xr.Dataset, figure: SubFigure) -> None:
    """Couplings of the first checkpoints; where there are spectra, of the first one, and distances of these."""
    has_spectra = "js_divergence" in ds
    names = short_names(ds)[: 1 if has_spectra else _MOST]
    axes = figure.subplots(1, 3 if has_spectra else max(len(names), 2), squeeze=False)[0]
    for ax in axes[len(names) :] if not has_spectra else ():
        ax.remove()
    for i, name in enumerate(names):
        title = "coupling, $\\|H_{kl}\\| / \\sqrt{\\|H_{kk}\\| \\|H_{ll}\\|}$"
        ax, values = axes[i], _relative(ds.isel(checkpoint=i))
        _heat_map(ax, values, ds, top=1.0)
        white = "white: not above zero" if np.isnan(values).any() else ""
        head = ", ".join(filter(None, (name if len(names) > 1 else "", white)))
        ax.set_title("\n".join(filter(None, (title, head))), loc="left", fontsize=7)
        ax.set_label(f"coupling {name}".strip())
    for ax, name, label in zip(axes[1:], _DISTANCES, _DISTANCES.values(), strict=False) if has_spectra else ():
        values = ds[name].isel(checkpoint=0).values
        _heat_map(ax, values, ds, top=float(np.nanmax(values)) or 1.0)
        doubtful = np.argwhere(_reach_chance(ds.isel(checkpoint=0), name)) + 0.5
        ax.plot(doubtful[:, 1], doubtful[:, 0], "o", color="white", mec="black", mew=0.4, ms=3, ls="")
        dots = "; dot: reaches it" if len(doubtful) else ""
        ax.set_title(f"{label}\ndiagonal: chance{dots}", loc="left", fontsize=7)
        ax.set_label(name)


def _relative(ds: xr.Dataset) -> Array:
    """Norms of blocks relative to those on the diagonal; NaN where they are not above zero by two standard errors."""
    values, se = ds.energy.values, ds.energy_se.values
    size = np.sqrt(np.where(values > 2 * se, values, np.nan))
    own = np.sqrt(np.diagonal(size))
    found: Array = size / np.outer(own, own)
    return found


def _reach_chance(ds: xr.Dataset, name: str) -> Array:
    """Of which pairs of blocks the interval of a distance reaches down to that of one block by chance."""
    if f"{name}_low" not in ds:
        return np.zeros(ds[name].shape, dtype=bool)
    own = np.diagonal(ds[name].values)
    found: Array = ds[f"{name}_low"].values <= np.maximum(own[:, None], own)  # False on the diagonal, which has none
    return found


def _heat_map(ax: Axes, values: Array, ds: xr.Dataset, top: float) -> None:
    drawn = ax.pcolormesh(values, cmap="cividis", vmin=0, vmax=top, edgecolors="white", linewidth=0.3)
    names = [str(name) for name in ds.block.values]
    step = -(-len(names) // 18)
    kept = np.arange(0, len(names), step)
    size = 6 if len(kept) <= _FEW_NAMES else 5
    ax.set_yticks(kept + 0.5, [names[i] for i in kept], fontsize=size)
    ax.set_xticks(kept + 0.5, [names[i] for i in kept], fontsize=size, rotation=90)
    ax.invert_yaxis()
    ax.set_aspect("equal")
    ax.tick_params(length=0)
    # no taller than the map, whose title has the room above both
    ax.figure.colorbar(drawn, cax=ax.inset_axes((1.04, 0.0, 0.06, 1.0)))


def _ranks(ds: xr.Dataset, figure: SubFigure) -> None:
    """What rounding the weights of a block does, beside what the mean eigenvalue says, of the first checkpoint."""
    at = ds.isel(checkpoint=0)
    axes = figure.subplots(1, at.sizes["bits"], squeeze=False, sharey=True)[0]
    places = np.arange(ds.sizes["block"])
    for ax, bits in zip(axes, at.bits.values, strict=True):
        own = at.sel(bits=bits)
        value, se = own.sensitivity.values / 2, own.sensitivity_se.values / 2
        ax.errorbar(value, places - 0.15, xerr=_Z95 * se, fmt="o", color=COLOURS[0], elinewidth=0.8,
                    label="half mean eigenvalue × change")  # fmt: skip
        ax.plot(own.quadratic, places, "D", color=GREY, mfc="white", ls="", label="second order")
        ax.errorbar(own.loss_increase, places + 0.15, xerr=_Z95 * own.loss_increase_data_se.fillna(0), fmt="s",
                    color=VERMILION, elinewidth=0.8, label="measured")  # fmt: skip
        largest = float(np.nanmax(np.abs(np.concatenate([value, own.loss_increase.values]))))
        positive = value[value > 0]
        least = float(positive.min()) if positive.size else largest
        lowest = float(np.nanmin(own.loss_increase - _Z95 * own.loss_increase_data_se.fillna(0)))
        _signed_log(ax, max(least, 1e-3 * largest) or 1.0, largest or 1.0, lowest)
        for place, rank, low, high in zip(places, own["rank"].values, own.rank_low, own.rank_high, strict=True):
            if np.isfinite(rank):
                text = f"{rank:.0f}" if low == high else f"{rank:.0f} ({float(low):.0f}–{float(high):.0f})"
                ax.annotate(text, (1.0, place), xycoords=("axes fraction", "data"), fontsize=6, va="center",
                            xytext=(2, 0), textcoords="offset points")  # fmt: skip
        ax.axvline(0, color="#bbbbbb", lw=0.6, zorder=0)
        ax.set_xlabel("change of the loss [loss]")
        what = f"rounded to {int(bits)} bits" if bits > 0 else "quantised as given"
        ax.set_title(f"weights {what}; right: rank", loc="left", fontsize=7)
        ax.grid(axis="y", color="0.92", lw=0.6)
        ax.set_axisbelow(True)
        ax.set_label(what)
    _name_rows(axes[0], ds)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=6)


def _signed_log(ax: Axes, least: float, largest: float, lowest: float) -> None:
    """A logarithmic axis to both sides of a linear piece about zero, with a few ticks, from a lowest number on."""
    first = int(np.floor(np.log10(least)))
    last = max(int(np.ceil(np.log10(largest))), first + 1)
    ax.set_xscale("symlog", linthresh=10.0**first, linscale=0.7)
    decades = 10.0 ** np.arange(last, first, -max(-(-(last - first) // 2), 1))
    ax.set_xticks(np.concatenate([-decades, [0.0], decades[::-1]]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlim(min(-0.5 * 10.0**first, 1.5 * lowest), 1.5 * 10.0**last)

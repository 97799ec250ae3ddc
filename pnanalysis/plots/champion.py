"""A champion beside restarts: barriers from the plain model, and every diagnostic on the restarts' own scale."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from pnanalysis.analyses.champion_verdict import number_of
from pnanalysis.plots.style import CHAMPION, PAGE, PLAIN, QUIET, RESTART, new_figure
from pnanalysis.significance import LEVEL

_Z95 = 1.96  # standard errors to either side that make a 95 % interval
_FARTHEST = 4.6  # half-widths of the prediction interval up to which markers are drawn in their places
_LINE = 0.185  # inches a diagnostic
_GAP = 0.95  # rows between the two groups
_TITLES = {"line": "weights as they are", "aligned": "hidden units aligned"}
_BAND = "#dcefe7"  # of the prediction interval


def champion(ds: xr.Dataset) -> Figure:
    """Barriers from the plain model to champion and restarts; below, where each diagnostic lies among the restarts.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``champion``.

    Returns
    -------
    Figure
        Above, the training loss on straight lines from the plain model, less its linear interpolation between the
        ends; bands are 95 % intervals. Below, one row for each diagnostic, on an axis of the restarts: 0 is their
        mean, and the band from -1 to 1 the 95 % interval of prediction for one more. Bars are 95 % intervals of the
        numbers themselves; a full diamond is outside the restarts after Holm's step-down. Arrows point to what lies
        farther out. Without restarts, the differences from the plain model in their own 95 % intervals.
    """
    has_null = bool(np.isfinite(ds.null_low).any())
    rows = _rows(ds, has_null)
    height = 0.66 + _LINE * (len(rows) + 2 * _GAP)
    figure = new_figure(PAGE, 2.35 + height)
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(2.2, height))[:, 0]
    paths = [str(path) for path in ds.path.values if bool(ds.excess.sel(path=path).notnull().any())]
    panels = upper.subplots(1, len(paths), sharey=True, squeeze=False)[0]
    for ax, path in zip(panels, paths, strict=True):
        _barriers(ax, ds.sel(path=path))
        ax.set_title(_TITLES.get(path, path), loc="left")
        ax.set_label(path)
    panels[0].set_ylabel("training loss above\nlinear interpolation [nat]")
    ax = lower.subplots()
    ax.set_label("diagnostics")
    if has_null:
        _strips(ax, ds, rows)
    else:
        _differences(ax, ds, rows)
    upper.legend(
        handles=_samples(ds, has_null), loc="outside upper right", ncols=6, handletextpad=0.5, columnspacing=1.4
    )
    return figure


def _rows(ds: xr.Dataset, has_null: bool) -> list[int]:
    """Places of the diagnostics that are drawn."""
    known = (
        np.isfinite(ds.null_low.values)
        if has_null
        else np.isfinite(ds.difference.values) & (ds.difference_se.values > 0)
    )
    return [int(i) for i in np.flatnonzero(known)]


def _samples(ds: xr.Dataset, has_null: bool) -> list[Line2D | Patch]:
    """The legend of both parts."""
    role, n = str(ds.checkpoint.values[1]), ds.sizes["checkpoint"] - 2
    found: list[Line2D | Patch] = [
        Line2D([], [], color=PLAIN, marker="s", ls="none", mfc="white", label="plain"),
        Line2D([], [], color=CHAMPION, marker="D", label=role),
    ]
    if n:
        name = f"{n} restart{'s' * (n > 1)}"
        found.append(Line2D([], [], color=RESTART, marker="o", ms=3, lw=0.8, mfc="white", label=name))
    if has_null:
        found.append(Patch(color=_BAND, label="95 % for one more"))
    return found


def _barriers(ax: Axes, ds: xr.Dataset) -> None:
    """Excess of the loss along the line to every network, the champion's on top."""
    position = ds.position.values
    ax.axhline(0, color=QUIET, lw=0.6, zorder=0)
    for i in [*range(2, ds.sizes["checkpoint"]), 1]:
        one = ds.isel(checkpoint=i)
        excess, half = one.excess.values, _Z95 * np.nan_to_num(one.excess_se.values)
        is_own = i == 1
        colour = CHAMPION if is_own else RESTART
        ax.fill_between(position, excess - half, excess + half, color=colour, alpha=0.22 if is_own else 0.1, lw=0)
        ax.plot(position, excess, color=colour, lw=1.6 if is_own else 0.8, zorder=3 if is_own else 2)
    own = ds.isel(checkpoint=1)
    peak = int(np.nanargmax(np.nan_to_num(own.excess.values, nan=np.inf)))
    if position[peak] in (position[0], position[-1]):  # no barrier: half-way, where other curves are far above
        peak = len(position) // 2
    ax.plot(position[peak], own.excess.values[peak], "D", color=CHAMPION, zorder=4)
    ax.annotate(
        f"{float(own.barrier):.2g} ± {float(own.barrier_se):.1g}", (position[peak], own.excess.values[peak]), (0, 5),
        textcoords="offset points", ha="center", va="bottom", fontsize=7, color=CHAMPION,
    )  # fmt: skip
    ax.set_xlim(0, 1)
    ax.set_xticks([0, 0.5, 1], ["plain", "half-way", "other end"])
    first, _, last = ax.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.12 * (high - low))


def _on_scale(ds: xr.Dataset, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values of every network on the axis of the restarts, with the ends of their 95 % intervals."""
    at = ds.isel(diagnostic=i)
    value, low, high = (at[f"value{end}"].values.astype(float) for end in ("", "_low", "_high"))
    half = _Z95 * np.nan_to_num(at.value_se.values.astype(float))
    low, high = np.where(np.isnan(low), value - half, low), np.where(np.isnan(high), value + half, high)
    ends = [float(at[name]) for name in ("null_mean", "null_low", "null_high")]
    on_log = bool(at.log_scale) and ends[1] > 0 and (np.nan_to_num(value, nan=1.0) > 0).all()
    if on_log:
        tiny = np.nanmin(value) * 1e-3
        value, low, high = (np.log(np.maximum(one, tiny)) for one in (value, low, high))
        ends = [float(np.log(one)) for one in ends]
    mean, width = ends[0], (ends[2] - ends[1]) / 2
    width = width if width > 0 else 1.0
    return (value - mean) / width, (low - mean) / width, (high - mean) / width


def _strips(ax: Axes, ds: xr.Dataset, rows: list[int]) -> None:
    """One row for each diagnostic."""
    ax.axvspan(-1, 1, color=_BAND, lw=0, zorder=0)
    ax.axvline(0, color="white", lw=1.0, zorder=1)
    scaled = [_on_scale(ds, i) for i in rows]
    every = np.concatenate([value for value, _, _ in scaled])
    left = max(-_FARTHEST, min(-1.6, float(np.nanmin(every)) - 0.3))
    right = min(_FARTHEST, max(1.6, float(np.nanmax(every)) + 0.3))
    for y, i, ends in zip(_places(ds, rows), rows, scaled, strict=True):
        value, low, high = (np.clip(one, left, right) for one in ends)
        is_outside = float(ds.null_p[i]) <= LEVEL
        ax.plot(value[2:], np.full(len(value) - 2, y), "o", ms=3, mew=0.8, color=RESTART, mfc="white", zorder=2)
        if np.isfinite(value[0]):
            ax.plot([low[0], high[0]], [y + 0.14, y + 0.14], color=PLAIN, lw=0.9, zorder=3)
            ax.plot(value[0], y + 0.14, _marker(value[0], left, right, "s"), color=PLAIN, mfc="white", ms=3.6, zorder=4)
        ax.plot([low[1], high[1]], [y - 0.14, y - 0.14], color=CHAMPION, lw=0.9, zorder=3)
        ax.plot(
            value[1], y - 0.14, _marker(value[1], left, right, "D"), color=CHAMPION,
            mfc=CHAMPION if is_outside else "white", ms=4, zorder=5,
        )  # fmt: skip
        own, p = number_of(ds, str(ds.diagnostic.values[i]), 1), float(ds.null_p[i])
        number = own._number(own.value)
        text = f"{'−' + number[1:] if number.startswith('-') else number}{' %' if own.percent else ''}"
        ax.annotate(
            f"{text}  (p {p:.1g})" if is_outside else text, (1.01, y), xycoords=("axes fraction", "data"), va="center",
            fontsize=6.5, color=CHAMPION if is_outside else "0.35",
        )  # fmt: skip
    _finish(ax, ds, rows, left, right)
    ax.annotate(str(ds.checkpoint.values[1]), (1.01, -_GAP), xycoords=("axes fraction", "data"), va="center",
                fontsize=6.5, color=CHAMPION)  # fmt: skip
    ax.set_xlabel("distance from the mean of the restarts, in half-widths of the 95 % interval of prediction")


def _marker(value: float, left: float, right: float, marker: str) -> str:
    """An arrow for what lies beyond the axis."""
    return "<" if value <= left else ">" if value >= right else marker


def _differences(ax: Axes, ds: xr.Dataset, rows: list[int]) -> None:
    """Without restarts: champion minus plain model, in half-widths of the 95 % interval of the difference."""
    ax.axvspan(-1, 1, color="0.93", lw=0, zorder=0)
    ax.axvline(0, color=PLAIN, lw=0.9, zorder=1)
    score = ds.difference.values / np.where(ds.difference_se.values > 0, _Z95 * ds.difference_se.values, np.nan)
    farthest = _FARTHEST
    for y, i in zip(_places(ds, rows), rows, strict=True):
        value = float(np.clip(np.nan_to_num(score[i], posinf=farthest, neginf=-farthest), -farthest, farthest))
        is_sure = float(ds.difference_p[i]) <= LEVEL
        ax.plot(
            value,
            y,
            _marker(value, -farthest, farthest, "D"),
            color=CHAMPION,
            mfc=CHAMPION if is_sure else "white",
            ms=4,
        )
    _finish(ax, ds, rows, -farthest, farthest)
    ax.set_xlabel("difference from the plain model, in half-widths of its own 95 % interval")


def _places(ds: xr.Dataset, rows: list[int]) -> list[float]:
    """Heights of the rows, with a gap between numbers of pairs and of single networks."""
    n_pairs = sum(bool(ds.of_pair[i]) for i in rows)
    return [y + (_GAP if 0 < n_pairs <= y else 0.0) for y in range(len(rows))]


def _finish(ax: Axes, ds: xr.Dataset, rows: list[int], left: float, right: float) -> None:
    """Names of the rows, and above each group what it is about."""
    places = _places(ds, rows)
    ax.set_yticks(places, [str(ds.title.values[i]) for i in rows])
    ax.set_ylim(max(places, default=0) + 0.6, -0.6)
    ax.set_xlim(left - 0.15, right + 0.15)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    n_pairs = sum(bool(ds.of_pair[i]) for i in rows)
    heads = {"from the plain model": -_GAP} if n_pairs else {}
    heads |= {"of each network": n_pairs + 0.05} if 0 < n_pairs < len(rows) else {}
    for text, y in heads.items():
        ax.annotate(text, (0, y), (-5, 0), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
                    va="center", fontsize=6.5, color="0.35", style="italic")  # fmt: skip

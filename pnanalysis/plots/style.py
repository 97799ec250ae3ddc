"""How figures look: seaborn's theme at the column widths of a paper, colour-blind-safe colours, panels, saving."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    ScalarFormatter,
)
from PIL import Image

from pnanalysis.checks import check_figure
from pnanalysis.errors import printable
from pnanalysis.io.atomic import atomic_path

COLUMN, PAGE = 3.4, 7.0  # width in inches of one column, and of both
GOLDEN = 0.618
_SCREEN_DPI = 120  # in notebooks; files have their own

# Seaborn's "colorblind" palette, which is Okabe and Ito's in print-safe tones. Written out, as importing seaborn takes
# a second that only drawing has to cost.
BLUE, ORANGE, GREEN, VERMILION, PURPLE = "#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc"
YELLOW, SKY, GREY, BLACK = "#ece133", "#56b4e9", "#949494", "#000000"
#: Dark and light alternate, so that neighbours also differ in a grey print.
COLOURS = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, BLACK, YELLOW)
PLAIN, CHAMPION, RESTART, QUIET = BLUE, VERMILION, GREEN, GREY
OTHERS = "#777777"  # iterations drawn over a thick plain one
#: Style of legends that lie over curves.
OVERLAY: dict[str, Any] = {"frameon": True, "framealpha": 0.75, "edgecolor": "none"}
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
MARKERS = "osD^vP*X"
PER_ROW = 3  # panels
_FEW = 12  # points up to which each point of a curve has a marker

#: What differs from seaborn's "ticks" style and "paper" context.
_RC: dict[str, Any] = {
    "font.size": 8.0,
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same layout on every machine
    "axes.labelsize": 8.0,
    "axes.titlesize": 8.0,
    "legend.fontsize": 7.0,
    "legend.title_fontsize": 7.0,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    **{f"{axis}tick.{which}.width": 0.6 for axis in "xy" for which in ("major", "minor")},
    **{f"{axis}tick.{which}.size": size for axis in "xy" for which, size in (("major", 3.0), ("minor", 1.8))},
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "patch.force_edgecolor": False,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # TrueType: text in the file stays text
    "ps.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "pnanalysis",  # identifiers in an SVG depend on this salt instead of a random one
    "axes.formatter.use_mathtext": True,
    "axes.unicode_minus": True,
}


@contextmanager
def style() -> Iterator[None]:
    """Within the body, figures are made in this package's style; nothing global changes."""
    with mpl.rc_context(_theme()):
        yield


@cache
def _theme() -> dict[Any, Any]:
    import seaborn as sns  # here, as it takes a second to import

    colours = {"axes.prop_cycle": cycler(color=COLOURS)}
    return {**sns.axes_style("ticks"), **sns.plotting_context("paper"), **colours, **_RC}


class _NotebookFigure(Figure):
    """A figure that notebooks display although pyplot does not manage it, in 256 colours: a third of the bytes."""

    def _repr_png_(self) -> bytes:
        drawn, small = BytesIO(), BytesIO()
        self.savefig(drawn, format="png", dpi=self.dpi)
        image = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        image.save(small, "PNG", optimize=True)
        return small.getvalue()


def new_figure(width: float = COLUMN, height: float | None = None) -> Figure:
    """An empty figure with constrained layout that pyplot does not manage. Sizes are in inches.

    A notebook shows it once, as the value of a cell's last line, and it need not be closed.
    """
    size = (width, height if height is not None else width * GOLDEN)
    figure = _NotebookFigure(figsize=size, dpi=_SCREEN_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def own_axes(ax: Axes | None, width: float = COLUMN, height: float | None = None) -> Axes:
    """The given axes, or those of a new figure."""
    return ax if ax is not None else new_figure(width, height).add_subplot()


def panels(
    n: int, height: float, *, alone: float = PAGE, per_row: int = PER_ROW, **shared: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of ``n`` panels, ``height`` inches per row, and its axes; ``alone`` is the width of a single panel."""
    # seaborn.FacetGrid makes its figure through pyplot (a window on a desktop, shown twice in a notebook) and has no
    # constrained layout, so the grid is made here and seaborn draws on its axes
    rows, columns = grid(n, per_row)
    figure = new_figure(PAGE if n > 1 else alone, height * rows + 0.3)
    axes = list(figure.subplots(rows, columns, squeeze=False, **shared).ravel())
    for ax in axes[n:]:
        ax.remove()
    for ax in axes[max(n - columns, 0) : n]:  # the lowest of their columns
        ax.xaxis.set_tick_params(labelbottom=True)
    return figure, axes[:n]


def grid(n: int, per_row: int = PER_ROW) -> tuple[int, int]:
    """Rows and columns of ``n`` panels."""
    columns = 2 if n == 4 else min(n, per_row)
    return -(-n // columns), columns


def lowest(axes: Sequence[Axes]) -> Sequence[Axes]:
    """The lowest panel of each column."""
    return axes[-grid(len(axes))[1] :]


def leftmost(axes: Sequence[Axes]) -> Sequence[Axes]:
    """The first panel of each row."""
    return axes[:: grid(len(axes))[1]]


def legend_in_gap(figure: Figure, handles: Sequence[Any], names: Sequence[str], n: int, per_row: int = PER_ROW) -> bool:
    """Put a legend in the empty places of the last of the rows of ``n`` panels; False if that row is full."""
    rows, columns = grid(n, per_row)
    taken = n - (rows - 1) * columns
    if taken == columns:
        return False
    place = (taken / columns, 0.0, 1 - taken / columns, 1 / rows)
    figure.legend(handles, names, loc="center", bbox_to_anchor=place, ncols=-(-len(names) // 10))
    return True


def legend_above(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Put a legend above all panels, in as many columns as fit the figure's width."""
    widest = max(map(len, names), default=0) + 7  # letters, those that the handle takes included
    columns = max(1, min(len(names), int(figure.get_size_inches()[0] * 16 / widest)))  # 16 letters per inch
    figure.legend(handles, names, loc="outside upper right", ncols=columns)


def few(n: int) -> str | None:
    """The marker of a curve of ``n`` points; None if there are many."""
    return "o" if n <= _FEW else None


def integer_axis(ax: Axes, values: Any) -> None:
    """Ticks at integers only, also if there is a single value."""
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    if len(values) == 1:
        ax.set_xlim(float(values[0]) - 0.5, float(values[0]) + 0.5)


def log_axis(ax: Axes, low: float, high: float) -> None:
    """A logarithmic y axis with readable ticks, also over less than a decade."""
    if high < 1.001 * low:  # a constant: a logarithmic axis would have no tick
        ax.set_ylim(0.98 * low, 1.02 * high)
        return
    ax.set_yscale("log")
    if high < 3 * low:
        ax.yaxis.set_major_locator(MaxNLocator(5))
    elif high < 300 * low:
        subs = (1, 2, 3, 4, 6, 8) if high < 8 * low else (1, 2, 5) if high < 30 * low else (1, 3)
        ax.yaxis.set_major_locator(LogLocator(subs=subs))
    if high < 300 * low:
        is_short = high >= 3 * low > 3e-4 and high < 1e5
        ax.yaxis.set_major_formatter(FuncFormatter(_short) if is_short else ScalarFormatter())
        ax.yaxis.set_minor_formatter(NullFormatter())


def _short(value: float, place: int | None = None) -> str:
    """A tick label without the zeros at its end."""
    return f"{value:g}".replace("-", "\N{MINUS SIGN}", 1)


def symlog_axis(ax: Axes, linear: float) -> None:
    """An x axis that is linear out to ``linear`` on both sides and logarithmic beyond, with ticks on both parts."""
    ax.set_xscale("symlog", linthresh=linear)
    low, high = ax.get_xlim()
    farthest = max(-low, high, linear)
    room = 5 if farthest < 30 * linear else 2
    inside = np.asarray(MaxNLocator(room).tick_values(max(low, -linear), min(high, linear)))
    inside = inside[np.abs(inside) <= 0.9 * linear]
    decades = 10.0 ** np.arange(np.floor(np.log10(linear)), np.ceil(np.log10(farthest)) + 1)
    subs = (1, 2, 5) if farthest < 30 * linear else (1, 3) if farthest < 1000 * linear else (1,)
    beyond = np.outer(decades, subs).ravel()
    beyond = beyond[beyond >= linear]
    ticks = np.concatenate([-beyond, inside, beyond])
    ax.xaxis.set_major_locator(FixedLocator(ticks[(ticks >= low) & (ticks <= high)].tolist()))
    ax.xaxis.set_major_formatter(FuncFormatter(_short))
    ax.xaxis.set_minor_locator(NullLocator())


def tilted(names: Sequence[Any], inches: float) -> dict[str, Any]:
    """Options that rotate tick labels if they would overlap on an axis of this length."""
    room = inches * 15 / max(len(names), 1)  # letters per label, at 15 letters per inch
    return {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if max(map(len, map(str, names))) > room else {}


def others(iterations: Sequence[int], champion: int) -> str:
    """Legend text for the iterations that are neither plain nor champion."""
    rest = [i for i in dict.fromkeys(iterations) if i not in (0, champion)]
    return f"iteration {rest[0]}" if len(rest) == 1 else "other iterations"


def champion_of(ds: xr.Dataset | xr.DataArray) -> int:
    """The champion's iteration, of the selected run if there are several runs; -1 if there is none."""
    own = ds.coords.get("champion")
    if own is not None:
        return int(own) if own.ndim == 0 else -1
    return int(ds.attrs.get("champion", -1))


def with_plain_names(ds: xr.Dataset) -> xr.Dataset:
    """The dataset with names as figures may show them: with control characters as escapes, and without formulas."""
    plain = ds.assign_attrs(_plain_attrs(ds.attrs))
    for name, array in ds.variables.items():
        given = array.values.ravel().tolist() if array.dtype.kind in "OU" else []
        values = [_plain(value) if isinstance(value, str) else value for value in given]
        if values != given:
            plain[name] = (array.dims, np.array(values, dtype=object).reshape(array.shape), array.attrs)
        plain[name].attrs = _plain_attrs(array.attrs)
    return plain


def _plain_attrs(attrs: Mapping[Any, Any]) -> dict[Any, Any]:
    return {name: _plain(value) if isinstance(value, str) else value for name, value in attrs.items()}


def _plain(text: str) -> str:
    try:
        names = json.loads(text) if text.startswith("[") else None
    except (ValueError, RecursionError):
        names = None
    if isinstance(names, list):
        return json.dumps([_plain(name) if isinstance(name, str) else name for name in names])
    return printable(text).replace("$", r"\$")


def label(array: xr.DataArray) -> str:
    """An axis label from the variable's attributes: its long name and unit."""
    text = str(array.attrs.get("long_name", array.name or ""))
    units = str(array.attrs.get("units", "1"))
    return f"{text} [{units}]" if units not in ("", "1") else text


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure atomically as png, pdf or svg, by the file's suffix; the same figure gives the same bytes.

    Raises
    ------
    PnError
        If the suffix is none of these.
    """
    path = check_figure(path)
    metadata = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}, ".png": {}}[path.suffix.lower()]
    with style(), atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), metadata=metadata)
    return path


def cell_edges(middles: np.ndarray) -> np.ndarray:
    """Borders ``(n + 1,)`` half-way between the middles of cells ``(n,)``, which need not be evenly spaced."""
    if len(middles) == 1:
        return middles[0] + np.array([-0.5, 0.5])
    inner = (middles[1:] + middles[:-1]) / 2
    return np.concatenate([[2 * middles[0] - inner[0]], inner, [2 * middles[-1] - inner[-1]]])

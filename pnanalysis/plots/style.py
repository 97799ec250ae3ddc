"""How figures look: sizes of a paper's columns, colours the colour-blind can tell apart, vector fonts, saving."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter
from PIL import Image

from pnanalysis.checks import check_figure
from pnanalysis.io.atomic import atomic_path

COLUMN, PAGE = 3.4, 7.0  # inches: one column, both columns
GOLDEN = 0.618
_SCREEN_DPI = 120  # in notebooks; files have their own

#: Okabe and Ito's palette, dark and light alternating so that neighbours differ in grey too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000", "#F0E442")
PLAIN, CHAMPION, RESTART, QUIET = "#0072B2", "#D55E00", "#009E73", "#999999"
OTHERS = "#777777"  # iterations over a thick plain one
#: Of legends that lie over what is drawn.
OVERLAY: dict[str, Any] = {"frameon": True, "framealpha": 0.75, "edgecolor": "none"}
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
MARKERS = "osD^vP*X"
PER_ROW = 3  # panels
_FEW = 12  # points of a curve that are worth a marker each

_RC: dict[Any, Any] = {
    "font.size": 8.0,
    "axes.labelsize": 8.0,
    "axes.titlesize": 8.0,
    "legend.fontsize": 7.0,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "pnanalysis",
    "axes.formatter.use_mathtext": True,
    "axes.unicode_minus": True,
}


@contextmanager
def style() -> Iterator[None]:
    """Within the body, figures are made in this package's style; nothing global changes."""
    with mpl.rc_context(_RC):
        yield


class _NotebookFigure(Figure):
    """A figure that notebooks show although pyplot does not know of it, in 256 colours: a third of the bytes."""

    def _repr_png_(self) -> bytes:
        drawn, small = BytesIO(), BytesIO()
        self.savefig(drawn, format="png", dpi=self.dpi)
        image = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        image.save(small, "PNG", optimize=True)
        return small.getvalue()


def new_figure(width: float = COLUMN, height: float | None = None) -> Figure:
    """An empty figure that no window manager knows of; constrained layout. Sizes are in inches.

    A notebook shows it as the value of a cell's last line, once, and nothing has to be closed.
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
    """A figure of ``n`` panels, ``height`` inches a row, and its axes; ``alone`` is the width of a single panel."""
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
    """A legend in the place of the panels that the last of ``n`` panels' rows lacks; False if it lacks none."""
    rows, columns = grid(n, per_row)
    taken = n - (rows - 1) * columns
    if taken == columns:
        return False
    place = (taken / columns, 0.0, 1 - taken / columns, 1 / rows)
    figure.legend(handles, names, loc="center", bbox_to_anchor=place, ncols=-(-len(names) // 10))
    return True


def legend_above(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """A legend above all panels, in as many columns as the figure is wide enough for."""
    widest = max(map(len, names), default=0) + 7  # letters, the handle's included
    columns = max(1, min(len(names), int(figure.get_size_inches()[0] * 16 / widest)))
    figure.legend(handles, names, loc="outside upper right", ncols=columns)


def few(n: int) -> str | None:
    """The marker of a curve of ``n`` points: none if there are many."""
    return "o" if n <= _FEW else None


def integer_axis(ax: Axes, values: Any) -> None:
    """Ticks at integers alone, also where there is a single value."""
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    if len(values) == 1:
        ax.set_xlim(float(values[0]) - 0.5, float(values[0]) + 0.5)


def log_axis(ax: Axes, low: float, high: float) -> None:
    """A logarithmic axis of y with ticks that can be read, also over less than a decade."""
    if high < 1.001 * low:  # all the same
        ax.set_ylim(0.98 * low, 1.02 * high)
        return
    ax.set_yscale("log")
    if high < 3 * low:
        ax.yaxis.set_major_locator(MaxNLocator(5))
    elif high < 30 * low:
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 6, 8) if high < 8 * low else (1, 2, 5)))
    if high < 30 * low:
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.yaxis.set_minor_formatter(NullFormatter())


def tilted(names: Sequence[Any], inches: float) -> dict[str, Any]:
    """How tick labels are turned that would overlap on an axis so long."""
    room = inches * 15 / max(len(names), 1)  # letters
    return {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if max(map(len, map(str, names))) > room else {}


def others(iterations: Sequence[int], champion: int) -> str:
    """What the iterations are called that are neither plain nor champion."""
    rest = [i for i in dict.fromkeys(iterations) if i not in (0, champion)]
    return f"iteration {rest[0]}" if len(rest) == 1 else "other iterations"


def champion_of(ds: xr.Dataset | xr.DataArray) -> int:
    """The champion's iteration: of the run that was selected where there are several; -1 where there is none."""
    own = ds.coords.get("champion")
    if own is not None:
        return int(own) if own.ndim == 0 else -1
    return int(ds.attrs.get("champion", -1))


def label(array: xr.DataArray) -> str:
    """An axis label from a variable's own attributes: its name and its unit."""
    text = str(array.attrs.get("long_name", array.name or ""))
    units = str(array.attrs.get("units", "1"))
    return f"{text} [{units}]" if units not in ("", "1") else text


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as png, pdf or svg, by the file's suffix; atomically, and the same bytes for the same figure.

    Raises
    ------
    PnError
        If the suffix is another.
    """
    path = check_figure(path)
    metadata = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}, ".png": {}}[path.suffix.lower()]
    with style(), atomic_path(path) as temporary:
        figure.savefig(temporary, metadata=metadata)
    return path

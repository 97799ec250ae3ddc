"""How figures look: sizes of a paper's columns, colours the colour-blind can tell apart, vector fonts, saving."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from pnanalysis.errors import PnError
from pnanalysis.schema import atomic_path

COLUMN, PAGE = 3.4, 7.0  # inches: one column, both columns
GOLDEN = 0.618
_SCREEN_DPI = 120  # in notebooks; files have their own

#: Okabe and Ito's palette, dark and light alternating so that neighbours differ in grey too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000", "#F0E442")
PLAIN, CHAMPION, RESTART, QUIET = "#0072B2", "#D55E00", "#009E73", "#999999"
#: Of legends that lie over what is drawn.
OVERLAY: dict[str, Any] = {"frameon": True, "framealpha": 0.75, "edgecolor": "none"}
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))

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

_FORMATS = (".png", ".pdf", ".svg")


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
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise PnError(f"{path}: figures are saved as {', '.join(_FORMATS)}; choose one of these suffixes")
    metadata = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}, ".png": {}}[path.suffix.lower()]
    with style(), atomic_path(path) as temporary:
        figure.savefig(temporary, metadata=metadata)
    return path

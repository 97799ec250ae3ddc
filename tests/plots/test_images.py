"""Figures look as they did: every one, drawn of synthetic data, is compared with a stored picture.

`make baselines` draws the stored pictures anew, into ``tests/plots/baseline``: look at them before they are committed.
"""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure
from matplotlib.ft2font import __freetype_build_type__

from pnanalysis import plots
from tests.plots.synthetic import PICTURES

#: Text and ticks change with matplotlib and its FreeType: pictures of other ones are not compared. To be changed with
#: them.
DRAWN_WITH = "3.11"
FREETYPE = "local"  # the one in matplotlib's own wheels
#: Root mean square of the grey values' differences, of 255: the smallest curve in another colour makes more.
TOLERANCE = 1.0

_other = not mpl.__version__.startswith(f"{DRAWN_WITH}.") or __freetype_build_type__ != FREETYPE


@pytest.mark.skipif(
    _other, reason=f"the pictures were drawn by a wheel of matplotlib {DRAWN_WITH}, this is {mpl.__version__}"
)
@pytest.mark.mpl_image_compare(
    tolerance=TOLERANCE, style="default", savefig_kwargs={"dpi": 50, "pil_kwargs": {"optimize": True}}
)
@pytest.mark.parametrize("name", PICTURES)
def test_picture(name: str) -> Figure:
    figure, make, options = PICTURES[name]
    made: dict[str, Any] = {key: value() if callable(value) else value for key, value in options.items()}
    return plots.plot(make(), figure, **made)


def test_every_figure_has_a_picture() -> None:
    assert {plots.FIGURES[figure] for figure, _, _ in PICTURES.values()} == set(plots.FIGURES.values())

"""Figures look as they did: each is drawn from synthetic data and compared with a stored picture.

`make baselines` draws the stored pictures again, into ``tests/plots/baseline``: look at them before you commit them.
"""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure
from matplotlib.ft2font import __freetype_build_type__

from pnanalysis import plots
from tests.plots.synthetic import PICTURES

#: Text and ticks depend on matplotlib and its FreeType: pictures are compared only if drawn with these versions.
DRAWN_WITH = "3.11"
FREETYPE = "local"  # the one in matplotlib's own wheels
#: Root-mean-square difference of the grey values (of 255): the smallest curve in another colour exceeds it.
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

"""The picture in the README, from the results of the demo: ``python -m docs.tools.picture DEMO-FOLDER``."""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

import pnanalysis as pn

PICTURE = Path(__file__).resolve().parents[1] / "images" / "demo.png"
_WIDTH, _GAP = 1400, 10  # pixels
_DPI = 110


def compose(run: pn.Run) -> Image.Image:
    """Spectra in the first row, saturation and trajectories in the second."""
    results = run.results
    top, left, right = (
        _image(pn.plots.plot(results[kind].to_dataset())) for kind in ("hessian", "saturation", "trajectory")
    )
    height = min(left.height, right.height)
    row = [image.resize((image.width * height // image.height, height)) for image in (left, right)]
    width = sum(image.width for image in row) + _GAP
    top = top.resize((width * 4 // 5, top.height * width * 4 // 5 // top.width))
    whole = Image.new("RGB", (width, top.height + _GAP + height), "white")
    whole.paste(top, ((width - top.width) // 2, 0))
    whole.paste(row[0], (0, top.height + _GAP))
    whole.paste(row[1], (row[0].width + _GAP, top.height + _GAP))
    return whole.resize((_WIDTH, whole.height * _WIDTH // width), Image.Resampling.LANCZOS)


def _image(figure: Figure) -> Image.Image:
    drawn = BytesIO()
    with pn.plots.style():
        figure.savefig(drawn, format="png", dpi=2 * _DPI)  # scaled down later, which smooths the lines
    return Image.open(drawn).convert("RGB")


if __name__ == "__main__":
    compose(pn.open_run(Path(sys.argv[1]) / "tanh7")).quantize(128).save(PICTURE, optimize=True)

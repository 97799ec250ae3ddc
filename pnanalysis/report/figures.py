"""The figures of a report: every one that a run's datasets allow, as inline SVG with a caption."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import xarray as xr
from matplotlib.figure import Figure

from pnanalysis import plots
from pnanalysis.analyses.verdict import verdict
from pnanalysis.io.runs import Run
from pnanalysis.plots.landscape import same_plane
from pnanalysis.plots.saturation import bounded_layers
from pnanalysis.plots.style import PAGE, new_figure, style
from pnanalysis.report.datasets import ODD, datasets

_SVG_LIMIT = 1_500_000


@dataclass(frozen=True)
class Picture:
    """A drawn figure: markup, title, caption and sentences (also its text for those who do not see it).

    Without markup it is one that could not be drawn, and the caption says why.
    """

    title: str
    caption: str
    markup: str
    points: tuple[str, ...] = ()


def pictures(run: Run, control: Run | None) -> Iterator[Picture]:
    """Every figure that the run's datasets allow."""
    found, odd = datasets(run)
    for name, ds in found.items():
        title = name
        try:
            for figure_of in _figures_of(name, found, control):
                title, caption, options = figure_of
                figure = _draw(options.pop("figure"), ds, options)
                points = tuple(verdict(ds)) if title == "Comparison" else ()
                said = " ".join((f"{title}.", caption, *points))
                yield Picture(title, caption, embed(figure, said, f"{run.path.name}-{title}"), points)
        except ODD as error:
            odd[title] = str(error)
    for title, why in odd.items():
        yield Picture(title.capitalize(), f"Not shown: {why}.", "")


def _figures_of(
    kind: str, found: dict[str, xr.Dataset], control: Run | None
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    ds = found[kind]
    if kind == "history":
        if bool(ds.validation_error.notnull().any()):
            yield (
                "Errors by iteration",
                "Validation and test error at the end of each iteration; lines are the plain model's, bars "
                "one binomial standard error" + (", hollow green markers the restart control." if control else "."),
                {"figure": "errors", "control": control.history if control else None},
            )
        yield (
            "Training", "Plain thick below, champion dashed, the other iterations thin in grey.", {"figure": "history"},
        )  # fmt: skip
    elif kind == "hessian" and "layer" in ds.coords:
        yield (
            "Hessian spectra by layer",
            "Densities of the diagonal blocks, a row a layer.",
            {"figure": "layer_spectra"},
        )
    elif kind == "hessian":
        yield (
            "Hessian spectrum",
            "Density of eigenvalues with its standard error as a band; ticks below, a row a checkpoint, mark "
            "eigenvalues beyond the bulk that were found one by one.",
            {"figure": "hessian"},
        )
    elif kind == "saturation":
        yield (
            "Saturation", "98th percentile of the absolute activations, a panel a layer; bands are one standard error.",
            {"figure": "saturation"},
        )  # fmt: skip
        if bounded_layers(ds).any():
            yield (
                "Distance from saturation", "How far that percentile is from the asymptote at one, on a logarithmic "
                "axis; gaps that single precision cannot resolve, 6e-8, lie at the bottom.",
                {"figure": "saturation_gap"},
            )  # fmt: skip
        yield (
            "Saturated and dead units", "Layer by layer at the end of each iteration; bars are one standard error.",
            {"figure": "saturated_layers"},
        )  # fmt: skip
        yield (
            "Activations", "Normalised histograms, plain against champion.", {"figure": "activation_histogram"},
        )  # fmt: skip
    elif kind == "trajectory":
        yield (
            "Trajectories", "On planes through the start and two end points, and of principal components; squares are "
            "ends, percentages the share of the variance that an axis explains.",
            {"figure": "trajectories"},
        )  # fmt: skip
        if int(ds.end_iteration.max()) > 0:
            yield (
                "Cosines with earlier end points", "Seen from zero: what the penalty pushes down.",
                {"figure": "cosines"},
            )  # fmt: skip
        if "layer" in ds.dims:
            yield "Trajectories by layer", "Each layer on axes of its own.", {"figure": "trajectory_layers"}
    elif kind == "barrier":
        yield (
            "Loss between minima", "Loss and error along paths from one minimum to the other, with one standard error; "
            "the barrier is the largest height above the line between the ends.",
            {"figure": "barrier"},
        )  # fmt: skip
    elif kind == "landscape":
        paths = found.get("trajectory")
        yield (
            "Loss on a plane", "Contours of the loss; the axes are in the units of the parameters, or of filter norms.",
            {"figure": "landscape", "trajectory": paths if same_plane(ds, paths) else None},
        )  # fmt: skip
    elif kind == "sharpness":
        yield (
            "Sharpness", "The largest rise of the loss found in small neighbourhoods of the minima; bars are one "
            "standard error.", {"figure": "sharpness"},
        )  # fmt: skip
    elif kind == "gradients":
        yield (
            "Persistent gradient", "The penalty's constant push and its fluctuation beside the gradient of the loss; "
            "below, the signs of the inner products with the earlier end points.",
            {"figure": "gradients"},
        )  # fmt: skip
    elif kind == "comparison":
        yield (
            "Comparison", "Every diagnostic with its 95 % interval, hollow where the paired difference from the first "
            "checkpoint is not told from zero, half filled where its error is not known; below, how far they differ as "
            "functions and layer by layer.", {"figure": "comparison"},
        )  # fmt: skip
    elif kind == "descent":
        yield (
            "Descents", "Paths of all iterations over the contours of the unpenalised surface.",
            {"figure": "descent", "surfaces": found.get("surface")},
        )  # fmt: skip
    elif kind == "basin":
        yield "Basins", "Which start ends in which well of the unpenalised surface.", {"figure": "basin"}
    elif kind == "surface":
        yield (
            "Surfaces", "The surface that each iteration descends, and its path.",
            {"figure": "surface", "descents": found.get("descent")},
        )  # fmt: skip
    elif kind in plots.FIGURES:
        yield kind.capitalize(), "", {"figure": kind}


def _draw(name: str, ds: xr.Dataset, options: dict[str, Any]) -> Figure:
    if name == "errors":
        with style():
            ax = plots.errors(ds, ax=new_figure(4.6, 2.8).add_subplot(), **options)
            figure = ax.get_figure()
            assert isinstance(figure, Figure)
            return figure
    return plots.plot(ds, name, **options)


def embed(figure: Figure, text: str, prefix: str) -> str:
    """The figure as inline SVG whose identifiers cannot clash with another's; as PNG where that would be large."""
    width = f'style="width: {min(100 * figure.get_size_inches()[0] / PAGE, 100):.0f}%"'
    buffer = BytesIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue().decode()
    if len(svg) > _SVG_LIMIT:
        buffer = BytesIO()
        with style():
            figure.savefig(buffer, format="png", dpi=160)
        data = base64.b64encode(buffer.getvalue()).decode()
        return f'<img {width} alt="{_escaped(text)}" src="data:image/png;base64,{data}">'
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    mark = re.sub(r"\W+", "-", prefix)
    svg = re.sub(r'\bid="', f'id="{mark}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{mark}-", svg)
    return svg.replace("<svg", f'<svg {width} role="img" aria-label="{_escaped(text)}"', 1)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")

"""The figures of a report: all that a run's datasets allow, as inline SVG with a caption."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from html import escape
from io import BytesIO
from typing import Any

import xarray as xr
from matplotlib.figure import Figure

from pnanalysis import plots
from pnanalysis.analyses.matrix_names import matrix_name
from pnanalysis.analyses.verdict import verdict
from pnanalysis.plots.landscape import same_plane
from pnanalysis.plots.saturation import bounded_layers
from pnanalysis.plots.style import PAGE, new_figure, style
from pnanalysis.report.datasets import BAD_DATASET, Study

#: Bytes of SVG above which a picture is embedded as PNG: browsers become slow on paths of very many points.
_SVG_LIMIT = 1_500_000


@dataclass(frozen=True)
class Picture:
    """A drawn figure for the page.

    Attributes
    ----------
    key : str
        The figure's name in :data:`pnanalysis.plots.FIGURES`, or the dataset's kind if that could not be read.
    title, caption : str
        The caption says why where the figure could not be drawn.
    markup : str
        Empty if the figure could not be drawn.
    points : tuple of str
        Sentences that belong to it; they are also part of its text for screen readers.
    """

    key: str
    title: str
    caption: str
    markup: str
    points: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A figure that a kind of dataset may have in a report.

    Attributes
    ----------
    key : str
        Name in :data:`pnanalysis.plots.FIGURES`.
    title, caption : str
    shown_if : callable
        Whether the dataset holds what the figure draws.
    options : callable
        Arguments of the figure's function, from the dataset and the study.
    points : callable
        Sentences about the dataset.
    size : tuple of float, optional
        Width and height in inches, of a figure that draws on given axes.
    """

    key: str
    title: str
    caption: str
    shown_if: Callable[[xr.Dataset], bool] = lambda ds: True
    options: Callable[[xr.Dataset, Study], dict[str, Any]] = lambda ds, study: {}
    points: Callable[[xr.Dataset], list[str]] = lambda ds: []
    size: tuple[float, float] | None = None

    def of_file(self, name: str) -> Entry:
        """The same of another file than that of its kind's name."""
        return replace(self, key=f"{self.key}-{name}", title=f"{self.title} ({name})")


def _has_layers(ds: xr.Dataset) -> bool:
    return "layer" in ds.coords


def _control_history(ds: xr.Dataset, study: Study) -> dict[str, Any]:
    return {"control": study.control.run.history if study.control else None}


def _trajectory_on_plane(ds: xr.Dataset, study: Study) -> dict[str, Any]:
    paths = study.main.get("trajectory")
    return {"trajectory": paths if same_plane(ds, paths) else None}


#: By kind of dataset, its figures in the order of the page.
ENTRIES: dict[str, tuple[Entry, ...]] = {
    "history": (
        Entry(
            "errors",
            "Errors by iteration",
            "Validation and test error at the end of each iteration. Horizontal lines mark the plain model, bars show "
            "one binomial standard error, and hollow green markers, where present, are the restart control.",
            shown_if=lambda ds: bool(ds.validation_error.notnull().any()),
            options=_control_history,
            size=(4.6, 2.8),
        ),
        Entry(
            "history",
            "Training",
            "Loss and error during training: the plain model as a thick line, the champion dashed, the other "
            "iterations as thin grey lines.",
        ),
    ),
    "hessian": (
        Entry(
            "layer_spectra",
            "Hessian spectra by layer",
            "Spectral densities of the diagonal blocks, one row per layer.",
            shown_if=_has_layers,
        ),
        Entry(
            "hessian",
            "Hessian spectrum",
            "Density of the eigenvalues; bands show one standard error. Where there are two, the dark one is that of "
            "the random probes, and the light one includes the choice of examples. The ticks at the bottom, one row "
            "per checkpoint, mark outliers: eigenvalues beyond a gap in the spectrum.",
            shown_if=lambda ds: not _has_layers(ds),
        ),
    ),
    "eigenpairs": (
        Entry(
            "eigenpairs",
            "Eigenpairs",
            "Eigenvalues at one end of the spectrum, with 95 % intervals that include the choice of examples; the "
            "overlap of the eigenvectors' spaces, with that over two halves of the examples on the diagonal; the parts "
            "of the gradient and of the last update in the top space; and the part of each eigenvector in each layer, "
            "with the layer's part of all parameters in the last column. For classifiers, what the curvature is made "
            "of: means of classes, of pairs of classes, and the scatter about them.",
        ),
    ),
    "blocks": (
        Entry(
            "blocks",
            "Curvature by blocks",
            "Traces and Frobenius norms of the blocks on the diagonal, and the part of its energy that each block "
            "shares with others, with 95 % intervals whose thick part is from random signs alone; below, the norms of "
            "blocks off the diagonal relative to those on it. Where there are any, distances between the spectra of "
            "blocks, whose diagonal is what chance alone gives (a dot: the 95 % interval reaches down to it), and what "
            "rounding the weights of one block does to the loss.",
        ),
    ),
    "saturation": (
        Entry(
            "saturation",
            "Saturation",
            "98th percentile of the absolute activations, one panel per layer; bands show one standard error.",
        ),
        Entry(
            "saturation_gap",
            "Distance from saturation",
            "Distance of that percentile from the asymptote at one, on a logarithmic axis. Gaps below the resolution "
            "of single precision, 6e-8, are drawn at the bottom.",
            shown_if=lambda ds: bool(bounded_layers(ds).any()),
        ),
        Entry(
            "saturated_layers",
            "Saturated and dead units",
            "By layer, at the end of each iteration; bars show one standard error.",
        ),
        Entry(
            "activation_histogram",
            "Activations",
            "Normalised histograms of the activations, plain model and champion; bands show one standard error.",
        ),
    ),
    "trajectory": (
        Entry(
            "trajectories",
            "Trajectories",
            "Projected on planes through the start and two end points and on principal components. Squares mark end "
            "points; percentages give the fraction of the variance that an axis explains.",
        ),
        Entry(
            "cosines",
            "Cosines with earlier end points",
            "Cosines of the angles, seen from the origin, that the penalty drives towards 90 degrees.",
            shown_if=lambda ds: int(ds.end_iteration.max()) > 0,
        ),
        Entry(
            "trajectory_layers",
            "Trajectories by layer",
            "Each layer in its own coordinates.",
            shown_if=lambda ds: "layer" in ds.dims,
        ),
    ),
    "barrier": (
        Entry(
            "barrier",
            "Loss between minima",
            "Loss and error along paths from one minimum to the other; bands show one standard error. The barrier is "
            "the largest height above the straight line between the values at the ends.",
        ),
    ),
    "landscape": (
        Entry(
            "landscape",
            "Loss on a plane",
            "Contours of the loss. The axes are in units of the parameters, or of filter norms on random planes.",
            options=_trajectory_on_plane,
        ),
    ),
    "sharpness": (
        Entry(
            "sharpness",
            "Sharpness",
            "The largest rise of the loss found in neighbourhoods of the minima, and its mean rise over random "
            "directions there; bands and bars show one standard error, dotted lines what the second-order expansion of "
            "the loss gives. Below, the relative flatness of a layer with 95 % intervals.",
        ),
    ),
    "learning_coefficient": (
        Entry(
            "learning_coefficient",
            "Local learning coefficient",
            "Estimates with 95 % intervals, beside those of a Gaussian with the Hessian of the minimum; on the right, "
            "means of pieces of each chain, with a line where burn-in ends. Chains that have not converged give no "
            "estimate.",
        ),
    ),
    "correlation": (
        Entry(
            "correlation",
            "Correlation with generalisation",
            "Kendall's rank correlation of each diagnostic with the target over the runs of a sweep, with 95 % "
            "intervals; full markers are significant after Holm's step-down for all of them. On the right, the runs.",
        ),
    ),
    "curvature_monitor": (
        Entry(
            "curvature_monitor",
            "Curvature along training",
            "The largest eigenvalue of the Hessian that the optimizer sees, preconditioned where it is adaptive, "
            "beside the threshold above which its steps are unstable; the largest eigenvalues of the Hessian itself, "
            "loss, and norm of the gradient.",
        ),
    ),
    "gradients": (
        Entry(
            "gradients",
            "Persistent gradient",
            "Constant push and fluctuation of the penalty compared with the gradient of the loss; below, the signs of "
            "the inner products with the earlier end points.",
        ),
    ),
    "comparison": (
        Entry(
            "comparison",
            "Comparison",
            "Every diagnostic with its 95 % interval, whose thick part is from random probes alone. Hollow markers: "
            "the paired difference from the first checkpoint is not significant; half-filled markers: its error is "
            "unknown. Below, how much the checkpoints differ as functions, overall and layer by layer.",
            points=verdict,
        ),
    ),
    "champion": (
        Entry(
            "champion",
            "Champion and restarts",
            "Training loss on straight lines from the plain model to the champion and to restarts, less its linear "
            "interpolation, with the weights as they are and aligned. Below, every diagnostic on the scale of the "
            "restarts: the band is the 95 % interval of prediction for one more, bars are 95 % intervals of the "
            "numbers themselves, and full diamonds lie outside after Holm's step-down.",
            points=verdict,
        ),
    ),
    "descent": (
        Entry(
            "descent",
            "Descents",
            "Paths of all iterations over the contours of the unpenalised surface.",
            options=lambda ds, study: {"surfaces": study.main.get("surface")},
        ),
    ),
    "basin": (Entry("basin", "Basins", "The well of the unpenalised surface that each start ends in."),),
    "surface": (
        Entry(
            "surface",
            "Surfaces",
            "The surface that each iteration descends, and its path.",
            options=lambda ds, study: {"descents": study.main.get("descent")},
        ),
    ),
}


def pictures(study: Study) -> Iterator[Picture]:
    """Every figure that the datasets of a study's main run allow; last, those that could not be drawn."""
    reasons = {kind: (kind.capitalize(), why) for kind, why in study.main.unreadable().items()}
    for name, ds in study.main.readable().items():
        kind = name if name in ENTRIES else str(ds.attrs.get("kind", name))
        # kinds without a caption of their own get the figure of their name, if there is one
        default = (Entry(kind, kind.capitalize(), ""),) if kind in plots.FIGURES else ()
        for entry in ENTRIES.get(kind, default):
            try:
                if entry.shown_if(ds):
                    yield _picture(entry if name == kind else entry.of_file(name), ds, study, entry.key)
            except BAD_DATASET as error:
                reasons[entry.key if name == kind else name] = entry.title, str(error)
                break  # the other figures of this dataset would lack the same
    for key, (title, why) in reasons.items():
        yield Picture(key, title, f"Not shown: {why}.", "")


def _picture(entry: Entry, ds: xr.Dataset, study: Study, figure_key: str) -> Picture:
    options = entry.options(ds, study)
    with style():
        if entry.size:
            options["ax"] = new_figure(*entry.size).add_subplot()
        figure = plots.plot(ds, figure_key, **options)
    points = tuple(entry.points(ds))
    title = entry.title.replace("Hessian", matrix_name(ds.attrs)) if ds.attrs.get("kind") == "hessian" else entry.title
    alternative = " ".join((f"{title}.", entry.caption, *points))
    markup = embed(figure, alternative, f"{study.main.name}-{entry.key}")
    return Picture(entry.key, title, entry.caption, markup, points)


def embed(figure: Figure, text: str, prefix: str) -> str:
    """A figure as inline SVG, or as PNG if the SVG would be large.

    Parameters
    ----------
    figure : Figure
    text : str
        Read out instead of the picture.
    prefix : str
        Put in front of every SVG identifier, so that figures on one page cannot refer to each other's parts.
    """
    width = f'style="width: {min(100 * figure.get_size_inches()[0] / PAGE, 100):.0f}%"'
    svg = _saved(figure, format="svg", metadata={"Date": None, "Creator": None}).decode()
    if len(svg) > _SVG_LIMIT:
        data = base64.b64encode(_saved(figure, format="png", dpi=160)).decode()
        return f'<img {width} alt="{escape(text)}" src="data:image/png;base64,{data}">'
    svg = svg[svg.index("<svg") :]  # an XML declaration may not stand inside HTML
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    mark = re.sub(r"\W+", "-", prefix)
    svg = re.sub(r'\bid="', f'id="{mark}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{mark}-", svg)
    return svg.replace("<svg", f'<svg {width} role="img" aria-label="{escape(text)}"', 1)


def _saved(figure: Figure, **options: Any) -> bytes:
    buffer = BytesIO()
    with style():
        figure.savefig(buffer, **options)
    return buffer.getvalue()

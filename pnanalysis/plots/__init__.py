"""One function per figure: dataset in, matplotlib Axes or Figure out."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pnanalysis.errors import PnError
from pnanalysis.plots.blocks import blocks
from pnanalysis.plots.champion import champion
from pnanalysis.plots.comparison import comparison
from pnanalysis.plots.correlation import correlation
from pnanalysis.plots.eigenpairs import eigenpairs
from pnanalysis.plots.history import errors, history
from pnanalysis.plots.landscape import barrier, landscape
from pnanalysis.plots.layer_activations import activation_histogram, saturated_layers
from pnanalysis.plots.saturation import saturation, saturation_gap
from pnanalysis.plots.sharpness import sharpness
from pnanalysis.plots.spectrum import layer_spectra, spectral_density
from pnanalysis.plots.style import new_figure, save_figure, style, with_plain_names
from pnanalysis.plots.trajectory import cosines, trajectories, trajectory, trajectory_layers

#: Figures by name, as ``module:function``; a dataset's kind is the name of its own figure.
FIGURES: dict[str, str] = {
    "history": "pnanalysis.plots.history:history",
    "errors": "pnanalysis.plots.history:errors",
    "hessian": "pnanalysis.plots.spectrum:spectral_density",
    "spectral_density": "pnanalysis.plots.spectrum:spectral_density",
    "eigenpairs": "pnanalysis.plots.eigenpairs:eigenpairs",
    "blocks": "pnanalysis.plots.blocks:blocks",
    "layer_spectra": "pnanalysis.plots.spectrum:layer_spectra",
    "saturation": "pnanalysis.plots.saturation:saturation",
    "saturation_gap": "pnanalysis.plots.saturation:saturation_gap",
    "saturated_layers": "pnanalysis.plots.layer_activations:saturated_layers",
    "activation_histogram": "pnanalysis.plots.layer_activations:activation_histogram",
    "trajectory": "pnanalysis.plots.trajectory:trajectory",
    "trajectories": "pnanalysis.plots.trajectory:trajectories",
    "trajectory_layers": "pnanalysis.plots.trajectory:trajectory_layers",
    "cosines": "pnanalysis.plots.trajectory:cosines",
    "pca": "pnanalysis.plots.trajectory:principal_components",
    "barrier": "pnanalysis.plots.landscape:barrier",
    "landscape": "pnanalysis.plots.landscape:landscape",
    "sharpness": "pnanalysis.plots.sharpness:sharpness",
    "learning_coefficient": "pnanalysis.plots.learning_coefficient:learning_coefficient",
    "correlation": "pnanalysis.plots.correlation:correlation",
    "curvature_monitor": "pnanalysis.plots.curvature_monitor:curvature_monitor",
    "gradients": "pnanalysis.plots.gradients:gradients",
    "champion": "pnanalysis.plots.champion:champion",
    "comparison": "pnanalysis.plots.comparison:comparison",
    "functional": "pnanalysis.plots.comparison:functional",
    "descent": "pnanalysis.plots.two_well:descent",
    "surface": "pnanalysis.plots.two_well:surface",
    "surface_3d": "pnanalysis.plots.two_well:surface_3d",
    "basin": "pnanalysis.plots.two_well:basin",
    "ensemble": "pnanalysis.plots.kink:ensemble",
    "escape": "pnanalysis.plots.kink:escape",
}


def plot(ds: xr.Dataset, kind: str | None = None, **options: Any) -> Figure:
    """The figure of a dataset.

    Parameters
    ----------
    ds : xarray.Dataset
    kind : str, optional
        A name in :data:`FIGURES`; by default the dataset's own kind.
    **options
        Passed to the figure's function.

    Raises
    ------
    PnError
        If there is no such figure, or the dataset lacks what it draws.
    """
    name = kind or str(ds.attrs.get("kind"))
    if name not in FIGURES:
        raise PnError(f"no figure {name!r}; the figures are {', '.join(FIGURES)}")
    module, _, attribute = FIGURES[name].partition(":")
    draw: Callable[..., Axes | Figure] = getattr(import_module(module), attribute)
    try:
        with style():
            given = {key: with_plain_names(it) if isinstance(it, xr.Dataset) else it for key, it in options.items()}
            drawn = draw(with_plain_names(ds), **given)
    except PnError:
        raise
    except (LookupError, AttributeError, TypeError, ValueError, ArithmeticError) as error:
        kind = ds.attrs.get("kind", "foreign")
        raise PnError(f"this {kind} dataset lacks what the figure {name!r} draws") from error
    if isinstance(drawn, Figure):
        return drawn
    figure = drawn.get_figure()
    assert isinstance(figure, Figure)
    return figure


__all__ = [
    "FIGURES",
    "activation_histogram",
    "barrier",
    "blocks",
    "champion",
    "comparison",
    "correlation",
    "cosines",
    "eigenpairs",
    "errors",
    "history",
    "landscape",
    "layer_spectra",
    "new_figure",
    "plot",
    "saturated_layers",
    "saturation",
    "saturation_gap",
    "save_figure",
    "sharpness",
    "spectral_density",
    "style",
    "trajectories",
    "trajectory",
    "trajectory_layers",
]

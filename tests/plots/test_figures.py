"""Figures: what is drawn is what the dataset holds, in every format, without touching matplotlib's settings."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import pnanalysis as pn
from pnanalysis import plots
from pnanalysis.errors import PnError
from pnanalysis.plots.style import PLAIN
from pnanalysis.runs import Run


@pytest.fixture(scope="module")
def spectra() -> xr.Dataset:
    """Two spectra with a spike at zero and outliers, one along the other."""
    found = []
    for top in (5.0, 8.0):
        eigenvalues = torch.cat([torch.zeros(180), torch.linspace(0, 0.5, 17), torch.tensor([2.0, 3.0, top])])
        op = pn.as_operator(torch.diag(eigenvalues.double()))
        found.append(pn.spectral_density(op, 12, 3, progress=False, grid=np.linspace(-1, 9, 400), kernel_width=0.05))
    stacked = xr.concat(found, dim="checkpoint", join="outer", combine_attrs="drop_conflicts")
    return stacked.assign_coords(checkpoint=["plain", "champion"]).assign_attrs(kind="hessian")


def test_spectra_are_drawn_on_a_log_axis_with_outliers_marked(spectra: xr.Dataset) -> None:
    ax = pn.plots.spectral_density(spectra)
    assert isinstance(ax, Axes)
    assert ax.get_yscale() == "log"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["plain", "champion"]
    curves = [line for line in ax.lines if line.get_label() in ("plain", "champion")]
    np.testing.assert_array_equal(curves[1].get_xdata(), spectra.eigenvalue)
    floor = ax.get_ylim()[0]
    np.testing.assert_array_equal(curves[1].get_ydata(), np.maximum(spectra.density[1], floor))
    rugs = [line for line in ax.lines if line.get_marker() == "|"]
    assert len(rugs) == 2
    assert any(abs(rugs[1].get_xdata() - 8.0) < 1e-6)
    assert ax.get_xlabel() == "eigenvalue [loss]"


def test_a_single_spectrum_needs_no_legend_and_may_be_symlog(spectra: xr.Dataset) -> None:
    ax = pn.plots.spectral_density(spectra.isel(checkpoint=0), symlog=True)
    assert ax.get_legend() is None
    assert ax.get_xscale() == "symlog"


def test_trajectories_end_where_the_dataset_says(tiny_run: Run) -> None:
    ds = pn.trajectory(tiny_run, progress=False)
    for projection in ("plane", "pca"):
        ax = plots.trajectory(ds, projection=projection)
        ends = [line for line in ax.lines if line.get_marker() == "s"]
        drawn = sorted((float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in ends)
        expected = ds[projection].sel(checkpoint=(ds.epoch == 4).values).isel(component=slice(2)).values.tolist()
        np.testing.assert_allclose(drawn, sorted(map(tuple, expected)))
        assert ax.get_aspect() == 1


def test_saturation_has_a_panel_a_layer_and_a_curve_an_iteration(tiny_run: Run) -> None:
    ds = pn.saturation(tiny_run, progress=False)
    figure = plots.saturation(ds)
    assert [ax.get_title() for ax in figure.axes] == list(ds.layer.values)
    assert all(len(ax.lines) == 3 for ax in figure.axes)
    plain = next(line for line in figure.axes[2].lines if line.get_label().startswith("plain"))
    expected = ds.abs_percentile.sel(iteration=0, layer="tanh3", quantile=98.0)
    np.testing.assert_array_equal(plain.get_ydata(), expected)


def test_histograms_show_plain_and_another_at_two_epochs(tiny_run: Run) -> None:
    ds = pn.saturation(tiny_run, progress=False)
    figure = plots.activation_histogram(ds)
    assert len(figure.axes) == 2 * ds.sizes["layer"]
    assert figure.axes[0].get_ylabel() == "density, epoch 2"
    with pytest.raises(PnError, match="epoch 99"):
        plots.activation_histogram(ds, epochs=[99])


def test_errors_show_the_control_and_binomial_bars(tiny_run: Run) -> None:
    ax = plots.errors(tiny_run.history, control=tiny_run.history)
    labels = {text.get_text() for text in ax.get_legend().get_texts()}
    assert labels == {"validation", "test", "validation, restart", "test, restart"}
    bars = next(c for c in ax.containers if c.get_label() == "test")
    share = float(tiny_run.history.test_error[1, -1])
    (segments,) = bars.lines[2]
    low, high = segments.get_segments()[1][:, 1]
    assert (high - low) / 2 == pytest.approx(np.sqrt(share * (1 - share) / 300))


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_figures_are_saved_alike_every_time(tiny_run: Run, tmp_path: Path, suffix: str) -> None:
    contents = []
    for name in ("a", "b"):
        figure = plots.plot(tiny_run.history)
        assert isinstance(figure, Figure)
        contents.append(plots.save_figure(figure, tmp_path / f"{name}{suffix}").read_bytes())
    assert contents[0] == contents[1]
    assert len(contents[0]) > 5000


def test_other_formats_and_figures_are_refused(tiny_run: Run, tmp_path: Path) -> None:
    with pytest.raises(PnError, match=r"\.png, \.pdf, \.svg"):
        plots.save_figure(plots.plot(tiny_run.history), tmp_path / "figure.bmp")
    with pytest.raises(PnError, match="no figure 'pie'"):
        plots.plot(tiny_run.history, "pie")
    with pytest.raises(PnError, match="history dataset"):
        plots.plot(tiny_run.history, "saturation")


def test_drawing_changes_no_settings(spectra: xr.Dataset) -> None:
    before = dict(mpl.rcParams)
    plots.plot(spectra)
    assert dict(mpl.rcParams) == before


def test_notebooks_show_a_figure_once_and_small(spectra: xr.Dataset) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgb
    from PIL import Image

    before = plt.get_fignums()
    figure = plots.plot(spectra)
    png = figure._repr_png_()  # type: ignore[attr-defined]
    assert plt.get_fignums() == before  # pyplot would show it a second time
    saved = io.BytesIO()
    figure.savefig(saved, format="png", dpi=figure.dpi)
    assert len(png) < len(saved.getvalue())
    shown, original = (np.asarray(Image.open(file).convert("RGB"), int) for file in (io.BytesIO(png), saved))
    assert shown.shape == original.shape == (*(figure.dpi * figure.get_size_inches()[::-1]).astype(int), 3)
    assert np.abs(shown - original).mean() < 2  # of 255
    plain = np.array(to_rgb(PLAIN)) * 255
    assert np.abs(shown - plain).sum(-1).min() < 20

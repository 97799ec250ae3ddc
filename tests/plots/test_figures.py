"""Figures draw what the dataset holds, in every format, without changing matplotlib's settings."""

from __future__ import annotations

import io
import json
import shutil
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
from pnanalysis.io.runs import MANIFEST, Run
from pnanalysis.plots import kink
from pnanalysis.plots.style import BLACK, CHAMPION, COLOURS, PLAIN, QUIET, RESTART
from tests.plots import synthetic


@pytest.fixture(scope="module")
def spectra() -> xr.Dataset:
    """Two spectra with a spike at zero and outliers, one along the other."""
    found = []
    for top in (5.0, 8.0):
        bulk = torch.linspace(-0.5, 0.5, 97)
        eigenvalues = torch.cat([torch.zeros(100), bulk, torch.tensor([2.0, 3.0, top])])
        op = pn.as_operator(torch.diag(eigenvalues.double()))
        found.append(pn.spectral_density(op, 12, 3, progress=False, grid=np.linspace(-1, 9, 400), kernel_width=0.05))
    stacked = xr.concat(found, dim="checkpoint", join="outer", combine_attrs="drop_conflicts")
    return stacked.assign_coords(checkpoint=["plain", "champion"]).assign_attrs(kind="hessian")


def test_spectra_are_drawn_on_a_log_axis_with_outliers_marked(spectra: xr.Dataset) -> None:
    ax = pn.plots.spectral_density(spectra)
    assert isinstance(ax, Axes)
    assert ax.get_yscale() == "log"
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["plain", "champion", "± 1 standard error", "outliers"]
    curves = [line for line in ax.lines if line.get_label() in ("plain", "champion")]
    np.testing.assert_array_equal(curves[1].get_xdata(), spectra.eigenvalue)
    floor = ax.get_ylim()[0]
    np.testing.assert_array_equal(curves[1].get_ydata(), np.maximum(spectra.density[1], floor))
    rugs = [line for line in ax.lines if line.get_marker() == "|"]
    assert len(rugs) == 2
    assert any(abs(rugs[1].get_xdata() - 8.0) < 1e-6)
    assert ax.get_xlabel() == "eigenvalue [loss]"


def test_a_single_spectrum_needs_no_name_and_may_be_symlog(spectra: xr.Dataset) -> None:
    exact = spectra.isel(checkpoint=0).drop_vars("deflated_value")
    ax = pn.plots.spectral_density(exact.assign(density_se=0 * exact.density_se), symlog=True)
    assert ax.get_legend() is None
    assert ax.get_xscale() == "symlog"
    band = spectra.density_se.isel(checkpoint=0, drop=True)
    (grey,) = pn.plots.spectral_density(exact.assign(density_se=band + 1e-3)).get_legend().get_texts()
    assert grey.get_text() == "± 1 standard error"


def test_trajectories_end_where_the_dataset_says(tiny_run: Run) -> None:
    ds = pn.trajectory(tiny_run, progress=False)
    for projection in ("plane", "pca"):
        ax = plots.trajectory(ds, projection=projection)
        ends = [line for line in ax.lines if line.get_marker() == "s"]
        drawn = sorted((float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in ends)
        expected = ds[projection].sel(checkpoint=(ds.epoch == 4).values).isel(component=slice(2)).values.tolist()
        np.testing.assert_allclose(drawn, sorted(map(tuple, expected)))
        assert ax.get_aspect() == 1


@pytest.fixture(scope="module")
def saturated(tiny_run: Run) -> xr.Dataset:
    return pn.saturation(tiny_run, progress=False)


def test_saturation_has_a_panel_per_layer_and_a_curve_per_iteration(saturated: xr.Dataset) -> None:
    ds = saturated
    figure = plots.saturation(ds)
    assert [ax.get_title() for ax in figure.axes] == list(ds.layer.values)
    assert all(len(ax.lines) == 3 for ax in figure.axes)
    plain = next(line for line in figure.axes[2].lines if line.get_label().startswith("plain"))
    expected = ds.abs_percentile.sel(iteration=0, layer="tanh3", quantile=98.0)
    np.testing.assert_array_equal(plain.get_ydata(), expected)


def test_bands_of_the_percentiles_are_one_standard_error(saturated: xr.Dataset) -> None:
    ds = saturated
    ax = plots.saturation(ds).axes[2]
    at = ds.sel(iteration=0, layer="tanh3", quantile=98.0)
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(float((at.abs_percentile + at.abs_percentile_se).max()))
    with pytest.raises(PnError, match="99th percentile has not been measured"):
        plots.saturation(ds, quantile=99)


def test_iterations_of_equal_values_are_thinner_and_marked_at_other_epochs() -> None:
    ds = synthetic.saturation()
    ds["abs_percentile"] = ds.abs_percentile.sel(iteration=0).broadcast_like(ds.abs_percentile)
    figure = plots.plot(ds)
    plain, *later = figure.axes[0].lines
    assert plain.get_linewidth() > 2 * max(line.get_linewidth() for line in later)
    assert plain.get_zorder() < min(line.get_zorder() for line in later)
    assert len({(line.get_marker(), line.get_markevery()) for line in later}) == 3
    assert len({line.get_markevery() for line in later}) == 3  # of seven epochs
    (legend,) = figure.legends  # five panels: in the place of the sixth
    figure.draw_without_rendering()
    box = legend.get_window_extent()
    assert not any(box.overlaps(ax.get_window_extent()) for ax in figure.axes)
    assert [bool(ax.get_xlabel()) for ax in figure.axes] == [False, False, True, True, True]
    labelled = [any(tick.label1.get_visible() for tick in ax.xaxis.get_major_ticks()) for ax in figure.axes]
    assert labelled == [False, False, True, True, True]


def test_iterations_that_a_run_does_not_have_are_not_named() -> None:
    ds = synthetic.saturation()
    short = ds.where(ds.iteration < 2)
    both = xr.concat([ds, short], dim="run", data_vars="all").assign_coords(run=["a", "b"], champion=("run", [2, 1]))
    names = [text.get_text() for text in plots.saturation(both).legends[0].get_texts()]
    assert [name for name in names if name.startswith("b")] == ["b: plain", "b: iteration 1 (champion)"]


def test_gaps_are_one_minus_the_percentile_with_bands_that_stay_positive() -> None:
    ds = synthetic.saturation()
    ds["abs_percentile_se"] = 0 * ds.abs_percentile_se + 0.5
    ax = plots.plot(ds, "saturation_gap").axes[2]
    at = ds.sel(iteration=0, layer="tanh3", quantile=98.0)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), 1 - at.abs_percentile)
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert ax.get_yscale() == "log"
    assert band.min() == 2.0**-24
    assert band.max() == pytest.approx(float((1 - at.abs_percentile + 0.5).max()))
    saturated = ds.assign(abs_percentile=0 * ds.abs_percentile + 1)
    assert (plots.plot(saturated, "saturation_gap").axes[0].lines[0].get_ydata() == 2.0**-24).all()
    mixed = ds.assign_coords(activation=("layer", ["relu", "tanh", "relu", "sigmoid", "relu"]))
    assert [ax.get_title() for ax in plots.saturation_gap(mixed).axes] == ["tanh2", "tanh4"]
    with pytest.raises(PnError, match="bounded by 1"):
        plots.saturation_gap(ds.assign_coords(activation=("layer", ["relu"] * 5)))


def test_unrelated_files_are_not_joined_by_a_line() -> None:
    ds = synthetic.saturation_of_files()
    figure = plots.saturation(ds)
    (bars,) = figure.axes[1].containers
    assert bars.lines[0].get_linestyle() == "None"
    np.testing.assert_array_equal(bars.lines[0].get_ydata(), ds.abs_percentile.sel(layer="tanh2", quantile=98.0))
    assert [tick.get_rotation() for tick in figure.axes[-1].get_xticklabels()] == [0.0] * 4
    long = ds.assign_coords(checkpoint=[f"a-network-of-some-{day}day" for day in ("mon", "tues", "fri", "sun")])
    assert {tick.get_rotation() for tick in plots.saturation(long).axes[-1].get_xticklabels()} == {30.0}


def test_saturated_layers_have_a_marker_and_a_bar_for_each_iteration(saturated: xr.Dataset) -> None:
    ds = saturated
    left, right = plots.saturated_layers(ds).axes
    assert [text.get_text() for text in left.get_xticklabels()] == list(ds.layer.values)
    heights = [container.lines[0].get_ydata() for container in left.containers]
    np.testing.assert_array_equal(heights, ds.saturation_measure.sel(epoch=4))
    drawn = np.array([[bar.get_height() for bar in bars] for bars in right.containers])
    np.testing.assert_allclose(drawn, (ds.dead_units / ds.n_units).sel(epoch=4).transpose("iteration", "layer"))
    early = plots.saturated_layers(ds, epoch=1).axes[0].containers[0].lines[0].get_ydata()
    np.testing.assert_array_equal(early, ds.saturation_measure.sel(epoch=1, iteration=0))
    with pytest.raises(PnError, match="epoch 99"):
        plots.saturated_layers(ds, epoch=99)


def test_every_figure_of_saturation_can_show_a_monitor() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
    with pn.SaturationMonitor(model, every=1) as monitor:
        for _ in range(3):
            model(torch.randn(20, 3))
    ds = monitor.dataset()
    (line,) = plots.saturation(ds).axes[0].lines
    np.testing.assert_array_equal(line.get_xdata(), [0, 1, 2])
    assert len(plots.saturated_layers(ds).axes[1].patches) == 3
    assert len(plots.activation_histogram(ds).axes) == 1


def test_histograms_show_plain_and_another_at_two_epochs(saturated: xr.Dataset) -> None:
    ds = saturated
    figure = plots.activation_histogram(ds)
    assert len(figure.axes) == 2 * ds.sizes["layer"]
    assert figure.axes[0].get_ylabel() == "density, epoch 2"
    steps = figure.axes[0].lines[0].get_ydata()
    expected = ds.histogram.isel(layer=0).sel(iteration=0, epoch=2).values
    np.testing.assert_allclose(steps[: len(expected)], expected)  # then the right border of the last bin
    with pytest.raises(PnError, match="epoch 99"):
        plots.activation_histogram(ds, epochs=[99])


def test_errors_show_the_control_and_binomial_bars(tiny_run: Run) -> None:
    ax = plots.errors(tiny_run.history, control=tiny_run.history)
    labels = {text.get_text() for text in ax.get_legend().get_texts()}
    assert labels == {"validation", "test", "validation, restart", "test, restart"}
    bars = next(c for c in ax.containers if c.get_label() == "test")
    rate = float(tiny_run.history.test_error[1, -1])
    (segments,) = bars.lines[2]
    low, high = segments.get_segments()[1][:, 1]
    assert (high - low) / 2 == pytest.approx(np.sqrt(rate * (1 - rate) / 300))


def test_errors_of_several_runs_are_refused(tiny_run: Run) -> None:
    with pytest.raises(PnError, match="select one of a, b"):
        plots.errors(pn.history(tiny_run).expand_dims(run=["a", "b"]))


@pytest.mark.parametrize("kind", ["history", "gradients"])
def test_one_epoch_is_a_point_at_an_integer(kind: str) -> None:
    figure = plots.plot(getattr(synthetic, kind)(synthetic.EPOCHS[:1]))
    figure.draw_without_rendering()
    for ax in figure.axes:
        assert [tick for tick in ax.get_xticks() if ax.get_xlim()[0] <= tick <= ax.get_xlim()[1]] == [1.0]
    assert figure.axes[0].lines[0].get_marker() == "o"


def test_a_single_other_iteration_is_named_and_round_off_is_not_a_distance() -> None:
    ds = synthetic.trajectory()
    named = plots.trajectory(ds).get_legend_handles_labels()[1]
    assert named == ["plain", "other iterations", "champion (iteration 2)", "start"]
    assert plots.trajectory(ds).get_title(loc="left").splitlines()[0] == "points lie up to 0.6 off this plane"
    few = ds.isel(checkpoint=(ds.iteration < 2).values).assign_attrs(champion=0)
    few["plane_residual"] = 1e-8 * few.plane_residual
    ax = plots.trajectory(few)
    assert ax.get_legend_handles_labels()[1] == ["plain (champion)", "iteration 1", "start"]
    assert ax.get_title(loc="left").splitlines()[0] == "all points lie in this plane"


def test_bars_of_fractions_stop_at_zero_and_fillings_are_explained() -> None:
    figure = plots.plot(synthetic.comparison())
    panels = {ax.get_label(): ax for ax in figure.axes}
    bars = [line.get_xdata()[0] for line in panels["error:test"].lines if len(line.get_xdata()) == 2]
    assert bars[0] == 0.0  # 0.004 - 1.96 * 0.003
    filled = {
        key: [line.get_fillstyle() if line.get_markerfacecolor() != "white" else "none" for line in ax.lines
                if line.get_marker() in "osD"]
        for key, ax in panels.items()
    }  # fmt: skip
    assert filled["loss:test"] == ["full", "full", "none"]
    assert filled["error:test"] == ["full", "none", "none"]
    assert filled["distance_from_start"] == ["full", "left", "left"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "95 % interval", "its part from probes", "first, or significantly different",
        "not significantly different", "difference of unknown error",
    ]  # fmt: skip


def test_the_bar_of_the_probes_lies_thick_within_that_of_both_errors() -> None:
    ds = synthetic.comparison()
    panels = {ax.get_label(): ax for ax in plots.plot(ds).axes}
    bars = [line for line in panels["trace"].lines if line.get_ydata()[0] == line.get_ydata()[-1] == 1]
    both, probes = bars[:2]
    assert probes.get_linewidth() > 2 * both.get_linewidth()
    value, se, probe_se = (float(ds[name][1]) for name in ("trace", "trace_se", "trace_probe_se"))
    np.testing.assert_allclose(both.get_xdata(), [value - 1.96 * se, value + 1.96 * se])
    np.testing.assert_allclose(probes.get_xdata(), [value - 1.96 * probe_se, value + 1.96 * probe_se])
    alone = [line for line in panels["loss:test"].lines if len(line.get_xdata()) == 2 and line.get_ydata()[0] == 1]
    assert len(alone) == 1  # a mean over examples has no probes


def test_the_band_of_the_probes_lies_dark_within_that_of_both_errors() -> None:
    ds = synthetic.spectra_of_examples()
    ax = plots.spectral_density(ds)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts[2:4] == ["± 1 standard error, probes", "± 1 standard error, also examples"]
    assert len(ax.collections) == 4
    outer, inner = ax.collections[:2]
    assert inner.get_facecolor()[0, 3] > 2 * outer.get_facecolor()[0, 3]
    top = float((ds.density + ds.density_se)[0].max())
    assert outer.get_paths()[0].vertices[:, 1].max() == pytest.approx(top)
    top = float((ds.density + ds.density_probe_se)[0].max())
    assert inner.get_paths()[0].vertices[:, 1].max() == pytest.approx(top)


def test_losses_are_drawn_by_path_and_split(tiny_run: Run) -> None:
    ds = pn.landscape(tiny_run, checkpoints=["start", "plain"], align=True, n_points=4, n=200, progress=False)
    figure = plots.plot(ds)
    assert len(figure.axes) == 4  # loss and error, train and test
    ax = figure.axes[2]
    drawn = {line.get_label(): line.get_ydata() for line in ax.lines if len(line.get_xdata()) == 4}
    at = ds.sel(split="test")
    for (text, heights), path in zip(drawn.items(), ("line", "aligned"), strict=True):
        np.testing.assert_array_equal(heights, at.loss.sel(path=path))
        assert text == f"{path}: no barrier"  # the loss falls all the way from the start
    assert {line.get_linestyle() for line in ax.lines if line.get_label() in drawn} == {"-", "--"}


def test_barriers_have_their_height_in_the_legend_unless_there_is_none() -> None:
    ds = synthetic.barrier()
    loss, error = plots.plot(ds).axes[:2]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["line: 1 ± 0.05", "aligned: no barrier"]
    assert [text.get_text() for text in error.get_legend().get_texts()] == [
        "line: 30.00 ± 2.00 %", "aligned: no barrier",
    ]  # fmt: skip
    assert error.yaxis.get_major_formatter()(0.25).endswith("%")
    rounding = ds.assign(barrier=ds.barrier.where(ds.path == "line", 1e-9))
    assert "aligned: no barrier" in [text.get_text() for text in plots.plot(rounding).axes[0].get_legend().get_texts()]


def test_planes_carry_their_points_and_the_trajectories_of_the_same_plane(tiny_run: Run, own_run: Run) -> None:
    ds = pn.landscape(tiny_run, view="plane", n_points=4, n=200, progress=False)
    paths = pn.trajectory(tiny_run, progress=False)
    ax = plots.plot(ds, trajectory=paths).axes[0]
    drawn = [line.get_xydata() for line in ax.lines]
    for name in ("start", "plain"):
        at = ds.point_position.sel(point=name).values
        assert any(len(xy) == 1 and np.allclose(xy[0], at) for xy in drawn)
    plain = paths.plane.sel(checkpoint=(paths.iteration == 0).values).values[:, :2]
    assert any(xy.shape == plain.shape and np.allclose(xy, plain) for xy in drawn)
    assert ax.get_xlim() == (float(ds.x[0]), float(ds.x[-1]))
    layered = plots.plot(ds, trajectory=pn.trajectory(tiny_run, per_layer=True, progress=False)).axes[0]
    assert [line.get_label() for line in layered.lines] == [line.get_label() for line in ax.lines]
    for one, other in zip(layered.lines, ax.lines, strict=True):
        np.testing.assert_allclose(one.get_xydata(), other.get_xydata(), atol=1e-12)
    with pytest.raises(PnError, match="another plane"):
        plots.plot(ds, trajectory=pn.trajectory(own_run, progress=False))
    random = pn.landscape(tiny_run, view="random", n_points=3, n=100, progress=False)
    assert "filter norms" in plots.plot(random, quantity="error").axes[0].get_xlabel()


def test_sharpness_has_a_panel_per_neighbourhood(tiny_run: Run) -> None:
    options = {"checkpoints": ["ends"], "n": 100, "n_steps": 3, "n_starts": 1, "n_directions": 2, "progress": False}
    ds = pn.sharpness(tiny_run, radii={"ball": 0.05, "box": 0.001}, measures="worst", second_order=False, **options)
    figure = plots.plot(ds)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["ball, radius 0.05", "box, radius 0.001"]
    found = next(c for c in figure.axes[0].containers if c.get_label() == "largest found")
    np.testing.assert_array_equal(found.lines[0].get_ydata(), ds.rise.sel(neighbourhood="ball"))
    several = pn.sharpness(
        tiny_run, radii={"ball": [0.05, 0.1]}, measures=("worst", "average"), second_order=False, **options
    )
    upper, lower = plots.plot(several).axes
    for ax, name, radius in ((upper, "rise", "radius"), (lower, "average", "average_radius")):
        np.testing.assert_array_equal(ax.lines[0].get_xdata(), several[radius].squeeze("neighbourhood"))
        np.testing.assert_array_equal(ax.lines[0].get_ydata(), several[name].isel(checkpoint=0, neighbourhood=0))


def test_correlations_are_drawn_strongest_first() -> None:
    ds = synthetic.correlation()
    forest, *scatters = plots.plot(ds).axes
    order = np.argsort(-np.abs(ds.tau.values), kind="stable")
    assert [text.get_text() for text in forest.get_yticklabels()] == [
        str(name).replace("_", " ") for name in ds.diagnostic.values[order]
    ]
    assert len(scatters) == 3
    assert scatters[0].get_title(loc="left").startswith(str(ds.diagnostic.values[order[0]]).replace("_", " "))


@pytest.mark.parametrize("suffix", [".png", pytest.param(".pdf", marks=pytest.mark.slow), ".svg"])
def test_the_same_figure_is_saved_as_the_same_bytes(tiny_run: Run, tmp_path: Path, suffix: str) -> None:
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
    with pytest.raises(PnError, match="this history dataset lacks what the figure 'saturation' draws"):
        plots.plot(tiny_run.history, "saturation")


def test_colours_are_those_of_the_colour_blind_palette() -> None:
    import seaborn as sns

    palette = {*sns.color_palette("colorblind").as_hex(), BLACK}
    assert {*COLOURS, PLAIN, CHAMPION, RESTART, QUIET} <= palette
    assert len(set(COLOURS)) == len(COLOURS)


def test_cosines_are_drawn_one_by_one_and_as_their_mean() -> None:
    ds = synthetic.trajectory()
    ax = plots.cosines(ds).axes[0]
    third = ds.cosine.values[(ds.iteration == 3).values, :3]
    drawn = [line.get_ydata() for line in ax.lines[-4:]]
    np.testing.assert_allclose(np.stack(drawn[:3], axis=1), third)
    np.testing.assert_allclose(drawn[3], third.mean(1))


def test_losses_by_seed_have_a_histogram_at_their_side() -> None:
    ds = synthetic.restarts()
    ax = kink.losses_by_seed(ds)
    (side,) = ax.child_axes
    assert sum(bar.get_width() for bar in side.patches) == ds.sizes["member"]
    assert side.get_ylim() == ax.get_ylim()


def test_drawing_changes_no_settings(spectra: xr.Dataset) -> None:
    before = dict(mpl.rcParams)
    plots.plot(spectra)
    assert dict(mpl.rcParams) == before


def test_the_dashboard_shows_intervals_disagreement_and_layers(tiny_run: Run) -> None:
    ds = pn.compare(tiny_run, checkpoints=["ends"], hessian={"n": 60, "n_lanczos": 8, "n_probes": 3}, progress=False)
    figure = plots.plot(ds)
    panels = {ax.get_label(): ax for ax in figure.axes}
    assert {"loss:train", "error:test", "trace", "saturation"} <= set(panels)
    ax = panels["loss:test"]
    at = ds.sel(split="test").isel(checkpoint=1, other=0)
    bar = next(line for line in ax.lines if list(line.get_ydata()) == [1, 1] and line.get_marker() in ("None", None))
    expected = [float(at.loss - 1.96 * at.loss_se), float(at.loss + 1.96 * at.loss_se)]
    np.testing.assert_allclose(bar.get_xdata(), expected)
    marker = next(line for line in ax.lines if line.get_marker() == "s")
    assert (marker.get_markerfacecolor() != "white") == (float(at.loss_difference_p) <= 0.05)
    heat = panels["disagreement"]
    numbers = {text.get_text() for text in heat.texts}
    assert f"{100 * float(ds.disagreement[0, 2]):.1f}" in numbers
    assert len(heat.texts) == 6
    np.testing.assert_array_equal(panels["cka"].containers[1].lines[0].get_ydata(), ds.cka[2, 0, :-1])
    assert [text.get_text() for text in heat.get_yticklabels()] == ["iter00", "iter01", "iter02"]


def test_the_dashboard_has_no_panels_for_what_was_not_compared(tiny_run: Run) -> None:
    bare = plots.plot(pn.compare(tiny_run, hessian=False, cka=False, saturation=False, progress=False))
    assert {ax.get_label() for ax in bare.axes}.isdisjoint({"cka", "trace", "lambda_max", "n_outliers", "saturation"})
    two = plots.plot(pn.compare(tiny_run, checkpoints=["plain", "start"], hessian=False, progress=False)).axes[-2]
    assert len(two.patches) == 2  # they, and independent networks
    assert two.get_title(loc="left") == "disagreement on test examples [%]"
    alone = plots.plot(pn.functional_distance(tiny_run, progress=False))
    assert [ax.get_label() for ax in alone.axes] == ["disagreement", "cka"]


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


def test_each_of_several_runs_shows_its_own_champion(tiny_run: Run, tmp_path: Path) -> None:
    runs = []
    for name, champion in (("a", 1), ("b", 2)):
        shutil.copytree(tiny_run.path, tmp_path / name)
        manifest = pn.open_run(tmp_path / name).manifest
        (tmp_path / name / MANIFEST).write_text(json.dumps(manifest | {"champion": champion}))
        runs.append(pn.open_run(tmp_path / name))
    labels = [
        text.get_text()
        for ax in plots.plot(pn.history(*runs)).axes
        if ax.get_legend() is not None
        for text in ax.get_legend().get_texts()
    ]
    assert [text for text in labels if "champion" in text] == ["champion (iteration 1)", "champion (iteration 2)"]
    ds = pn.saturation(*runs, checkpoints=["ends"], n=50, progress=False)
    assert ds.champion.values.tolist() == [1, 2]
    names = {text.get_text() for text in plots.plot(ds).legends[0].get_texts()}
    assert {"a: iteration 1 (champion)", "b: iteration 2 (champion)"} <= names


@pytest.mark.slow
def test_each_layer_has_a_row_that_checkpoints_share(tiny_run: Run) -> None:
    ds = pn.hessian(tiny_run, checkpoints=["plain", "start"], per_layer=True, n=50, n_hvp=20, progress=False)
    figure = plots.plot(ds, "layer_spectra")
    layers = list(dict.fromkeys(ds.layer.values))
    assert [ax.get_ylabel() for ax in figure.axes] == layers
    for ax, layer in zip(figure.axes, layers, strict=True):
        rows = ds.density.values[ds.layer.values == layer]
        assert len(ax.lines) == len(rows) == 2
        for line, density in zip(ax.lines, rows, strict=True):
            seen = density > density.max() * 1e-8
            np.testing.assert_allclose(line.get_ydata()[seen], density[seen])


def test_eigenpairs_of_some_of_several_checkpoints_are_drawn() -> None:
    ds = synthetic.eigenpairs()
    both = {ax.get_label() for ax in plots.eigenpairs(ds).axes}
    assert "overlap" in both
    for part in (ds.isel(checkpoint=[0]), ds.isel(checkpoint=0), ds.sel(checkpoint=["champion"])):
        alone = {ax.get_label() for ax in plots.eigenpairs(part).axes}
        assert "overlap" not in alone  # with what?
        assert {"values", "directions"} <= alone
    turned = plots.eigenpairs(ds.isel(checkpoint=[1, 0]))
    (overlap,) = (ax for ax in turned.axes if ax.get_label() == "overlap")
    shown = overlap.collections[0].get_array().reshape(2, 2)
    np.testing.assert_allclose(np.diag(shown), [0.7, 0.8])


def test_critical_sharpness_is_drawn_beside_the_eigenvalue_that_bounds_it() -> None:
    ds = synthetic.curvature_along_training()
    for one in (ds, ds.drop_vars("preconditioned_lambda_max")):
        stability = plots.plot(one).axes[0]
        (line,) = (line for line in stability.lines if line.get_label() == "critical sharpness")
        np.testing.assert_array_equal(line.get_ydata(), ds.critical_sharpness.dropna("step"))
        np.testing.assert_array_equal(line.get_xdata(), ds.step[1:])
        assert "critical sharpness" in [text.get_text() for text in stability.figure.legends[0].get_texts()]
    without = plots.plot(ds.drop_vars([name for name in ds if "critical" in str(name)]))
    assert not any(line.get_label() == "critical sharpness" for line in without.axes[0].lines)


def test_chains_by_single_batches_are_drawn_at_the_steps_that_measure_the_loss() -> None:
    ds = synthetic.learning_coefficients()
    measured = np.arange(ds.sizes["draw"]) % 5 == 0
    part = ds.assign(excess=ds.excess.where(xr.DataArray(measured, dims="draw")))
    for whole, some in zip(plots.plot(ds).axes[1].lines, plots.plot(part).axes[1].lines,
                           strict=True):  # fmt: skip
        np.testing.assert_allclose(some.get_xdata()[-1], whole.get_xdata()[-1], rtol=0.1)

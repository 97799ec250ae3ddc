"""Comparisons: every number against a direct computation, paired errors that cover, and words that claim no more."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import pnanalysis as pn
from pnanalysis import schema
from pnanalysis.analyses.diagnostics import diagnostics, estimate_of
from pnanalysis.analyses.hessian import SpectrumOptions
from pnanalysis.analyses.spectrum_cache import matrix_digest, saved_spectrum
from pnanalysis.analyses.verdict import verdict
from pnanalysis.errors import DataError, RunError
from pnanalysis.estimates import Estimate
from pnanalysis.inputs.examples import Examples
from pnanalysis.inputs.networks import open_files
from pnanalysis.inputs.selection import SelectedCheckpoint, Selection, as_sources, select
from pnanalysis.inputs.sources import as_source
from pnanalysis.io import netcdf
from pnanalysis.io.runs import ANALYSIS, MANIFEST, Run, open_run
from pnanalysis.spectra.differences import compare_spectra
from tests.plots.synthetic import curvature_along_training
from trainers import Config, train

SMALL = {"n": 100, "n_lanczos": 10, "n_probes": 3}
QUIET = {"device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def control(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The restart control of the tiny run."""
    return train(replace(tiny_config, strategy="restart"), tmp_path_factory.mktemp("runs") / "restart", **QUIET)


@pytest.fixture(scope="module")
def ends(tiny_run: Run) -> xr.Dataset:
    """All end points of the tiny run."""
    return pn.compare(tiny_run, checkpoints=["ends"], hessian=SMALL, progress=False)


def compared(runs: list[Any], checkpoints: list[str] | None = None) -> Selection:
    """The checkpoints that ``compare`` would choose."""
    return select(runs, checkpoints, champions=True, at_least=2)


def spectrum_of_run(item: SelectedCheckpoint, options: dict[str, Any]) -> xr.Dataset | None:
    """The spectrum that ``compare`` would take from the run in place of computing it."""
    split, n, spent = (
        options.get("split", "train"),
        options["n"],
        SpectrumOptions.from_keywords(**{name: value for name, value in options.items() if name not in ("split", "n")}),
    )
    network, part = item.source.model(item.checkpoint), item.source.split(split, n, spent.seed, "cpu")
    digest = matrix_digest(item.source, spent.matrix_settings(64), part, network)
    return saved_spectrum(item.source, digest, spent.n_products)


def regression(seed: int, hidden: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 1))


def saved(folder: Path, **models: nn.Module) -> list[Path]:
    for name, model in models.items():
        torch.save(model.state_dict(), folder / f"{name}.pt")
    return [folder / f"{name}.pt" for name in models]


def points(seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(80, 3, generator=torch.Generator().manual_seed(seed))
    y = x[:, :1].sin()
    return {"train": (x[:50], y[:50]), "validation": (x[50:], y[50:])}


def test_losses_errors_and_counts_equal_those_by_hand(tiny_run: Run, ends: xr.Dataset) -> None:
    source = as_source(tiny_run)
    for split in ("train", "validation", "test"):
        x, y = source.data.get(split).take(slice(None))
        with torch.no_grad():
            logits = [source.model(end)(x).double() for end in tiny_run.ends]
        losses = np.stack([nn.functional.cross_entropy(o, y, reduction="none").numpy() for o in logits])
        wrong = np.stack([(o.argmax(1) != y).numpy() for o in logits])
        at = ends.sel(split=split)
        assert int(at.n_examples) == len(y)
        np.testing.assert_allclose(at.loss, losses.mean(1), rtol=1e-5)
        np.testing.assert_allclose(at.loss_se, losses.std(1, ddof=1) / np.sqrt(len(y)), rtol=1e-4)
        np.testing.assert_allclose(at.error, wrong.mean(1))
        np.testing.assert_allclose(at.only_wrong[0, 2], (wrong[0] & ~wrong[2]).sum())
        np.testing.assert_allclose(at.error_difference[0, 2], wrong[0].mean() - wrong[2].mean(), atol=1e-15)
    for split in ("validation", "test"):  # what training wrote down
        np.testing.assert_allclose(ends.error.sel(split=split), tiny_run.history[f"{split}_error"][:, -1], atol=1e-9)


def test_the_error_of_a_difference_is_mcnemars(ends: xr.Dataset) -> None:
    at = ends.sel(split="train").isel(checkpoint=1, other=0)
    back = float(ends.only_wrong.sel(split="train").isel(checkpoint=0, other=1))
    n, b, c = float(at.n_examples), float(at.only_wrong), back
    assert b + c > 0
    assert float(at.error_difference) == pytest.approx((b - c) / n)
    assert float(at.error_difference_se) == pytest.approx(np.sqrt((b + c - (b - c) ** 2 / n) / (n * (n - 1))))


def test_distances_equal_those_of_the_flattened_parameters(tiny_run: Run, ends: xr.Dataset) -> None:
    names = [name for name, _ in as_source(tiny_run).make_model().named_parameters()]
    states = [end.load() for end in tiny_run.ends]
    flat = np.stack([np.concatenate([s[name].double().numpy().ravel() for name in names]) for s in states])
    start = np.concatenate([tiny_run.start.load()[name].double().numpy().ravel() for name in names])
    np.testing.assert_allclose(ends.norm, np.linalg.norm(flat, axis=1))
    np.testing.assert_allclose(ends.distance[1, 2], np.linalg.norm(flat[1] - flat[2]))
    np.testing.assert_allclose(ends.distance_from_start, np.linalg.norm(flat - start, axis=1))
    np.testing.assert_allclose(ends.relative_distance[1, 0], ends.distance[1, 0] / ends.norm[0])
    cosine = flat[0] @ flat[2] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[2])
    np.testing.assert_allclose(ends.cosine[0, 2], cosine)
    by_layer = ends.layer_distance.sel(layer="fc3")[1, 0]
    part = [np.concatenate([s[f"fc3.{n}"].double().numpy().ravel() for n in ("weight", "bias")]) for s in states]
    np.testing.assert_allclose(by_layer, np.linalg.norm(part[1] - part[0]))
    np.testing.assert_allclose((ends.layer_distance**2).sum("layer"), ends.distance**2)
    assert ends.layer.values.tolist() == [*(f"fc{i}" for i in range(1, 8)), "output"]


def test_spectra_differ_as_their_own_comparison_says(tiny_run: Run, ends: xr.Dataset) -> None:
    spectra = pn.hessian(tiny_run, checkpoints=["ends"], progress=False, **SMALL)
    np.testing.assert_allclose(ends.trace, spectra.trace, rtol=1e-6)
    np.testing.assert_allclose(ends.lambda_max_high, spectra.lambda_max_high, rtol=1e-6)
    direct = compare_spectra(*(spectra.isel(checkpoint=i) for i in (0, 2)))
    pair = ends.isel(checkpoint=2, other=0)
    for name in ("trace", "trace_se", "effective_rank", "lambda_max_low"):
        stem, _, end = name.partition("_se") if name.endswith("_se") else name.partition("_low")
        end = name.removeprefix(stem)
        assert float(pair[f"{stem}_difference{end}"]) == pytest.approx(float(direct[name]), rel=1e-5), name
    assert float(pair.wasserstein1) == pytest.approx(float(direct.wasserstein1), rel=1e-4)
    back = ends.isel(checkpoint=0, other=2)
    assert float(back.lambda_max_difference_low) == -float(pair.lambda_max_difference_high)
    assert ends.attrs["n_hessian"] == 100


def test_a_saved_spectrum_is_used_only_if_it_is_the_same(own_run: Run) -> None:
    options = {**SMALL, "seed": 0}
    chosen = compared([own_run], ["plain", "iter01"])
    assert spectrum_of_run(chosen[0], options) is None
    saved_ds = pn.hessian(own_run, checkpoints=["ends"], progress=False, **options)
    file = own_run.path / ANALYSIS / "hessian.nc"
    netcdf.save(saved_ds.assign(trace=saved_ds.trace + 1000), file)
    found = spectrum_of_run(chosen[1], options)
    assert found is not None
    assert float(found.trace) == float(saved_ds.trace[1]) + 1000
    ds = pn.compare(own_run, checkpoints=["ends"], hessian=SMALL, progress=False)
    np.testing.assert_array_equal(ds.trace, saved_ds.trace + 1000)
    for change in ({"n": 99}, {"seed": 1}, {"n_lanczos": 11}, {"n_probes": 4}, {"split": "test"}):
        assert spectrum_of_run(chosen[1], options | change) is None, change
    start = compared([own_run], ["start", "plain"])[0]
    assert spectrum_of_run(start, options) is None
    chosen[1].checkpoint.path.touch()  # the same weights at another time
    assert spectrum_of_run(chosen[1], options) is not None
    shutil.copyfile(own_run.start.path, chosen[1].checkpoint.path)  # trained again, to other weights
    assert spectrum_of_run(chosen[1], options) is None


def test_the_matrix_depends_on_the_size_of_batches_where_it_is_made_of_them() -> None:
    for made_of_batches in ({"bn_mode": "train"}, {"draws": 2}, {"weight": "batches"}):
        options = SpectrumOptions.from_keywords(**made_of_batches)
        assert options.matrix_settings(8) != options.matrix_settings(32), made_of_batches
    for options in (SpectrumOptions(), SpectrumOptions(weight="examples")):
        assert options.matrix_settings(8) == options.matrix_settings(32)


def test_saturation_is_that_of_the_checkpoint(tiny_run: Run, ends: xr.Dataset) -> None:
    direct = pn.saturation(tiny_run, checkpoints=["ends"], split="test", progress=False).sel(epoch=4, quantile=98.0)
    np.testing.assert_allclose(ends.saturation, direct.abs_percentile)
    assert ends.activation.values.tolist() == direct.layer.values.tolist()


def test_a_mean_is_taken_of_saturating_layers_alone(ends: xr.Dataset) -> None:
    (row,) = (row for row in diagnostics(ends) if row.title.startswith("saturation"))
    assert ends.bounded.all()
    assert [value.value for value in row.values] == pytest.approx(ends.saturation.mean("activation").values)
    mixed = ends.assign_coords(bounded=("activation", [True] + [False] * (ends.sizes["activation"] - 1)))
    (row,) = (row for row in diagnostics(mixed) if row.title.startswith("saturation"))
    assert [value.value for value in row.values] == pytest.approx(ends.saturation.isel(activation=0).values)
    none = ends.assign_coords(bounded=("activation", [False] * ends.sizes["activation"]))
    assert not any(row.title.startswith("saturation") for row in diagnostics(none))


def test_rows_say_nothing_twice_and_count_in_whole_numbers(ends: xr.Dataset, tmp_path: Path) -> None:
    titles = [row.title for row in diagnostics(ends)]
    last = ends.layer.values[-2]
    np.testing.assert_allclose(ends.cka.sel(layer="output"), ends.cka.sel(layer=last), atol=1e-6)
    assert f"CKA of {last}" in titles
    assert "CKA of output" not in titles
    other = ends.assign(cka=ends.cka.where(ends.layer != "output", 0.5))
    assert "CKA of output" in [row.title for row in diagnostics(other)]
    (outliers,) = (row for row in diagnostics(ends) if row.title == "Hessian outliers")
    for cell in outliers.cells()[1:]:
        assert "." not in cell.text().partition("p")[0]
    assert Estimate(12345.6, low=12000.4, high=13000.0).text(whole=True) == "12346 (12000 to 13000)"
    assert Estimate(-0.2).text(signed=True, whole=True) == "+0"
    files = saved(tmp_path, a=regression(0), b=regression(1))
    squared = pn.compare(open_files(regression(0), files, points(), "mse"), hessian=False, progress=False)
    titles = [row.title for row in diagnostics(squared)]
    assert "validation loss" in titles
    assert not any(title.endswith("squared error") for title in titles)


def test_runs_that_were_watched_are_compared_by_their_curvature_in_training(own_run: Run) -> None:
    ends = own_run.manifest["ends"]
    steps = np.arange(3)
    top = np.array([[1.0, 4.0, 2.0], [1.0, 5.0, 3.0]])[: len(ends)]
    ds = curvature_along_training().isel(step=slice(3)).assign_coords(step=steps)
    ds = ds.expand_dims(iteration=np.arange(len(ends)))
    numbers = {"lambda_max": top, "lambda_max_se": top / 20, "preconditioned_lambda_max": 3 * top,
               "preconditioned_lambda_max_se": top / 10, "threshold": np.full(top.shape, 10.0), "n_hvp": top,
               "seconds": top}  # fmt: skip
    ds = ds.assign({name: (("iteration", "step"), one) for name, one in numbers.items()}).assign(residual=ds.eigenvalue)
    file = pn.save(schema.finish(ds, "curvature_monitor"), own_run.path / ANALYSIS / "curvature_monitor.nc")
    fast: dict[str, Any] = {"n": 50, "hessian": False, "cka": False, "saturation": False, "progress": False}
    found = pn.compare(own_run, checkpoints=["iter00", "iter01", "start"], **fast)
    np.testing.assert_allclose(found.last_lambda_max, [2.0, 3.0, 1.0])
    np.testing.assert_allclose(found.last_threshold_ratio, [0.6, 0.9, 0.3])
    pair = found.isel(checkpoint=1, other=0)
    assert float(pair.last_lambda_max_difference) == 1.0
    assert float(pair.last_lambda_max_difference_se) == pytest.approx(np.hypot(0.1, 0.15))
    assert float(pair.last_threshold_ratio_difference_se) == pytest.approx(np.hypot(0.02, 0.03))
    assert float(pair.last_threshold_ratio_difference_p) < 1e-6
    itself = found.isel(checkpoint=1, other=1)
    assert (float(itself.last_lambda_max_difference), float(itself.last_lambda_max_difference_p)) == (0.0, 1.0)
    titles = {row.key: row.title for row in diagnostics(found)}
    assert titles["last_threshold_ratio"].strip() == "preconditioned, over threshold"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.warns(UserWarning, match="is compared without its curvature along training"):
        assert "last_lambda_max" not in pn.compare(own_run, checkpoints=["iter00", "iter01"], **fast)


def test_a_checkpoint_does_not_differ_from_itself(tiny_run: Run) -> None:
    ds = pn.compare(tiny_run, checkpoints=["plain", "iter00"], hessian=SMALL, progress=False)
    pair = ds.isel(checkpoint=1, other=0)
    for name in ("loss_difference", "loss_difference_se", "error_difference", "error_difference_se", "only_wrong"):
        np.testing.assert_array_equal(pair[name], 0)
    for name in ("distance", "disagreement", "js_divergence", "trace_difference", "wasserstein1"):
        assert float(pair[name]) == 0, name
    np.testing.assert_allclose(pair.cka, 1)
    assert verdict(ds) == ["iter00 (the plain model) compared with plain: identical parameters."]


def won_by(iteration: int, run: Run) -> Run:
    """The run as if this iteration had the lowest validation error; 0 is the plain model."""
    return Run(run.path, run.manifest | {"champion": iteration})


def test_defaults_are_plain_and_champion_and_then_champions(tiny_run: Run, control: Run) -> None:
    tiny_run = won_by(1, tiny_run)
    assert [m.label for m in compared([tiny_run])] == ["plain", "champion"]
    both = compared([tiny_run, control])
    assert [m.label for m in both] == ["tiny/champion", "restart/champion"]
    assert both[1].description == "the best of 3 restarts"
    assert [m.label for m in compared([tiny_run, tiny_run])] == ["tiny#1/champion", "tiny#2/champion"]


def test_no_network_is_compared_with_itself(tiny_run: Run, control: Run) -> None:
    """A plain model that is the champion is also the first restart: the best of the later iterations steps in."""
    run, best_restart_is_plain = won_by(0, tiny_run), won_by(0, control)
    assert [m.label for m in compared([run])] == ["plain", "challenger"]
    assert [m.label for m in compared([run, best_restart_is_plain])] == ["tiny/challenger", "restart/champion"]
    assert [m.label for m in compared([best_restart_is_plain, run])] == ["restart/champion", "tiny/challenger"]
    another_restart = won_by(1, control)
    assert [m.label for m in compared([run, another_restart])] == ["tiny/champion", "restart/champion"]
    assert compared([run, another_restart]).note is None
    assert [m.label for m in compared([run], ["plain", "champion"])] == ["plain", "champion"]  # as asked for


def test_what_takes_a_champions_place_is_said(tiny_run: Run, control: Run) -> None:
    few = {"hessian": False, "cka": False, "saturation": False, "progress": False}
    ds = pn.compare(won_by(0, tiny_run), won_by(0, control), **few)
    note, first, *_ = verdict(ds)
    assert note == ds.attrs["note"]
    assert note == (
        "The champion of tiny is the plain model: so that no network is compared with itself, the best of iterations "
        "1 to 2 takes its place."
    )
    assert f"tiny/challenger (iteration {tiny_run.challenger.iteration}, the best of iterations 1 to 2)" in first
    assert float(ds.distance[0, 1]) > 0
    assert "note" not in pn.compare(tiny_run, checkpoints=["plain", "challenger"], **few).attrs


def test_the_restart_control_is_named(tiny_run: Run, control: Run) -> None:
    ds = pn.compare(won_by(1, tiny_run), control, hessian=False, cka=False, saturation=False, progress=False)
    said = verdict(ds)
    assert said[0].startswith("restart/champion (the best of 3 restarts) compared with tiny/champion (")
    assert "cka" not in ds
    assert "trace" not in ds
    assert "saturation" not in ds
    titles = [row.title for row in diagnostics(ds)]
    assert "disagreement" in titles
    assert not any(title.startswith(("Hessian", "CKA", "saturation")) for title in titles)


def test_words_claim_what_the_errors_allow(ends: xr.Dataset) -> None:
    """The same difference with a small and with a large error."""
    for factor, claimed in ((0.1, True), (10.0, False)):
        ds = ends.copy(deep=True)
        ds.error_difference[:] = np.sign(np.arange(3)[:, None, None] - np.arange(3)[None, :, None]) * 0.02
        ds.error_difference_se[:] = factor * 0.02  # what 26 examples and more are judged by
        ds.only_wrong[:] = np.where(ds.error_difference > 0, 20.0 if claimed else 8.0, 6.0)
        del ds.attrs["significance"]
        said = verdict(ds)[0]
        assert ("points (higher)" in said) is claimed
        assert ("no significant difference on this test set" in said) is not claimed


def test_ranks_tie_where_errors_do_not_tell(tmp_path: Path) -> None:
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    model = regression(0)
    with torch.no_grad():
        targets = model(x) + 0.1 * torch.randn(400, 1, generator=torch.Generator().manual_seed(1))
    near, far = regression(0), regression(0)
    with torch.no_grad():
        near[2].bias += 1e-4
        far[2].bias += 1.0
    source = open_files(lambda: regression(3), saved(tmp_path, far=far, near=near, best=model), (x, targets), "mse")
    ds = pn.compare(source, hessian=False, progress=False)
    assert ds["rank"].sel(split="train").values.tolist() == [3, 1, 1]
    assert ds.error_difference_p.sel(split="train")[0, 1] <= 0.05 < ds.error_difference_p.sel(split="train")[1, 2]
    assert verdict(ds)[-1].startswith("By train error, counting only significant differences: 1. ")
    assert verdict(ds)[-1].endswith("3. far.")


def test_a_run_and_its_control_load_the_data_once(tiny_run: Run, control: Run, own_run: Run) -> None:
    chosen = compared([tiny_run, control])
    Examples(chosen, torch.device("cpu"))
    assert chosen[0].source.data is chosen[1].source.data
    manifest = open_run(own_run.path).manifest
    manifest["data"]["split_seed"] = 5
    (own_run.path / MANIFEST).write_text(json.dumps(manifest))
    others = as_sources([tiny_run, open_run(own_run.path)])
    assert others[1].data.split_hash != others[0].data.split_hash


def test_a_users_own_regression_is_compared(tmp_path: Path) -> None:
    files = saved(tmp_path, a=regression(0), b=regression(1))
    ds = pn.compare(open_files(lambda: regression(2), files, points(), "mse"), hessian=SMALL, progress=False)
    assert ds.split.values.tolist() == ["train", "validation"]
    np.testing.assert_allclose(ds.loss, ds.error, rtol=1e-6)  # both are the squared error
    assert "disagreement" not in ds
    assert float(ds.rms_difference[0, 1]) > 0
    said = verdict(ds)
    assert "validation squared error" in said[0]
    assert "selected by this error" in said[0]
    assert any("difference of their outputs" in line for line in said)
    assert np.isnan(ds.distance_from_start).all()
    assert netcdf.load(netcdf.save(ds, tmp_path / "c.nc")).identical(ds)


def test_one_instance_serves_for_all_weights(tmp_path: Path) -> None:
    files = saved(tmp_path, a=regression(0), b=regression(1))
    shared, made = (
        pn.compare(open_files(model, files, points(), "mse"), hessian=False, progress=False)
        for model in (regression(2), lambda: regression(2))
    )
    np.testing.assert_array_equal(shared.loss, made.loss)
    assert float(shared.distance[0, 1]) > 0


def test_architectures_may_differ_if_outputs_do_not(tmp_path: Path) -> None:
    data = points()
    a = open_files(lambda: regression(2), saved(tmp_path, small=regression(0)), data, "mse", label="small")
    b = open_files(lambda: regression(2, 9), saved(tmp_path, wide=regression(1, 9)), data, "mse", label="wide")
    ds = pn.compare(a, b, hessian=SMALL, progress=False)
    assert np.isnan(float(ds.distance[0, 1]))
    assert float(ds.rms_difference[0, 1]) > 0
    assert ds.cka.sel(layer="0").notnull().all()  # layers of one name, of whatever width
    assert any("architectures differ, so no distance" in line for line in verdict(ds))
    assert "distance in parameters" not in [row.title for row in diagnostics(ds)]


def test_identical_functions_with_more_layers(tmp_path: Path) -> None:
    """An identity in between: another architecture, the same outputs."""
    plain = regression(0)
    deep = nn.Sequential(*plain, nn.Linear(1, 1))
    with torch.no_grad():
        deep[3].weight.fill_(1.0)
        deep[3].bias.zero_()
    data = points()
    sources = [
        open_files(lambda: regression(0), saved(tmp_path, plain=plain), data, "mse", label="plain"),
        open_files(lambda: nn.Sequential(*regression(0), nn.Linear(1, 1)), saved(tmp_path, deep=deep), data, "mse"),
    ]
    ds = pn.compare(*sources, hessian=False, progress=False)
    assert float(ds.rms_difference[0, 1]) == 0
    assert any("the same function on all 30 validation examples" in line for line in verdict(ds))
    assert np.isnan(ds.cka.sel(layer="3")[0, 1])
    np.testing.assert_allclose(ds.cka.sel(layer="output"), 1, rtol=1e-6)


def test_bad_input_is_one_clear_sentence(tiny_run: Run, own_run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="at least two checkpoints, there is only plain"):
        pn.compare(tiny_run, checkpoints=["plain"])
    manifest = open_run(own_run.path).manifest
    manifest["data"]["split_seed"] = 5
    (own_run.path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="different validation and test halves"):
        pn.compare(tiny_run, open_run(own_run.path), progress=False)
    files = saved(tmp_path, a=regression(0))
    a, b = (open_files(lambda: regression(0), files, points(seed), "mse") for seed in (0, 1))
    with pytest.raises(DataError, match="model#1/a and model#2/a are of different data sets"):
        pn.compare(a, b, progress=False)


def test_variables_of_one_checkpoint_become_numbers_with_errors(ends: xr.Dataset) -> None:
    at = estimate_of(ends.isel(checkpoint=0, other=0), "trace")
    assert at.low < at.value < at.high
    assert at.se > 0
    assert np.isnan(estimate_of(ends.isel(checkpoint=0, other=0), "norm").se)


def test_numbers_of_other_matrices_are_called_by_their_name() -> None:
    networks = {"a": regression(0), "b": regression(1)}
    options: dict[str, Any] = {"n_hvp": 20, "data_error": "none", "operator": "fisher", "params": "0"}
    few = {"saturation": False, "cka": False, "progress": False}
    ds = pn.compare(networks, data=points(), loss="mse", hessian=options, eigenpairs={"k": 1, "operator": "ggn"}, **few)
    assert (ds.attrs["hessian_operator"], ds.attrs["hessian_params"]) == ("fisher", "0")
    titles = [row.title for row in diagnostics(ds)]
    assert {"empirical Fisher of 0 lambda_max", "empirical Fisher of 0 trace", "Gauss-Newton eigenvalue 1"} <= set(
        titles
    )
    assert not any("Hessian" in title for title in titles)
    sentences = " ".join(verdict(ds))
    assert "empirical Fisher matrices of 0 on all" in sentences
    assert "Hessian" not in sentences
    plain = pn.compare(networks, data=points(), loss="mse", hessian={"n_hvp": 20, "data_error": "none"}, **few)
    assert "Hessian trace" in [row.title for row in diagnostics(plain)]
    assert "Hessians on all" in " ".join(verdict(plain))

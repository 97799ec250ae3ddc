"""Analyses: what each command saves, draws and prints."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file

from pnanalysis.io import datasets, netcdf
from pnanalysis.io.runs import Run
from pnanalysis.spectra.differences import compare_spectra
from trainers import Config, train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_analyses_save_into_the_run_and_draw(run, own_run: Run, tmp_path: Path) -> None:
    for kind in ("saturation", "trajectory", "history"):
        figure = tmp_path / f"{kind}.png"
        done = run("pnanalysis", kind, own_run.path, "--plot", figure)
        assert done.status == 0, done.err
        assert figure.read_bytes()[:4] == b"\x89PNG"
    saved = {path.stem: netcdf.load(path).attrs["kind"] for path in (own_run.path / "analysis").glob("*")}
    assert saved == {kind: kind for kind in ("saturation", "trajectory")}  # its history is in the run already


def test_hessian_of_a_run_has_plain_and_champion(run, own_run: Run, tmp_path: Path) -> None:
    small = ("--n", 100, "--n-lanczos", 10, "--n-probes", 2)
    done = run("pnanalysis", "hessian", own_run.path, *small, "-o", tmp_path / "h.nc", "--plot", tmp_path / "h.svg")
    assert done.status == 0, done.err
    ds = netcdf.load(tmp_path / "h.nc")
    assert ds.checkpoint.values.tolist() == ["plain", "champion"]
    assert "lambda_max" in done.out
    assert run("pnanalysis", "plot", tmp_path / "h.nc", "-o", tmp_path / "h.pdf").status == 0
    assert (tmp_path / "h.pdf").read_bytes()[:5] == b"%PDF-"
    info = run("pnanalysis", "info", tmp_path / "h.nc")
    assert "Ritz" in info.out


def test_hessian_prints_differences_between_checkpoints(run, own_run: Run) -> None:
    few = ["--n", 100, "--n-hvp", 30, "--device", "cpu", "-q"]
    outcome = run("pnanalysis", "hessian", own_run.path, *few[:-1], "-c", "start", "-c", "plain")
    assert "plain - start" in outcome.out
    assert "noise" in outcome.out
    spectra, largest, differences = json.loads(
        run("pnanalysis", "hessian", own_run.path, *few, "-c", "start", "-c", "plain", "--json").out
    )["tables"]
    ds = netcdf.load(own_run.path / "analysis" / "hessian.nc")
    for name, table, column in (
        ("lambda_max", spectra, "lambda_max"),
        ("negative_curvature", spectra, "negative curvature"),
        ("bulk_edge_high", largest, "bulk edge"),
    ):
        shown = table["rows"][1][column]
        for key, end in (("value", ""), ("low", "_low"), ("high", "_high")):
            assert shown.get(key, math.nan) == pytest.approx(float(ds[name + end][1]), rel=1e-12, nan_ok=True)
    assert [row["outliers"]["value"] for row in largest["rows"]] == ds.n_outliers.values.tolist()
    assert [row["outliers"]["gap_p"] for row in largest["rows"]] == ds.outlier_p.values.tolist()
    assert all("lambda_1 / lambda_10" in row for row in largest["rows"])
    found = compare_spectra(ds.sel(checkpoint="start"), ds.sel(checkpoint="plain"))
    shown = differences["rows"][0]["lambda_max"]
    assert (shown["low"], shown["high"]) == (float(found.lambda_max_low), float(found.lambda_max_high))


def test_hessian_of_layers_is_drawn_by_layer(run, tiny_run: Run, tmp_path: Path) -> None:
    few = ("--n", 30, "--n-lanczos", 3, "--n-probes", 2, "--device", "cpu", "-o", tmp_path / "h.nc")
    layers = ("--per-layer", "--params", "fc1", "--params", "fc7", "--plot", tmp_path / "h.svg")
    done = run("pnanalysis", "hessian", tiny_run.path, *few, *layers, "-c", "plain")
    assert done.status == 0, done.err
    assert netcdf.load(tmp_path / "h.nc").layer.values.tolist() == ["fc1", "fc7"]
    assert (tmp_path / "h.svg").is_file()


def test_eigenpairs_are_saved_with_vectors_drawn_and_span_a_plane(run, own_run: Run, tmp_path: Path) -> None:
    few = ("-k", 2, "--n", 80, "--device", "cpu")
    done = run(
        "pnanalysis", "eigenpairs", own_run.path, "-c", "plain", "-c", "iter01", *few, "--plot", tmp_path / "e.svg"
    )
    assert done.status == 0, done.err
    assert "overlap of the spaces" in done.out
    assert "part in the top 2 eigenvectors" in done.out
    assert (tmp_path / "e.svg").is_file()
    file = own_run.path / "analysis" / "eigenpairs.nc"
    found = datasets.load(file)
    assert found.vector.sizes == {"checkpoint": 2, "pair": 2, "parameter": int(found.n_parameters[0])}
    assert set(own_run.files) == {"history", "eigenpairs"}
    plane = ("--view", "eigenvectors", "-c", "iter01", "--eigenpairs", file, "--n", 80, "--points", 3)
    done = run("pnanalysis", "landscape", own_run.path, *plane, "-o", tmp_path / "plane.nc")
    assert done.status == 0, done.err
    smallest = ("--which", "smallest", "--data-error", "none", "--no-vectors", "--json", "-o", tmp_path / "s.nc")
    done = run("pnanalysis", "eigenpairs", own_run.path, "-c", "plain", *few, *smallest)
    assert done.status == 0, done.err
    assert "vector" not in datasets.load(tmp_path / "s.nc")
    assert (datasets.load(tmp_path / "s.nc").value < 0).all()


def test_blocks_are_saved_drawn_and_resumed(run, own_run: Run, tmp_path: Path) -> None:
    few = ("--n", 80, "--device", "cpu", "--n-hvp", 24)
    both = ("-c", "plain", "-c", "iter01")
    done = run(
        "pnanalysis", "blocks", own_run.path, *both, *few, "--bits", 4, "--diagonal", "--plot", tmp_path / "b.svg"
    )
    assert done.status == 0, done.err
    assert "energy with other blocks" in done.out
    assert "weights rounded to 4 bits, block by block" in done.out
    assert (tmp_path / "b.svg").is_file()
    file = own_run.path / "analysis" / "blocks.nc"
    found = datasets.load(file)
    assert found.diagonal.sizes["statistic"] == 3
    assert found.sizes["block"] == 7
    assert not file.with_suffix(".unfinished").exists()
    own = ("--block", "fc1", "--block", "fc2.weight[0:4]", "--operator", "ggn", "--spectra", "--n-spectrum", 6,
           "--json", "-o", tmp_path / "own.nc")  # fmt: skip
    done = run("pnanalysis", "blocks", own_run.path, "-c", "plain", *few, *own)
    assert done.status == 0, done.err
    assert datasets.load(tmp_path / "own.nc").block.values.tolist() == ["fc1", "fc2.weight[0:4]"]
    assert "distances between spectra of blocks over two halves of the examples, with 95 % intervals" in done.out
    assert run("pnanalysis", "blocks", own_run.path, "--by", "heads", *few).status == 2
    weights = own_run.select(["plain"]).popitem()[1].load()
    save_file({name: tensor.half() for name, tensor in weights.items()}, tmp_path / "half.safetensors")
    low = ("--quantised", tmp_path / "half.safetensors", "-o", tmp_path / "low.nc")
    done = run("pnanalysis", "blocks", own_run.path, "-c", "plain", *few, *low)
    assert "weights quantised as in half.safetensors, block by block" in done.out
    assert (datasets.load(tmp_path / "low.nc").squared_change > 0).all()
    done = run("pnanalysis", "blocks", own_run.path, *both, *few, *low)
    assert done.status == 2
    assert "quantised is one state, of 2 networks" in done.err


@pytest.mark.slow
def test_each_analysis_has_its_section_of_the_report(run, own_run: Run, tmp_path: Path) -> None:
    few = ("-c", "plain", "--n", 80, "--device", "cpu", "-q")
    for command in (("trajectory", "-q"), ("eigenpairs", "-k", 2, *few), ("blocks", "--n-hvp", 24, *few)):
        assert run("pnanalysis", command[0], own_run.path, *command[1:]).status == 0
    assert run("pnanalysis", "report", own_run.path, "-o", tmp_path / "r.html").status == 0
    page = (tmp_path / "r.html").read_text()
    for text in ("principal component", "Eigenvalues at one end of the spectrum", "Curvature by blocks"):
        assert text in page


def test_custom_weights_go_through_every_analysis(run, tmp_path: Path, own_run: Run, monkeypatch) -> None:
    (tmp_path / "own_nets.py").write_text(
        "from trainers.zoo.models import tanh7\ndef make():\n    return tanh7((1, 8, 8), width=16)\n"
    )
    monkeypatch.chdir(tmp_path)
    weights = [checkpoint.path for checkpoint in own_run.checkpoints]
    own = ("--model", "own_nets:make", "--weights", *weights)
    data = ("--data", "digits")
    assert run("pnanalysis", "saturation", *own, *data).status == 0
    assert run("pnanalysis", "trajectory", *own).status == 0
    small = ("--n", 100, "--n-lanczos", 8, "--n-probes", 2, "-o", "own.nc")
    done = run("pnanalysis", "hessian", *own, *data, *small)
    assert done.status == 0, done.err
    assert netcdf.load("own.nc").sizes["checkpoint"] == len(weights)


def test_gradients_of_a_run_are_drawn_and_saved(run, own_run: Run, tmp_path: Path) -> None:
    outcome = run("pnanalysis", "gradients", own_run.path, "--n", 100, "--plot", tmp_path / "g.svg", "--device", "cpu")
    assert outcome.status == 0
    assert "constant push" in outcome.out
    assert (own_run.path / "analysis" / "gradients.nc").is_file()
    assert (tmp_path / "g.svg").is_file()


def test_trajectories_are_saved_as_zarr_and_read_by_other_commands(run, own_run: Run, tmp_path: Path) -> None:
    store, figure = own_run.path / "analysis" / "trajectory.zarr", tmp_path / "t.png"
    done = run("pnanalysis", "trajectory", own_run.path, "-o", store)
    assert done.status == 0, done.err
    assert f"saved {store}" in done.out
    assert run("pnanalysis", "trajectory", own_run.path, "-o", store, "--quiet").status == 0  # replaces it
    assert run("pnanalysis", "plot", store, "-o", figure).status == 0
    assert figure.read_bytes()[:4] == b"\x89PNG"
    assert "explained_variance" in run("pnanalysis", "info", store).out
    assert "trajectory" in run("pnanalysis", "info", own_run.path).out


def test_trajectories_by_layer_are_drawn_by_layer(run, own_run: Run, tmp_path: Path) -> None:
    svg = tmp_path / "layers.svg"
    assert run("pnanalysis", "trajectory", own_run.path, "--per-layer", "--plot", svg).status == 0
    drawn = svg.read_text()
    assert all(f">{layer}<" in drawn for layer in ("whole network", "fc1", "fc7"))


def test_compare_prints_a_table_and_sentences(run, own_run: Run, tmp_path: Path) -> None:
    few = ["--n", 200, "--n-hessian", 50, "--n-hvp", 40, "--device", "cpu"]
    picture = tmp_path / "dashboard.svg"
    outcome = run("pnanalysis", "compare", own_run.path, "-c", "ends", *few, "--plot", picture)
    assert outcome.status == 0, outcome.err
    for text in ("test error", "difference", "disagreement", "CKA of fc3", "Hessian trace", "iter01 (iteration 1"):
        assert text in outcome.out
    assert "<svg" in picture.read_text()
    ds = netcdf.load(own_run.path / "analysis" / "comparison.nc")
    assert ds.attrs["kind"] == "comparison"
    assert ds.n_examples.values.tolist() == [200, 200, 200]


def test_compare_takes_many_checkpoints_and_custom_weights(run, own_run: Run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = ("--no-hessian", "--no-cka", "--device", "cpu")
    outcome = run("pnanalysis", "compare", own_run.path, "-c", "all", "-c", "plain", *plain, "-o", "c.nc")
    assert outcome.status == 0, outcome.err
    assert "values" in outcome.out
    assert "By test error" in outcome.out
    (tmp_path / "compared.py").write_text(
        "from trainers.zoo.models import tanh7\ndef make():\n    return tanh7((1, 8, 8), width=16)\n"
    )
    weights = [end.path for end in own_run.ends]
    own = ("--model", "compared:make", "--weights", *weights[:1], "--data", "digits", *weights[1:])
    outcome = run("pnanalysis", "compare", *own, *plain, "-o", "own.nc", "--quiet")
    assert (outcome.status, outcome.out) == (0, ""), outcome.err
    assert netcdf.load("own.nc").sizes["checkpoint"] == 2
    refused = run("pnanalysis", "compare", own_run.path, "-c", "plain", *plain)
    assert refused.status == 2
    assert "at least two checkpoints" in refused.err


def test_landscapes_are_saved_drawn_and_reported(run, own_run: Run, tmp_path: Path) -> None:
    ends = ("-c", "start", "-c", "plain", "--n", 100, "--points", 3, "--device", "cpu")
    done = run("pnanalysis", "landscape", own_run.path, *ends, "--align", "--permutations", "--json")
    assert done.status == 0, done.err
    barriers, aligned = json.loads(done.out)["tables"]
    assert [row["path"] for row in barriers["rows"]][-1] == "aligned"
    assert {row["kind"] for row in aligned["rows"]} == {"units"}
    done = run("pnanalysis", "landscape", own_run.path, *ends, "--view", "curve", "--steps", 5, "-o", tmp_path / "c.nc")
    assert done.status == 0, done.err
    assert netcdf.load(tmp_path / "c.nc").path.values.tolist() == ["line", "curve"]
    plane = ("--view", "plane", "--points", 3, "--n", 50, "--device", "cpu")
    done = run("pnanalysis", "landscape", own_run.path, *plane, "--plot", tmp_path / "p.svg")
    assert done.status == 0, done.err
    assert "path of plain" in (tmp_path / "p.svg").read_text()
    done = run(
        "pnanalysis",
        "sharpness",
        own_run.path,
        "--n",
        50,
        "--steps",
        3,
        "--directions",
        2,
        "--radius",
        "ball=0.1",
        "-q",
    )
    assert done.status == 0, done.err
    assert not (own_run.path / "analysis" / "sharpness.unfinished").exists()
    assert set(own_run.results.children) == {"history", "barrier", "landscape", "sharpness"}
    assert netcdf.load(own_run.path / "analysis" / "sharpness.nc").radius.values.tolist() == [0.1]
    assert run("pnanalysis", "report", own_run.path, "-o", tmp_path / "r.html").status == 0
    page = (tmp_path / "r.html").read_text()
    assert all(title in page for title in ("Loss between minima", "Loss on a plane", "Sharpness"))


@pytest.mark.slow
def test_sharpness_over_radii_and_a_comparison_of_it(run, own_run: Run, tmp_path: Path) -> None:
    small = ("--n", 50, "--steps", 2, "--starts", 1, "--directions", 2, "-c", "ends")
    radii = ("--radius", "adaptive=0.2,0.4", "--radius", "filter=0.2,0.4", "--average-radius", "filter=0.05,0.1")
    done = run("pnanalysis", "sharpness", own_run.path, *small, *radii, "--plot", tmp_path / "s.svg")
    assert done.status == 0, done.err
    assert all(text in done.out for text in ("largest rise of the loss found", "mean rise", "relative flatness"))
    ds = netcdf.load(own_run.path / "analysis" / "sharpness.nc")
    assert ds.average_radius.sel(neighbourhood="filter").values.tolist() == [0.05, 0.1]
    assert "standard deviation" in (tmp_path / "s.svg").read_text()
    options = ("--no-hessian", "--no-cka", "--sharpness", "--n-hessian", 50, "--n", 50, "-c", "ends")
    done = run("pnanalysis", "compare", own_run.path, *options, "-o", tmp_path / "c.nc", "--plot", tmp_path / "c.svg")
    assert done.status == 0, done.err
    assert all(text in done.out for text in ("largest rise", "mean rise", "relative flatness"))
    found = netcdf.load(tmp_path / "c.nc")
    assert (found.worst_rise_difference_se.values[0, 1], found.worst_rise_difference_se.values[0, 0]) > (0, 0)
    assert {"worst_rise_difference_p", "mean_rise_difference_p", "relative_flatness_difference_p"} <= set(found)


def test_correlate_saves_its_table_with_the_sweep(run, tiny_config: Config, tmp_path: Path) -> None:
    for seed in range(4):
        train(replace(tiny_config, iterations=1, epochs=1, seed=seed), tmp_path / f"{seed}", progress=False)
    done = run("pnanalysis", "correlate", tmp_path, "--bootstrap", 50, "--plot", tmp_path / "t.png")
    assert done.status == 0, done.err
    assert "train_loss" in done.out
    assert "would pass by chance" in done.out
    assert netcdf.load(tmp_path / "correlation.nc").sizes["run"] == 4
    done = run("pnanalysis", "correlate", *sorted(tmp_path.glob("[0-2]")), "-o", tmp_path / "few.nc")
    assert done.status == 2
    assert "there are 3 runs" in done.err


def test_learning_coefficients_of_one_and_of_several_settings(run, own_run: Run, tmp_path: Path) -> None:
    small = ("--n", 50, "--chains", 3, "--draws", 12, "--burn-in", 4, "-c", "plain")
    done = run("pnanalysis", "learning-coefficient", own_run.path, *small, "--plot", tmp_path / "one.png")
    assert done.status == 0, done.err
    assert "no" in done.out  # so few draws do not converge
    assert netcdf.load(own_run.path / "analysis" / "learning_coefficient.nc").excess.sizes["draw"] == 16
    several = ("--localization", 10, "--localization", 100, "--step-size", 1e-4, "-o", tmp_path / "c.nc")
    done = run("pnanalysis", "learning-coefficient", own_run.path, *small, *several, "--plot", tmp_path / "c.svg")
    assert done.status == 0, done.err
    assert netcdf.load(tmp_path / "c.nc").learning_coefficient.dims == ("checkpoint", "localization")

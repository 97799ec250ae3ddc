"""The report: one file that needs nothing else, claims no more than the numbers support, and trusts no name."""

from __future__ import annotations

import base64
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr
from markupsafe import escape
from torch import nn

import pnanalysis as pn
from pnanalysis import plots
from pnanalysis.analyses.diagnostics import estimate_of
from pnanalysis.errors import RunError
from pnanalysis.estimates import Estimate
from pnanalysis.io import netcdf
from pnanalysis.io.runs import ANALYSIS, MANIFEST, Run, open_run
from pnanalysis.report import summary_sentences, summary_table, write_report
from pnanalysis.report.datasets import RunDatasets, Study, studies
from pnanalysis.report.figures import ENTRIES, Picture, embed, pictures
from pnanalysis.report.interactive import explorers
from pnanalysis.report.tables import sentences
from tests.report.conftest import copies_of
from trainers import Config, configure, find_recipe, train

ONLY_FUNCTIONS = {"hessian": False, "cka": False, "saturation": False, "progress": False}


class _Page(HTMLParser):
    """Collects tags, addresses and ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.ids += [value or "" for name, value in attrs if name == "id"]


def drawn(runs: list[Run]) -> dict[str, Picture]:
    (study,) = studies(runs)
    return {picture.key: picture for picture in pictures(study)}


def summary(runs: list[Run]) -> list[str]:
    (study,) = studies(runs)
    return list(sentences(study))


def test_files_under_any_name_are_drawn_by_their_kind(copies: list[Run]) -> None:
    """Such as the spectrum of a second checkpoint, which is saved beside that of the first."""
    run = copies[0]
    more = "hessian-iter02-epoch001"
    for name in set(run.files) - {"history", "hessian"}:
        run.files[name].unlink()
    shutil.copy(run.files["hessian"], run.path / ANALYSIS / f"{more}.nc")
    found = drawn([open_run(run.path)])
    first, second = found["hessian"], found[f"hessian-{more}"]
    assert (second.title, second.caption) == (f"Hessian spectrum ({more})", first.caption)
    assert second.markup
    ids = [re.findall(r'\bid="([^"]+)"', one.markup) for one in (first, second)]
    assert not set(ids[0]) & set(ids[1])


def test_the_page_holds_everything_and_fetches_nothing(pair: list[Run], report: Path) -> None:
    text = report.read_text()
    page = _Page(text)
    assert page.tags.count("svg") == 9
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert not re.search(r"@import|url\(\s*['\"]?http", text)
    assert len(page.ids) == len(set(page.ids))
    for heading in (
        "Errors by iteration",
        "Hessian spectrum",
        "Saturation",
        "Distance from saturation",
        "Trajectories",
        "How it was made",
    ):
        assert heading in text
    assert pair[0].manifest["data"]["fingerprint"] in text


def test_every_dataset_file_is_read_once(copies: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netcdf.save(pn.compare(*copies, **ONLY_FUNCTIONS), copies[0].path / ANALYSIS / "comparison.nc")
    runs = [open_run(run.path) for run in copies]  # nothing is cached
    files = [file for run in runs for file in run.files.values()]
    read: list[Path] = []
    load = netcdf.load

    def counting(path: Path, within: Path | None = None) -> xr.Dataset:
        read.append(path)
        return load(path, within)

    monkeypatch.setattr(netcdf, "load", counting)
    monkeypatch.setattr("pnanalysis.report.figures._picture", lambda entry, ds, study: Picture(entry.key, "", "", ""))
    write_report(runs, tmp_path / "report.html")
    assert len(files) == 6  # a history each; hessian, saturation, trajectory and comparison
    assert sorted(read) == sorted(files)


def test_every_entry_has_a_figure_and_a_key_of_its_own() -> None:
    keys = [entry.key for entries in ENTRIES.values() for entry in entries]
    assert len(keys) == len(set(keys))
    assert set(keys) <= set(plots.FIGURES)


def test_downloads_are_the_datasets(pair: list[Run], report: Path, tmp_path: Path) -> None:
    encoded = re.search(
        r'download="partial-hessian.nc" href="data:application/x-netcdf;base64,([^"]+)"', report.read_text()
    )
    assert encoded is not None
    (tmp_path / "back.nc").write_bytes(base64.b64decode(encoded[1]))
    assert netcdf.load(tmp_path / "back.nc").identical(netcdf.load(pair[0].path / ANALYSIS / "hessian.nc"))


def test_the_table_shows_plain_champion_and_best_restart(pair: list[Run]) -> None:
    pair = [Run(pair[0].path, pair[0].manifest | {"champion": 1}), pair[1]]
    table = summary_table(pair)
    assert [row["network"].split(": ")[1] for row in table] == ["plain", "champion (partial)", "best of 3 restarts"]
    plain = float(pair[0].history.test_error.sel(iteration=0)[-1])
    assert table[0]["test error"].startswith(f"{100 * plain:.2f} ± ")
    assert "±" in table[0]["trace"]
    assert table[2]["trace"] == "–"


def with_errors(run: Run, test_errors: list[float]) -> Run:
    """The run as if its iterations had ended with these test errors on 300 examples."""
    history = run.history.copy(deep=True)
    history.test_error[:, -1] = test_errors
    changed = open_run(run.path)
    changed.__dict__["history"] = history
    return changed


def test_a_difference_within_two_standard_errors_is_not_claimed(copies: list[Run]) -> None:
    run = copies[0]  # the champion is iteration 2
    (close,) = (line for line in summary([with_errors(run, [0.10, 0.10, 0.09])]) if "test error" in line)
    assert "(no significant difference on this test set)" in close
    (apart,) = (line for line in summary([with_errors(run, [0.30, 0.30, 0.10])]) if "test error" in line)
    assert "-20.00 ± 3.16 points (lower)" in apart


def test_a_plain_model_that_is_the_best_is_named_as_such(pair: list[Run], tmp_path: Path) -> None:
    run = copies_of(pair, tmp_path)[0]
    run.manifest["champion"] = 0
    first, second, *_ = summary([run])
    assert first == (
        "partial: the plain model has the lowest validation error of all iterations; the best of iterations 1 to 2 is "
        "compared with it."
    )
    best = run.challenger.iteration
    assert (
        f"the test error of the best of iterations 1 to 2 (iteration {best}) differs from that of the plain" in second
    )


def test_the_tables_never_compare_a_network_with_itself(pair: list[Run], tmp_path: Path) -> None:
    """The plain model is the champion, and the best restart is the one that is the same training."""
    run, control = copies_of(pair, tmp_path)
    for one in (run, control):
        (one.path / MANIFEST).write_text(json.dumps(one.manifest | {"champion": 0}))
    run, control = (open_run(one.path) for one in (run, control))
    netcdf.save(pn.compare(run, control, **ONLY_FUNCTIONS), run.path / ANALYSIS / "comparison.nc")
    table = summary_table([run, control])
    names = [row["network"].split(": ")[1] for row in table]
    assert names == ["plain, the champion", "best of iterations 1 to 2 (partial)", "best of 3 restarts"]
    assert table[1]["iteration"] == str(run.challenger.iteration)
    (restarts,) = (sentence for sentence in summary([run, control]) if "restarts" in sentence)
    assert "differs from that of the best of iterations 1 to 2 by" in restarts
    assert "unpaired" not in restarts  # the saved comparison has both


def test_numbers_are_printed_with_their_errors() -> None:
    assert Estimate(0.1234, 0.012).text(percent=True) == "12.34 ± 1.20 %"
    assert Estimate(12.344, 0.67).text() == "12.34 ± 0.67"
    assert Estimate(float("nan")).text() == "–"


def test_names_are_escaped(tiny_config: Config, tmp_path: Path) -> None:
    hostile = tmp_path / "<script>alert('x')<|script>"
    train(replace(tiny_config, iterations=1, epochs=1), hostile, device="cpu", progress=False)
    manifest = open_run(hostile).manifest
    manifest["command"] = "</details><img src=x onerror=alert(1)>"
    (hostile / MANIFEST).write_text(json.dumps(manifest))
    text = write_report([open_run(hostile)], tmp_path / "r.html", title="<b>bold</b>").read_text()
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert "<b>bold" not in text


def test_a_report_about_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="at least one"):
        write_report([], tmp_path / "r.html")


def test_descents_are_drawn_over_their_surface(tmp_path: Path) -> None:
    run = train(configure(find_recipe("S1"), epochs=200), tmp_path / "wells", device="cpu", progress=False)
    found = drawn([run])
    assert {"descent", "surface", "basin"} <= set(found)
    alone = plots.plot(run.results["descent"].to_dataset())
    assert len(found["descent"].markup) > 2 * len(embed(alone, "", "alone"))  # the contours are there


def test_a_comparison_comes_with_its_sentences(copies: list[Run], tmp_path: Path) -> None:
    run, control = (open_run(run.path) for run in copies)
    for file in (run.path / ANALYSIS).glob("*.nc"):
        file.unlink()  # only the comparison is to be drawn
    ds = pn.compare(run, control, **ONLY_FUNCTIONS)
    netcdf.save(ds, run.path / ANALYSIS / "comparison.nc")
    points = [f"<li>{escape(sentence)}</li>" for sentence in pn.verdict(ds)]
    text = write_report([run, control], tmp_path / "report.html").read_text()
    assert len(points) >= 3
    assert all(point in text for point in points)


def test_damaged_files_cost_only_their_own_figures(copies: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pnanalysis.report.figures.embed", lambda figure, text, prefix: "<svg>")  # takes seconds
    folder = copies[0].path / ANALYSIS
    netcdf.save(pn.history(*copies), folder / "history.nc")
    assert copies[0].results["history"].to_dataset().identical(copies[0].history)
    (folder / "sharpness.nc").write_bytes(b"no dataset")
    trajectory = netcdf.load(folder / "trajectory.nc")
    netcdf.save(trajectory.drop_vars(["run", "iteration"]), folder / "trajectory.nc")
    netcdf.save(pn.saturation(*copies, n=50, checkpoints=["ends"], progress=False), folder / "saturation.nc")
    study = Study(*map(RunDatasets, copies))
    found = {picture.key: picture for picture in pictures(study)}
    assert {"errors", "history", "saturation", "hessian"} <= set(found)
    assert "not a readable NetCDF4 file" in found["sharpness"].caption
    assert [key for key, picture in found.items() if not picture.markup] == ["sharpness", "trajectories"]
    assert {explorer.key for explorer in explorers(study.main)} == {"history", "hessian", "saturation"}


@pytest.mark.slow
def test_spectra_of_several_runs_are_assigned_to_their_own(copies: list[Run]) -> None:
    run, control = copies
    ds = pn.hessian(run, control, checkpoints=["champion"], n=60, n_lanczos=8, n_probes=3, progress=False)
    netcdf.save(ds, run.path / ANALYSIS / "hessian.nc")
    table = summary_table([run, control])
    assert table[0]["lambda_max"] == "–"
    assert table[1]["lambda_max"] == estimate_of(ds.isel(checkpoint=0), "lambda_max").text()
    layered = pn.hessian(run, per_layer=True, n=60, n_lanczos=8, n_probes=3, progress=False)
    netcdf.save(layered, run.path / ANALYSIS / "hessian.nc")
    assert summary_table([run, control])[0]["lambda_max"] == "–"  # a layer's would be another number


def test_the_summary_says_what_the_comparison_says(copies: list[Run]) -> None:
    run, control = copies
    for given in (run.path.name, f"{run.path.name} {control.path.name}"):
        assert any(f"pnanalysis compare {given} computes" in sentence for sentence in summary(copies))
    for runs, place in (((run,), 0), ((run, control), 1)):
        ds = pn.compare(*runs, **ONLY_FUNCTIONS)
        netcdf.save(ds, run.path / ANALYSIS / "comparison.nc")
        at = ds.sel(split="test").isel(checkpoint=1, other=0)
        difference = Estimate(float(at.error_difference), float(at.error_difference_se), p=float(at.error_difference_p))
        words = difference.in_points()
        assert summary(copies)[place].endswith(f" by {words}.")
        assert "unpaired" in summary(copies)[1 - place]
    few = pn.compare(run, control, n=40, **ONLY_FUNCTIONS)
    netcdf.save(few, run.path / ANALYSIS / "comparison.nc")
    assert summary(copies)[1].endswith(", on 40 test examples.")


def test_squared_errors_are_no_percentages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "curve.py").write_text(
        "import torch\n"
        "def net():\n    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))\n"
        "def data():\n"
        "    x = 9 * torch.randn(90, 3, generator=torch.Generator().manual_seed(0))\n"
        "    y = x[:, :1]\n"
        "    return {'train': (x[:50], y[:50]), 'validation': (x[50:70], y[50:70]), 'test': (x[70:], y[70:])}\n"
    )
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {"model": "curve:net", "data": "curve:data", "loss": "mse", "recipe": "own"}
    config = configure(find_recipe("lenet5"), iterations=2, epochs=2, **settings)
    run = train(config, tmp_path / "own", device="cpu", progress=False)
    plain = summary_table([run])[0]
    assert "%" not in plain["validation error"] + plain["test error"]
    assert float(plain["test error"]) == pytest.approx(float(run.history.test_error[0, -1]), rel=1e-3)
    assert "points" not in " ".join(summary([run]))
    assert plots.errors(run.history).get_ylabel() == "squared error at the end of training"
    assert "%" not in plots.history(run.history).axes[1].yaxis.get_major_formatter()(1.0)
    assert _Page(write_report([run], tmp_path / "r.html").read_text()).tags.count("svg") == 2


@pytest.fixture(scope="module")
def networks() -> dict[str, xr.Dataset]:
    """Analyses of two networks in memory, by kind."""
    torch.manual_seed(0)
    first, second = (nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)) for _ in range(2))
    train, test = ((torch.randn(40, 4), torch.randint(2, (40,))) for _ in range(2))
    given = {"first": first, "second": second}
    options = {"data": train, "loss": nn.functional.cross_entropy, "n": None, "progress": False}
    return {
        "hessian": pn.hessian(given, n_hvp=20, data_error="none", **options),
        "comparison": pn.compare(given, hessian=False, **options | {"data": {"train": train, "test": test}}),
    }


def test_networks_of_no_run_have_a_report_of_their_datasets(networks: dict[str, xr.Dataset], tmp_path: Path) -> None:
    file = pn.save(networks["hessian"], tmp_path / "spectra.nc")
    page = write_report([file, networks["comparison"]], tmp_path / "report.html").read_text()
    assert "<h1>Minima of first, second</h1>" in page
    assert "the best of the same number of trainings" not in page  # there is no training to speak of
    (study,) = studies([file, networks["comparison"]])
    found = {picture.key: picture for picture in pictures(study)}
    assert {"hessian", "comparison"} <= set(found)
    assert all(picture.markup for picture in found.values())
    assert [explorer.key for explorer in explorers(study.main)] == ["hessian"]
    for kind in networks:
        content = re.search(rf'download="{kind}\.nc" href="data:application/x-netcdf;base64,([^"]+)"', page)
        assert content is not None
        (tmp_path / "again.nc").write_bytes(base64.b64decode(content[1]))
        xr.testing.assert_equal(pn.load(tmp_path / "again.nc"), networks[kind])


def test_the_table_of_networks_has_the_numbers_of_their_datasets(networks: dict[str, xr.Dataset]) -> None:
    table = summary_table(list(networks.values()))
    assert [row["network"] for row in table] == ["first", "second"]
    assert "iteration" not in table[0]
    for name, row in zip(("first", "second"), table, strict=True):
        spectrum, compared = (ds.sel(checkpoint=name) for ds in networks.values())
        assert row["lambda_max"] == estimate_of(spectrum, "lambda_max").text()
        assert row["training loss"] == estimate_of(compared.sel(split="train"), "loss").text()
        share = 100 * float(compared.error.sel(split="test"))
        assert row["test error"].startswith(f"{share:.2f}")
        assert row["test error"].endswith("%")
        assert row["validation error"] == "–"
    further = summary_table([*networks.values(), networks["hessian"]])
    assert [row["network"] for row in further][2:] == ["first (hessian-hessian)", "second (hessian-hessian)"]
    assert [row["trace"] for row in further][2:] == [row["trace"] for row in table]


def test_spectra_alone_are_put_in_words(networks: dict[str, xr.Dataset]) -> None:
    (text,) = summary_sentences([networks["hessian"]])
    assert text.startswith("The largest Hessian eigenvalues of first and second are ")


def test_spectra_of_other_matrices_are_called_by_their_name(networks: dict[str, xr.Dataset], copies: list[Run]) -> None:
    fisher = networks["hessian"].assign_attrs(operator="fisher", params="fc1")
    (text,) = summary_sentences([fisher])
    assert text.startswith("The largest empirical Fisher of fc1 eigenvalues of first and second are ")
    plain, named = summary_table([networks["hessian"]]), summary_table([fisher])
    assert [row["trace"] for row in named] == [f"{row['trace']} (empirical Fisher of fc1)" for row in plain]
    (study,) = studies([fisher])
    assert [picture.title for picture in pictures(study)] == ["empirical Fisher of fc1 spectrum"]
    run, control = copies
    for one, operator in ((run, "ggn"), (control, "hessian")):
        ds = pn.load(run.path / ANALYSIS / "hessian.nc").assign_attrs(operator=operator)
        netcdf.save(ds.assign_attrs(run=one.path.name), one.path / ANALYSIS / "hessian.nc")
    table = summary_table([run, control])
    assert table[0]["lambda_max"].endswith(" (Gauss-Newton)")
    assert not any("(Hessian)" in cell for row in table for cell in row.values())


def test_several_datasets_of_a_kind_have_a_figure_each(networks: dict[str, xr.Dataset], tmp_path: Path) -> None:
    other = pn.save(networks["hessian"], tmp_path / "other.nc")
    (study,) = studies([networks["hessian"], other, other])
    assert list(study.main.readable()) == ["hessian", "hessian-other", "hessian-other-2"]
    titles = [picture.title for picture in pictures(study)]
    assert titles == ["Hessian spectrum", "Hessian spectrum (hessian-other)", "Hessian spectrum (hessian-other-2)"]


def test_datasets_are_shown_after_runs(pair: list[Run], networks: dict[str, xr.Dataset]) -> None:
    found = studies([networks["hessian"], *pair])
    assert [study.main.name for study in found] == ["partial", "first, second"]
    assert [row["iteration"] for row in summary_table([networks["hessian"], pair[0]])][-2:] == ["–", "–"]


def test_what_is_neither_run_nor_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(b"weights")
    with pytest.raises(RunError, match="neither a run nor a dataset"):
        write_report([tmp_path / "net.pt"], tmp_path / "report.html")
    with pytest.raises(RunError, match="no kind"):
        write_report([xr.Dataset()], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()

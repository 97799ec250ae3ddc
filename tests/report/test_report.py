"""The report: one file that needs nothing else, says no more than the numbers, and believes no name."""

from __future__ import annotations

import base64
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import escape

import pnanalysis as pn
from pnanalysis import plots
from pnanalysis.errors import RunError
from pnanalysis.estimates import Estimate
from pnanalysis.io import netcdf
from pnanalysis.io.runs import ANALYSIS, MANIFEST, Run, open_run
from pnanalysis.report import summary_table, write_report
from pnanalysis.report.figures import embed, pictures
from pnanalysis.report.interactive import explorers
from pnanalysis.report.tables import sentences
from trainers import Config, configure, find_recipe, train


@pytest.fixture(scope="module")
def pair(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """A run with every analysis, and its control."""
    folder = tmp_path_factory.mktemp("pair")
    runs = [
        train(replace(tiny_config, strategy=strategy), folder / strategy, device="cpu", progress=False)
        for strategy in ("partial", "restart")
    ]
    found = {
        "hessian": pn.hessian(runs[0], n=100, n_lanczos=10, n_probes=3, progress=False),
        "saturation": pn.saturation(runs[0], progress=False),
        "trajectory": pn.trajectory(*runs, progress=False),
    }
    for kind, ds in found.items():
        netcdf.save(ds, runs[0].path / ANALYSIS / f"{kind}.nc")
    return runs


class _Page(HTMLParser):
    """Collects tags, addresses and text."""

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


def test_the_page_holds_everything_and_fetches_nothing(pair: list[Run], tmp_path: Path) -> None:
    text = write_report(pair, tmp_path / "report.html").read_text()
    page = _Page(text)
    assert page.tags.count("svg") == 9
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert not re.search(r"@import|url\(\s*['\"]?http", text)
    assert len(page.ids) == len(set(page.ids))
    for title in (
        "Errors by iteration",
        "Hessian spectrum",
        "Saturation",
        "Distance from saturation",
        "Trajectories",
        "How it was made",
    ):
        assert title in text
    assert pair[0].manifest["data"]["fingerprint"] in text


def test_downloads_are_the_datasets(pair: list[Run], tmp_path: Path) -> None:
    text = write_report(pair, tmp_path / "report.html").read_text()
    encoded = re.search(r'download="partial-hessian.nc" href="data:application/x-netcdf;base64,([^"]+)"', text)
    assert encoded is not None
    (tmp_path / "back.nc").write_bytes(base64.b64decode(encoded[1]))
    assert netcdf.load(tmp_path / "back.nc").identical(netcdf.load(pair[0].path / ANALYSIS / "hessian.nc"))


def test_the_table_shows_plain_champion_and_best_restart(pair: list[Run]) -> None:
    table = summary_table(pair)
    assert [row["network"].split(": ")[1] for row in table] == ["plain", "champion (partial)", "best of 3 restarts"]
    plain = float(pair[0].history.test_error.sel(iteration=0)[-1])
    assert table[0]["test error"].startswith(f"{100 * plain:.2f} ± ")
    assert "±" in table[0]["trace"]
    assert table[2]["trace"] == "–"


def test_a_difference_within_two_standard_errors_is_not_claimed(pair: list[Run]) -> None:
    said = " ".join(sentences(pair))
    assert "no significant difference on this test set" in said or "the plain model has the lowest" in said


def test_numbers_are_printed_with_their_errors() -> None:
    assert Estimate(0.1234, 0.012).text(percent=True) == "12.34 ± 1.20 %"
    assert Estimate(12.345, 0.67).text() == "12.35 ± 0.67" or Estimate(12.345, 0.67).text() == "12.34 ± 0.67"
    assert Estimate(float("nan")).text() == "–"


def test_names_are_escaped(tiny_config: Config, tmp_path: Path) -> None:
    hostile = tmp_path / "<script>alert('x')<|script>"
    train(replace(tiny_config, iterations=1, epochs=1), hostile, device="cpu", progress=False)
    manifest = json.loads((hostile / MANIFEST).read_text())
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
    run = train(configure(find_recipe("S1"), epochs=2000), tmp_path / "wells", device="cpu", progress=False)
    found = {picture.title: picture for picture in pictures(run, None)}
    assert {"Descents", "Surfaces", "Basins"} <= set(found)
    alone = plots.plot(run.results["descent"].to_dataset())
    assert len(found["Descents"].markup) > 2 * len(embed(alone, "", "alone"))  # the contours are there


def test_a_comparison_comes_with_its_sentences(copies: list[Run], tmp_path: Path) -> None:
    ds = pn.compare(*copies, hessian=False, cka=False, saturation=False, progress=False)
    netcdf.save(ds, copies[0].path / ANALYSIS / "comparison.nc")
    (picture,) = (picture for picture in pictures(*copies) if picture.title == "Comparison")
    assert picture.points == tuple(pn.verdict(ds))
    text = write_report(copies, tmp_path / "report.html").read_text()
    assert all(f"<li>{escape(sentence)}</li>" in text for sentence in pn.verdict(ds))


@pytest.fixture
def copies(pair: list[Run], tmp_path: Path) -> list[Run]:
    """The pair, to be changed at will; the champion is an iteration of its own."""
    for run in pair:
        shutil.copytree(run.path, tmp_path / run.path.name)
    manifest = json.loads((tmp_path / "partial" / MANIFEST).read_text())
    (tmp_path / "partial" / MANIFEST).write_text(json.dumps(manifest | {"champion": 2}))
    return [open_run(tmp_path / run.path.name) for run in pair]


def test_odd_files_cost_no_more_than_their_own_figures(copies: list[Run], tmp_path: Path) -> None:
    folder = copies[0].path / ANALYSIS
    netcdf.save(pn.history(*copies), folder / "history.nc")
    assert copies[0].results["history"].to_dataset().identical(copies[0].history)
    (folder / "sharpness.nc").write_bytes(b"no dataset")
    trajectory = netcdf.load(folder / "trajectory.nc")
    netcdf.save(trajectory.drop_vars(["run", "iteration"]), folder / "trajectory.nc")
    netcdf.save(pn.saturation(*copies, n=50, checkpoints=["ends"], progress=False), folder / "saturation.nc")
    found = {picture.title: picture for picture in pictures(*copies)}
    assert {"Errors by iteration", "Training", "Saturation", "Hessian spectrum"} <= set(found)
    assert "not a readable NetCDF4 file" in found["Sharpness"].caption
    assert found["Sharpness"].markup == found["Trajectories"].markup == ""
    assert {"Explore the training", "Explore the saturation"} <= {explorer.title for explorer in explorers(copies[0])}
    text = write_report(copies, tmp_path / "report.html").read_text()
    assert text.count("Not shown: ") == 2


def test_spectra_of_several_runs_are_told_apart(copies: list[Run]) -> None:
    run, control = copies
    ds = pn.hessian(run, control, checkpoints=["champion"], n=60, n_lanczos=8, n_probes=3, progress=False)
    netcdf.save(ds, run.path / ANALYSIS / "hessian.nc")
    table = summary_table([run, control])
    assert table[0]["lambda_max"] == "–"
    assert table[1]["lambda_max"] == Estimate(float(ds.lambda_max[0])).text()
    layered = pn.hessian(run, per_layer=True, n=60, n_lanczos=8, n_probes=3, progress=False)
    netcdf.save(layered, run.path / ANALYSIS / "hessian.nc")
    assert summary_table([run, control])[0]["lambda_max"] == "–"  # a layer's would be another number


def test_the_summary_says_what_the_comparison_says(copies: list[Run]) -> None:
    run, control = copies
    for given in (run.path.name, f"{run.path.name} {control.path.name}"):
        assert any(f"pnanalysis compare {given} gives" in sentence for sentence in sentences(copies))
    options = {"hessian": False, "cka": False, "saturation": False, "progress": False}
    for runs, place in (((run,), 0), ((run, control), 1)):
        ds = pn.compare(*runs, **options)
        netcdf.save(ds, run.path / ANALYSIS / "comparison.nc")
        at = ds.sel(split="test").isel(checkpoint=1, other=0)
        words = Estimate(float(at.error_difference), float(at.error_difference_se)).in_points()
        assert sentences(copies)[place].endswith(f": test error {words}.")
        assert "unpaired" in sentences(copies)[1 - place]
    few = pn.compare(run, control, n=40, **options)
    netcdf.save(few, run.path / ANALYSIS / "comparison.nc")
    assert sentences(copies)[1].endswith(", on 40 test examples.")


def test_squared_errors_are_no_percentages(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "curve.py").write_text(
        "import torch\n"
        "def net():\n    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))\n"
        "def data():\n"
        "    x = 9 * torch.randn(90, 3, generator=torch.Generator().manual_seed(0))\n"
        "    y = x[:, :1]\n"
        "    return {'train': (x[:50], y[:50]), 'validation': (x[50:70], y[50:70]), 'test': (x[70:], y[70:])}\n"
    )
    monkeypatch.chdir(tmp_path)
    config = configure(
        find_recipe("lenet5"), model="curve:net", data="curve:data", loss="mse", iterations=2, epochs=2, recipe="own"
    )
    run = train(config, tmp_path / "own", device="cpu", progress=False)
    plain = summary_table([run])[0]
    assert "%" not in plain["validation error"] + plain["test error"]
    assert float(plain["test error"]) == pytest.approx(float(run.history.test_error[0, -1]), rel=1e-3)
    assert "points" not in " ".join(sentences([run]))
    assert plots.errors(run.history).get_ylabel() == "squared error at the end of training"
    assert "%" not in plots.history(run.history).axes[1].yaxis.get_major_formatter()(1.0)
    write_report([run], tmp_path / "r.html")

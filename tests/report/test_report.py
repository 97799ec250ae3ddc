"""The report: one file that needs nothing else, says no more than the numbers, and believes no name."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import pnanalysis as pn
from pnanalysis import plots, schema
from pnanalysis.errors import RunError
from pnanalysis.measured import Measured
from pnanalysis.report import summary_table, write_report
from pnanalysis.report.figures import _figures_of, embed, pictures
from pnanalysis.report.summary import sentences
from pnanalysis.runs import ANALYSIS, MANIFEST, Run, open_run
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
        schema.save(ds, runs[0].path / ANALYSIS / f"{kind}.nc")
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
    assert schema.load(tmp_path / "back.nc").identical(schema.load(pair[0].path / ANALYSIS / "hessian.nc"))


def test_the_table_shows_plain_champion_and_best_restart(pair: list[Run]) -> None:
    table = summary_table(pair)
    assert [row["network"].split(": ")[1] for row in table] == ["plain", "champion (partial)", "best of 3 restarts"]
    plain = float(pair[0].history.test_error.sel(iteration=0)[-1])
    assert table[0]["test error"].startswith(f"{100 * plain:.2f} ± ")
    assert "±" in table[0]["trace"]
    assert table[2]["trace"] == "–"


def test_a_difference_within_two_standard_errors_is_not_claimed(pair: list[Run]) -> None:
    said = " ".join(sentences(pair))
    assert "no difference that this test set could tell" in said or "the plain model has the lowest" in said


def test_numbers_are_printed_with_their_errors() -> None:
    assert Measured(0.1234, 0.012).text(percent=True) == "12.34 ± 1.20 %"
    assert Measured(12.345, 0.67).text() == "12.35 ± 0.67" or Measured(12.345, 0.67).text() == "12.34 ± 0.67"
    assert Measured(float("nan")).text() == "–"


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


def test_a_comparison_comes_with_its_sentences(pair: list[Run]) -> None:
    ds = pn.compare(*pair, hessian=False, cka=False, saturation=False, progress=False)
    ((title, caption, options),) = _figures_of("comparison", {"comparison": ds}, None)
    assert (title, options) == ("Comparison", {"figure": "comparison"})
    assert all(sentence in caption for sentence in pn.verdict(ds))

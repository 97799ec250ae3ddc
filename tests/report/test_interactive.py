"""Figures to explore: what is under the pointer is what the datasets hold, and every list can be worked."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pnanalysis.io.runs import Run
from pnanalysis.report import write_report
from pnanalysis.report.interactive import ALL, explorers
from tests.report.test_report import pair

__all__ = ["pair"]

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def shown(explorer, **chosen: str) -> list[dict]:
    """The curves that a choice leaves, by the page's own rule."""
    first = {choice.key: choice.options[0] for choice in explorer.choices} | chosen
    return [t for t in explorer.traces if all(v in (ALL, t["meta"][k]) for k, v in first.items())]


def test_curves_are_the_datasets(pair: list[Run]) -> None:
    found = {explorer.title: explorer for explorer in explorers(pair[0])}
    assert set(found) == {f"Explore the {what}" for what in ("training", "spectrum", "saturation", "trajectories")}
    history, saturation = (pair[0].results[name].to_dataset() for name in ("history", "saturation"))
    (curve,) = shown(found["Explore the training"], quantity="test error", iteration="1")
    np.testing.assert_allclose(curve["y"], history.test_error.sel(iteration=1), rtol=1e-4)
    layer = str(saturation.layer.values[2])
    (curve,) = shown(found["Explore the saturation"], layer=layer, level="75", iteration="2")
    expected = saturation.abs_percentile.sel(layer=layer, quantile=75, iteration=2).values
    known = [math.nan if value is None else value for value in curve["y"]]
    np.testing.assert_allclose(known, expected, rtol=1e-4)
    assert len(shown(found["Explore the spectrum"])) == 2
    assert shown(found["Explore the trajectories"])[0]["name"].removesuffix(" (champion)").endswith("plain")


def test_every_choice_shows_something(pair: list[Run]) -> None:
    for explorer in explorers(pair[0]):
        for choice in explorer.choices:
            for option in choice.options:
                assert shown(explorer, **{choice.key: option}), (explorer.title, choice.key, option)


def test_data_cannot_end_their_script(pair: list[Run]) -> None:
    for explorer in explorers(pair[0]):
        explorer.traces[0]["name"] = "</script><script>alert(1)</script>"
        assert "</script" not in explorer.json()
        assert json.loads(explorer.json())["data"][0]["name"] == explorer.traces[0]["name"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_them_from_the_file(pair: list[Run], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    text = write_report(pair, page).read_text()
    page.write_text(text.replace('<details class="explore">', '<details class="explore" open>'))
    quiet = ["--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command = [CHROMIUM, "--headless", "--no-sandbox", *quiet, f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert dom.count('class="main-svg"') >= 4
    assert len(re.findall(r'class="[^"]*js-line', dom)) > 10

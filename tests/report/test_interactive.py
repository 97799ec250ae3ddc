"""Interactive figures: what is under the pointer is what the datasets hold, and each choice shows something."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pnanalysis.io.runs import Run
from pnanalysis.report.datasets import RunDatasets
from pnanalysis.report.interactive import ALL, Explorer, explorers

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def found(pair: list[Run]) -> dict[str, Explorer]:
    """The interactive figures of a run; only to be read."""
    return {explorer.key: explorer for explorer in explorers(RunDatasets(pair[0]))}


def shown(explorer: Explorer, **chosen: str) -> list[dict[str, Any]]:
    """The curves that a choice leaves, by the page's own rule."""
    first = {choice.key: next(iter(choice.options)) for choice in explorer.choices} | chosen
    return [t for t in explorer.traces if all(v in (ALL, t["meta"][k]) for k, v in first.items())]


def test_curves_are_the_datasets(pair: list[Run], found: dict[str, Explorer]) -> None:
    assert set(found) == {"history", "hessian", "saturation", "trajectory"}
    history, saturation = (pair[0].results[name].to_dataset() for name in ("history", "saturation"))
    (curve,) = shown(found["history"], quantity="test_error", iteration="1")
    np.testing.assert_allclose(curve["y"], history.test_error.sel(iteration=1), rtol=1e-4)
    layer = str(saturation.layer.values[2])
    (curve,) = shown(found["saturation"], layer=layer, level="75", iteration="2")
    expected = saturation.abs_percentile.sel(layer=layer, quantile=75, iteration=2).values
    known = [math.nan if value is None else value for value in curve["y"]]
    np.testing.assert_allclose(known, expected, rtol=1e-4)
    assert len(shown(found["hessian"])) == 2
    assert shown(found["trajectory"])[0]["name"].removesuffix(" (champion)").endswith("plain")


def test_every_choice_shows_something(found: dict[str, Explorer]) -> None:
    for explorer in found.values():
        for choice in explorer.choices:
            for option in choice.options:
                assert shown(explorer, **{choice.key: option}), (explorer.key, choice.key, option)


def test_data_cannot_end_their_script() -> None:
    name = "</script><script>alert(1)</script>"
    explorer = Explorer("history", "Explore", [], [{"name": name}])
    assert "</script" not in explorer.json()
    assert json.loads(explorer.json())["data"][0]["name"] == name


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_them_from_the_file(report: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(report.read_text().replace('<details class="explore">', '<details class="explore" open>'))
    quiet = ["--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command = [CHROMIUM, "--headless", "--no-sandbox", *quiet, f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert dom.count('class="main-svg"') >= 4
    assert len(re.findall(r'class="[^"]*js-line', dom)) > 10

"""A study at the smallest scale: cells are made once, and the page is made from them alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pnanalysis.errors import PnError
from pnanalysis.reproduce.study import reproduce


def quiet(line: str) -> None:
    pass


@pytest.mark.slow
def test_the_same_tables_twice_and_no_cell_again(tmp_path: Path) -> None:
    out = tmp_path / "study"
    first = reproduce(["S2"], "smoke", out, jobs=2, log=quiet).read_text()
    times = {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*") if path.is_file()}
    assert times
    again = reproduce(["S2"], "smoke", out, jobs=2, log=quiet).read_text()
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in times} == times
    # trained anew, elsewhere
    other = reproduce(["S2"], "smoke", tmp_path / "other", jobs=2, log=quiet)
    shutil.rmtree(tmp_path / "other" / "work", ignore_errors=True)
    assert reproduce(["S2"], "smoke", tmp_path / "other", train=False, log=quiet) == other
    assert other.read_text().split("## Cost")[0] == first.split("## Cost")[0]


def test_a_page_without_any_cell_says_so(tmp_path: Path) -> None:
    page = reproduce(["S1"], "smoke", tmp_path, train=False, log=quiet).read_text()
    assert "not yet known at this scale" in page


@pytest.mark.parametrize(("experiments", "scale"), [(["S12"], "smoke"), (["S1"], "huge")])
def test_unknown_names_are_refused(experiments: list[str], scale: str, tmp_path: Path) -> None:
    with pytest.raises(PnError, match="S12|huge"):
        reproduce(experiments, scale, tmp_path, train=False, log=quiet)

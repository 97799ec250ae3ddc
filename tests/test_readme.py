"""The Python code in the README runs, and its table lists every recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.tools.blocks import code_blocks, run_page

README = Path(__file__).parents[1] / "README.md"


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(code_blocks(README.read_text(), "python")) >= 2
    skipped = run_page(README)
    assert (tmp_path / "spectrum.pdf").stat().st_size > 1000
    if skipped:
        pytest.skip("; ".join(skipped))


def test_every_recipe_is_in_the_readme() -> None:
    from trainers import RECIPES

    text = README.read_text()
    for name, recipe in RECIPES.items():
        assert f"`{name}`" in text
        assert f"`{recipe.id}`" in text

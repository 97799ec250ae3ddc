"""The Python code in the README runs, and its table lists every recipe."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "spectrum.pdf").stat().st_size > 1000


def test_every_recipe_is_in_the_readme() -> None:
    from trainers import RECIPES

    text = README.read_text()
    for name, recipe in RECIPES.items():
        assert f"`{name}`" in text
        assert f"`{recipe.id}`" in text

"""The page on the layout names every folder, and imports follow the order that it gives."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.tools.blocks import code_blocks

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/concepts/layout.md").read_text()
(ORDER,) = code_blocks(PAGE, "text")
LEVELS = {name: level for level, line in enumerate(ORDER.splitlines()) for name in line.split()}


def unit(module: str) -> str:
    """Folder or top-level module of pnanalysis that a dotted name lies in, such as ``spectra``."""
    return module.split(".")[1]


def imported(file: Path) -> Iterator[str]:
    """Dotted names that a file imports, wherever in the file; ``from a import b`` as ``a.b``."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", ["pnanalysis", "trainers"])
def test_every_folder_is_on_the_page(package: str) -> None:
    folders = {file.parent.name for file in files(package) if file.name == "__init__.py"} - {package}
    assert {folder for folder in folders if f"`{folder}`" not in PAGE} == set()


def test_the_order_covers_every_module() -> None:
    modules = {file.relative_to(ROOT / "pnanalysis").with_suffix("").parts[0] for file in files("pnanalysis")}
    assert modules - {"__init__", "__main__"} == set(LEVELS)


@pytest.mark.parametrize("name", LEVELS)
def test_imports_go_down(name: str) -> None:
    own = [file for file in files("pnanalysis") if unit(".".join(file.relative_to(ROOT).with_suffix("").parts)) == name]
    targets = {unit(it) for file in own for it in imported(file) if it.startswith("pnanalysis.")}
    assert {target for target in targets if LEVELS[target] < LEVELS[name]} == set()


def test_analyses_never_import_the_trainer() -> None:
    assert [file for file in files("pnanalysis") for it in imported(file) if it.split(".")[0] == "trainers"] == []

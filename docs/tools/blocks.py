"""Find the code blocks of a page, and run its Python blocks in order."""

from __future__ import annotations

import ast
import builtins
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def code_blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return [body for found, body in _FENCE.findall(text) if found == language]


def commands(text: str) -> list[str]:
    """Commands after ``$`` in console blocks, with continued lines joined and comments removed."""
    typed = []
    for block in code_blocks(text, "console"):
        lines = block.replace("\\\n", " ").splitlines()
        typed += [line[2:].partition(" # ")[0].strip() for line in lines if line.startswith("$ ")]
    return typed


def run_page(path: Path, namespace: dict[str, Any] | None = None) -> list[str]:
    """Run a page's Python blocks in one namespace, in the current folder.

    A block is skipped if it imports a package that is not installed. Blocks that use a name which only a skipped block
    would have defined are skipped too.

    Returns
    -------
    list of str
        Why blocks were skipped; empty if all ran.
    """
    names = {"__name__": "page"} if namespace is None else namespace
    skipped = []
    missing: set[str] = set()
    for number, block in enumerate(code_blocks(path.read_text(encoding="utf-8"), "python"), start=1):
        tree = ast.parse(block, f"{path.name}, block {number}")
        reasons = [*dict.fromkeys(_missing_packages(tree)), *sorted(_used(tree) & missing - _defined(tree))]
        if reasons:
            skipped.append(f"{path.name}, block {number}: no {', '.join(reasons)}")
            missing |= _defined(tree) - names.keys()  # what an earlier block has defined is still there
            continue
        exec(compile(tree, f"{path.name}, block {number}", "exec"), names)
        missing -= _defined(tree)
    return skipped


def _missing_packages(tree: ast.AST) -> Iterator[str]:
    """Modules that the block imports and that are not installed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if not _installed(alias.name))
        elif isinstance(node, ast.ImportFrom) and not node.level and not _installed(str(node.module)):
            yield str(node.module)


def _installed(module: str) -> bool:
    # Only the top-level package: find_spec of a submodule would import its parents.
    return importlib.util.find_spec(module.partition(".")[0]) is not None


def _used(tree: ast.AST) -> set[str]:
    """Names that the block reads."""
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def _defined(tree: ast.Module) -> set[str]:
    """Names that the block binds, except those of builtins: they exist without the block."""
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    return found - set(dir(builtins))

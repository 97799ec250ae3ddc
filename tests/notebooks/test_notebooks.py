"""Every notebook is stored without outputs, runs from top to bottom and stays small."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[2] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES = 300_000

#: What stands in a notebook's first code cell, tagged ``parameters``, while it is tested; the same names, less work.
SMALL = {
    "01_two_wells": "steps, n = 2_000, 31",
    "02_kink": "steps, n_restarts, n_starts, lams, iterations = 300, 6, 3, (0.01, 0.1), 2",
    "03_your_own_model": "epochs, n_hvp = 3, 60",
    "04_spectra": "hidden, epochs, n_repeats, budgets = 4, 3, 3, (40, 80)",
    "05_plain_against_persistent": "folder, data, iterations, epochs, n_hvp = None, 'digits', 3, 3, 40",
    "06_sweeps": "folder, lams, n_seeds, iterations, epochs, jobs = None, (0.01, 0.1), 2, 2, 2, 1",
}


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def parameters(notebook: NotebookNode) -> NotebookNode:
    """The cell tagged ``parameters``."""
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    return cell


def names_set(source: str) -> set[str]:
    """Names that a piece of code assigns to."""
    names = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
    return {node.id for node in names if isinstance(node.ctx, ast.Store)}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("PNANALYSIS_CIFAR10", raising=False)
    notebook = read(path)
    parameters(notebook).source = SMALL[path.stem]
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert len(nbformat.writes(notebook)) < MAX_BYTES
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no figure is shown"
    assert not any(output.get("name") == "stderr" for output in outputs), "warnings are shown"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_is_stored_clean(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert code[0] == parameters(notebook)
    assert names_set(code[0].source) == names_set(SMALL[path.stem])

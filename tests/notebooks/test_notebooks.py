"""Every notebook is stored without outputs, runs from top to bottom and stays small when executed."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.cases import cases

FOLDER = Path(__file__).parents[2] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES = 300_000

#: Replaces a notebook's first code cell, tagged ``parameters``, in the test: the same names with values for less work.
SMALL = {
    "01_two_wells": "steps, n = 2_000, 31",
    "02_kink": "steps, n_restarts, n_starts, lams, iterations = 300, 6, 3, (0.01, 0.1), 2",
    "03_your_own_model": "epochs, n_hvp = 3, 60",
    "04_spectra": "hidden, epochs, n_repeats, budgets = 4, 3, 3, (40, 80)",
    "05_plain_against_persistent": "folder, data, iterations, epochs, n_hvp = None, 'digits', 3, 3, 40",
    "06_sweeps": "folder, lams, n_seeds, iterations, epochs, jobs = None, (0.01, 0.1), 2, 2, 2, 1",
}


#: Notebooks that take longer than a quarter of a minute even so.
SLOW = ("01_two_wells", "03_your_own_model", "04_spectra", "05_plain_against_persistent", "06_sweeps")


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


@pytest.mark.parametrize("path", cases({path.stem: path for path in PATHS}, SLOW))
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # A sweep then trains in the kernel itself: starting worker processes, which import torch again, would take longer.
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    # The image folder that notebook 05 would take in place of digits is large.
    monkeypatch.delenv("PNANALYSIS_CIFAR10", raising=False)
    notebook = read(path)
    parameters(notebook).source = SMALL[path.stem]
    # All results are in by the time the kernel shuts down, so there is no need to wait for it.
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, shutdown_kernel="immediate", resources=where).execute()
    assert len(nbformat.writes(notebook)) < MAX_BYTES
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "the notebook shows no figure"
    assert not any(output.get("name") == "stderr" for output in outputs), "the notebook shows warnings"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_is_stored_clean(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert code[0] == parameters(notebook)
    assert names_set(code[0].source) == names_set(SMALL[path.stem])

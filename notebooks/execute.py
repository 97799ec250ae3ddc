"""Execute the notebooks of this folder with their full settings and write the results to ``executed/``.

Usage: ``python notebooks/execute.py [NAME ...]``; without names, all notebooks.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def main(names: list[str]) -> None:
    """Execute the notebooks whose file names begin with one of ``names``, such as ``04``, or all."""
    out = FOLDER / "executed"
    out.mkdir(exist_ok=True)
    paths = [path for path in sorted(FOLDER.glob("*.ipynb")) if path.name.startswith(tuple(names or [""]))]
    if not paths:
        sys.exit(f"no notebook's name begins with {' or '.join(names)}")
    for path in paths:
        start = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        try:
            NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(FOLDER)}}).execute()
        finally:  # a notebook that failed is written too: it contains the error, at the cell that raised it
            nbformat.write(notebook, out / path.name)
        print(f"{out.name}/{path.name}  {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

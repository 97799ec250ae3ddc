"""Loads one module with a fault in it, in this process and in all that it starts."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from types import CodeType

from mutants import mutated

ROOT = Path(__file__).resolve().parents[2]
#: Tells processes which fault it is; they import what is in this folder when they start.
_FAULT, _FOLDER = "PNANALYSIS_FAULT", Path(__file__).parent / "children"


def load_with_fault(file: str, index: int) -> None:
    """Load a module with its fault of that index from now on; it must not have been imported."""
    sys.meta_path.insert(0, _Finder(file, index))
    os.environ[_FAULT] = f"{file}:{index}"
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(_FOLDER), *filter(None, paths)]))


def load_with_fault_of_parent() -> None:
    """Do the same in a process that was started by one with a fault."""
    if _FAULT in os.environ:
        file, _, index = os.environ[_FAULT].rpartition(":")
        load_with_fault(file, int(index))


class _Faulty(importlib.machinery.SourceFileLoader):
    """Loads a module with a fault in it."""

    def __init__(self, name: str, file: str, index: int) -> None:
        super().__init__(name, str(ROOT / file))
        self.index = index

    def get_code(self, fullname: str) -> CodeType:
        return compile(mutated(Path(self.path).read_text(), self.index), self.path, "exec")


class _Finder:
    """Finds the one module that has a fault."""

    def __init__(self, file: str, index: int) -> None:
        self.name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        self.loader = _Faulty(self.name, file, index)

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.loader.path, loader=self.loader)

"""Packages offer their names without importing what is behind them, in any order."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pnanalysis
import trainers

PACKAGES = [pnanalysis, trainers]


def in_a_fresh_interpreter(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_is_where_type_checkers_are_told(package) -> None:
    block = next(node for node in ast.parse(Path(package.__file__).read_text()).body if isinstance(node, ast.If))
    told = {alias.asname: node.module for node in block.body for alias in node.names}
    told = {name: f"{module}.{name}" if module == package.__name__ else module for name, module in told.items()}
    assert told == package.__dict__["_WHERE"]
    assert sorted(package.__all__) == sorted(told)
    for name in told:
        assert getattr(package, name) is not None
        assert name in dir(package)


def test_modules_are_attributes_without_being_imported() -> None:
    code = "import pnanalysis as pn, trainers; print(pn.models.__name__, pn.curvature.__name__, trainers.runs.sweep.__name__)"
    assert in_a_fresh_interpreter(code) == "pnanalysis.inputs.models pnanalysis.curvature trainers.runs.sweep"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'hesian'"):
        _ = pnanalysis.hesian


@pytest.mark.parametrize(
    "imports",
    [
        "import pnanalysis.analyses.hessian, trainers.loop.fit",
        "from pnanalysis.analyses.saturation import saturation; from trainers import persistence",
        "from pnanalysis import *; from trainers import *",
        "",
    ],
)
def test_a_function_is_never_hidden_by_its_module(imports: str) -> None:
    check = (
        "print(all(type(f).__name__ == 'function' for f in (pn.hessian, pn.saturation, pn.history, t.fit, t.train)))"
    )
    assert in_a_fresh_interpreter(f"{imports}\nimport pnanalysis as pn, trainers as t\n{check}") == "True"


@pytest.mark.parametrize("module", ["pnanalysis.cli", "trainers.cli"])
def test_a_command_line_starts_without_torch(module: str) -> None:
    heavy = "torch", "xarray", "matplotlib", "scipy", "sklearn"
    assert in_a_fresh_interpreter(f"import {module}, sys; print([m for m in {heavy} if m in sys.modules])") == "[]"

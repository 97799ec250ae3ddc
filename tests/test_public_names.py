"""Packages offer their names without importing what is behind them, in any order."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pnanalysis
import trainers

PACKAGES = [pnanalysis, trainers]


def in_a_fresh_interpreter(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_is_there(package) -> None:
    assert len(package.__all__) == len(set(package.__all__)) > 5
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in dir(package)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="hesian"):
        _ = pnanalysis.hesian


@pytest.mark.parametrize(
    "imports",
    [
        pytest.param("import pnanalysis.analyses.hessian, trainers.loop.fit", marks=pytest.mark.slow),
        pytest.param(
            "from pnanalysis.analyses.saturation import saturation; from trainers.loop import persistence",
            marks=pytest.mark.slow,
        ),
        "from pnanalysis import *; from trainers import *",
        pytest.param("", marks=pytest.mark.slow),
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

"""Command lines run in this process, as a user would type them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

import pnanalysis.cli
import trainers.cli

#: Options of ``pntrain`` for a network that trains in an instant.
TINY = ("--data", "digits", "--model", "tanh7", "--model-option", "input_shape=[1,8,8]", "--model-option", "width=16")


@dataclass
class Outcome:
    """Exit status, standard output and standard error."""

    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """``run("pnanalysis", "hessian", ...)``."""
    mains = {"pnanalysis": pnanalysis.cli.main, "pntrain": trainers.cli.main}

    def call(program: str, *arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            mains[program]()
        captured = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), captured.out, captured.err)

    return call

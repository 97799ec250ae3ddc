"""Runs, and one written report, that the tests of the report share."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import pnanalysis as pn
from pnanalysis.io import netcdf
from pnanalysis.io.runs import ANALYSIS, MANIFEST, Run, open_run
from pnanalysis.report import write_report
from trainers import Config, train


@pytest.fixture(scope="package")
def pair(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """A run with several analyses, and its restart control; only to be read."""
    folder = tmp_path_factory.mktemp("pair")
    runs = [
        train(replace(tiny_config, strategy=strategy), folder / strategy, device="cpu", progress=False)
        for strategy in ("partial", "restart")
    ]
    found = {
        "hessian": pn.hessian(runs[0], n=100, n_lanczos=10, n_probes=3, progress=False),
        "saturation": pn.saturation(runs[0], progress=False),
        "trajectory": pn.trajectory(*runs, progress=False),
    }
    for kind, ds in found.items():
        netcdf.save(ds, runs[0].path / ANALYSIS / f"{kind}.nc")
    return runs


@pytest.fixture(scope="package")
def report(pair: list[Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The written report about the pair; only to be read."""
    return write_report(pair, tmp_path_factory.mktemp("report") / "report.html")


def copies_of(pair: list[Run], folder: Path) -> list[Run]:
    """Copies of the pair whose champion is iteration 2."""
    for run in pair:
        shutil.copytree(run.path, folder / run.path.name)
    manifest = open_run(folder / "partial").manifest
    (folder / "partial" / MANIFEST).write_text(json.dumps(manifest | {"champion": 2}))
    return [open_run(folder / run.path.name) for run in pair]


@pytest.fixture
def copies(pair: list[Run], tmp_path: Path) -> list[Run]:
    """The pair, to be changed at will; the champion is iteration 2."""
    return copies_of(pair, tmp_path)

"""A basis on the disk is not put where files are kept in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pnanalysis as pn
from pnanalysis.errors import CurvatureError
from pnanalysis.spectra import scratch
from pnanalysis.spectra.linear_operator import DiagonalOperator


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, in memory as far as the table of mounts says; all the rest is on a disk."""
    folder = tmp_path / "in memory"
    folder.mkdir()
    escaped = str(folder).replace(" ", "\\040")
    table = tmp_path / "mounts"
    table.write_text(f"/dev/sda1 / ext4 rw 0 0\ntmpfs {escaped} tmpfs rw 0 0\n")
    monkeypatch.setattr(scratch, "_MOUNTS", table)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_another_folder_is_taken(memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scratch.lies_in_memory(memory / "deeper")
    assert not scratch.lies_in_memory(tmp_path)
    assert scratch.scratch_folder() == Path("/var/tmp")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert scratch.scratch_folder() == tmp_path
    monkeypatch.setattr(scratch, "_MOUNTS", tmp_path / "none")
    monkeypatch.setattr("tempfile.tempdir", str(memory))
    assert scratch.scratch_folder() == memory


def test_where_all_is_in_memory_it_says_so(memory: Path) -> None:
    (memory.parent / "mounts").write_text("overlay / overlay rw 0 0\ntmpfs / tmpfs rw 0 0\n")
    with pytest.raises(CurvatureError, match="set TMPDIR to a folder on a disk"):
        pn.spectral_density(DiagonalOperator(torch.linspace(0, 1, 500)), n_hvp=20, basis="disk", progress=False)

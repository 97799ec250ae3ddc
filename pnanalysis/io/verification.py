"""Every file of a run compared with the digest that it carries."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pnanalysis.errors import PnError
from pnanalysis.io import datasets, netcdf, zarr_store
from pnanalysis.io.runs import RESUME, Run
from pnanalysis.io.weights import check_digest, read_state_dicts


@dataclass(frozen=True)
class Finding:
    """What is known of one file: whether its digest confirms it, or what is wrong with it."""

    path: Path
    is_confirmed: bool = False
    problem: str = ""

    @property
    def text(self) -> str:
        """In words."""
        return self.problem or ("intact" if self.is_confirmed else "readable, has no digest")


def verify(run: Run) -> Iterator[Finding]:
    """Check every dataset, every checkpoint and the resume state of a run; the manifest was checked by opening it."""
    resume = run.path / RESUME
    weights = [checkpoint.path for checkpoint in run.checkpoints] + ([resume] if os.path.lexists(resume) else [])
    for path in (*run.files.values(), *weights):
        yield verify_file(path, run.path)


def verify_file(path: Path, within: Path | None = None) -> Finding:
    """Check a dataset, or a file of weights.

    Parameters
    ----------
    path : Path
    within : Path, optional
        The run to which the file belongs, whose links are not followed.
    """
    try:
        if path.suffix == zarr_store.SUFFIX:
            zarr_store.load(path, within)
            return Finding(path, zarr_store.is_confirmed(path))
        if path.suffix in datasets.SUFFIXES:
            return Finding(path, netcdf.read(path, within)[1])
        read_state_dicts(path, within)
        return Finding(path, path.suffix == ".safetensors" and check_digest(path, within))
    except PnError as error:
        return Finding(path, problem=str(error))

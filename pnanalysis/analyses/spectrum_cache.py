"""Spectra that have been computed before."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from pnanalysis.errors import CurvatureError
from pnanalysis.inputs.data import Split
from pnanalysis.inputs.selection import Member
from pnanalysis.io import netcdf
from pnanalysis.io.runs import ANALYSIS, Checkpoint
from pnanalysis.spectra.linear_operator import LinearOperator, random_unit_vectors


def _saved_spectrum(member: Member, options: Mapping[str, Any]) -> xr.Dataset | None:
    """The spectrum that is saved with the run, if it is of this checkpoint, these examples and as good as asked for."""
    run = member.source.run
    file = None if run is None else run.path / ANALYSIS / "hessian.nc"
    if file is None or not file.is_file() or file.stat().st_mtime < member.checkpoint.path.stat().st_mtime:
        return None
    ds = netcdf.load(file)
    wanted: dict[str, Any] = {"operator": "hessian", "split": "train", "bn_mode": "eval", "params": None}
    wanted |= {"amp": "no", "dtype": "float32", **{name: member.source.attrs.get(name) for name in ("loss", "model")}}
    wanted |= {key: options[key] for key in ("n", "seed", *wanted) if key in options}
    train = member.source.data.train
    if isinstance(train, Split) and wanted["n"] is not None:
        wanted["n"] = min(wanted["n"], len(train))
    at = np.flatnonzero((ds.iteration == member.checkpoint.iteration) & (ds.epoch == member.checkpoint.epoch))
    fits = all(ds.attrs.get(key) == value for key, value in wanted.items())
    enough = ds.sizes["lanczos"] >= options["n_lanczos"] and ds.sizes["probe"] >= options["n_probes"]
    same_data = ds.attrs.get("data_fingerprint") == member.source.data.fingerprint
    if not (fits and enough and same_data and len(at)) or "layer" in ds.coords:
        return None
    return ds.isel(checkpoint=int(at[0]))


_SAME = 1e-3  # relative deviation of a product that arithmetic explains


_Key = tuple[int, Checkpoint, str]  # source, checkpoint, layer ("" for all)


def _claim(folder: Path, asked: dict[str, Any]) -> None:
    """Make the folder that of this call, or see that it is.

    Raises
    ------
    CurvatureError
        If it holds the unfinished work of another.
    """
    path, asked = folder / "asked.json", json.loads(json.dumps(asked, default=str))
    if path.is_file() and (any(folder.glob("*.nc")) or any(folder.glob("*/*.safetensors"))):
        before = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name in asked if before.get(name) != asked[name]]
        if other:
            raise CurvatureError(
                f"{folder}: holds unfinished work with {other[0]} {before.get(other[0])!r}, not {asked[other[0]]!r}; "
                "finish that first with the same settings, or delete the folder"
            )
        return
    with netcdf.atomic_path(path) as temporary:
        temporary.write_text(json.dumps(asked, indent=1), encoding="utf-8")


def _finished(
    folder: Path | None,
    asked: dict[str, Any],
    operator: LinearOperator,
    compute: Callable[[], xr.Dataset],
) -> xr.Dataset:
    """A spectrum, from the file beside ``folder`` if it is there and answers just what is asked.

    One product tells whether the operator is still the same, whatever has happened to code and data meanwhile.
    """
    if folder is None:
        return compute()
    path = folder.with_name(f"{folder.name}.nc")
    question = json.dumps(asked, sort_keys=True, default=str)
    vector = random_unit_vectors(operator, [0], seed=0)
    product = operator.matmat(vector)
    known = np.array([float((vector * product).sum()), float(torch.linalg.vector_norm(product))])
    if path.is_file():
        found = netcdf.load(path)
        same = np.abs(np.asarray(found.attrs.pop("product", np.nan)) - known).max() <= _SAME * known[1]
        if found.attrs.pop("asked", None) == question and same:
            return found
    ds = compute()
    netcdf.save(ds.assign_attrs(asked=question, product=known), path)
    return ds


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _row(label: str, layer: str) -> str:
    return f"{label}:{layer}" if layer else label


def _own_folder(state: str | os.PathLike[str] | None, key: _Key) -> Path | None:
    """Where the unfinished work on one spectrum is kept."""
    which, checkpoint, layer = key
    return None if state is None else Path(state) / f"{which}-{_row(checkpoint.name.replace('/', '-'), layer)}"

"""Eigenpairs that an interrupted call had finished, taken up again without another search or verification."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import xarray as xr
from torch import Tensor

from pnanalysis import schema
from pnanalysis.analyses.network_eigenpairs import EigenpairOptions, Found, matrix_eigenpairs
from pnanalysis.analyses.work_folder import loss_tolerance
from pnanalysis.curvature.base import CurvatureOperator
from pnanalysis.errors import CurvatureError, SchemaError
from pnanalysis.io import netcdf
from pnanalysis.io.unfinished import Unfinished, warn_unsaved
from pnanalysis.spectra.finished import sizes_of_product
from pnanalysis.spectra.inner_products import norms
from pnanalysis.spectra.lanczos import SAME_PRODUCT
from pnanalysis.spectra.linear_operator import LinearOperator, round_off
from pnanalysis.terminal.progress import Advance

#: The part of unfinished work with the vectors of finished eigenpairs.
_FOUND = "found"


def finished_or_computed(
    operator: LinearOperator,
    options: EigenpairOptions,
    folder: Path | None,
    *,
    update: Tensor | None = None,
    advance: Advance | None = None,
    title: str = "",
) -> Found:
    """The eigenpairs in a folder if they are finished, else what :func:`matrix_eigenpairs` finds, which is saved there.

    One product and the loss tell whether these are the eigenpairs of this operator.

    Parameters
    ----------
    operator : LinearOperator
    options : EigenpairOptions
    folder : Path or None
        ``None`` saves nothing.
    update, advance, title
        See :func:`pnanalysis.analyses.network_eigenpairs.matrix_eigenpairs`.

    Raises
    ------
    CurvatureError
        If the folder holds the work of another operator, or of other settings.
    """
    if folder is None:
        return matrix_eigenpairs(operator, options, update=update, advance=advance, title=title)
    state = _unfinished(operator, options, folder)
    about = _about(operator, options, update)
    saved = state.load(_FOUND)
    known = None if saved is None else _known(*saved, folder, about)
    if known is not None:
        return known
    # a search over slightly other data or weights, which one product may not tell apart, is none to go on with
    is_other = saved is not None and not _same(saved[1]["about"], {"loss": about["loss"]})
    found = matrix_eigenpairs(
        operator, options, update=update, advance=advance, state=None if is_other else state, title=title
    )
    _save(found, state, folder, about)
    return found


def _unfinished(operator: LinearOperator, options: EigenpairOptions, folder: Path) -> Unfinished:
    """What is saved of pairs that were begun before, for this operator alone, as one product tells."""
    seen = sizes_of_product(operator)
    about = {name: getattr(options, name) for name in ("k", "which", "tolerance", "max_hvp", "seed")}
    tolerance = max(SAME_PRODUCT, 10 * round_off(operator)) * seen[1]
    return Unfinished(folder, about, seen.tolist(), tolerance, CurvatureError)


def _about(operator: LinearOperator, options: EigenpairOptions, update: Tensor | None) -> dict[str, Any]:
    """What else than the matrix the numbers depend on: gradients, classes and the last update."""
    return {
        "data_error": options.data_error, "classes": options.classes,
        "loss": operator.loss() if isinstance(operator, CurvatureOperator) else None,
        "update": None if update is None else float(norms(update[:, None])),
    }  # fmt: skip


def _save(found: Found, state: Unfinished, folder: Path, about: dict[str, Any]) -> None:
    """Write the numbers first, then the vectors, with which they count."""
    path = folder / f"{_FOUND}.nc"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        netcdf.save(schema.finish(found.dataset.drop_attrs(), "eigenpairs"), path)
    except OSError as error:
        warn_unsaved(path, error)
        return
    tensors = {"vector": found.vector} | {f"half-{i:02d}": half for i, half in enumerate(found.halves)}
    tensors = {name: vectors.T for name, vectors in tensors.items()}  # vectors lie in memory one after the other
    state.save(_FOUND, tensors, about=about, notes=found.dataset.attrs, shapes=found.shapes)


def _known(
    rows: dict[str, Tensor], numbers: dict[str, Any], folder: Path, about: dict[str, Any]
) -> Found | None:  # fmt: skip
    """What is saved; ``None`` where something else is asked for now."""
    if not _same(numbers["about"], about):
        return None
    tensors = {name: vectors.T for name, vectors in rows.items()}
    with suppress(SchemaError):  # a damaged file is computed again
        ds: xr.Dataset = netcdf.load(folder / f"{_FOUND}.nc").drop_attrs().assign_attrs(numbers["notes"])
        halves = tuple(tensors[name] for name in sorted(tensors) if name != "vector")
        shapes = tuple((name, tuple(shape)) for name, shape in numbers["shapes"])
        return Found(ds, tensors["vector"], halves, shapes)
    return None


def _same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    for name, value in now.items():
        other = before.get(name)
        if isinstance(value, float) and isinstance(other, float):
            if not abs(other - value) <= loss_tolerance(value):
                return False
        elif other != value:
            return False
    return True


__all__ = ["finished_or_computed"]

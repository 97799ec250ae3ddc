"""Labels, provenance and validation of every dataset that pnanalysis writes.

A *kind* (``"history"``, ``"hessian"``...) is a table of variables in :mod:`pnanalysis.kinds`. An analysis builds a
plain ``xarray.Dataset`` and passes it through :func:`finish`, which writes ``long_name`` and ``units`` from the table,
records where the numbers came from, and checks the result. :func:`validate` does only the check.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pnanalysis.errors import SchemaError
from pnanalysis.kinds import COMPARED_SPECTRUM, SCHEMAS

__all__ = ["COMPARED_SPECTRUM", "SCHEMAS", "SCHEMA_VERSION", "finish", "provenance", "stamp", "validate"]

SCHEMA_VERSION = 1

#: Dims that may stand in front of any variable: several checkpoints, runs or iterations side by side.
STACKING_DIMS = (
    "run", "checkpoint", "iteration", "epoch", "step", "layer", "localization", "step_size", "radius_index",
    "diagnostic", "rise",
)  # fmt: skip


def stamp(ds: xr.Dataset, kind: str, **attrs: Any) -> xr.Dataset:
    """A shallow copy of ``ds`` with labels, units and provenance.

    Attributes that are ``None`` are left out; mappings and sequences are stored as JSON text, booleans as 0/1.
    """
    ds = ds.copy()
    for name, variable in SCHEMAS[kind].items():
        if name in ds:
            # an analysis may have written a more specific label
            own = ds.variables[name].attrs
            own.setdefault("long_name", variable.long_name)
            own.setdefault("units", variable.units)
    record = {"kind": kind, "schema_version": SCHEMA_VERSION, **provenance(), **attrs}
    ds.attrs.update({key: _storable(value) for key, value in record.items() if value is not None})
    return ds


def finish(ds: xr.Dataset, kind: str, **attrs: Any) -> xr.Dataset:
    """Apply :func:`stamp`, then :func:`validate`: the last step of every analysis."""
    return validate(stamp(ds, kind, **attrs), kind)


def validate(ds: xr.Dataset, kind: str | None = None) -> xr.Dataset:
    """Check ``ds`` against its kind and return it.

    Parameters
    ----------
    ds : xarray.Dataset
    kind : str, optional
        Defaults to the dataset's own ``kind`` attribute.

    Raises
    ------
    SchemaError
        If the kind is unknown, a required variable is missing, or a variable has wrong dims or no label or unit.
    """
    kind = kind or ds.attrs.get("kind")
    if not isinstance(kind, str) or kind not in SCHEMAS:
        raise SchemaError(f"not a pnanalysis dataset (kind {kind!r}); known kinds: {', '.join(SCHEMAS)}")
    for name, variable in SCHEMAS[kind].items():
        if name not in ds:
            if variable.required:
                raise SchemaError(f"{kind} dataset lacks the variable {name!r}")
            continue
        array = ds.variables[name]
        n_stacked = max(array.ndim - len(variable.dims), 0)
        stacked, own = array.dims[:n_stacked], array.dims[n_stacked:]
        if own != variable.dims or not set(stacked) <= set(STACKING_DIMS):
            raise SchemaError(f"{kind}.{name} has dims {array.dims}, expected (..., {', '.join(variable.dims)})")
        if not {"long_name", "units"} <= array.attrs.keys():
            raise SchemaError(f"{kind}.{name} lacks its long_name or units")
    return ds


def provenance() -> dict[str, str]:
    """What produced the numbers: versions of pnanalysis and torch, command line, and time (UTC)."""
    return {
        "pnanalysis_version": _version("pnanalysis"),
        "torch_version": _version("torch"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv else "",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache
def _version(package: str) -> str:
    return metadata.version(package)


def _storable(value: Any) -> int | float | str | np.number[Any]:
    """A value as NetCDF attributes can hold it."""
    if isinstance(value, bool | np.bool_):
        return int(value)
    if isinstance(value, str):  # bytes of file names that are no text cannot be stored
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, int | float | np.number):
        return value
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, default=str)
    return _storable(str(value))


def error_kind(ds: xr.Dataset) -> str:
    """What the errors of one run's history are.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``history``, without the dim ``run``.

    Returns
    -------
    str
        ``"share"`` for the fraction of mistakes, or ``"squared error"``, a mean over outputs. Histories that do not
        record it hold fractions.
    """
    return str(ds.coords["error"].item() if "error" in ds.coords else ds.attrs.get("error", "share"))


def error_name(split: str, *kinds: str) -> str:
    """What the errors of a split are called, given their kinds (``error`` where these differ)."""
    return f"{split} squared error" if set(kinds) == {"squared error"} else f"{split} error"

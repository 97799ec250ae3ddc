"""Small datasets as JSON text: legible, comparable line by line, and without the overhead of a binary container."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pnanalysis.errors import SchemaError, reason
from pnanalysis.io.files import read_regular

#: More digits than any of these numbers is known to.
DIGITS = 6
_LARGEST = 2**26  # bytes
_LABELS = ("long_name", "units")


def as_text(ds: xr.Dataset) -> str:
    """A dataset as JSON, a line for each variable."""
    parts = [f'"attrs": {json.dumps(_plain_attrs(ds.attrs), sort_keys=True)}']
    for name, group in (("coords", ds.coords), ("variables", ds.data_vars)):
        lines = [f"  {json.dumps(str(key))}: {_array(array)}" for key, array in sorted(group.items(), key=_by_name)]
        parts.append(f'"{name}": {{\n' + ",\n".join(lines) + "\n }")
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def load(path: Path) -> xr.Dataset:
    """The dataset in a file that :func:`as_text` wrote.

    Raises
    ------
    SchemaError
        If it is none.
    """
    try:
        content = json.loads(read_regular(path, _LARGEST, SchemaError))
        variables, coords = (
            {name: (it["dims"], _values(it["data"], it.get("shape")), it.get("attrs", {})) for name, it in part.items()}
            for part in (content["variables"], content["coords"])
        )
        return xr.Dataset(variables, coords, content["attrs"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, SchemaError):
            raise
        raise SchemaError(f"{path}: not a readable dataset ({reason(error)}); restore it") from error


def _array(array: xr.DataArray) -> str:
    attrs = {key: array.attrs[key] for key in _LABELS if key in array.attrs}
    entries = {"dims": list(array.dims), "shape": list(array.shape), "data": _rounded(array.values.tolist()),
               "attrs": attrs}  # fmt: skip
    return json.dumps(entries, separators=(",", ":"), allow_nan=False)


def _rounded(data: Any) -> Any:
    """Numbers rounded, NaN and infinities as text that :func:`_values` takes back."""
    if isinstance(data, list):
        return [_rounded(each) for each in data]
    if not isinstance(data, float):
        return data
    if math.isnan(data):
        return None
    return float(f"{data:.{DIGITS}g}") if math.isfinite(data) else str(data)


def _values(data: Any, shape: list[int] | None) -> np.ndarray:
    values = np.array(data, dtype=object)
    if shape is not None:  # which nested lists without any number do not show
        values = values.reshape(shape)
    flat = values.ravel().tolist()
    texts = [each for each in flat if isinstance(each, str)]
    if texts and not all(each in ("inf", "-inf") for each in texts):
        return values.astype(str)
    if all(isinstance(each, int) for each in flat) and flat:
        return values.astype(np.int64)
    return np.array([math.nan if each is None else float(each) for each in flat]).reshape(values.shape)


def _plain_attrs(attrs: Any) -> dict[str, Any]:
    found = {str(key): value.item() if isinstance(value, np.generic) else value for key, value in attrs.items()}
    return {key: _rounded(value) if isinstance(value, float) else value for key, value in found.items()}


def _by_name(entry: tuple[Any, Any]) -> str:
    return str(entry[0])

"""Datasets of several networks along ``checkpoint``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from pnanalysis.arrays import Array
from pnanalysis.io.collection import padded


def along_checkpoints(rows: Sequence[xr.Dataset], labels: Sequence[str]) -> xr.Dataset:
    """One dataset for all networks, padded with NaN along dims without coordinates where some are shorter.

    Parameters
    ----------
    rows : sequence of xarray.Dataset
        Of a network each, some with their parameters named in a coordinate ``tensors``.
    labels : sequence of str
        Of the networks.
    """
    together = xr.concat(
        padded(rows), dim="checkpoint", join="outer", data_vars="all", coords="different", compat="equals",
        combine_attrs="drop_conflicts",
    )  # fmt: skip
    if "tensors" in together.coords and together["tensors"].ndim == 0:  # the same for all
        together = together.assign_coords(tensors=("checkpoint", [str(together["tensors"].item())] * len(rows)))
    return together.assign_coords(checkpoint=list(labels))


def independent_differences(name: str, value: Array, se: Array) -> dict[str, Any]:
    """A number of each network, and how it differs between all pairs, with the errors of independent numbers.

    Parameters
    ----------
    name : str
    value, se : ndarray, shape (checkpoint,)
        The errors are too large where two networks have much in common.

    Returns
    -------
    dict
        ``NAME`` and ``NAME_se`` (checkpoint), ``NAME_difference`` and ``NAME_difference_se`` (checkpoint, other),
        checkpoint minus other: none from itself, and unknown where the number is.
    """
    difference, error = value[:, None] - value, np.hypot(se[:, None], se)
    np.fill_diagonal(error, np.where(np.isnan(value), np.nan, 0.0))
    pair = ("checkpoint", "other")
    return {
        name: ("checkpoint", value), f"{name}_se": ("checkpoint", se),
        f"{name}_difference": (pair, difference), f"{name}_difference_se": (pair, error),
    }  # fmt: skip

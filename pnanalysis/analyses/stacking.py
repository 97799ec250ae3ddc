"""Datasets of several networks along ``checkpoint``."""

from __future__ import annotations

from collections.abc import Sequence

import xarray as xr

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

"""Spectra that have been computed before, found by a digest of weights, data and settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import xarray as xr
from torch import nn

from pnanalysis.analyses.work_folder import WorkFolder, weights_digest
from pnanalysis.inputs.batches import fingerprint, tensors
from pnanalysis.inputs.data import LoaderSplit, Split
from pnanalysis.inputs.sources import Source
from pnanalysis.io import netcdf
from pnanalysis.io.runs import ANALYSIS
from pnanalysis.spectra.data_error import DATA_ERRORS
from pnanalysis.spectra.finished import saved_or_computed
from pnanalysis.spectra.linear_operator import LinearOperator


def matrix_digest(source: Source, settings: Mapping[str, Any], part: Split | LoaderSplit, network: nn.Module) -> str:
    """A digest of all that determines a network's matrix: weights, architecture, loss, examples, settings.

    It is empty, and so equal to none, where a name does not tell what is behind it: custom models and losses, and
    loaders.
    """
    model, loss = source.attrs.get("model", ""), source.attrs.get("loss", "")
    registered = source.run is not None and not any(":" in name or name.startswith("own ") for name in (model, loss))
    if not registered or not isinstance(part, Split):
        return ""
    examples = fingerprint(*tensors([part.inputs, part.targets, part.offset, part.scale]))
    text = json.dumps([model, loss, examples, dict(settings)], sort_keys=True, default=str)
    return hashlib.sha256((weights_digest(network) + text).encode()).hexdigest()


def saved_spectrum(source: Source, digest: str, n_products: int, data_error: str = "none") -> xr.Dataset | None:
    """The spectrum of this matrix that is saved with the run, if it is exact or was given at least so many products.

    Its error must include that for the choice of examples at least as far as ``data_error`` says.
    """
    file = None if source.run is None else source.run.path / ANALYSIS / "hessian.nc"
    if not digest or file is None or not file.is_file():
        return None
    ds = netcdf.load(file, within=file.parent.parent)
    if "layer" in ds.coords or "matrix_digest" not in ds.coords:
        return None
    rows = np.flatnonzero(ds.matrix_digest == digest)
    if not len(rows) or DATA_ERRORS.index(ds.attrs.get("data_error", "none")) < DATA_ERRORS.index(data_error):
        return None
    found = ds.isel(checkpoint=int(rows[0]))
    spent = sum(int(found[name].notnull().sum()) for name in ("ritz_value", "single_mean") if name in found)
    return found if spent >= n_products or not (found["sampled"] == 1).any() else None


class SpectrumCache(WorkFolder):
    """A folder with the finished spectra of one analysis, and the unfinished work on the next."""

    def finished(self, layer: str, operator: LinearOperator, compute: Callable[..., xr.Dataset]) -> xr.Dataset:
        """The spectrum of a layer (``""`` for the whole network): the saved one if there is, else ``compute(state=)``.

        See :func:`pnanalysis.spectra.finished.saved_or_computed`.
        """
        return saved_or_computed(self.file(layer), operator, compute)

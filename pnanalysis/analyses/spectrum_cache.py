"""Spectra that have been computed before, found by a digest of weights, data and settings."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from pnanalysis.errors import CurvatureError, RunError, reason
from pnanalysis.inputs.batches import fingerprint, tensors
from pnanalysis.inputs.data import LoaderSplit, Split
from pnanalysis.inputs.sources import Source
from pnanalysis.io import digest, netcdf
from pnanalysis.io.atomic import atomic_path
from pnanalysis.io.files import check_tree, read_regular
from pnanalysis.io.lock import Lock
from pnanalysis.io.runs import ANALYSIS
from pnanalysis.spectra.data_error import DATA_ERRORS
from pnanalysis.spectra.finished import saved_or_computed
from pnanalysis.spectra.linear_operator import LinearOperator

_LARGEST_SETTINGS = 2**24  # bytes
#: What settings were before they could be chosen.
_NEWER = {"method": "exact"}


def weights_digest(network: nn.Module) -> str:
    """SHA-256 over names, shapes, types and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            digest.update(f"{name}{tensor}".encode())  # extra state of a module
            continue
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def matrix_digests(
    source: Source, settings: Mapping[str, Any], part: Split | LoaderSplit
) -> Callable[[nn.Module], str]:
    """What gives a network's digest of all that determines its matrix: weights, architecture, loss, examples, settings.

    ``part`` holds the examples, which are read once for all networks. A digest is empty, and so equal to none, where a
    name does not tell what is behind it: custom models and losses, and loaders.
    """
    model, loss = source.attrs.get("model", ""), source.attrs.get("loss", "")
    registered = source.run is not None and not any(":" in name or name.startswith("own ") for name in (model, loss))
    if not registered or not isinstance(part, Split):
        return lambda network: ""
    examples = fingerprint(*tensors([part.inputs, part.targets, part.offset, part.scale]))
    text = json.dumps([model, loss, examples, dict(settings)], sort_keys=True, default=str)
    return lambda network: hashlib.sha256((weights_digest(network) + text).encode()).hexdigest()


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


@dataclass(frozen=True)
class SpectrumCache:
    """A folder with the finished spectra of one analysis, and the unfinished work on the next.

    Attributes
    ----------
    folder : Path
    weights : str
        Digest of the network whose spectra are looked for; see :meth:`of`.
    """

    folder: Path
    weights: str = ""
    _lock: Lock | None = None

    @classmethod
    def claim(cls, folder: str | os.PathLike[str], settings: Mapping[str, Any], writes: bool = True) -> SpectrumCache:
        """The folder for an analysis with these settings, until :meth:`release`.

        Parameters
        ----------
        folder : path
        settings : mapping
        writes : bool
            Whether this process writes to the folder, and keeps others from doing so. Of several that share a job, the
            first one does.

        Raises
        ------
        CurvatureError
            If it holds the unfinished work of an analysis with other settings.
        RunError
            If another call is at work on it.
        """
        cache = cls(Path(folder), _lock=Lock(Path(folder)) if writes else None)
        if cache.folder.is_symlink():
            raise CurvatureError(f"{folder}: is a link, which is not followed; name the folder itself")
        check_tree(cache.folder, CurvatureError)
        if cache._lock is not None:
            try:
                cache.folder.mkdir(parents=True, exist_ok=True)
                cache._lock.acquire()
            except OSError as error:
                raise CurvatureError(f"{folder}: no folder for unfinished work ({reason(error)})") from error
        try:
            cache._begin(json.loads(json.dumps(dict(settings), default=str)))
        except BaseException:
            cache.release()
            raise
        return cache

    def _begin(self, own: dict[str, Any]) -> None:
        """Note the settings, or see that unfinished work was begun with the same ones."""
        path = self.folder / "settings.json"
        if path.is_file() and (any(self.folder.glob("*.nc")) or any(self.folder.glob("*/*.safetensors"))):
            before = _settings_in(path)
            other = [name for name in own if before.get(name, _NEWER.get(name)) != own[name]]
            if other:
                raise CurvatureError(
                    f"{self.folder}: holds unfinished work with {other[0]} {before.get(other[0])!r}, not "
                    f"{own[other[0]]!r}; finish that first with the same settings, or delete the folder"
                )
            return
        if self._lock is None:  # the process that writes does
            return
        with atomic_path(path) as temporary:
            signed = {**own, digest.KEY: digest.of_entries(own)}
            temporary.write_text(json.dumps(signed, indent=1), encoding="utf-8")

    def release(self) -> None:
        """Let others work in the folder."""
        if self._lock is not None:
            self._lock.release()

    def of(self, network: nn.Module) -> SpectrumCache:
        """The same folder, for the spectra of one network."""
        return replace(self, weights=weights_digest(network))

    def finished(self, layer: str, operator: LinearOperator, compute: Callable[..., xr.Dataset]) -> xr.Dataset:
        """The spectrum of a layer (``""`` for the whole network): the saved one if there is, else ``compute(state=)``.

        See :func:`pnanalysis.spectra.finished.saved_or_computed`.
        """
        name = "-".join(part for part in (self.weights[:16], layer.replace("/", "-")) if part)
        return saved_or_computed(self.folder / f"{name}.nc", operator, compute)


def remove_unfinished(folder: Path) -> None:
    """Remove a folder of unfinished work, unless another call has begun to work on it."""
    lock = Lock(folder)
    with suppress(RunError, OSError):
        lock.acquire()
        try:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            lock.release()


def _settings_in(path: Path) -> dict[str, Any]:
    """The settings that a folder of unfinished work was begun with."""
    advice = "delete the folder to start again"
    try:
        settings = json.loads(read_regular(path, _LARGEST_SETTINGS, CurvatureError))
    except (ValueError, RecursionError) as error:
        raise CurvatureError(f"{path}: is damaged ({reason(error)}); {advice}") from error
    if not isinstance(settings, dict):
        raise CurvatureError(f"{path}: is damaged, for it holds no settings; {advice}")
    digest.check_entries(settings, path, CurvatureError, advice)
    return settings

"""A folder with finished parts of an analysis, and the unfinished work on the next."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
import xarray as xr
from torch import nn

from pnanalysis.errors import CurvatureError, RunError, SchemaError, reason
from pnanalysis.inputs.batches import fingerprint, tensors
from pnanalysis.inputs.random_states import random_states_kept
from pnanalysis.io import digest, netcdf
from pnanalysis.io.atomic import atomic_path
from pnanalysis.io.files import check_tree, read_regular
from pnanalysis.io.lock import Lock
from pnanalysis.io.unfinished import warn_unsaved

_LARGEST_SETTINGS = 2**24  # bytes
#: What settings were before they could be chosen.
_NEWER = {"method": "exact"}
#: Losses of the same data differ less than this, relative to their size, and up to the round-off of logarithms.
_SAME_LOSS, _ROUND_OFF = 1e-5, 1e-7


def loss_tolerance(loss: float) -> float:
    """How much the loss of the same network on the same data may differ from one computation to the next."""
    return _SAME_LOSS * abs(loss) + _ROUND_OFF


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


def within(folder: Path | None, name: str) -> Path | None:
    """The part of a folder of unfinished work that belongs to one of several analyses."""
    return None if folder is None else folder / name


@dataclass(frozen=True)
class WorkFolder:
    """A folder with the finished parts of one analysis, and the unfinished work on the next.

    Attributes
    ----------
    folder : Path
    weights : str
        Digest of the network, and of the first of its batches, whose parts are looked for; see :meth:`of`.
    """

    folder: Path
    weights: str = ""
    _lock: Lock | None = None

    @classmethod
    def claim(cls, folder: str | os.PathLike[str], settings: Mapping[str, Any], writes: bool = True) -> Self:
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

    @classmethod
    @contextmanager
    def held(cls, folder: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> Iterator[Self | None]:
        """The folder as :meth:`claim` gives it, released after the body; ``None`` where there is none."""
        if folder is None:
            yield None
            return
        cache = cls.claim(folder, settings)
        try:
            yield cache
        finally:
            cache.release()

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

    def of(self, network: nn.Module, batches: Iterable[Any]) -> Self:
        """The same folder, for the parts of one network on some data.

        Parameters
        ----------
        network : Module
        batches : re-iterable of batches
            The first of them tells loaders apart, whose data have no name.
        """
        with random_states_kept():  # a loader draws the seed of its workers
            first = next(iter(batches), ())
        both = weights_digest(network) + fingerprint(*tensors(first))
        return replace(self, weights=hashlib.sha256(both.encode()).hexdigest())

    def file(self, part: str) -> Path:
        """Where a part of the network's results is (``""`` for all of them)."""
        name = "-".join(text for text in (self.weights[:16], part.replace("/", "-")) if text)
        return self.folder / f"{name}.nc"

    def part(self, name: str, loss: float, compute: Callable[[], xr.Dataset]) -> xr.Dataset:
        """A part of the results that depends on the loss: the saved one if there is, else what ``compute`` gives.

        Names cannot tell whether a user's code or data have changed meanwhile. The loss can, so it is compared with
        that of the saved part.
        """
        path = self.file(name)
        if path.is_file():
            with suppress(SchemaError):  # a damaged file is computed again
                found = netcdf.load(path)
                if abs(float(found.attrs.pop("loss_here", float("nan"))) - loss) <= loss_tolerance(loss):
                    return found
        ds = compute()
        try:
            netcdf.save(ds.assign_attrs(loss_here=loss), path)
        except OSError as error:  # the caller may find room elsewhere
            warn_unsaved(path, error)
        return ds


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

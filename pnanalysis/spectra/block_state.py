"""Unfinished work on the blocks of a matrix in a folder: the Lanczos basis, and the forms so far."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from pnanalysis import schema
from pnanalysis.arrays import Array
from pnanalysis.errors import CurvatureError
from pnanalysis.io import netcdf
from pnanalysis.io.unfinished import warn_unsaved
from pnanalysis.spectra.lanczos import Saver

if TYPE_CHECKING:
    from pnanalysis.spectra.block_diagonal import DiagonalSums


@dataclass
class BlockState:
    """Where the forms are saved, and how many sign vectors are done.

    Attributes
    ----------
    folder : Path or None
        ``None`` saves nothing.
    every : float
        Seconds between two saves.
    done : int
    """

    folder: Path | None
    every: float
    done: int = 0
    _last: float = 0.0

    @classmethod
    def of(cls, folder: Path | None, every: float) -> BlockState:
        """The state in a folder, which need not be there yet."""
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return cls(folder, every, _last=time.monotonic())

    def lanczos_saver(self, seed: int, n_steps: int) -> Saver | None:
        """What saves the basis."""
        if self.folder is None:
            return None
        return Saver(self.folder / "basis.safetensors", f"blocks {seed} {n_steps}", self.every)

    def restore(self, forms: NDArray[np.float32], rest: Array, sums: DiagonalSums | None) -> int:
        """Read what is saved into the arrays; how many sign vectors are done.

        Raises
        ------
        CurvatureError
            If it belongs to other settings.
        """
        path = None if self.folder is None else self.folder / "forms.nc"
        if path is None or not path.is_file():
            return 0
        ds = netcdf.load(path)
        same = "forms" in ds and ds["forms"].shape == forms.shape and ("halves" in ds) == (sums is not None)
        if not same:
            raise CurvatureError(f"{path}: holds unfinished work of other settings; delete it to start again")
        forms[:], rest[:] = ds["forms"].values, ds["rest"].values
        if sums is not None:
            sums.total, sums.square, sums.halves = (ds[name].values.copy() for name in ("total", "square", "halves"))
        self.done = int(ds.attrs["done"])
        return self.done

    def save_if_due(self, forms: NDArray[np.float32], rest: Array, sums: DiagonalSums | None) -> None:
        """Save if the interval has passed."""
        if time.monotonic() - self._last >= self.every:
            self.save(forms, rest, sums)

    def save(self, forms: NDArray[np.float32], rest: Array, sums: DiagonalSums | None) -> None:
        """Write all that there is; where that fails, there is a warning."""
        if self.folder is None or not self.done:
            return
        clean_forms, clean_rest = forms.copy(), rest.copy()
        clean_forms[..., self.done :], clean_rest[..., self.done :] = 0, 0  # of a step that was interrupted
        ds = xr.Dataset(
            {"forms": (("group", "block", "a", "b"), clean_forms), "rest": (("block", "a", "b"), clean_rest)}
        )
        if sums is not None:
            ds = ds.assign(
                total=("parameter", sums.total), square=("parameter", sums.square),
                halves=(("group", "half", "parameter"), sums.halves),
            )  # fmt: skip
        path = self.folder / "forms.nc"
        try:
            netcdf.save(schema.finish(ds, "block_forms", done=self.done), path)
        except OSError as error:
            warn_unsaved(path, error)
        self._last = time.monotonic()


__all__ = ["BlockState"]

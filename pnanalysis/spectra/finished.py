"""Finished spectra in files, taken up again by a later call."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xarray as xr

from pnanalysis.arrays import Array
from pnanalysis.io import netcdf
from pnanalysis.io.unfinished import warn_unsaved
from pnanalysis.spectra.inner_products import inner_products, norms
from pnanalysis.spectra.lanczos import SAME_PRODUCT
from pnanalysis.spectra.linear_operator import LinearOperator, round_off
from pnanalysis.spectra.random_vectors import random_unit_vectors
from pnanalysis.spectra.sharing import part_of, processes_of


def saved_or_computed(path: Path, operator: LinearOperator, compute: Callable[..., xr.Dataset]) -> xr.Dataset:
    """The spectrum in a file if there is one, else ``compute(state=folder)``, which is then saved there.

    The folder is removed once the file is safe on the disk. If it cannot be written, there is a warning.

    Names cannot tell whether a user's code or data have changed meanwhile. One product can, so it is compared with that
    of the operator whose spectrum was saved.
    """
    processes = processes_of(operator)
    found = processes.by_first(lambda: netcdf.load(path) if path.is_file() else None)
    if found is not None:
        product = sizes_of_product(operator)
        before = np.asarray(found.attrs.pop("product", np.nan))
        tolerance = max(SAME_PRODUCT, 10 * round_off(operator)) * product[1]
        if processes.decided(bool(np.abs(before - product).max() <= tolerance)):
            return found
    state = path.with_suffix("")
    ds = compute(state=state)
    product = sizes_of_product(operator)
    if not processes.is_first:
        return ds
    try:
        netcdf.save(ds.assign_attrs(product=product), path)
    except OSError as error:  # the caller may find room elsewhere
        warn_unsaved(path, error)
    else:
        shutil.rmtree(state, ignore_errors=True)
    return ds


def sizes_of_product(operator: LinearOperator) -> Array:
    """What tells a product with a random vector from another operator's: its overlap with the vector, its norm."""
    vector = random_unit_vectors(operator, [0], seed=0)
    product = operator.matmat(vector)
    add = part_of(operator).add
    return np.array([float(inner_products(vector, product, add)), float(norms(product, add))])

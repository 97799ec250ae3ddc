"""The two errors of the numbers of a spectrum together: that of the probes, and that of the choice of examples."""

from __future__ import annotations

import numpy as np
import xarray as xr

from pnanalysis.spectra.data_error import NEARLY, Influence, influences
from pnanalysis.spectra.half_samples import Contrasts, contrasts

#: Numbers between 0 and 1, and their intervals with them.
_FRACTIONS = ("negative_mass", "negative_curvature")

DataError = Influence | Contrasts


def data_errors(ds: xr.Dataset) -> dict[str, DataError]:
    """What is known of the error that the choice of examples causes, by the name of the number.

    Parameters
    ----------
    ds : xarray.Dataset
        A ``"spectral_density"`` dataset of one checkpoint. Forms of single examples are preferred to half samples, of
        which there are few, except where they say it only nearly.
    """
    by_forms, by_halves = influences(ds), contrasts(ds)
    nearly = {name: by_forms.pop(name) for name in NEARLY if name in by_forms}
    return nearly | by_halves | by_forms


def with_data_errors(ds: xr.Dataset) -> xr.Dataset:
    """A spectrum with the error for the choice of examples in the standard errors and intervals of its numbers.

    Parameters
    ----------
    ds : xarray.Dataset
        A ``"spectral_density"`` dataset of one checkpoint whose errors are those of the probes, with forms or half
        samples.

    Returns
    -------
    xarray.Dataset
        With ``NAME_data_se``, and ``NAME_se`` the total of it and of ``NAME_probe_se``. ``NAME_low`` and ``NAME_high``
        include both; ``NAME_bound_low`` and ``NAME_bound_high`` are those for these examples.
    """
    found = data_errors(ds)
    return ds.assign({key: value for name, error in found.items() for key, value in _totals(ds, name, error).items()})


def _totals(ds: xr.Dataset, name: str, error: DataError) -> dict[str, float]:
    if not np.isfinite(error.se):
        return {}
    totals = {f"{name}_data_se": error.se, f"{name}_se": error.se}
    if f"{name}_se" in ds:
        probe = float(ds[f"{name}_se"])
        totals |= {f"{name}_probe_se": probe, f"{name}_se": float(np.hypot(probe, error.se))}
    if f"{name}_low" in ds:
        value, low, high = (float(ds[f"{name}{end}"]) for end in ("", "_low", "_high"))
        totals |= {f"{name}_bound_low": low, f"{name}_bound_high": high}
        totals |= _interval(name, value, (value - low, high - value), error.half_width(), f"{name}_se" in ds)
    return totals


def _interval(
    name: str, value: float, own: tuple[float, float], half_width: float, statistical: bool
) -> dict[str, float]:
    """Widened: independent errors add in squares, while bounds that are not statistical add up."""
    add = np.hypot if statistical else np.add
    low, high = value - float(add(own[0], half_width)), value + float(add(own[1], half_width))
    if name in _FRACTIONS:
        low, high = max(low, 0.0), min(high, 1.0)
    return {f"{name}_low": low, f"{name}_high": high}


def own_ends(ds: xr.Dataset, name: str) -> tuple[float, float]:
    """The interval of a number for these examples, without the error that their choice causes."""
    stem = f"{name}_bound" if f"{name}_bound_low" in ds and np.isfinite(ds[f"{name}_bound_low"]) else name
    return float(ds[f"{stem}_low"]), float(ds[f"{stem}_high"])


def own_se(ds: xr.Dataset, name: str) -> float:
    """The standard error of a number for these examples; NaN for those known up to bounds."""
    known = {end: float(ds[f"{name}{end}"]) for end in ("_probe_se", "_data_se", "_se") if f"{name}{end}" in ds}
    if np.isfinite(known.get("_probe_se", np.nan)):
        return known["_probe_se"]
    return np.nan if np.isfinite(known.get("_data_se", np.nan)) else known.get("_se", np.nan)

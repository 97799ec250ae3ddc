"""Which differences of a comparison are more than chance: one family of tests for tables, sentences, figures and ranks.

Every number that is printed with a difference is tested, for every pair of checkpoints, and Holm's step-down over all
of these tests keeps the chance of any false claim in a comparison at 5 %.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr

from pnanalysis.arrays import Array
from pnanalysis.curvature.example_groups import N_GROUPS
from pnanalysis.kinds import COMPARED_NUMBERS, TESTED_SPECTRUM
from pnanalysis.significance import FEW_DISCORDANT, LEVEL, holm, mcnemar, p_value, p_value_beyond_bounds
from pnanalysis.spectra.subspaces import chance_p

#: How significance is decided, as an attribute of a comparison.
METHOD = f"Holm, {LEVEL:.0%}".replace("%", " %")
#: Round-off of single precision, relative to the larger of two numbers; of a mean loss of classes, also in nats.
ROUND_OFF = 1e-6

_PAIR = ("checkpoint", "other")


def with_p_values(ds: xr.Dataset) -> xr.Dataset:
    """A comparison with the p-value of every difference, and the ranks that follow; as it is if it has them.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``comparison``.

    Returns
    -------
    xarray.Dataset
        With ``NAME_difference_p`` for each tested number, and ``wasserstein1_p``: p-values adjusted by Holm's
        step-down for all numbers, splits and pairs of checkpoints together. A difference is significant if its own
        is at most 0.05. ``rank`` is one more than the number of checkpoints with a significantly lower error.

    Notes
    -----
    Losses and other means over examples are tested by the paired standard error; mistakes by McNemar's exact test
    where fewer than 25 examples decide; numbers of spectra by their intervals, of ``lambda_max`` by what lies beyond
    its bounds, and so other eigenvalues; overlaps of spaces by what random spaces have. The distance of two spectra
    is compared with that of two estimates of one spectrum, as :func:`pnanalysis.spectra.differences.beyond_noise`
    does. Differences not beyond round-off are none.
    """
    return ds if ds.attrs.get("significance") == METHOD else _computed(ds)


def _computed(ds: xr.Dataset) -> xr.Dataset:
    tests = dict(single_p_values(ds))
    below = np.tril_indices(ds.sizes["checkpoint"], -1)
    adjusted = holm(np.concatenate([p[below].ravel() for p in tests.values()]))
    variables: dict[str, Any] = {}
    start = 0
    for name, p in tests.items():
        part = adjusted[start : start + p[below].size].reshape(p[below].shape)
        start += part.size
        symmetric = np.ones(p.shape)  # a checkpoint does not differ from itself
        symmetric[below] = symmetric[below[::-1]] = part
        last = next((str(dim) for dim in ds[name].dims if dim not in _PAIR), "")
        if name == "overlap":  # of a space with itself there is nothing to tell
            np.fill_diagonal(symmetric, np.nan)
        variables[f"{name}_p"] = xr.DataArray(symmetric, dims=(*_PAIR, last)[: p.ndim]).transpose(*ds[name].dims)
    ds = ds.assign(variables).assign_attrs(significance=METHOD)
    is_better = (ds.error_difference > 0) & (ds.error_difference_p <= LEVEL)
    return ds.assign(rank=(1 + is_better.sum("other")).transpose("checkpoint", "split"))


def single_p_values(ds: xr.Dataset) -> Iterator[tuple[str, Array]]:
    """The variables that are tested, with a p-value by itself for each pair of checkpoints (and split)."""
    counted = {"error": ds.n_examples.values, "loss": ds.get("n_loss_examples", ds.n_examples).values}
    is_of_classes = "classes" in ds.attrs
    for name in ("loss", "error"):
        difference, se = (_values(ds, f"{name}_difference{end}") for end in ("", "_se"))
        floor = np.maximum(_larger(ds, name), float(is_of_classes)) if name == "loss" else _larger(ds, name)
        p = p_value(difference, se, dof=np.fmax(counted[name] - 1.0, 1.0), floor=ROUND_OFF * floor)
        yield f"{name}_difference", _mcnemar_where_few(ds, p) if name == "error" else p
    round_off = float(ds.attrs.get("round_off", ROUND_OFF))
    if "lambda_max_difference" in ds:
        low, high, data_se = (_values(ds, f"lambda_max_difference{end}") for end in ("_low", "_high", "_data_se"))
        floor = round_off * _larger(ds, "lambda_max")
        yield "lambda_max_difference", p_value_beyond_bounds(low, high, data_se, floor)
    for name in TESTED_SPECTRUM:
        if name != "lambda_max" and f"{name}_difference" in ds:
            floor = _larger(ds, name)
            if name == "trace":
                floor = np.maximum(floor, _larger(ds, "lambda_max"))
            value, se, low, high = (_values(ds, f"{name}_difference{end}") for end in ("", "_se", "_low", "_high"))
            yield f"{name}_difference", p_value(value, se, low, high, floor=round_off * floor)
    for name in COMPARED_NUMBERS:
        if f"{name}_difference" in ds:
            difference, se = (_values(ds, f"{name}_difference{end}") for end in ("", "_se"))
            yield f"{name}_difference", p_value(difference, se, floor=ROUND_OFF * _larger(ds, name))
    if "eigenvalue_difference" in ds:
        low, high, data_se = (_values(ds, f"eigenvalue_difference{end}") for end in ("_low", "_high", "_data_se"))
        largest = np.fmax.reduce(_larger(ds, "eigenvalue"), axis=-1, keepdims=True)
        yield "eigenvalue_difference", p_value_beyond_bounds(low, high, data_se, round_off * largest)
    if "overlap" in ds:
        names = ("overlap", "overlap_chance", "overlap_chance_sd")
        yield "overlap", chance_p(*(_values(ds, name) for name in names))
    for name in ("block_trace", "block_norm"):
        if f"{name}_difference" in ds:
            value, se = (_values(ds, f"{name}_difference{end}") for end in ("", "_se"))
            largest = np.fmax.reduce(_larger(ds, name), axis=-1, keepdims=True)
            yield f"{name}_difference", p_value(value, se, dof=N_GROUPS - 1.0, floor=round_off * largest)
    if "wasserstein1" in ds:
        distance, noise, se = (_values(ds, f"wasserstein1{end}") for end in ("", "_noise", "_se"))
        floor = np.maximum(round_off * _larger(ds, "lambda_max"), noise)
        yield "wasserstein1", p_value(distance, se, floor=floor)


def _values(ds: xr.Dataset, name: str) -> Array:
    """A variable along checkpoint, other (and split, block or another); NaN if there is none."""
    if name not in ds:
        return np.full([ds.sizes[dim] for dim in _PAIR], np.nan)
    return ds[name].transpose(*_PAIR, ...).values


def _larger(ds: xr.Dataset, name: str) -> Array:
    """The larger magnitude of a number of two checkpoints."""
    size = np.abs(ds[name].transpose("checkpoint", ...).values)
    return np.fmax(size[:, None], size[None, :])


def _mcnemar_where_few(ds: xr.Dataset, p: Array) -> Array:
    """McNemar's exact p-values where each example is right or wrong and few decide; elsewhere ``p``."""
    if "only_wrong" not in ds:
        return p
    wrong = _values(ds, "only_wrong")
    back, n = wrong.swapaxes(0, 1), ds.n_examples.values
    is_counted = np.abs(_values(ds, "error_difference") * n - (wrong - back)) < 1e-6 * n
    return np.where(is_counted & (wrong + back < FEW_DISCORDANT), mcnemar(wrong, back), p)

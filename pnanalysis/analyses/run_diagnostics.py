"""The numbers that are stored with a run about one of its checkpoints: history and analyses, with their errors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from pnanalysis.analyses.monitored_curvature import KIND as CURVATURE
from pnanalysis.analyses.monitored_curvature import monitored
from pnanalysis.errors import SchemaError
from pnanalysis.io.datasets import load
from pnanalysis.io.runs import Checkpoint, Run
from pnanalysis.schema import error_kind
from pnanalysis.significance import share_interval

#: Numbers by kind of dataset. Those that have a layer are averaged over layers, and so are their errors: the same
#: examples pass through all layers, so that errors need not cancel.
STORED: dict[str, tuple[str, ...]] = {
    "hessian": (
        "lambda_max", "lambda_min", "trace", "frobenius_norm", "effective_rank", "negative_curvature", "negative_mass",
        "n_outliers", "gap_ratio", "class_ratio", "class_trace",
    ),
    "blocks": ("network_trace", "network_off_diagonal_share", "trace_concentration"),
    "sharpness": ("rise", "average", "relative_flatness"),
    "learning_coefficient": ("learning_coefficient", "gaussian"),
    "saturation": ("saturation_measure", "saturated_share", "dead_units"),
    "trajectory": ("distance_from_start", "path_length"),
    "eigenpairs": ("gradient_norm", "gradient_top"),
    "barrier": ("barrier", "error_barrier", "distance"),
    CURVATURE: ("last_lambda_max", "highest_lambda_max", "last_threshold_ratio", "highest_threshold_ratio"),
}  # fmt: skip
#: Attributes that say which quantity a dataset has, and those that say of how many examples.
MEANING, SIZES = ("operator", "params", "split", "bn_mode", "weight", "draws"), ("n", "batch_size")
_HISTORY = ("train_loss", "train_error", "validation_error", "test_error")
_Z95 = 1.959963984540054
#: Dims with labels, which are part of a number's name.
_NAMED = ("neighbourhood", "path", "split")
#: The difference of two errors, a target of its own.
GAP = "generalization_gap"


class Number(NamedTuple):
    """A number of a checkpoint.

    Attributes
    ----------
    kind : str
        Of the dataset it is from.
    value, se : float
        ``se`` is NaN where it is not known.
    is_main : bool
        Whether it counts where nothing is chosen: of numbers at several radii, that in the middle; of barriers, those
        of the training loss.
    """

    kind: str
    value: float
    se: float
    is_main: bool = True


class Stored(NamedTuple):
    """What is stored about a checkpoint.

    Attributes
    ----------
    numbers : dict of str to Number
        By name.
    problems : dict of str to str
        By kind why a saved dataset has no number, empty where it is of other checkpoints.
    settings : dict of str to dict
        By kind the attributes in :data:`MEANING` and :data:`SIZES`, as text.
    """

    numbers: dict[str, Number]
    problems: dict[str, str]
    settings: dict[str, dict[str, str]]


def run_diagnostics(run: Run, checkpoint: Checkpoint) -> Stored:
    """The numbers that are stored with a run about one of its checkpoints."""
    found = Stored(dict(_of_history(run.history, checkpoint)), {}, {})
    for kind, names in STORED.items():
        row, problem = _saved_row(run, kind, checkpoint)
        if row is not None:
            for name in names:
                found.numbers.update(_numbers(row, kind, name))
            found.settings[kind] = _settings(row)
        elif problem is not None:
            found.problems[kind] = problem
    return found


def _settings(ds: xr.Dataset) -> dict[str, str]:
    chosen = {name: ds.attrs[name] for name in (*MEANING, *SIZES) if name in ds.attrs}
    if chosen.get("bn_mode") != "train":  # else the result does not depend on it
        chosen.pop("batch_size", None)
    return {name: str(np.asarray(value).tolist()) for name, value in chosen.items()}


def has_saved(run: Run, kind: str, checkpoint: Checkpoint) -> bool:
    """Whether numbers of this kind are saved about a checkpoint."""
    return _saved_row(run, kind, checkpoint)[0] is not None


def file_beside(kind: str, checkpoint: Checkpoint) -> str:
    """The stem of the file for a checkpoint that is not in the dataset that a run has of this kind."""
    return f"{kind}-{checkpoint.name.replace('/', '-')}"


def _saved_row(run: Run, kind: str, checkpoint: Checkpoint) -> tuple[xr.Dataset | None, str | None]:
    """What is saved about a checkpoint, or why there is nothing: ``None`` where there is no such file."""
    problem = None
    for stem in (kind, file_beside(kind, checkpoint)):
        if stem not in run.files:
            continue
        try:
            row = _row(load(run.files[stem], within=run.path, large=False), run, checkpoint)
        except SchemaError as error:
            problem = str(error)
            continue
        if row is not None:
            return row, None
        problem = problem or ""
    return None, problem


def _of_history(history: xr.Dataset, checkpoint: Checkpoint) -> Iterator[tuple[str, Number]]:
    if checkpoint.iteration not in history.iteration.values or checkpoint.epoch not in history.epoch.values:
        return
    at = history.sel(iteration=checkpoint.iteration, epoch=checkpoint.epoch)
    errors: dict[str, Number] = {}
    for name in _HISTORY:
        if name in at and np.isfinite(float(at[name])):
            value, se = float(at[name]), math.nan
            n = history.attrs.get(f"n_{name.removesuffix('_error')}")
            if name.endswith("_error") and n and error_kind(history) == "share":
                # of Wilson's interval, which holds where there are no mistakes at all
                low, high = share_interval(value, math.sqrt(value * (1 - value) / float(n)), float(n))
                se = float(high - low) / (2 * _Z95)
            errors[name] = Number("history", value, se)
    yield from errors.items()
    if {"train_error", "test_error"} <= errors.keys():
        train, test = errors["train_error"], errors["test_error"]
        yield GAP, Number("history", test.value - train.value, test.se)


def _row(ds: xr.Dataset, run: Run, checkpoint: Checkpoint) -> xr.Dataset | None:
    """What a dataset says of a checkpoint of a run; ``None`` if nothing."""
    if ds.attrs.get("kind") == CURVATURE:
        return monitored(ds, run, checkpoint)
    if ds.attrs.get("kind") == "barrier":
        return ds if _is_end(ds, run, checkpoint) else None
    if "run" in ds.dims and "checkpoint" not in ds.dims:  # several runs, of which one is this
        if run.path.name not in ds.run.values:
            return None
        ds = ds.sel(run=run.path.name)
    if {"iteration", "epoch"} <= set(ds.dims):
        places = {"iteration": checkpoint.iteration, "epoch": checkpoint.epoch}
        there = all(value in ds[name].values for name, value in places.items())
        return ds.sel(places) if there else None
    if "checkpoint" not in ds.dims or not {"iteration", "epoch"} <= set(ds.coords):
        return None
    same = (ds.iteration.values == checkpoint.iteration) & (ds.epoch.values == checkpoint.epoch)
    labels = [str(name) for name in ds.checkpoint.values]
    prefixes = [name.rpartition("/")[0].split("/")[0] for name in labels]
    prefixed = [bool(prefix) and not prefix.startswith("iter") for prefix in prefixes]
    if any(prefixed):  # an analysis of several runs puts their names in front
        same &= np.array([prefix == run.path.name for prefix in prefixes])
    if "run" in ds.coords and ds.run.dims == ("checkpoint",):
        same &= ds.run.values == run.path.name
    if "layer" in ds.coords and ds.layer.dims == ("checkpoint",):  # a row for each layer
        return None
    rows = np.flatnonzero(same)
    return ds.isel(checkpoint=int(rows[0])) if len(rows) else None


def _is_end(ds: xr.Dataset, run: Run, checkpoint: Checkpoint) -> bool:
    """Whether a line leads from or to a checkpoint, and stays within the run."""
    places: Any = None
    with suppress(ValueError, RecursionError):
        places = json.loads(ds.attrs.get("places", "null"))
    name = run.path.name
    own = [name, checkpoint.iteration, checkpoint.epoch]
    return isinstance(places, list) and own in places and all(isinstance(p, list) and p[:1] == [name] for p in places)


def _numbers(ds: xr.Dataset, kind: str, name: str) -> Iterator[tuple[str, Number]]:
    """A variable as numbers, one for each place along its dims."""
    if name not in ds:
        return
    value = ds[name].astype(float)
    se = ds.get(f"{name}_se", xr.full_like(value, np.nan))
    if f"{name}_se" not in ds and f"{name}_low" in ds:
        se = (ds[f"{name}_high"] - ds[f"{name}_low"]) / (2 * _Z95)
    if "layer" in value.dims:
        se, value = se.where(value.notnull(), 0.0).sum("layer", skipna=False), value.mean("layer")
        se = se / ds[name].notnull().sum("layer")
    radius = {"rise": "radius", "average": "average_radius"}.get(name)
    for place in np.ndindex(*value.shape):
        at = dict(zip(value.dims, place, strict=True))
        one = float(value.isel(at))
        if math.isfinite(one):
            is_main = at.get("radius_index", 0) == value.sizes.get("radius_index", 1) // 2
            if "split" in at:
                is_main = str(ds.split.values[at["split"]]) == "train" and name == "barrier"
            yield _label(ds, name, radius, at), Number(kind, one, float(se.isel(at)), is_main)


def _label(ds: xr.Dataset, name: str, radius: str | None, at: dict[object, int]) -> str:
    """The name of a number, with where along dims it is: ``rise ball 0.05``, ``barrier line train``."""
    parts = [name] + [str(ds[dim].values[at[dim]]) for dim in _NAMED if dim in at]
    if radius is not None and radius in ds:
        own = {dim: index for dim, index in at.items() if dim in ds[radius].dims}
        parts.append(f"{float(ds[radius].isel(own)):.3g}")
    parts += [f"{dim} {index}" for dim, index in at.items() if dim not in (*_NAMED, "radius_index")]
    return " ".join(parts)

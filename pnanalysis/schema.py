"""Every dataset pnanalysis writes: its variables, dims, units and attributes.

A *kind* (``"history"``, ``"hessian"``...) is a table of variables. An analysis builds a plain
``xarray.Dataset`` and passes it through :func:`finish`, which writes ``long_name`` and ``units`` from the
table, records where the numbers came from, and checks the result. :func:`validate` does the check alone,
and :func:`save` and :func:`load` move datasets to and from NetCDF4 without ever leaving half a file behind.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pnanalysis.errors import SchemaError

SCHEMA_VERSION = 1

#: Dims that may stand in front of any variable: several checkpoints, runs or iterations side by side.
STACKING_DIMS = ("run", "checkpoint", "iteration", "epoch", "step", "layer")


@dataclass(frozen=True)
class Variable:
    """One variable: its own dims (stacking dims may precede them), unit, label and whether it must be there."""

    dims: tuple[str, ...]
    units: str
    long_name: str
    required: bool = True


def _var(dims: str, units: str, long_name: str, required: bool = True) -> Variable:
    return Variable(tuple(dims.split()), units, long_name, required)


_OPTIONAL = False


def _with_error(name: str, units: str, long_name: str) -> dict[str, Variable]:
    """A scalar with its standard error and 95 % interval."""
    return {
        name: _var("", units, long_name),
        f"{name}_se": _var("", units, f"standard error of the {long_name}", _OPTIONAL),
        **_with_interval(name, units, long_name),
    }


def _with_interval(name: str, units: str, long_name: str) -> dict[str, Variable]:
    """A scalar with the two ends of its 95 % interval."""
    return {
        name: _var("", units, long_name),
        f"{name}_low": _var("", units, f"lower end of the interval of the {long_name}", _OPTIONAL),
        f"{name}_high": _var("", units, f"upper end of the interval of the {long_name}", _OPTIONAL),
    }


def _with_se(name: str, dims: str, units: str, long_name: str, required: bool = True) -> dict[str, Variable]:
    """A variable with its standard error."""
    return {
        name: _var(dims, units, long_name, required),
        f"{name}_se": _var(dims, units, f"standard error of the {long_name}", required),
    }


_SPECTRUM_SCALARS = {
    **_with_error("trace", "loss", "trace"),
    **_with_error("frobenius_norm", "loss", "Frobenius norm"),
    **_with_error("negative_mass", "1", "share of negative eigenvalues"),
    **_with_error("effective_rank", "1", "effective rank (participation ratio)"),
    **_with_error("effective_dimension", "1", "effective dimension"),
    **_with_interval("lambda_max", "loss", "largest eigenvalue"),
    **_with_interval("lambda_min", "loss", "smallest eigenvalue"),
    **_with_interval("n_outliers", "1", "eigenvalues beyond the bulk"),
    **_with_interval("bulk_edge_low", "loss", "lower edge of the bulk"),
    **_with_interval("bulk_edge_high", "loss", "upper edge of the bulk"),
    **_with_interval("gap_ratio", "1", "lambda_max over the upper edge of the bulk"),
}

#: Numbers of a spectrum that a comparison lists.
COMPARED_SPECTRUM = ("lambda_max", "lambda_min", "trace", "n_outliers", "effective_rank", "negative_mass")

_SPECTRUM = {
    "node": _var("quadrature", "loss", "quadrature node (eigenvalue)"),
    "weight": _var("quadrature", "1", "quadrature weight (share of the spectrum)"),
    "sampled": _var("quadrature", "1", "node known by random probes (1) or exactly counted (0)"),
    "node_run": _var("quadrature", "1", "probe of a sampled node, from 1; minus the run, from 0, of a counted one"),
    "node_n_before": _var("quadrature", "1", "directions deflated before the node's run"),
    "ritz_value": _var("probe lanczos", "loss", "Ritz value"),
    "ritz_weight": _var("probe lanczos", "1", "Ritz weight (squared first component)"),
    "ritz_residual": _var("probe lanczos", "loss", "residual bound of the Ritz value"),
    "density": _var("eigenvalue", "1 / loss", "spectral density"),
    "density_se": _var("eigenvalue", "1 / loss", "standard error of the spectral density"),
    "deflated_value": _var("component", "loss", "deflated eigenvalue", _OPTIONAL),
    "deflated_residual": _var("component", "loss", "residual bound of the deflated eigenvalue", _OPTIONAL),
    "top_value": _var("top", "loss", "largest eigenvalues"),
    "top_residual": _var("top", "loss", "residual bound of the largest eigenvalues"),
    "coupling": _var("", "loss", "coupling of the deflated space with the rest"),
    "n_parameters": _var("", "1", "number of parameters"),
    "probe_weight": _var("probe", "1", "share of the run in the averaged estimate"),
    "kernel_width": _var("", "loss", "standard deviation of the Gaussian kernel"),
    **_SPECTRUM_SCALARS,
}

_SPECTRUM_COMPARISON = {
    "wasserstein1": _var("", "loss", "Wasserstein-1 distance of the two spectra"),
    "wasserstein1_noise": _var("", "loss", "Wasserstein-1 distance expected of two estimates of one spectrum"),
    "wasserstein1_se": _var("", "loss", "bound on the standard error of the Wasserstein-1 distance"),
    **{
        name: Variable(scalar.dims, scalar.units, f"difference in {scalar.long_name}", scalar.required)
        for name, scalar in _SPECTRUM_SCALARS.items()
    },
}

_FUNCTIONAL = {
    **_with_se("disagreement", "checkpoint other", "1", "share of examples put into different classes", _OPTIONAL),
    "expected_disagreement": _var(
        "checkpoint other", "1", "disagreement of independent networks of these accuracies", _OPTIONAL
    ),
    **_with_se(
        "js_divergence", "checkpoint other", "nat", "mean Jensen-Shannon divergence of probabilities", _OPTIONAL
    ),
    **_with_se("rms_difference", "checkpoint other", "1", "root mean square difference of the outputs", _OPTIONAL),
    **_with_se("cka", "checkpoint other layer", "1", "linear CKA", _OPTIONAL),
}

_COMPARISON = {
    **_with_se("loss", "checkpoint split", "nat", "loss"),
    **_with_se("loss_difference", "checkpoint other split", "nat", "difference in loss"),
    **_with_se("error", "checkpoint split", "1", "error"),
    **_with_se("error_difference", "checkpoint other split", "1", "difference in error"),
    "only_wrong": _var("checkpoint other split", "1", "examples wrong here and right in the other", _OPTIONAL),
    "rank": _var("checkpoint split", "1", "one more than the number that have told lower error"),
    "n_examples": _var("split", "1", "number of examples"),
    "norm": _var("checkpoint", "1", "norm of the parameters"),
    "distance": _var("checkpoint other", "1", "Euclidean distance in parameters"),
    "relative_distance": _var("checkpoint other", "1", "distance over the norm of the other"),
    "cosine": _var("checkpoint other", "1", "cosine of the parameters"),
    "layer_distance": _var("checkpoint other layer", "1", "Euclidean distance in the layer's parameters"),
    "layer_cosine": _var("checkpoint other layer", "1", "cosine of the layer's parameters"),
    "distance_from_start": _var("checkpoint", "1", "Euclidean distance from the starting point", _OPTIONAL),
    **_FUNCTIONAL,
    **{
        f"{name}{end}": replace(_SPECTRUM_SCALARS[f"{name}{end}"], dims=("checkpoint",), required=False)
        for name in COMPARED_SPECTRUM
        for end in ("", "_se", "_low", "_high")
        if f"{name}{end}" in _SPECTRUM_SCALARS
    },
    **{
        f"{name}_difference{end}": replace(
            _SPECTRUM_COMPARISON[f"{name}{end}"], dims=("checkpoint", "other"), required=False
        )
        for name in COMPARED_SPECTRUM
        for end in ("", "_se", "_low", "_high")
        if f"{name}{end}" in _SPECTRUM_COMPARISON
    },
    **{
        name: replace(_SPECTRUM_COMPARISON[name], dims=("checkpoint", "other"), required=False)
        for name in ("wasserstein1", "wasserstein1_noise", "wasserstein1_se")
    },
    "saturation": _var("checkpoint activation", "1", "98th percentile of the absolute activation", _OPTIONAL),
}

SCHEMAS: dict[str, dict[str, Variable]] = {
    "history": {
        "train_loss": _var("iteration epoch", "nat", "training loss"),
        "penalty": _var("iteration epoch", "nat", "persistent penalty"),
        "train_error": _var("iteration epoch", "1", "training error", _OPTIONAL),
        "validation_error": _var("iteration epoch", "1", "validation error"),
        "test_error": _var("iteration epoch", "1", "test error"),
        "seconds": _var("iteration epoch", "s", "wall time of the epoch", _OPTIONAL),
    },
    "spectral_density": _SPECTRUM,
    "hessian": _SPECTRUM,
    "spectrum_comparison": _SPECTRUM_COMPARISON,
    "functional": _FUNCTIONAL,
    "comparison": _COMPARISON,
    "saturation": {
        **_with_se("percentile", "layer quantile", "1", "activation percentile"),
        **_with_se("abs_percentile", "layer quantile", "1", "percentile of the absolute activation"),
        **_with_se("histogram", "layer bin", "1", "normalised histogram of activations (density)"),
        **_with_se("mean", "layer", "1", "mean activation"),
        **_with_se("std", "layer", "1", "standard deviation of activations"),
        **_with_se("saturated_share", "layer", "1", "share of activations within 0.05 of an asymptote"),
        **_with_se("saturation_measure", "layer", "1", "saturation measure (Rakitianskaia and Engelbrecht)"),
        "dead_units": _var("layer", "1", "units that no example moves"),
        "n_units": _var("layer", "1", "number of units"),
        **_with_se("unit_saturated_share", "layer unit", "1", "share of a unit near an asymptote", _OPTIONAL),
        **_with_se("unit_saturation_measure", "layer unit", "1", "saturation measure of a unit", _OPTIONAL),
        "unit_dead": _var("layer unit", "1", "whether no example moves the unit", _OPTIONAL),
    },
    "trajectory": {
        "plane": _var("checkpoint component", "1", "coordinate on the plane through the end points", _OPTIONAL),
        "pca": _var("checkpoint component", "1", "coordinate on the principal component", _OPTIONAL),
        "pca_end": _var("checkpoint component", "1", "coordinate on the component about the end point", _OPTIONAL),
        "random": _var("draw checkpoint component", "1", "coordinate on a random plane", _OPTIONAL),
        "explained_variance": _var("component", "1", "share of the variance explained", _OPTIONAL),
        "explained_variance_end": _var("component", "1", "share of the distances from the end explained", _OPTIONAL),
        "explained_variance_plane": _var("component", "1", "share of the distances from the start", _OPTIONAL),
        "explained_variance_random": _var("draw component", "1", "share of the distances from the start", _OPTIONAL),
        "plane_residual": _var("checkpoint", "1", "distance from the plane through the end points", _OPTIONAL),
        "distance_from_start": _var("checkpoint", "1", "Euclidean distance from the starting point"),
        "path_length": _var("checkpoint", "1", "length of the path through the saved checkpoints"),
        "distance_to_end": _var("checkpoint end", "1", "Euclidean distance from the end point"),
        "cosine": _var("checkpoint end", "1", "cosine with the end point, seen from zero"),
        "validation_error": _var("checkpoint", "1", "validation error", _OPTIONAL),
    },
    "barrier": {
        **_with_se("loss", "path split position", "nat", "loss"),
        **_with_se("error", "path split position", "1", "error", _OPTIONAL),
        **_with_se("excess", "path split position", "nat", "loss above the line between the ends' losses"),
        **_with_se("barrier", "path split", "nat", "barrier of the loss"),
        "barrier_position": _var("path split", "1", "position of the barrier of the loss"),
        **_with_se("error_barrier", "path split", "1", "barrier of the error", _OPTIONAL),
        "distance": _var("path", "1", "Euclidean distance between the ends"),
        "length": _var("path", "1", "length of the path"),
    },
    "landscape": {
        **_with_se("loss", "split y x", "nat", "loss"),
        "error": _var("split y x", "1", "error", _OPTIONAL),
        "point_position": _var("point component", "1", "coordinates of the checkpoint"),
    },
    "sharpness": {
        **_with_se("loss", "checkpoint", "nat", "loss"),
        **_with_se("rise", "checkpoint neighbourhood", "nat", "largest rise of the loss found"),
        **_with_se("one_step", "checkpoint neighbourhood", "nat", "rise of the loss after one step to the border"),
        "relative": _var("checkpoint neighbourhood", "%", "largest rise of the loss found, relative to 1 + loss"),
        "radius": _var("neighbourhood", "1", "radius of the neighbourhood"),
    },
    "gradients": {
        "inner_product": _var("layer epoch end", "1", "inner product with the end point over its squared norm"),
        "sign": _var("layer epoch end", "1", "sign of the inner product"),
        "last_flip": _var("layer end", "1", "epoch from which on the sign stays as it is"),
        "constant_norm": _var("layer", "loss", "norm of the constant push of the penalty"),
        "fluctuation_norm": _var("layer epoch", "loss", "norm of the fluctuation of the penalty's push"),
        "loss_gradient_norm": _var("layer epoch", "loss", "norm of the gradient of the loss"),
        "half_difference": _var("layer", "loss", "norm of the difference between the window's halves"),
        "half_difference_se": _var("layer", "loss", "size of that difference for independent fluctuations"),
    },
    "descent": {
        "path": _var("iteration step component", "1", "position"),
        "value": _var("iteration step", "1", "value of the unpenalised surface along the path"),
        "end": _var("iteration component", "1", "end point"),
        "end_value": _var("iteration", "1", "value of the unpenalised surface at the end point"),
        "champion": _var("", "1", "iteration with the lowest end value"),
    },
    "surface": {
        "value": _var("iteration y x", "1", "value of the (penalised) surface"),
    },
    "basin": {
        "basin": _var("y x", "1", "well in which the start ends (-1: in none)"),
        "minimum": _var("well component", "1", "position of the well"),
        "minimum_value": _var("well", "1", "value of the surface in the well"),
        "share": _var("well", "1", "share of the starts that end in the well"),
    },
    "ensemble": {
        "loss": _var("member step", "1", "mean squared error", _OPTIONAL),
        "final_loss": _var("member", "1", "mean squared error at the end"),
        "parameters": _var("member parameter", "1", "parameters at the end", _OPTIONAL),
        "prediction": _var("member x", "1", "output of the trained network", _OPTIONAL),
        "champion": _var("member", "1", "iteration of the lowest final loss", _OPTIONAL),
        "champion_loss": _var("member", "1", "lowest mean squared error of all iterations", _OPTIONAL),
        "data_x": _var("point", "1", "input", _OPTIONAL),
        "data_y": _var("point", "1", "target", _OPTIONAL),
    },
    "escape": {
        "probability": _var("strategy iteration", "1", "share of starts that have left the plateau"),
        "probability_low": _var("strategy iteration", "1", "lower end of the interval of the share"),
        "probability_high": _var("strategy iteration", "1", "upper end of the interval of the share"),
        "best_loss": _var("strategy iteration", "1", "median over starts of the lowest loss so far"),
        "n_starts": _var("strategy", "1", "number of starts"),
    },
}


def stamp(ds: xr.Dataset, kind: str, **attrs: Any) -> xr.Dataset:
    """Write labels, units and provenance on ``ds`` (a shallow copy is returned).

    Attributes that are ``None`` are left out; mappings and sequences are stored as JSON text, booleans as 0/1.
    """
    ds = ds.copy()
    for name, variable in SCHEMAS[kind].items():
        if name in ds:
            ds[name].attrs.setdefault("long_name", variable.long_name)
            ds[name].attrs.setdefault("units", variable.units)
    record = {"kind": kind, "schema_version": SCHEMA_VERSION, **provenance(), **attrs}
    ds.attrs.update({key: _plain(value) for key, value in record.items() if value is not None})
    return ds


def finish(ds: xr.Dataset, kind: str, **attrs: Any) -> xr.Dataset:
    """:func:`stamp` and :func:`validate` in one: the last line of every analysis."""
    return validate(stamp(ds, kind, **attrs), kind)


def validate(ds: xr.Dataset, kind: str | None = None) -> xr.Dataset:
    """Check that ``ds`` holds what its kind promises and return it.

    Parameters
    ----------
    ds : xarray.Dataset
    kind : str, optional
        Defaults to the dataset's own ``kind`` attribute.

    Raises
    ------
    SchemaError
        If the kind is unknown, or a variable is missing, has other dims or lacks its label or unit.
    """
    kind = kind or ds.attrs.get("kind")
    if kind not in SCHEMAS:
        raise SchemaError(f"not a pnanalysis dataset (kind {kind!r}); known kinds: {', '.join(SCHEMAS)}")
    for name, variable in SCHEMAS[kind].items():
        if name not in ds:
            if variable.required:
                raise SchemaError(f"{kind} dataset lacks the variable {name!r}")
            continue
        array = ds[name]
        n_stacked = array.ndim - len(variable.dims)
        stacked, own = array.dims[: max(n_stacked, 0)], array.dims[max(n_stacked, 0) :]
        if own != variable.dims or not set(stacked) <= set(STACKING_DIMS):
            raise SchemaError(f"{kind}.{name} has dims {array.dims}, expected (..., {', '.join(variable.dims)})")
        if not {"long_name", "units"} <= array.attrs.keys():
            raise SchemaError(f"{kind}.{name} lacks its long_name or units")
    return ds


def provenance() -> dict[str, str]:
    """What made the numbers: version, command line, torch version and time (UTC)."""
    return {
        "pnanalysis_version": metadata.version("pnanalysis"),
        "torch_version": metadata.version("torch"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv else "",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, bool | np.bool_):
        return int(value)
    if isinstance(value, int | float | str | np.number):
        return value
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, default=str)
    return str(value)

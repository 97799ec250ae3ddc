"""Cells with numbers of one's own, as a study would have saved them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from pnanalysis.reproduce.cells import Cell, planned
from pnanalysis.reproduce.plan import Plan

#: Errors of the validation and of the test set, by iteration.
Errors = Sequence[tuple[float, float]]


def put(
    plan: Plan,
    cell: Cell,
    errors: Errors,
    *,
    seconds: float = 1.0,
    layers: Sequence[Sequence[str]] = (),
    **more: xr.Dataset,
) -> None:
    """Save a finished cell of an image experiment."""
    validation, test = np.array(errors).T
    datasets = {"history": history(validation, test), "end_points": end_points(validation, test), **more}
    record = {
        **planned(cell, plan.scale, plan.setting(cell.experiment)),
        "status": "finished", "failure": None, "champion": int(np.argmin(validation)), "data": {"name": "digits"},
        "cost": {"training_seconds": seconds, "measuring_seconds": 0.5, "epochs": 4, "products": 7},
        "device_name": "test machine", "cores": 2, "layers": layers,
    }  # fmt: skip
    plan.store.save(cell, record, datasets)


def put_failed(plan: Plan, cell: Cell, why: str) -> None:
    """Save a cell whose training has diverged."""
    record = {
        **planned(cell, plan.scale, plan.setting(cell.experiment)),
        "status": "diverged", "failure": why, "champion": None, "cost": {},
    }  # fmt: skip
    plan.store.save(cell, record, {})


def history(validation: np.ndarray, test: np.ndarray) -> xr.Dataset:
    """Two epochs, of which the last one has these errors."""
    shape = (len(validation), 2)
    variables: dict[str, Any] = {name: (("iteration", "epoch"), np.full(shape, 0.5)) for name in ("seconds", "penalty")}
    for name, values in (("validation_error", validation), ("test_error", test)):
        variables[name] = (("iteration", "epoch"), np.stack([np.full(len(values), 0.9), values], axis=1))
    return xr.Dataset(variables, {"iteration": range(shape[0]), "epoch": [1, 2]}, {"kind": "history"})


def end_points(validation: np.ndarray, test: np.ndarray) -> xr.Dataset:
    """Ensembles that are a point better for every network, and distances that grow with the iteration."""
    k = len(test)
    errors = np.stack([validation, test], axis=1)
    apart = np.abs(np.subtract.outer(np.arange(k), np.arange(k))) / 10
    variables: dict[str, Any] = {
        "error": (("iteration", "split"), errors),
        "ensemble_error": (("iteration", "split"), errors - 0.01 * np.arange(k)[:, None]),
        **dict.fromkeys(("distance", "relative_distance", "disagreement"), (("iteration", "other"), apart)),
        "cosine": (("iteration", "other"), 1 - apart),
    }
    return xr.Dataset(variables, {"iteration": range(k), "other": range(k), "split": ["validation", "test"]})


def ensemble(losses: np.ndarray) -> xr.Dataset:
    """Final losses of S2, shape (iteration, start)."""
    return xr.Dataset({"final_loss": (("iteration", "member"), losses)}, {"iteration": range(len(losses))})


def spectrum(lambda_max: Sequence[float], outliers: Sequence[int]) -> xr.Dataset:
    """Spectra of so many end points."""
    k = len(lambda_max)
    variables: dict[str, Any] = {
        "lambda_max": ("checkpoint", np.array(lambda_max)),
        "lambda_max_data_se": ("checkpoint", np.full(k, 0.1)),
        "trace": ("checkpoint", 10 * np.array(lambda_max)),
        "trace_se": ("checkpoint", np.full(k, 0.5)),
        "class_ratio": ("checkpoint", np.full(k, 3.0)),
        "class_trace": ("checkpoint", np.full(k, 0.7)),
        "n_outliers": ("checkpoint", np.array(outliers)),
        "outlier_p": ("checkpoint", np.full(k, 0.01)),
        "contender_density": (("contender", "eigenvalue"), np.array([[1.0, 0.1, 1e-4], [1.0, 0.2, 1e-4]])),
    }
    coords = {"iteration": ("checkpoint", range(k)), "contender": ["plain", "champion"], "eigenvalue": [0.0, 1.0, 2.0]}
    return xr.Dataset(variables, coords)


def saturation(measure: Sequence[float]) -> xr.Dataset:
    """Saturation measures by iteration, the same in both layers and, after the first one, at both epochs."""
    values = np.broadcast_to(np.array(measure)[:, None, None], (len(measure), 2, 2))
    names = ("iteration", "epoch", "layer")
    variables: dict[str, Any] = dict.fromkeys(("saturation_measure", "saturated_share"), (names, values))
    variables["abs_percentile"] = (("quantile", *names), np.stack([values / 2, values]))
    coords = {"iteration": range(len(measure)), "epoch": [1, 2], "layer": ["tanh1", "tanh2"], "quantile": [50, 98]}
    return xr.Dataset(variables, coords)


def gradients(halves: np.ndarray, fluctuation: float) -> xr.Dataset:
    """A split of the persistent gradient: differences of halves, shape (iteration, layer), in their standard errors."""
    shape, each = halves.shape, ("iteration", "layer")
    variables: dict[str, Any] = {
        "half_difference": (each, 0.01 * halves),
        "half_difference_se": (each, np.full(shape, 0.01)),
        "constant_norm": (each, np.full(shape, 0.1)),
        "fluctuation_norm": ((*each, "epoch"), np.full((*shape, 2), fluctuation)),
        "loss_gradient_norm": ((*each, "epoch"), np.full((*shape, 2), 0.5)),
        "last_flip": (each, np.ones(shape)),
        "sign": ((*each, "epoch", "end"), np.ones((*shape, 2, 2))),
    }
    coords = {"iteration": range(1, len(halves) + 1), "layer": [f"fc{i}" for i in range(shape[1])], "epoch": [1, 2]}
    return xr.Dataset(variables, coords)

"""What a curvature monitor saw of a training, up to one of its checkpoints: last and highest sharpness."""

from __future__ import annotations

import numpy as np
import xarray as xr

from pnanalysis.io.runs import Checkpoint, Run

#: Kind of the dataset, which is the name of its file in a run.
KIND = "curvature_monitor"


def monitored(ds: xr.Dataset, run: Run, checkpoint: Checkpoint) -> xr.Dataset | None:
    """Numbers of the training that led to a checkpoint, from its start to there.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``curvature_monitor``, along ``step`` and, of a run of several iterations, ``iteration``.
    run : Run
    checkpoint : Checkpoint

    Returns
    -------
    xarray.Dataset or None
        ``last_lambda_max`` and ``last_threshold_ratio``, the largest eigenvalue of the Hessian, and that of the
        preconditioned Hessian over the stability threshold, in the last measurement that has found them;
        ``highest_lambda_max`` and ``highest_threshold_ratio``, the largest of each. ``NAME_se`` are standard errors for
        the choice of examples; of the highest those of that measurement, as if it had been chosen beforehand.
        ``None`` where nothing was measured on the way to this checkpoint, or it is not known when it was reached.
    """
    last_step = _step_of(run, checkpoint)
    if last_step is None:
        return None
    if "iteration" in ds.dims:
        if checkpoint.iteration not in ds.iteration.values:
            return None
        ds = ds.sel(iteration=checkpoint.iteration)
    elif checkpoint.iteration != 0 or len(run.manifest["ends"]) > 1:  # which of them is not known
        return None
    ds = ds.sel(step=ds.step <= last_step)
    found: dict[str, float] = {}
    for name, (value, se) in {"lambda_max": _eigenvalue(ds), "threshold_ratio": _ratio(ds)}.items():
        places = np.flatnonzero(np.isfinite(value))
        if not len(places):
            continue
        for which, place in (("last", places[-1]), ("highest", places[int(np.argmax(value[places]))])):
            found |= {f"{which}_{name}": float(value[place]), f"{which}_{name}_se": float(se[place])}
    return xr.Dataset(found) if found else None


def _step_of(run: Run, checkpoint: Checkpoint) -> float | None:
    """The step that a checkpoint was stored after; infinite at the end of its training."""
    ends = run.manifest["ends"]
    if checkpoint.iteration < len(ends) and checkpoint.epoch == ends[checkpoint.iteration]:
        return np.inf
    n, batch_size = run.manifest["data"].get("n_train"), run.manifest["config"].get("batch_size")
    if not (isinstance(n, int) and isinstance(batch_size, int) and n > 0 and batch_size > 0):
        return None
    return float(checkpoint.epoch * -(-n // batch_size))


def _eigenvalue(ds: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    return ds.lambda_max.values.astype(float), _or_nan(ds, "lambda_max_se")


def _ratio(ds: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    value, threshold = _or_nan(ds, "preconditioned_lambda_max"), _or_nan(ds, "threshold")
    return value / threshold, _or_nan(ds, "preconditioned_lambda_max_se") / threshold


def _or_nan(ds: xr.Dataset, name: str) -> np.ndarray:
    return ds[name].values.astype(float) if name in ds else np.full(ds.sizes["step"], np.nan)


__all__ = ["KIND", "monitored"]

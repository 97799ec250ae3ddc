"""S7: whether the gradient of the penalty is nearly constant along a trajectory."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import xarray as xr

from pnanalysis.reproduce.accuracy import CLAIM
from pnanalysis.reproduce.cells import Result
from pnanalysis.reproduce.markdown import UNKNOWN as DASH
from pnanalysis.reproduce.markdown import Links, blocks, failures, significant, table
from pnanalysis.reproduce.plan import Plan
from pnanalysis.reproduce.settings import PERSISTENT
from pnanalysis.reproduce.statistics import FAILS, HOLDS, UNKNOWN, Claim
from pnanalysis.significance import LEVEL


def claims(plan: Plan) -> list[Claim]:
    """Whether the penalty's gradient is a constant up to independent fluctuations, and whether these are small."""
    finished = [result for result in plan.results("S7", "", PERSISTENT) if result.is_finished]
    if not finished:
        return []
    datasets = [result.dataset("gradients") for result in finished]
    fluctuating = [_fluctuates(ds) for ds in datasets]
    n = sum(int(each.sum()) for each in fluctuating)
    drifting = sum(int(_drifts(ds, n).sum()) for ds in datasets)
    total = sum(each.size for each in fluctuating)
    rest = f"; in {total - n} more it never changes" if 0 < n < total else ""
    here = f"its halves differ in {drifting} of {n} layers and iterations{rest}" if n else f"never changes in {total}"
    larger = sum(int((_ratio(ds) >= 1).sum()) for ds in datasets)
    seeds = str(len(finished))
    return [
        Claim("the penalty's gradient is constant up to fluctuations that average to zero", "yes", here, seeds,
              FAILS if drifting else UNKNOWN if n else HOLDS),
        Claim("its fluctuations are smaller than the constant, in every layer and iteration (root mean square)",
              DASH, f"not in {larger} of {total}", seeds, FAILS if larger else HOLDS),
    ]  # fmt: skip


def gradient_split(plan: Plan, links: Links) -> str:
    """What the page says about S7."""
    results = plan.results("S7", "", PERSISTENT)
    finished = [result for result in results if result.is_finished]
    if not finished:
        return blocks(["Not yet known at this scale: no cell is done.", failures(results, links)])
    n = sum(int(_fluctuates(result.dataset("gradients")).sum()) for result in finished)
    rows = [row for result in finished for row in _rows(result, n)]
    columns = ["layer", "‖λC‖", "‖λd‖ / ‖λC‖ by iteration", "‖λC‖ / ‖∇L‖ at the end", "signs fixed from epoch",
               "halves differ"]  # fmt: skip
    epochs = max(result.dataset("gradients").sizes["epoch"] for result in finished)
    text = (
        "The remainder d averages to zero over the trajectory by definition. Whether the rest is a constant is tested "
        "by its means over the two halves of the trajectory, which differ by more than chance explains if it drifts. "
        f"Layers and iterations whose gradient never changes are not tested. In {epochs} epochs only large drifts are "
        "found. Norms of d are root mean squares over the "
        "trajectory; other numbers are means over iterations, and the epoch is the latest of them."
    )
    return blocks(
        [text, table(columns, rows), table(CLAIM, [claim.row for claim in claims(plan)]), failures(results, links),
         links.cells(results)]
    )  # fmt: skip


def _rows(result: Result, n: int) -> list[list[str]]:
    ds = result.dataset("gradients")
    drifts, rows = _drifts(ds, n), []
    ratio, fluctuates = _ratio(ds), _fluctuates(ds)
    for k, layer in enumerate(map(str, ds.layer.values)):
        at = ds.isel(layer=k)
        shown = [significant(value) if math.isfinite(value) else "∞ (C is 0)" for value in ratio[:, k]]
        beside_loss = float((at.constant_norm / at.loss_gradient_norm.isel(epoch=-1)).mean())
        rows.append(
            [f"seed {result.cell.seed}, {layer}", significant(float(at.constant_norm.mean())), ", ".join(shown),
             significant(beside_loss), significant(float(at.last_flip.max())),
             f"{drifts[:, k].sum()} of {fluctuates[:, k].sum()}" if fluctuates[:, k].any() else "never changes"]
        )  # fmt: skip
    return rows


def _fluctuates(ds: xr.Dataset) -> np.ndarray:
    """Where the gradient changes at all, shape (iteration, layer): elsewhere there is nothing to test."""
    return np.asarray((ds.fluctuation_norm.fillna(0) > 0).any("epoch").transpose("iteration", "layer").values)


def _ratio(ds: xr.Dataset) -> np.ndarray:
    """Root mean square of the fluctuation over the norm of the constant, shape (iteration, layer)."""
    size = np.sqrt((ds.fluctuation_norm**2).mean("epoch")).transpose("iteration", "layer").values
    constant = ds.constant_norm.transpose("iteration", "layer").values
    return np.divide(size, constant, out=np.where(size > 0, np.inf, 0.0), where=constant > 0)


def _drifts(ds: xr.Dataset, n: int) -> np.ndarray:
    """Where the two halves differ, shape (iteration, layer), by Bonferroni's bound for ``n`` such tests.

    A norm relative to its expected size exceeds a quantile at most as often as the size of one normal number does.
    """
    farthest = NormalDist().inv_cdf(1 - LEVEL / (2 * max(n, 1)))
    beyond = (ds.half_difference > farthest * ds.half_difference_se).transpose("iteration", "layer").values
    return np.asarray(beyond) & _fluctuates(ds)

"""S7: whether the gradient of the penalty is nearly constant along a trajectory."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import xarray as xr

from pnanalysis.reproduce.accuracy import CLAIM
from pnanalysis.reproduce.cells import Result
from pnanalysis.reproduce.markdown import Links, blocks, failures, significant, table
from pnanalysis.reproduce.plan import Plan
from pnanalysis.reproduce.settings import PERSISTENT
from pnanalysis.reproduce.statistics import FAILS, HOLDS, UNKNOWN, Claim
from pnanalysis.significance import LEVEL


def claims(plan: Plan) -> list[Claim]:
    """Whether the penalty's gradient is a constant up to independent fluctuations."""
    finished = [result for result in plan.results("S7", "", PERSISTENT) if result.is_finished]
    if not finished:
        return []
    datasets = [result.dataset("gradients") for result in finished]
    n = sum(ds.half_difference.size for ds in datasets)
    drifting = np.concatenate([_drifts(ds, n).ravel() for ds in datasets])
    is_constant = all(bool((ds.fluctuation_norm.fillna(0) == 0).all()) for ds in datasets)
    judged = FAILS if drifting.any() else HOLDS if is_constant else UNKNOWN
    here = f"its halves differ in {drifting.sum()} of {len(drifting)} layers and iterations"
    text = "the penalty's gradient is constant up to fluctuations that average to zero"
    return [Claim(text, "yes", here, str(len(finished)), judged)]


def gradient_split(plan: Plan, links: Links) -> str:
    """What the page says about S7."""
    results = plan.results("S7", "", PERSISTENT)
    finished = [result for result in results if result.is_finished]
    if not finished:
        return blocks(["Not yet known at this scale: no cell is done.", failures(results, links)])
    rows = [row for result in finished for row in _rows(result)]
    columns = ["layer", "‖λC‖", "‖λd‖ / ‖λC‖", "‖λC‖ / ‖∇L‖ at the end", "signs fixed from epoch", "halves differ"]
    text = (
        "The remainder d averages to zero over the trajectory by definition. Whether the rest is a constant is tested "
        "by its means over the two halves of the trajectory, which differ by more than chance explains if it drifts. "
        "Numbers are means over iterations."
    )
    return blocks(
        [text, table(columns, rows), table(CLAIM, [claim.row for claim in claims(plan)]), failures(results, links),
         links.cells(results)]
    )  # fmt: skip


def _rows(result: Result) -> list[list[str]]:
    ds = result.dataset("gradients")
    drifts, rows = _drifts(ds, ds.half_difference.size), []
    for k, layer in enumerate(map(str, ds.layer.values)):
        at = ds.isel(layer=k)
        constant, fluctuation = float(at.constant_norm.mean()), float(at.fluctuation_norm.mean())
        beside_loss = float((at.constant_norm / at.loss_gradient_norm.isel(epoch=-1)).mean())
        rows.append(
            [f"seed {result.cell.seed}, {layer}", significant(constant),
             significant(fluctuation / constant if constant else np.nan), significant(beside_loss),
             significant(float(at.last_flip.max())), f"{drifts[:, k].sum()} of {len(drifts)}"]
        )  # fmt: skip
    return rows


def _drifts(ds: xr.Dataset, n: int) -> np.ndarray:
    """Where the two halves differ, shape (iteration, layer), by Bonferroni's bound for ``n`` such tests.

    A norm relative to its expected size exceeds a quantile at most as often as the size of one normal number does.
    """
    farthest = NormalDist().inv_cdf(1 - LEVEL / (2 * n))
    return np.asarray((ds.half_difference > farthest * ds.half_difference_se).transpose("iteration", "layer").values)

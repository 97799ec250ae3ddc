"""S7: whether the gradient of the penalty is nearly constant along a trajectory."""

from __future__ import annotations

import numpy as np

from pnanalysis.reproduce.markdown import Links, blocks, failures, significant, table
from pnanalysis.reproduce.plan import Plan
from pnanalysis.reproduce.settings import PERSISTENT
from pnanalysis.reproduce.statistics import FAILS, HOLDS


def gradient_split(plan: Plan, links: Links) -> str:
    """What the page says about S7."""
    results = plan.results("S7", "", PERSISTENT)
    finished = [result for result in results if result.is_finished]
    if not finished:
        return blocks(["Not yet known at this scale: no cell is done.", failures(results, links)])
    rows, steady, n_tested = [], 0, 0
    for result in finished:
        ds = result.dataset("gradients")
        fluctuation = ds.fluctuation_norm.mean("epoch")
        for layer in map(str, ds.layer.values):
            at = ds.sel(layer=layer)
            halves, expected = at.half_difference.values, at.half_difference_se.values
            constant = float(at.constant_norm.mean())
            rows.append(
                [f"seed {result.cell.seed}, {layer}", significant(constant),
                 significant(float(fluctuation.sel(layer=layer).mean() / constant) if constant else np.nan),
                 significant(float((at.constant_norm / at.loss_gradient_norm.isel(epoch=-1)).mean())),
                 significant(float(at.last_flip.max())),
                 f"{int((halves > 2 * expected).sum())} of {len(halves)}"]
            )  # fmt: skip
            steady += int((halves <= 2 * expected).sum())
            n_tested += len(halves)
    columns = ["layer", "‖λC‖", "‖λd‖ / ‖λC‖", "‖λC‖ / ‖∇L‖ at the end", "signs fixed from epoch",
               "halves differ"]  # fmt: skip
    text = (
        "The remainder d averages to zero over the trajectory by definition. Whether the rest is a constant is tested "
        "by the means over the two halves of the trajectory, which differ by more than two of their standard errors if "
        f"it drifts: in {n_tested - steady} of {n_tested} cases. That the penalty's gradient is constant up to "
        f"independent fluctuations: **{HOLDS if steady == n_tested else FAILS}**. Numbers are means over iterations."
    )
    return blocks([table(columns, rows), text, failures(results, links), links.cells(results)])

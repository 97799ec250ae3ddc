"""How often networks leave the plateau of the kink regression, by the number of trainings.

Near zero bias every kink of a 1-D ReLU network sits near x = 0, where there are no data: the network is linear on
either side, and gradient descent cannot move the kinks to where they matter (Holzmueller and Steinwart 2020). The
plateau is therefore the loss of the best two-sided linear fit.

References
----------
D. Holzmueller and I. Steinwart, "Training Two-Layer ReLU Networks with Gradient Descent is Inconsistent",
arXiv:2002.04861.
Y. Min, "Persistent Neurons", arXiv:2007.01419.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from scipy.stats import binomtest

from pnanalysis import schema
from pnanalysis.errors import TrainingError
from trainers.zoo.kink import two_sided_fit_loss


def escape(
    persistent: xr.Dataset,
    restarts: xr.Dataset | None = None,
    *,
    plateau: float | None = None,
    margin: float = 0.01,
    confidence: float = 0.95,
) -> xr.Dataset:
    """Probability of having left the plateau, by iteration: persistent chains compared with restarts of equal cost.

    Parameters
    ----------
    persistent, restarts : xarray.Dataset
        Kind ``ensemble``, from :func:`trainers.problems.kink_ensemble.train_chains` and
        :func:`trainers.problems.kink_ensemble.train_restarts`.
    plateau : float, optional
        By default the loss of the best two-sided linear fit of the training data.
    margin : float
        A network has left if its final loss is below ``(1 - margin) * plateau``.
    confidence : float
        Level of the Wilson intervals over starts.

    Returns
    -------
    xarray.Dataset
        Kind ``escape``: ``probability``, ``probability_low``, ``probability_high`` (strategy, iteration), ``n_starts``
        and ``lam`` (strategy; NaN for restarts), ``best_loss`` (strategy, iteration): the median over starts of the
        lowest loss so far. A start counts as having left from the first iteration that left on.

    Raises
    ------
    TrainingError
        If the two were not trained on the same data, or ``margin`` is not in [0, 1).
    """
    if not 0 <= margin < 1:
        raise TrainingError(f"margin is {margin}; it must lie in [0, 1)")
    x, y = persistent["data_x"].values, persistent["data_y"].values
    if restarts is not None and not (np.array_equal(restarts["data_x"], x) and np.array_equal(restarts["data_y"], y)):
        raise TrainingError("the persistent chains and the restarts were trained on different data")
    plateau = two_sided_fit_loss(x, y) if plateau is None else plateau
    lams = sorted(set(persistent["lam"].values.tolist()))
    groups = [
        (f"persistent, λ = {lam:g}", lam, persistent.isel(member=persistent["lam"].values == lam)) for lam in lams
    ]
    if restarts is not None:
        groups.append(("restart", np.nan, restarts))
    arms, dims = [], ("strategy", "iteration")
    for label, lam, ds in groups:
        lowest = np.minimum.accumulate(ds["final_loss"].transpose("member", "iteration").values, axis=1)
        left = lowest < (1 - margin) * plateau
        intervals = [binomtest(k, len(left)).proportion_ci(confidence, "wilson") for k in left.sum(0).tolist()]
        variables = {
            "probability": (dims, left.mean(0)[None]),
            "probability_low": (dims, [[interval.low for interval in intervals]]),
            "probability_high": (dims, [[interval.high for interval in intervals]]),
            "best_loss": (dims, np.median(lowest, axis=0)[None]),
            "n_starts": ("strategy", [len(left)]),
        }
        coords = {"iteration": ds["iteration"].values, "strategy": [label], "lam": ("strategy", [lam])}
        arms.append(xr.Dataset(variables, coords=coords))
    joined = xr.concat(arms, dim="strategy", join="outer")
    return schema.finish(joined, "escape", plateau=plateau, margin=margin, confidence=confidence)

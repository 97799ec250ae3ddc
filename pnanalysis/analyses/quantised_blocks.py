"""How much the loss suffers from quantising the weights of one block after the other, and how sure their order is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.curvature.base import CurvatureOperator
from pnanalysis.curvature.example_groups import GroupedCurvature
from pnanalysis.curvature.quantisation import Quantisation
from pnanalysis.spectra.block_products import Partition
from pnanalysis.spectra.data_error import FEWEST_GROUPS, variance_of_forms
from pnanalysis.spectra.inner_products import inner_products
from pnanalysis.spectra.two_errors import Moment

#: Draws of the errors, for ranks.
_DRAWS = 4000


def rounding_effects(
    grouped: GroupedCurvature, partition: Partition, trace: Moment, n_rounded: NDArray[np.int64],
    quantised: Quantisation, seed: int,
) -> xr.Dataset:  # fmt: skip
    r"""Sensitivities by the trace, and what quantising each block does to the loss.

    Parameters
    ----------
    grouped : GroupedCurvature
    partition : Partition
        Into blocks.
    trace : Moment, (block,)
        Over the entries of each block that are quantised, of the loss over the data alone.
    n_rounded : ndarray, shape (block,)
        How many these are.
    quantised : Quantisation
        What is done to the weights.
    seed : int

    Returns
    -------
    xarray.Dataset
        Dims ``block`` and ``place``. ``sensitivity`` is the mean eigenvalue times the squared change of the weights
        (HAWQ-V2), with errors; ``rank`` its place from the largest, from 1, with the 95 % interval ``rank_low`` to
        ``rank_high`` and ``rank_probability`` (block, place). ``quadratic``,
        :math:`\tfrac12 \Delta w^\top H \Delta w`, and ``linear``, :math:`g^\top \Delta w`, take one product for each
        block; ``loss_increase`` is measured. All are of the loss over the data, without weight decay or a penalty.

    References
    ----------
    Z. Dong et al., "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks", arXiv:1911.03852.
    """
    op = grouped.op
    change = op.vector_of(quantised.change)
    squared = partition.products(change[:, None], change[:, None])[:, 0, 0]
    counted = np.maximum(n_rounded, 1)
    sensitivity = trace.divided(np.where(squared > 0, counted / np.where(squared > 0, squared, 1), np.inf))
    ds = xr.Dataset({"squared_change": ("block", squared)})
    for name, values in columns("sensitivity", sensitivity).items():
        ds[name] = "block", values
    ds = ds.merge(_ranks(sensitivity, squared > 0, seed))
    return ds.merge(_measured(grouped, op, partition, change))


def columns(name: str, moment: Moment) -> dict[str, Array]:
    """A number with its errors and interval, as variables."""
    half = moment.half_width
    return {
        name: moment.value, f"{name}_se": moment.se, f"{name}_probe_se": moment.probe_se,
        f"{name}_data_se": moment.data_se, f"{name}_low": moment.value - half, f"{name}_high": moment.value + half,
    }  # fmt: skip


def _ranks(moment: Moment, rounded: NDArray[np.bool_], seed: int) -> xr.Dataset:
    """Places from the largest, and how probable each is by the joint errors of all numbers."""
    rng = np.random.default_rng([seed, 2])
    n = len(moment.value)
    last = np.where(rounded, 0, -np.inf)  # blocks of which nothing is rounded take no place from the others
    draws = np.repeat(moment.value[None], _DRAWS, 0)
    if moment.deviation is not None:
        draws = draws + rng.standard_normal((_DRAWS, len(moment.deviation))) @ moment.deviation
    groups = int((moment.share > 0).sum())
    if groups >= FEWEST_GROUPS:
        centred = moment.form - moment.share @ moment.form / moment.share.sum()
        own = np.sqrt(variance_of_forms(moment.share, moment.form))
        shrunk = np.divide(np.nan_to_num(moment.data_se), own, out=np.zeros(n), where=own > 0)  # less the probes' noise
        steps = np.sqrt(groups / (groups - 1)) * moment.share[:, None] * centred * shrunk
        draws = draws + rng.standard_normal((_DRAWS, groups)) @ steps
    places = _places(draws + last)
    probability = np.stack([(places == place).mean(0) for place in range(1, n + 1)], axis=1)
    low, high = (np.quantile(places, level, axis=0, method="nearest").astype(float) for level in (0.025, 0.975))
    known = {
        "rank": _places(moment.value[None] + last)[0].astype(float), "rank_low": low, "rank_high": high,
    }  # fmt: skip
    found = {name: ("block", np.where(rounded, values, np.nan)) for name, values in known.items()}
    probability = np.where(rounded[:, None], probability, np.nan)
    return xr.Dataset(found | {"rank_probability": (("block", "place"), probability)})


def _places(values: Array) -> NDArray[np.int64]:
    """From the largest, from 1, ``(n, block)``."""
    order = np.argsort(-values, axis=1, kind="stable")
    places = np.empty(values.shape, dtype=np.int64)
    np.put_along_axis(places, order, np.arange(1, values.shape[1] + 1)[None], axis=1)
    return places


def _measured(grouped: GroupedCurvature, op: CurvatureOperator, partition: Partition, change: Tensor) -> xr.Dataset:
    """The Taylor expansion of what rounding does to the loss, and the loss itself."""
    n = len(partition.names)
    apart = torch.zeros(len(change), n, dtype=op.dtype, device=op.device)
    for block, span in partition.spans:
        apart[span, block] = change[span]
    together = torch.cat([apart, change[:, None]], dim=1)
    share = grouped.shares
    forms = np.zeros((len(share), n + 1))
    for group, product in grouped.matmat_by_group(together):
        forms[group] += inner_products(together, product).cpu().numpy() / 2
    gradient = op.gradient_without_regulariser()  # as the other two, which are of the data alone
    linear = inner_products(together, gradient[:, None].expand(-1, n + 1)).cpu().numpy()
    losses = np.zeros((len(share), n + 1))
    start = _by_group(grouped, op.batch_losses())
    for block, offset in enumerate(together.T):
        losses[:, block] = _by_group(grouped, op.batch_losses(offset)) - start
    found: dict[str, Any] = {"linear": ("block", linear[:n]), "linear_all": linear[n]}
    for name, of_groups in (("quadratic", forms), ("loss_increase", losses)):
        value = of_groups.sum(0)
        each = of_groups / share[:, None]
        se = np.sqrt(variance_of_forms(share, each))
        found |= {name: ("block", value[:n]), f"{name}_data_se": ("block", se[:n])}
        found |= {f"{name}_all": value[n], f"{name}_all_data_se": se[n]}
    return xr.Dataset(found)


def _by_group(grouped: GroupedCurvature, of_batches: Array) -> Array:
    if len(grouped.ends) == 1:
        return np.array([of_batches.sum()])
    found = np.zeros(len(grouped.ends))
    np.add.at(found, grouped.group_of_batch(), of_batches)
    return found


__all__ = ["columns", "rounding_effects"]

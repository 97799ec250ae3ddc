"""Traces of the Hessian's blocks in several networks, for a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from pnanalysis.analyses.blocks import network_blocks, stack
from pnanalysis.analyses.network_blocks import BlockOptions
from pnanalysis.analyses.requests import each_network, read_request
from pnanalysis.arrays import Array
from pnanalysis.inputs.selection import Selection
from pnanalysis.spectra.data_error import variance_of_forms
from pnanalysis.terminal.progress import progress_bar

#: Options of :func:`pnanalysis.blocks` where none are given.
BLOCKS = {"n": 1024, "n_hvp": 100}
#: Options that a comparison has no use for.
_OTHERS = {"diagonal", "spectra", "n_spectrum", "bits"}


@dataclass(frozen=True)
class BlockRequest:
    """The blocks to compare: examples, and options of :func:`pnanalysis.blocks`."""

    split: str
    n: int | None
    batch_size: int
    options: BlockOptions

    @classmethod
    def of(cls, requested: Mapping[str, Any], seed: int) -> BlockRequest:
        """From keyword arguments that replace :data:`BLOCKS`, checked before any work begins.

        Raises
        ------
        PnError
        """
        known = {entry.name for entry in fields(BlockOptions)} - _OTHERS
        split, n, batch_size, options = read_request(requested, BLOCKS, seed, known, "blocks")
        return cls(split, n, batch_size, BlockOptions(**options))

    def differences(
        self, selection: Selection, networks: Mapping[str, nn.Module], device: torch.device, progress: bool
    ) -> xr.Dataset:
        """Traces of all blocks along ``checkpoint``, and the differences of all pairs along ``other``."""
        found: dict[object, xr.Dataset] = {}
        for item, network, loss, batches in each_network(
            selection, networks, self.split, self.n, self.batch_size, self.options.seed, device
        ):
            with progress_bar(f"{item.label}: blocks", None, progress) as advance:
                found[item.key] = network_blocks(
                    network, loss, batches, self.options, label=item.label, device=device, advance=advance
                )
        together = stack([found[item.key] for item in selection], selection.labels)
        return block_differences(together, selection.shares_examples)


def block_differences(ds: xr.Dataset, shared_examples: bool = True) -> xr.Dataset:
    r"""Traces of blocks, and how they differ between all pairs of networks.

    Parameters
    ----------
    ds : xarray.Dataset
        Kind ``blocks``, along ``checkpoint``.
    shared_examples : bool
        Whether all are of the same examples in the same groups: what these do to both of a pair then cancels.
        The sign vectors must be the same, too, as they are for one ``seed``.

    Returns
    -------
    xarray.Dataset
        ``block_trace`` (checkpoint, block) and ``block_trace_difference`` (checkpoint, other, block), checkpoint minus
        other, each with its standard errors.

    Notes
    -----
    All networks are multiplied with the same sign vectors. What one of them adds to the traces of both of a pair is a
    pair of numbers, independent of those of the others, so that the variance of the difference of two means is

    .. math:: \sum_a (d_{ia} - d_{ja})^2, \qquad d_{ia} = (s_{ia} - \bar s_i) / \sqrt{q_i (q_i - 1)},

    with the number :math:`s_{ia}` of network :math:`i` and sign vector :math:`a`, and 0 where it took fewer of them.
    For networks of which the second is a small step away, hardly any of the errors of the two is left.
    """
    names = {f"trace{end}": f"block_trace{end}" for end in ("", "_se", "_probe_se", "_data_se", "_low", "_high")}
    table = ds[list(names)].rename(names).drop_vars("other", errors="ignore")
    trace, data_se = (ds[f"trace{end}"].values for end in ("", "_data_se"))
    difference = trace[:, None] - trace[None, :]
    apart = np.nan_to_num(ds.trace_deviation.transpose("probe", "checkpoint", "block").values)
    probes = np.sqrt(np.square(apart[:, :, None] - apart[:, None, :]).sum(0))
    probes = np.where(np.isnan(difference), np.nan, probes)
    examples = np.hypot(data_se[:, None], data_se[None, :])
    if shared_examples:
        k = len(trace)
        for i in range(k):
            for j in range(k):
                examples[i, j] = _paired(ds, i, j)
    total = np.hypot(probes, np.nan_to_num(examples))
    on = np.arange(len(trace))
    difference[on, on], total[on, on] = 0.0, 0.0
    dims = ("checkpoint", "other", "block")
    return table.assign(
        block_trace_difference=(dims, difference), block_trace_difference_se=(dims, total),
        block_trace_difference_probe_se=(dims, probes), block_trace_difference_data_se=(dims, examples),
    ).drop_attrs(deep=False).reset_coords(drop=True).assign_coords(block=ds.block.values)  # fmt: skip


def _paired(ds: xr.Dataset, i: int, j: int) -> Array:
    """Standard errors of differences for the choice of examples, group by group, ``(block,)``."""
    share = ds.group_share.isel(checkpoint=i).values
    keep = np.isfinite(share)
    forms = [ds.trace_form.isel(checkpoint=place).values[keep] for place in (i, j)]
    if keep.sum() != np.isfinite(ds.group_share.isel(checkpoint=j).values).sum():
        return np.asarray(np.hypot(ds.trace_data_se.isel(checkpoint=i), ds.trace_data_se.isel(checkpoint=j)))
    return np.asarray(np.sqrt(variance_of_forms(share[keep], forms[0] - forms[1])))

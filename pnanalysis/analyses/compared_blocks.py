"""Traces and Frobenius norms of the Hessian's blocks in several networks, for a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from pnanalysis.analyses.blocks import network_blocks, stack
from pnanalysis.analyses.network_blocks import BlockOptions
from pnanalysis.analyses.requests import read_request, settings_of
from pnanalysis.analyses.spectrum_cache import SpectrumCache
from pnanalysis.analyses.stacking import independent_differences
from pnanalysis.arrays import Array
from pnanalysis.errors import PnError
from pnanalysis.inputs.selection import Selection
from pnanalysis.spectra.data_error import variance_of_forms
from pnanalysis.terminal.progress import progress_bar

#: Options of :func:`pnanalysis.blocks` where none are given.
BLOCKS = {"n": 1024, "n_hvp": 100}
#: Options that a comparison has no use for.
_OTHERS = {"diagonal", "spectra", "n_spectrum", "bits", "quantised"}
#: Numbers of single blocks, and what they are called in a comparison.
_OF_BLOCKS = {"trace": "block_trace", "frobenius_norm": "block_norm"}
#: Numbers of the network.
_OF_NETWORK = ("network_off_diagonal_share", "trace_concentration")
_ENDS = ("", "_se", "_probe_se", "_data_se", "_low", "_high")


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
        refused = sorted(_OTHERS & set(requested))
        if refused:
            raise PnError(
                f"compare takes no option {refused[0]!r} for its blocks, of which it tests traces and norms; for what "
                "it gives of each network, call pn.blocks on all of them"
            )
        known = {entry.name for entry in fields(BlockOptions)} - _OTHERS
        split, n, batch_size, options = read_request(requested, BLOCKS, seed, known, "blocks")
        return cls(split, n, batch_size, BlockOptions(**options))

    def differences(
        self, selection: Selection, networks: Mapping[str, nn.Module], device: torch.device, progress: bool,
        state: Path | None = None,
    ) -> xr.Dataset:  # fmt: skip
        """Traces and norms of all blocks along ``checkpoint``, and the differences of all pairs along ``other``."""
        found: dict[object, xr.Dataset] = {}
        with SpectrumCache.held(state, settings_of(self, selection)) as cache:
            for item, network, loss, batches, _ in selection.measurable(
                self.split, self.n, self.batch_size, self.options.seed, device, networks=networks
            ):
                with progress_bar(f"{item.label}: blocks", None, progress) as advance:
                    found[item.key] = network_blocks(
                        network, loss, batches, self.options, label=item.label, device=device, advance=advance,
                        cache=None if cache is None else cache.of(network, batches),
                    )  # fmt: skip
        together = stack([found[item.key] for item in selection], selection.labels)
        return block_differences(together, selection.shares_examples)


def block_differences(ds: xr.Dataset, shared_examples: bool = True) -> xr.Dataset:
    r"""Traces and Frobenius norms of blocks, and how they differ between all pairs of networks.

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
        ``block_trace`` and ``block_norm`` (checkpoint, block), and ``NAME_difference`` (checkpoint, other, block),
        checkpoint minus other, each with its standard errors. ``network_off_diagonal_share`` and
        ``trace_concentration`` (checkpoint) and their differences, with the errors of independent numbers, which are
        too large where the two have much in common.

    Notes
    -----
    All networks are multiplied with the same sign vectors. What one of them adds to the traces of both of a pair is a
    pair of numbers, independent of those of the others, so that the variance of the difference of two means is

    .. math:: \sum_a (d_{ia} - d_{ja})^2, \qquad d_{ia} = (s_{ia} - \bar s_i) / \sqrt{q_i (q_i - 1)},

    with the number :math:`s_{ia}` of network :math:`i` and sign vector :math:`a`, and 0 where it took fewer of them.
    For networks of which the second is a small step away, hardly any of the errors of the two is left. Norms come from
    means over pairs of sign vectors, of which the jackknife's deviations take the place of :math:`d_{ia}`: see
    :func:`pnanalysis.spectra.block_energies.deviations`.
    """
    variables: dict[str, Any] = {}
    for name, compared in _OF_BLOCKS.items():
        variables |= {
            f"{compared}{end}": (("checkpoint", "block"), ds[f"{name}{end}"].values)
            for end in _ENDS
            if f"{name}{end}" in ds
        }
        if f"{name}_deviation" in ds:
            variables |= _differences(ds, name, compared, shared_examples)
    for name in _OF_NETWORK:
        if name in ds:
            variables |= independent_differences(name, ds[name].values, ds[f"{name}_se"].values)
    return xr.Dataset(variables, {"block": ds.block.values})


def _differences(ds: xr.Dataset, name: str, compared: str, shared_examples: bool) -> dict[str, Any]:
    """Of one number of all blocks, between all pairs."""
    value, data_se = (ds[f"{name}{end}"].values for end in ("", "_data_se"))
    difference = value[:, None] - value[None, :]
    apart = np.nan_to_num(ds[f"{name}_deviation"].transpose("probe", "checkpoint", "block").values)
    probes = np.sqrt(np.square(apart[:, :, None] - apart[:, None, :]).sum(0))
    probes = np.where(np.isnan(difference), np.nan, probes)
    examples = np.hypot(data_se[:, None], data_se[None, :])
    on = np.arange(len(value))
    if shared_examples:
        for i in range(len(value)):
            for j in range(len(value)):
                examples[i, j] = _paired(ds, name, i, j)
    total = np.hypot(probes, np.nan_to_num(examples))
    difference[on, on], total[on, on] = 0.0, 0.0
    dims, key = ("checkpoint", "other", "block"), f"{compared}_difference"
    return {
        key: (dims, difference), f"{key}_se": (dims, total), f"{key}_probe_se": (dims, probes),
        f"{key}_data_se": (dims, examples),
    }  # fmt: skip


def _paired(ds: xr.Dataset, name: str, i: int, j: int) -> Array:
    """Standard errors of differences for the choice of examples, group by group, ``(block,)``."""
    share = ds.group_share.isel(checkpoint=i).values
    keep = np.isfinite(share)
    forms = [ds[f"{name}_form"].isel(checkpoint=place).values[keep] for place in (i, j)]
    if keep.sum() != np.isfinite(ds.group_share.isel(checkpoint=j).values).sum():
        own = ds[f"{name}_data_se"]
        return np.asarray(np.hypot(own.isel(checkpoint=i), own.isel(checkpoint=j)))
    return np.asarray(np.sqrt(variance_of_forms(share[keep], forms[0] - forms[1])))

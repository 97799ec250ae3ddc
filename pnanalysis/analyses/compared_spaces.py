"""The spaces of the largest eigenvectors of several networks, for a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import xarray as xr
from torch import nn

from pnanalysis.analyses.eigenpairs import network_eigenpairs
from pnanalysis.analyses.network_eigenpairs import EigenpairOptions, Found, overlaps
from pnanalysis.analyses.requests import each_network, read_request
from pnanalysis.inputs.selection import Selection
from pnanalysis.terminal.progress import progress_bar

#: Options of :func:`pnanalysis.eigenpairs` where none are given.
EIGENPAIRS = {"n": 1024, "k": 10, "classes": False}


@dataclass(frozen=True)
class EigenpairRequest:
    """The spaces to compare: examples, and options of :func:`pnanalysis.eigenpairs`."""

    split: str
    n: int | None
    batch_size: int
    options: EigenpairOptions

    @classmethod
    def of(cls, requested: Mapping[str, Any], seed: int) -> EigenpairRequest:
        """From keyword arguments that replace :data:`EIGENPAIRS`, checked before any work begins.

        Raises
        ------
        PnError
        """
        known = {entry.name for entry in fields(EigenpairOptions)}
        split, n, batch_size, options = read_request(requested, EIGENPAIRS, seed, known, "eigenpairs")
        return cls(split, n, batch_size, EigenpairOptions(**options))

    def overlaps(
        self, selection: Selection, networks: Mapping[str, nn.Module], device: torch.device, progress: bool
    ) -> xr.Dataset:
        """Overlaps of all pairs of networks, dims ``checkpoint`` and ``other``."""
        found: dict[object, Found] = {}
        for item, network, loss, batches in each_network(
            selection, networks, self.split, self.n, self.batch_size, self.options.seed, device
        ):
            with progress_bar(f"{item.label}: eigenvectors", None, progress) as advance:
                found[item.key] = network_eigenpairs(
                    network, loss, batches, self.options, label=item.label, device=device, advance=advance
                )
        ds = xr.Dataset(overlaps([found[item.key] for item in selection], selection.labels))
        return ds.assign_attrs(n_pairs=self.options.k)

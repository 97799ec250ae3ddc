"""Leading eigenvalues and the spaces of their vectors in several networks, for a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from pnanalysis.analyses.eigenpair_halves import difference_se
from pnanalysis.analyses.eigenpair_numbers import jackknife_se
from pnanalysis.analyses.eigenpairs import network_eigenpairs
from pnanalysis.analyses.eigenspace_overlaps import overlaps
from pnanalysis.analyses.network_eigenpairs import EigenpairOptions, Found
from pnanalysis.analyses.requests import read_request, settings_of
from pnanalysis.analyses.stacking import independent_differences
from pnanalysis.analyses.work_folder import WorkFolder
from pnanalysis.arrays import Array
from pnanalysis.inputs.selection import Selection
from pnanalysis.spectra.data_error import variance_of_forms
from pnanalysis.terminal.progress import progress_bar

#: Options of :func:`pnanalysis.eigenpairs` where none are given.
EIGENPAIRS = {"n": 1024, "k": 10, "classes": False}
_Z95 = 1.959963984540054


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

    def differences(
        self, selection: Selection, networks: Mapping[str, nn.Module], device: torch.device, progress: bool,
        state: Path | None = None,
    ) -> xr.Dataset:  # fmt: skip
        """Eigenvalues along ``checkpoint``, and differences and overlaps of all pairs along ``other``."""
        found: dict[object, Found] = {}
        with WorkFolder.held(state, settings_of(self, selection)) as cache:
            for item, network, loss, batches, _ in selection.measurable(
                self.split, self.n, self.batch_size, self.options.seed, device, networks=networks
            ):
                with progress_bar(f"{item.label}: eigenvectors", None, progress) as advance:
                    found[item.key] = network_eigenpairs(
                        network, loss, batches, self.options, label=item.label, device=device, advance=advance,
                        folder=None if cache is None else cache.of(network, batches).file("").with_suffix(""),
                    )  # fmt: skip
        every = [found[item.key] for item in selection]
        ds = value_differences([one.dataset for one in every], selection.shares_examples)
        ds = ds.assign(overlaps(every, selection.labels, selection.shares_examples))
        return ds.assign_attrs(n_pairs=self.options.k)


def value_differences(found: Sequence[xr.Dataset], shared_examples: bool = True) -> xr.Dataset:
    """Eigenvalues of networks, and how they differ between all pairs, rank by rank.

    Parameters
    ----------
    found : sequence of xarray.Dataset
        Kind ``eigenpairs``, of a network each.
    shared_examples : bool
        Whether all are of the same examples in the same groups: what another choice of these would do to both of a pair
        then cancels.

    Returns
    -------
    xarray.Dataset
        ``eigenvalue`` (checkpoint, pair) and ``eigenvalue_difference`` (checkpoint, other, pair), checkpoint minus
        other. An interval, ``NAME_low`` to ``NAME_high``, is that of the bounds of the eigenvalues, widened by 1.96
        standard errors ``NAME_data_se`` for the choice of examples: by the curvature of each group of examples along
        the vectors, to first order. ``gradient_top`` (checkpoint) and its differences: of the same examples, by half
        samples where both have them, which move gradients and spaces, or by leaving out the same groups of examples,
        with the spaces as they are.
    """
    k, n = len(found), max(ds.sizes["pair"] for ds in found)
    rows = [ds.reindex(pair=np.arange(1, n + 1)) for ds in found]
    value, bound = (np.stack([ds[name].values for ds in rows]) for name in ("value", "value_bound"))
    unknown = np.full(n, np.nan)
    data_se = np.stack([ds.value_data_se.values if "value_data_se" in ds else unknown for ds in rows])
    between = np.hypot(data_se[:, None], data_se)
    if shared_examples:
        for i in range(k):
            for j in range(i):
                between[i, j] = between[j, i] = _paired(rows[i], rows[j], between[i, j])
    difference, bounds = value[:, None] - value, bound[:, None] + bound
    on = np.arange(k)
    bounds[on, on] = between[on, on] = np.where(np.isnan(difference[on, on]), np.nan, 0.0)
    each, pair = ("checkpoint", "pair"), ("checkpoint", "other", "pair")
    variables: dict[str, Any] = {}
    for name, dims, number, sure, se in (
        ("eigenvalue", each, value, bound, data_se), ("eigenvalue_difference", pair, difference, bounds, between),
    ):  # fmt: skip
        half = sure + _Z95 * np.nan_to_num(se)
        variables |= {
            name: (dims, number), f"{name}_data_se": (dims, se), f"{name}_low": (dims, number - half),
            f"{name}_high": (dims, number + half),
        }  # fmt: skip
    if all("gradient_top" in ds for ds in found):
        top, se = (np.array([float(ds[f"gradient_top{end}"]) for ds in found]) for end in ("", "_se"))
        variables |= independent_differences("gradient_top", top, se)
        if shared_examples:
            error = variables["gradient_top_difference_se"][1]
            for i in range(k):
                for j in range(i):
                    error[i, j] = error[j, i] = _paired_gradient(found[i], found[j], error[i, j])
    return xr.Dataset(variables, {"pair": np.arange(1, n + 1)})


def _paired(a: xr.Dataset, b: xr.Dataset, independent: Array) -> Array:
    """Standard errors of differences for the choice of examples, group by group; as they are where groups differ."""
    if not ("value_form" in a and "value_form" in b and np.array_equal(a.group_weight, b.group_weight)):
        return independent
    forms = a.value_form.transpose("group", "pair").values - b.value_form.transpose("group", "pair").values
    return np.asarray(np.sqrt(variance_of_forms(a.group_weight.values, forms)))


def _paired_gradient(a: xr.Dataset, b: xr.Dataset, independent: float) -> float:
    """Standard error of the difference of the gradients' parts for the choice of the same examples."""
    for name, error in (
        ("gradient_top_half", difference_se), ("gradient_top_without", lambda one, other: jackknife_se(one - other)),
    ):  # fmt: skip
        if name in a and name in b and a[name].shape == b[name].shape:
            return error(a[name].values, b[name].values)
    return independent

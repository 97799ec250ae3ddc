"""Local learning coefficients of several networks, with the paired errors of differences, for a comparison."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from pnanalysis.analyses.learning_coefficient import ChainOptions, network_learning_coefficient
from pnanalysis.analyses.requests import read_request, settings_of
from pnanalysis.analyses.work_folder import WorkFolder
from pnanalysis.errors import PnError
from pnanalysis.inputs.selection import Selection
from pnanalysis.sampling.influence import standard_error

#: Options of :func:`pnanalysis.learning_coefficient` where none are given.
LEARNING_COEFFICIENT: dict[str, Any] = {"n": 1024}
#: Options of which a comparison takes a single value, and what they are called in a grid.
_SINGLE = {"step_size": "step_sizes", "localization": "localizations"}


@dataclass(frozen=True)
class LearningCoefficientRequest:
    """The coefficients to compare: examples, and options of :func:`pnanalysis.learning_coefficient`."""

    split: str
    n: int | None
    batch_size: int
    options: ChainOptions

    @classmethod
    def of(cls, requested: Mapping[str, Any], seed: int) -> LearningCoefficientRequest:
        """From keyword arguments that replace :data:`LEARNING_COEFFICIENT`, checked before any work begins.

        Raises
        ------
        PnError
        """
        known = {entry.name for entry in fields(ChainOptions)} - set(_SINGLE.values()) | set(_SINGLE)
        split, n, batch_size, options = read_request(
            requested, LEARNING_COEFFICIENT, seed, known, "learning coefficients"
        )
        for name, several in _SINGLE.items():
            if name in options:
                if np.ndim(options[name]):
                    raise PnError(f"compare takes one {name}; calibrate with learning_coefficient first")
                options[several] = (options.pop(name),)
        return cls(split, n, batch_size, ChainOptions(**options))

    def differences(
        self, selection: Selection, networks: Mapping[str, nn.Module], device: torch.device, progress: bool,
        state: Path | None = None,
    ) -> xr.Dataset:  # fmt: skip
        """Coefficients along ``checkpoint``, and the differences of all pairs along ``other``."""
        found: dict[object, xr.Dataset] = {}
        with WorkFolder.held(state, settings_of(self, selection)) as cache:
            for item, network, loss, batches, _ in selection.measurable(
                self.split, self.n, self.batch_size, self.options.seed, device, networks=networks
            ):
                ds = network_learning_coefficient(
                    network, loss, batches, self.options, label=item.label, progress=progress,
                    cache=None if cache is None else cache.of(network, batches),
                ).squeeze(["localization", "step_size"], drop=True)  # fmt: skip
                if not float(ds.converged):
                    warnings.warn(
                        f"the chains of {item.label} have not converged (R-hat {float(ds.rhat):.3g}, "
                        f"{float(ds.effective_draws):.0f} effective draws), so that it has no learning coefficient; "
                        "look at them with learning_coefficient",
                        stacklevel=2,
                    )
                found[item.key] = ds
        return coefficient_differences([found[item.key] for item in selection], selection.shares_examples)


def coefficient_differences(found: Sequence[xr.Dataset], shared_examples: bool = True) -> xr.Dataset:
    """Coefficients of networks, and how they differ between all pairs.

    Parameters
    ----------
    found : sequence of xarray.Dataset
        Of a network each, without dims of settings.
    shared_examples : bool
        Whether all are of the same examples: what another choice of these would do to both of a pair then cancels.

    Returns
    -------
    xarray.Dataset
        ``learning_coefficient`` (checkpoint) and ``learning_coefficient_difference`` (checkpoint, other), checkpoint
        minus other, each with its standard error. That of a difference adds the errors of the chains, and takes that
        of examples from the differences of their influences.
    """
    value, se, chain_se, batch_se = (
        np.array([float(ds.get(f"learning_coefficient{end}", 0.0)) for ds in found])
        for end in ("", "_se", "_chain_se", "_batch_se")
    )
    of_chains = np.hypot(chain_se, batch_se)
    k = len(found)
    difference_se = np.zeros((k, k))
    for i in range(k):
        for j in range(i):
            examples = _error_of_examples(found[i], found[j], shared_examples)
            error = math.hypot(of_chains[i], of_chains[j], examples)
            difference_se[i, j] = difference_se[j, i] = error
    pair = ("checkpoint", "other")
    return xr.Dataset(
        {
            "learning_coefficient": ("checkpoint", value), "learning_coefficient_se": ("checkpoint", se),
            "learning_coefficient_difference": (pair, value[:, None] - value[None, :]),
            "learning_coefficient_difference_se": (pair, difference_se),
        }
    )  # fmt: skip


def _error_of_examples(a: xr.Dataset, b: xr.Dataset, shared: bool) -> float:
    """Standard error of the difference of two coefficients for the choice of examples; 0 where none was asked for."""
    names = "influence", "second_influence"
    if shared and all(name in ds for ds in (a, b) for name in names) and a.influence.shape == b.influence.shape:
        return standard_error(*(a[name].values - b[name].values.astype(float) for name in names))
    own, other = float(a.learning_coefficient_data_se), float(b.learning_coefficient_data_se)
    return math.hypot(*np.nan_to_num([own, other]))

"""Sharpness of several networks, with the paired errors of differences, for a comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from pnanalysis.analyses.network_sharpness import NetworkSharpness, SharpnessOptions, network_sharpness
from pnanalysis.analyses.requests import read_request, settings_of
from pnanalysis.analyses.work_folder import WorkFolder
from pnanalysis.estimates import mean_and_se
from pnanalysis.inputs.selection import Selection
from pnanalysis.terminal.progress import progress_bar

#: Options of :func:`pnanalysis.sharpness` where none are given.
SHARPNESS: dict[str, Any] = {"n": 1024, "radii": {"adaptive": 0.5}, "second_order": False}


@dataclass(frozen=True)
class SharpnessRequest:
    """The sharpness to compare: examples, and options of :func:`pnanalysis.sharpness`."""

    split: str
    n: int | None
    batch_size: int
    options: SharpnessOptions

    @classmethod
    def of(cls, requested: Mapping[str, Any], seed: int) -> SharpnessRequest:
        """From keyword arguments that replace :data:`SHARPNESS`, checked before any work begins.

        Raises
        ------
        PnError
        """
        known = {entry.name for entry in fields(SharpnessOptions) if entry.init}
        split, n, batch_size, options = read_request(requested, SHARPNESS, seed, known, "sharpness")
        if "measures" in options:
            options["measures"] = tuple(options["measures"])
        return cls(split, n, batch_size, SharpnessOptions(**options))

    def differences(
        self, selection: Selection, networks: Mapping[str, nn.Module], device: torch.device, progress: bool,
        state: Path | None = None,
    ) -> xr.Dataset:  # fmt: skip
        """Numbers along ``checkpoint``, and the differences of all pairs along ``other``.

        Of several neighbourhoods or radii, rises have a dim ``rise`` in front, with both in its labels.
        """
        found: dict[object, NetworkSharpness] = {}
        total = len(selection.distinct()) * self.options.n_steps_in_all
        with (
            progress_bar("sharpness", total, progress) as advance,
            WorkFolder.held(state, settings_of(self, selection)) as cache,
        ):
            for item, network, loss, batches, _ in selection.measurable(
                self.split, self.n, self.batch_size, self.options.seed, device, networks=networks
            ):
                found[item.key] = network_sharpness(
                    network, loss, batches, self.options, label=item.label, advance=advance,
                    cache=None if cache is None else cache.of(network, batches),
                )  # fmt: skip
        every = [found[item.key] for item in selection]
        worst, means = (
            {(kind, i): f"{kind} {radius:.3g}" for kind, radii in of.items() for i, radius in enumerate(radii)}
            for of in (self.options.worst, self.options.average)
        )
        kinds, several = list(self.options.worst), len(worst) > 1
        tables = []
        for kind, i in worst:
            at = kinds.index(kind), i
            of_rises = _table(every, "worst_rise", partial(_worst, at=at), partial(_worst_difference, at=at))
            of_means = _table(every, "mean_rise", partial(_mean, at=at), partial(_mean_difference, at=at))
            tables.append(of_rises.merge(of_means))
        ds = tables[0]
        if several:
            places = {"rise": list(worst.values()), "mean_radius": ("rise", list(means.values()))}
            ds = xr.concat(tables, "rise").assign_coords(places)
        ds = ds.merge(_table(every, "relative_flatness", _flat, _flat_difference))
        if several:
            return ds
        (kind, radii), (_, averages) = (next(iter(of.items())) for of in (self.options.worst, self.options.average))
        return ds.assign_attrs(
            sharpness_neighbourhood=kind, sharpness_radius=radii[0], sharpness_average_radius=averages[0]
        )


#: A number with its standard error; of a network, or the difference of two.
_Number = tuple[float, float]


def _table(
    every: Sequence[NetworkSharpness], name: str, value: Callable[[NetworkSharpness], _Number],
    error: Callable[[NetworkSharpness, NetworkSharpness], _Number],
) -> xr.Dataset:  # fmt: skip
    """A number of all networks, and its differences; nothing where none has it."""
    numbers = np.array([value(one) for one in every])
    if np.isnan(numbers).all():
        return xr.Dataset()
    errors = [[(0.0, 0.0) if a is b else error(a, b) for b in every] for a in every]
    difference, se = np.moveaxis(np.array(errors), -1, 0)
    pair = ("checkpoint", "other")
    return xr.Dataset(
        {
            name: ("checkpoint", numbers[:, 0]), f"{name}_se": ("checkpoint", numbers[:, 1]),
            f"{name}_difference": (pair, difference), f"{name}_difference_se": (pair, se),
        }
    )  # fmt: skip


def _worst(one: NetworkSharpness, at: tuple[int, int]) -> _Number:
    return (math.nan, math.nan) if one.rises is None else mean_and_se(one.rises.found[at])


def _worst_difference(a: NetworkSharpness, b: NetworkSharpness, at: tuple[int, int]) -> _Number:
    assert a.rises is not None
    assert b.rises is not None
    first, second = a.rises.found[at], b.rises.found[at]
    return mean_and_se(first - second) if len(first) == len(second) else (first.mean() - second.mean(), math.nan)


def _mean(one: NetworkSharpness, at: tuple[int, int]) -> _Number:
    if one.averages is None:
        return math.nan, math.nan
    return float(one.averages.mean[at]), float(one.averages.errors()[0][at])


def _mean_difference(a: NetworkSharpness, b: NetworkSharpness, at: tuple[int, int]) -> _Number:
    assert a.averages is not None
    assert b.averages is not None
    if a.averages.by_example.shape != b.averages.by_example.shape:
        return _mean(a, at)[0] - _mean(b, at)[0], math.hypot(_mean(a, at)[1], _mean(b, at)[1])
    change = a.averages.minus(b.averages)
    return float(change.mean[at]), float(change.errors()[0][at])


def _flat(one: NetworkSharpness) -> _Number:
    return (math.nan, math.nan) if one.flatness is None else (one.flatness.value, one.flatness.se)


def _flat_difference(a: NetworkSharpness, b: NetworkSharpness) -> _Number:
    one, other = a.flatness, b.flatness
    if one is None or other is None:
        return math.nan, math.nan
    data_se = math.hypot(one.data_se, other.data_se)
    if len(one.influence.weight) == len(other.influence.weight):
        data_se = one.influence.minus(other.influence).se
    return one.value - other.value, math.hypot(one.probe_se, other.probe_se, data_se)

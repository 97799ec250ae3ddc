"""Statistics of a layer's activations, accumulated as batches stream by, and the dataset that they form."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pnanalysis.activations.axis_tracker import Known
from pnanalysis.activations.cluster_errors import CumulativeFractions, ExampleMoments
from pnanalysis.activations.functions import Activation
from pnanalysis.activations.quantile_sketch import QuantileSketch
from pnanalysis.arrays import Array
from pnanalysis.checks import at_least
from pnanalysis.errors import PnError

PERCENTILES = (2.0, 25.0, 50.0, 75.0, 98.0)
MARGIN = 0.05  # distance from an asymptote up to which an activation counts as saturated
_TABLE_PER_EXAMPLE = 1 << 10  # numbers that CumulativeFractions allocates per example, roughly
_NUMBERS_AT_A_TIME = 1 << 20  # bounds temporary memory, and keeps it in the cache

Variables = dict[str, tuple[tuple[str, ...], Array | float]]


@dataclass(frozen=True)
class Measures:
    """Which statistics to compute; see :func:`pnanalysis.saturation`."""

    percentiles: tuple[float, ...] = PERCENTILES
    bins: int = 100
    saturation_bins: int = 10
    per_unit: bool = False
    exact_limit: int = 4_000_000

    def __post_init__(self) -> None:
        valid = all(isinstance(level, Real) and 0 <= float(level) <= 100 for level in self.percentiles)
        if not self.percentiles or not valid:
            given = ", ".join(map(str, self.percentiles)) or "none"
            raise PnError(f"percentiles must lie between 0 and 100, got {given}")
        at_least(1, bins=self.bins, saturation_bins=self.saturation_bins)


class LayerActivity:
    """Statistics of one layer after any number of batches, in memory that does not grow with their number.

    Parameters
    ----------
    activation : Activation
    measures : Measures
    bin_range : (float, float)
        Lower and upper end of the histogram; numbers outside only count in its total.
    """

    def __init__(self, activation: Activation, measures: Measures, bin_range: tuple[float, float]) -> None:
        self.activation = activation
        self.measures = measures
        self.bin_range = bin_range
        self.sketch = QuantileSketch(measures.exact_limit)
        self._fractions = CumulativeFractions()
        self._powers = ExampleMoments(cross=True)  # of x and x^2
        self._histogram, self._saturated, self._signal = ExampleMoments(), ExampleMoments(), ExampleMoments()
        self._unit_saturated, self._unit_signal = ExampleMoments(), ExampleMoments()
        self._active: Tensor | None = None  # for each unit, whether any example has activated it
        self.known = Known()

    def add(self, values: Tensor, known: Known = Known()) -> None:  # noqa: B008 (immutable)
        """Add activations (N, U, ...): examples, units, and positions at which a unit is applied.

        Statistics of units are left out if units are unknown in any batch, or not as many in each; standard errors if
        examples are unknown.
        """
        values = values.detach().flatten(2) if values.ndim > 2 else values.detach()[:, :, None]
        same = self._active is None or len(self._active) == values.shape[1]
        self.known = Known(self.known.units and known.units and same, self.known.examples and known.examples)
        for part in values.split(max(1, _NUMBERS_AT_A_TIME // max(values[0].numel(), _TABLE_PER_EXAMPLE))):
            self._add_part(part.contiguous())

    def _add_part(self, values: Tensor) -> None:
        n, _, n_positions = values.shape
        # squares in double precision: the standard deviation is a small difference of two large numbers
        double = values.view(n, -1).double()
        count = double.shape[1]
        self._powers.add(torch.stack([double.sum(1), double.square().sum(1)], dim=1), count)
        values = values.float()
        flat = values.view(n, -1)
        self.sketch.add(flat)
        self._fractions.add(flat)
        self._histogram.add(_bin_counts(flat, self.bin_range, self.measures.bins), count)
        saturated = self._is_saturated(values)
        unit_saturated = saturated.sum(2, dtype=torch.float64)
        self._saturated.add(unit_saturated.sum(1, keepdim=True), count)
        if self.known.units:
            active = (values > 0 if self.activation.rectifier else ~saturated).any(2).any(0)
            self._active = active if self._active is None else self._active | active
        by_unit = self.measures.per_unit and self.known.units
        if by_unit:
            self._unit_saturated.add(unit_saturated, n_positions)
        if self.activation.bounded:
            unit_signal = self._signal_sums(values)  # (N, 2, U)
            self._signal.add(unit_signal.sum(2), count)
            if by_unit:
                self._unit_signal.add(unit_signal.flatten(1), n_positions)

    def _is_saturated(self, values: Tensor) -> Tensor:
        """Whether each activation lies within the margin of an asymptote."""
        saturated = torch.zeros_like(values, dtype=torch.bool)
        for asymptote in (self.activation.low, self.activation.high):
            if isfinite(asymptote):
                saturated |= (values - asymptote).abs() <= MARGIN
        return saturated

    def _signal_sums(self, values: Tensor) -> Tensor:
        """Sums over positions from which the saturation measure follows, (N, 2, U).

        The measure is the sum over bins of the absolute value of the sum of scaled activations in the bin, divided by
        their number. All activations in a bin have one sign, so that this is the sum u of their absolute values;
        except in the middle one of an odd number of bins, whose sum v may have either sign. Without the middle bin in
        u, the measure is u + |v|, the larger of u + v and u - v. Both sums are returned, since which one is larger is
        known only at the end of the stream.
        """
        low, high = self.activation.low, self.activation.high
        scaled = (values - low) * (2 / (high - low)) - 1
        absolute = scaled.abs()
        if self.measures.saturation_bins % 2 == 0:
            sums = absolute.sum(2, dtype=torch.float64)
            return torch.stack([sums, sums], dim=1)
        middle = absolute < 1 / self.measures.saturation_bins
        signed = [torch.where(middle, sign * scaled, absolute).sum(2, dtype=torch.float64) for sign in (1, -1)]
        return torch.stack(signed, dim=1)

    @property
    def n(self) -> int:
        """Number of examples so far."""
        return self._powers.n

    def merge(self, other: LayerActivity) -> None:
        """Add all examples of ``other``, which must have the same measures."""
        self.sketch.merge(other.sketch)
        self._fractions.merge(other._fractions)
        for name in ("_powers", "_histogram", "_saturated", "_signal"):
            getattr(self, name).merge(getattr(other, name))
        same = self._active is None or other._active is None or len(self._active) == len(other._active)
        self.known = Known(
            self.known.units and other.known.units and same, self.known.examples and other.known.examples
        )
        if other._active is not None and self.known.units:
            self._active = other._active if self._active is None else self._active | other._active
            self._unit_saturated.merge(other._unit_saturated)
            self._unit_signal.merge(other._unit_signal)

    def variables(self) -> Variables:
        """Every variable of the layer, as dims and values; NaN what is unknown, and no entries along ``unit``."""
        found: Variables = {}
        levels = np.asarray(self.measures.percentiles, dtype=np.float64) / 100
        for name, absolute in (("percentile", False), ("abs_percentile", True)):
            found[name] = (("quantile",), self.sketch.quantiles(levels, absolute))
            found[f"{name}_se"] = (("quantile",), self._quantile_se(levels, absolute))
        width = (self.bin_range[1] - self.bin_range[0]) / self.measures.bins
        found["histogram"] = (("bin",), self._histogram.mean() / width)
        found["histogram_se"] = (("bin",), self._histogram.standard_error() / width)
        found |= self._mean_and_std()
        has_asymptote = isfinite(self.activation.low) or isfinite(self.activation.high)
        known = 1.0 if has_asymptote else np.nan  # without an asymptote there is no saturation: NaN, not zero
        fraction, se = self._saturated.mean() * known, self._saturated.standard_error() * known
        found |= {"saturated_share": ((), fraction[0]), "saturated_share_se": ((), se[0])}
        measure, se = _saturation_measure(self._signal, 1)
        found |= {"saturation_measure": ((), measure[0]), "saturation_measure_se": ((), se[0])}
        found |= self._unit_variables(known)
        if not self.known.examples:
            found |= {name: (dims, value * np.nan) for name, (dims, value) in found.items() if name.endswith("_se")}
        if not self.are_numbers:  # they would count among the largest, and as not saturated
            found = {name: (dims, np.asarray(value) * np.nan) for name, (dims, value) in found.items()}
        return found

    @property
    def are_numbers(self) -> bool:
        """Whether no activation is NaN."""
        return not np.isnan(self._powers.mean()[0])

    def _unit_variables(self, known: float) -> Variables:
        if self._active is None or not self.known.units:
            nothing = np.zeros(0)
            of_units = ("unit_saturated_share", "unit_saturation_measure")
            found: Variables = {"dead_units": ((), np.nan), "n_units": ((), np.nan)}
            if self.measures.per_unit:
                found |= {f"{name}{end}": (("unit",), nothing) for name in of_units for end in ("", "_se")}
                found["unit_dead"] = (("unit",), nothing)
            return found
        dead = (~self._active).double().cpu().numpy()
        if not self.activation.rectifier and np.isnan(known):
            dead = dead * np.nan  # without asymptotes there is nothing to be stuck at
        found = {"dead_units": ((), dead.sum()), "n_units": ((), float(len(dead)))}
        if self.measures.per_unit:
            fraction, se = self._unit_saturated.mean() * known, self._unit_saturated.standard_error() * known
            found |= {"unit_saturated_share": (("unit",), fraction), "unit_saturated_share_se": (("unit",), se)}
            measure, se = _saturation_measure(self._unit_signal, len(dead))
            found |= {"unit_saturation_measure": (("unit",), measure), "unit_saturation_measure_se": (("unit",), se)}
            found["unit_dead"] = (("unit",), dead)
        return found

    def _quantile_se(self, levels: Array, absolute: bool) -> Array:
        """Woodruff's standard errors of the quantiles (see :class:`CumulativeFractions`)."""
        se = self._fractions.standard_error(levels, absolute)
        if np.isnan(se).any():  # a single example
            return se
        ends = np.clip(np.stack([levels - se, levels + se]), 0, 1)
        low, high = self.sketch.quantiles(ends.ravel(), absolute).reshape(2, -1)
        return (high - low) / 2

    def _mean_and_std(self) -> Variables:
        """Mean and standard deviation; the standard error of the latter by linearisation in the first two moments."""
        mean, square = self._powers.mean()
        covariance = self._powers.covariance()
        std = np.sqrt(max(square - mean**2, 0.0))
        gradient = np.array([-mean, 0.5]) / std if std > 0 else np.zeros(2)
        variances = covariance[0, 0], gradient @ covariance @ gradient
        mean_se, std_se = np.sqrt(np.maximum(variances, 0.0))
        return {"mean": ((), mean), "mean_se": ((), mean_se), "std": ((), std), "std_se": ((), std_se)}


def to_dataset(layers: Mapping[str, LayerActivity]) -> xr.Dataset:
    """The variables of all layers along ``layer``, padded with NaN to the largest number of units.

    Attributes: ``exact``, and the names of layers ``without_units``, ``without_examples`` and ``without_numbers``.
    """
    first = next(iter(layers.values()))
    by_layer = [layer.variables() for layer in layers.values()]
    n_units = max(int(np.nan_to_num(variables["n_units"][1])) for variables in by_layer)
    data = {}
    for name, (dims, _) in by_layer[0].items():
        rows = [np.asarray(variables[name][1]) for variables in by_layer]
        if "unit" in dims:
            rows = [np.pad(row, (0, n_units - len(row)), constant_values=np.nan) for row in rows]
        data[name] = (("layer", *dims), np.stack(rows))
    edges = np.linspace(*first.bin_range, first.measures.bins + 1)
    quantile = np.asarray(first.measures.percentiles, dtype=np.float64)
    coords: dict[str, Any] = {
        "layer": list(layers),
        "activation": ("layer", [layer.activation.name for layer in layers.values()]),
        "quantile": ("quantile", quantile, {"units": "%", "long_name": "percentile"}),
        "bin": ("bin", (edges[:-1] + edges[1:]) / 2, {"units": "1", "long_name": "activation"}),
    }
    if first.measures.per_unit:
        coords["unit"] = ("unit", np.arange(n_units))
    attrs = {
        "exact": all(layer.sketch.exact for layer in layers.values()),
        "without_units": [name for name, layer in layers.items() if not layer.known.units],
        "without_examples": [name for name, layer in layers.items() if not layer.known.examples],
        "without_numbers": [name for name, layer in layers.items() if not layer.are_numbers],
    }
    return xr.Dataset(data, coords=coords, attrs=attrs)


def warn_of_unknown(datasets: Iterable[xr.Dataset], stacklevel: int) -> None:
    """One warning about all layers of datasets (:func:`to_dataset`) of which something is unknown."""
    parts = list(datasets)
    units, examples, numbers = (
        list(dict.fromkeys(name for ds in parts for name in ds.attrs[key]))
        for key in ("without_units", "without_examples", "without_numbers")
    )
    messages = []
    if units:
        messages.append(f"units cannot be told from other axes in {_listed(units)}, so that dead units are left out")
    if examples:
        messages.append(
            f"examples cannot be told from other axes in {_listed(examples)}, so that standard errors are left out"
        )
    if numbers:
        messages.append(f"some activations of {_listed(numbers)} are NaN, so that nothing is known of these layers")
    if messages:
        warnings.warn(f"{'; '.join(messages)} (NaN)", stacklevel=stacklevel + 1)


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more layers" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def common_range(extremes: Sequence[tuple[Activation, float, float]]) -> tuple[float, float]:
    """One range of bins for all layers: an asymptote where there is one, else the smallest or largest value seen.

    Parameters
    ----------
    extremes : sequence of (Activation, float, float)
        Each layer's activation function, and its smallest and largest value.
    """
    low = min(activation.low if isfinite(activation.low) else smallest for activation, smallest, _ in extremes)
    high = max(activation.high if isfinite(activation.high) else largest for activation, _, largest in extremes)
    return low, high if high > low else low + 1.0


def _bin_counts(flat: Tensor, bin_range: tuple[float, float], bins: int) -> Tensor:
    """Counts in each bin by example, (N, bins); the last bin includes its upper edge, as in numpy."""
    low, high = bin_range
    inside = (flat >= low) & (flat <= high)
    key = ((flat.double() - low) * (bins / (high - low))).long().clamp_(0, bins - 1)
    # One more bin per example takes the numbers outside, and one bincount does all examples.
    key = torch.where(inside, key, bins) + torch.arange(len(flat), device=flat.device)[:, None] * (bins + 1)
    return torch.bincount(key.view(-1), minlength=len(flat) * (bins + 1)).view(len(flat), bins + 1)[:, :bins]


def _saturation_measure(moments: ExampleMoments, n: int) -> tuple[Array, Array]:
    """The larger mean of u + v and u - v (:meth:`LayerActivity._signal_sums`), and its standard error; (n,) each."""
    if not moments.n:  # no asymptotes to scale by
        return np.full(n, np.nan), np.full(n, np.nan)
    means, ses = moments.mean().reshape(2, n), moments.standard_error().reshape(2, n)
    return means.max(0), np.where(means[0] >= means[1], ses[0], ses[1])

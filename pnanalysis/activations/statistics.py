"""Statistics of a layer's activations that accumulate over batches, and the dataset they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from pnanalysis.activations.cluster_errors import ExampleMoments, FractionErrors
from pnanalysis.activations.hooks import Activation
from pnanalysis.activations.quantile_sketch import QuantileSketch
from pnanalysis.checks import at_least
from pnanalysis.errors import PnError

PERCENTILES = (2.0, 25.0, 50.0, 75.0, 98.0)
MARGIN = 0.05
_TABLE = 1 << 10  # numbers per example that the errors of percentiles need
_AT_A_TIME = 1 << 20  # numbers; bounds temporary memory, and keeps it in the processor's cache

Array = NDArray[np.float64]
Variables = dict[str, tuple[tuple[str, ...], Array | float]]


@dataclass(frozen=True)
class Measures:
    """What to measure; see :func:`pnanalysis.saturation`."""

    percentiles: tuple[float, ...] = PERCENTILES
    bins: int = 100
    saturation_bins: int = 10
    per_unit: bool = False
    exact_limit: int = 4_000_000

    def __post_init__(self) -> None:
        numbers = all(isinstance(level, Real) and 0 <= float(level) <= 100 for level in self.percentiles)
        if not self.percentiles or not numbers:
            raise PnError(f"percentiles lie between 0 and 100, got {', '.join(map(str, self.percentiles)) or 'none'}")
        at_least(1, bins=self.bins, saturation_bins=self.saturation_bins)


class LayerActivity:
    """Statistics of one layer after any number of batches, in memory that does not grow with them.

    Parameters
    ----------
    activation : Activation
    measures : Measures
    bin_range : (float, float)
        Outer borders of the histogram's bins; numbers outside count in its total only.
    """

    def __init__(self, activation: Activation, measures: Measures, bin_range: tuple[float, float]) -> None:
        self.activation = activation
        self.measures = measures
        self.bin_range = bin_range
        self.sketch = QuantileSketch(measures.exact_limit)
        self._fractions = FractionErrors()
        self._powers = ExampleMoments(cross=True)  # of x and x^2
        self._histogram, self._near, self._scaled = ExampleMoments(), ExampleMoments(), ExampleMoments()
        self._unit_near, self._unit_scaled = ExampleMoments(), ExampleMoments()
        self._active: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Add activations (N, U, ...): examples, units, and the places where a unit is applied."""
        values = values.detach().float().flatten(2) if values.ndim > 2 else values.detach().float()[:, :, None]
        for part in values.split(max(1, _AT_A_TIME // max(values[0].numel(), _TABLE))):
            self._add(part.contiguous())

    def _add(self, values: Tensor) -> None:
        n, _, n_places = values.shape
        flat = values.view(n, -1)
        count = flat.shape[1]
        self.sketch.add(flat)
        self._fractions.add(flat)
        sums = [flat.sum(1, dtype=torch.float64), flat.square().sum(1, dtype=torch.float64)]
        self._powers.add(torch.stack(sums, dim=1), count)
        self._histogram.add(_counts(flat, self.bin_range, self.measures.bins), count)
        near = self._near_asymptote(values)
        unit_near = near.sum(2, dtype=torch.float64)
        self._near.add(unit_near.sum(1, keepdim=True), count)
        active = values > 0 if self.activation.rectifier else ~near
        active = active.any(2).any(0)
        self._active = active if self._active is None else self._active | active
        if self.measures.per_unit:
            self._unit_near.add(unit_near, n_places)
        if self.activation.bounded:
            unit_scaled = self._signals(values)  # (N, 2, U)
            self._scaled.add(unit_scaled.sum(2), count)
            if self.measures.per_unit:
                self._unit_scaled.add(unit_scaled.flatten(1), n_places)

    def _near_asymptote(self, values: Tensor) -> Tensor:
        near = torch.zeros_like(values, dtype=torch.bool)
        for asymptote in (self.activation.low, self.activation.high):
            if isfinite(asymptote):
                near |= (values - asymptote).abs() <= MARGIN
        return near

    def _signals(self, values: Tensor) -> Tensor:
        """Sums over places of the parts of the bins' mean signals, (N, 2, U).

        All signals in a bin have its sign, except in the middle one of an odd number of bins, whose sum may have
        either. With u the sum of absolute signals in the other bins and v the sum in the middle one, the measure is
        the larger of the means of u + v and u - v.
        """
        low, high = self.activation.low, self.activation.high
        scaled = (values - low) * (2 / (high - low)) - 1
        plus = scaled.abs()
        if self.measures.saturation_bins % 2 == 0:
            sums = plus.sum(2, dtype=torch.float64)
            return torch.stack([sums, sums], dim=1)
        middle = plus < 1 / self.measures.saturation_bins
        signed = [torch.where(middle, sign * scaled, plus).sum(2, dtype=torch.float64) for sign in (1, -1)]
        return torch.stack(signed, dim=1)

    @property
    def n(self) -> int:
        """Number of examples so far."""
        return self._powers.n

    def merge(self, other: LayerActivity) -> None:
        """Add all examples of ``other``, which must have the same measures."""
        self.sketch.merge(other.sketch)
        self._fractions.merge(other._fractions)
        for name in ("_powers", "_histogram", "_near", "_scaled", "_unit_near", "_unit_scaled"):
            getattr(self, name).merge(getattr(other, name))
        if other._active is not None:
            self._active = other._active if self._active is None else self._active | other._active

    def measure(self) -> Variables:
        """Every variable of the layer with its own dims."""
        assert self._active is not None
        found: Variables = {}
        levels = np.asarray(self.measures.percentiles, dtype=np.float64) / 100
        for name, absolute in (("percentile", False), ("abs_percentile", True)):
            found[name] = (("quantile",), self.sketch.quantiles(levels, absolute))
            found[f"{name}_se"] = (("quantile",), self._quantile_errors(levels, absolute))
        width = (self.bin_range[1] - self.bin_range[0]) / self.measures.bins
        found["histogram"] = (("bin",), self._histogram.mean() / width)
        found["histogram_se"] = (("bin",), self._histogram.standard_error() / width)
        found |= self._spread()
        known = 1.0 if isfinite(self.activation.low) or isfinite(self.activation.high) else np.nan
        fraction, se = self._near.mean() * known, self._near.standard_error() * known
        found |= {"saturated_share": ((), fraction[0]), "saturated_share_se": ((), se[0])}
        value, se = _larger(self._scaled, 1)
        found |= {"saturation_measure": ((), value[0]), "saturation_measure_se": ((), se[0])}
        dead = (~self._active).double().cpu().numpy()
        found |= {"dead_units": ((), dead.sum()), "n_units": ((), float(len(dead)))}
        if self.measures.per_unit:
            fraction, se = self._unit_near.mean() * known, self._unit_near.standard_error() * known
            found |= {"unit_saturated_share": (("unit",), fraction), "unit_saturated_share_se": (("unit",), se)}
            value, se = _larger(self._unit_scaled, len(dead))
            found |= {"unit_saturation_measure": (("unit",), value), "unit_saturation_measure_se": (("unit",), se)}
            found["unit_dead"] = (("unit",), dead)
        return found

    def _quantile_errors(self, levels: Array, absolute: bool) -> Array:
        """Woodruff's standard errors of the quantiles."""
        se = self._fractions.at(levels, absolute)
        if np.isnan(se).any():
            return se
        ends = np.clip(np.stack([levels - se, levels + se]), 0, 1)
        low, high = self.sketch.quantiles(ends.ravel(), absolute).reshape(2, -1)
        return (high - low) / 2

    def _spread(self) -> Variables:
        """Mean and standard deviation; the error of the latter by linearisation in the first two moments."""
        mean, square = self._powers.mean()
        covariance = self._powers.covariance()
        std = np.sqrt(max(square - mean**2, 0.0))
        gradient = np.array([-mean, 0.5]) / std if std > 0 else np.zeros(2)
        variances = covariance[0, 0], gradient @ covariance @ gradient
        mean_se, std_se = np.sqrt(np.maximum(variances, 0.0))
        return {"mean": ((), mean), "mean_se": ((), mean_se), "std": ((), std), "std_se": ((), std_se)}


def to_dataset(layers: Mapping[str, LayerActivity]) -> xr.Dataset:
    """Layers side by side along ``layer``, units padded with NaN."""
    first = next(iter(layers.values()))
    by_layer = [layer.measure() for layer in layers.values()]
    units = max(int(variables["n_units"][1]) for variables in by_layer)
    data = {}
    for name, (dims, _) in by_layer[0].items():
        rows = [np.asarray(variables[name][1]) for variables in by_layer]
        if "unit" in dims:
            rows = [np.pad(row, (0, units - len(row)), constant_values=np.nan) for row in rows]
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
        coords["unit"] = ("unit", np.arange(units))
    return xr.Dataset(
        data, coords=coords, attrs={"exact": all(layer.sketch.exact for layer in layers.values()), "n": first.n}
    )


def common_range(ranges: Sequence[tuple[Activation, float, float]]) -> tuple[float, float]:
    """One range of bins for all layers: between asymptotes where there are any, else the range of outputs."""
    low = min(activation.low if isfinite(activation.low) else seen for activation, seen, _ in ranges)
    high = max(activation.high if isfinite(activation.high) else seen for activation, _, seen in ranges)
    return low, high if high > low else low + 1.0


def _counts(flat: Tensor, bin_range: tuple[float, float], bins: int) -> Tensor:
    """Counts in each bin per example, (N, bins); the last bin includes its upper border."""
    low, high = bin_range
    inside = (flat >= low) & (flat <= high)
    key = ((flat.double() - low) * (bins / (high - low))).long().clamp_(0, bins - 1)
    key = torch.where(inside, key, bins) + torch.arange(len(flat), device=flat.device)[:, None] * (bins + 1)
    return torch.bincount(key.view(-1), minlength=len(flat) * (bins + 1)).view(len(flat), bins + 1)[:, :bins]


def _larger(moments: ExampleMoments, n: int) -> tuple[Array, Array]:
    """The larger mean of u + v and u - v (see :meth:`LayerActivity._signals`), and its standard error; (n,) each."""
    if not moments.n:
        return np.full(n, np.nan), np.full(n, np.nan)
    means, errors = moments.mean().reshape(2, n), moments.standard_error().reshape(2, n)
    return means.max(0), np.where(means[0] >= means[1], errors[0], errors[1])

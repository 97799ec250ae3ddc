"""All measures of sharpness of one network, as a dataset."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from pnanalysis import schema
from pnanalysis.analyses.work_folder import WorkFolder
from pnanalysis.arrays import Array
from pnanalysis.checks import at_least, check_seed, one_of, resolve_dtype
from pnanalysis.curvature.operators import HessianOperator
from pnanalysis.errors import CurvatureError, ModelError, PnError
from pnanalysis.estimates import mean_and_se
from pnanalysis.evaluation.diagnosis import clear_errors
from pnanalysis.evaluation.losses import counts
from pnanalysis.evaluation.normalised_logits import with_normalised_logits
from pnanalysis.geometry.loss_surface import LossSurface, check_same_function
from pnanalysis.inputs.batches import first_examples, move
from pnanalysis.inputs.models import Loss, device_of
from pnanalysis.perturbation.ascent import METHODS
from pnanalysis.perturbation.average_case import Crossed, average_case
from pnanalysis.perturbation.neighbourhoods import KINDS as NEIGHBOURHOODS
from pnanalysis.perturbation.neighbourhoods import around, checked_radii, scale_of
from pnanalysis.perturbation.relative_flatness import (
    RelativeFlatness,
    last_weight,
    output_dim,
    relative_flatness,
    weight_of,
)
from pnanalysis.perturbation.second_order import example_half_forms, half_forms, largest_rises, rise_influences
from pnanalysis.perturbation.weight_uses import WeightUse, weight_uses
from pnanalysis.perturbation.worst_case import Radii, Rises, WorstCase, example_losses, worst_case
from pnanalysis.sampling.stacked_gradients import StackedGradients
from pnanalysis.spectra.data_error import Influence
from pnanalysis.terminal.progress import Advance

#: What can be measured.
MEASURES = ("worst", "average", "flatness")
#: Neighbourhoods where none are named, and how many radii of each.
RADII = {name: NEIGHBOURHOODS[name].radius for name in ("ball", "adaptive", "filter", "box")}
N_RADII = 3
#: How far the loss of batches may be from that of the examples, relative to its size plus a little for round-off.
_SAME_LOSS, _SMALLEST_LOSS = 1e-3, 1e-3
#: How names of the samples begin that parts of unfinished work hold beside their numbers.
_SAMPLES = "samples_"


@dataclass(frozen=True)
class SharpnessOptions:
    """What to measure, and how; see :func:`pnanalysis.sharpness`."""

    radii: Mapping[str, Any] | None = None
    average_radii: Mapping[str, Any] | None = None
    measures: tuple[str, ...] = MEASURES
    method: str = "frank-wolfe"
    n_steps: int = 10
    n_starts: int = 2
    group: int | None = None
    n_directions: int = 16
    layer: str | None = None
    normalize_logits: bool = False
    second_order: bool = True
    dtype: str = "float32"
    seed: int = 0
    worst: Radii = field(init=False, repr=False)
    average: Radii = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.measures:
            raise PnError(f"no measure is named; there are {', '.join(MEASURES)}")
        for measure in self.measures:
            one_of(MEASURES, measure=measure)
        one_of(METHODS, method=self.method)
        at_least(2, n_steps=self.n_steps, n_directions=self.n_directions)
        at_least(1, n_starts=self.n_starts, group=self.group)
        check_seed(seed=self.seed)
        resolve_dtype(self.dtype)
        worst, average = _both(self.radii, self.average_radii)
        object.__setattr__(self, "worst", worst)
        object.__setattr__(self, "average", average)

    @property
    def worst_case(self) -> WorstCase:
        """How to look for the worst case."""
        return WorstCase(self.worst, self.method, self.n_steps, self.n_starts, self.group, self.seed)

    @property
    def is_scalar(self) -> bool:
        """Whether each neighbourhood was given a single radius, so that there is no dim for them."""
        given = [*(self.radii or {}).values(), *(self.average_radii or {}).values()]
        return bool(given) and not any(np.ndim(one) for one in given)

    @property
    def n_steps_in_all(self) -> int:
        """Gradients, and points of the average case, for a progress bar."""
        worst = self.worst_case.n_gradients if "worst" in self.measures else 0
        points = sum(map(len, self.average.values())) * self.n_directions if "average" in self.measures else 0
        return worst + points


def _both(radii: Mapping[str, Any] | None, average: Mapping[str, Any] | None) -> tuple[Radii, Radii]:
    """Radii of the worst and the average case, as many of each, in the same neighbourhoods.

    Raises
    ------
    ModelError
    """
    if radii is None and average is None:
        worst: Radii = {name: around(radius, N_RADII) for name, radius in RADII.items()}
    else:
        worst = {} if radii is None else checked_radii(radii)
    means = {} if average is None else checked_radii(average, "average radius")
    names = list(worst or means)
    if set(means) - set(names):
        raise ModelError(f"average radii name {min(set(means) - set(names))}, radii do not; name the same ones in both")
    n = len(next(iter((worst or means).values())))
    worst = {name: worst.get(name, around(NEIGHBOURHOODS[name].radius, n)) for name in names}
    means = {name: means.get(name, around(NEIGHBOURHOODS[name].average_radius, n)) for name in names}
    counts = {len(values) for values in means.values()}
    if counts != {n}:
        raise ModelError(f"there are {n} radii and {max(counts)} average radii; give as many of both")
    return worst, means


@dataclass
class NetworkSharpness:
    """Measures of one network, and the samples that they are means of.

    Attributes
    ----------
    ds : xarray.Dataset
        Dims ``radius_index`` and ``neighbourhood``.
    rises : Rises or None
    averages : Crossed or None
    flatness : RelativeFlatness or None
    """

    ds: xr.Dataset
    rises: Rises | None = None
    averages: Crossed | None = None
    flatness: RelativeFlatness | None = None

    def take_samples(self, part: xr.Dataset) -> None:
        """Those of a part that another call has finished, as :func:`_with_samples` has put them there."""
        samples = {str(name): part[name].values for name in part.data_vars if str(name).startswith(_SAMPLES)}

        def of(kind: str, *names: str) -> list[Array] | None:
            keys = [f"{_SAMPLES}{kind}_{name}" for name in names]
            return [samples[key] for key in keys] if set(keys) <= samples.keys() else None

        if self.rises is None and (own := of("rise", "found", "first", "start")):
            self.rises = Rises(*own)
        if self.averages is None and (own := of("average", "by_example", "by_direction", "squares")):
            self.averages = Crossed(*own)
        if self.flatness is None and (own := of("flatness", "numbers", "weight", "form", "spread")):
            numbers, *influence = own
            value, se, probe_se, data_se, dof = map(float, numbers)
            self.flatness = RelativeFlatness(value, se, probe_se, data_se, dof, Influence(*influence))


def network_sharpness(
    network: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    options: SharpnessOptions,
    *,
    label: str = "network",
    advance: Advance | None = None,
    cache: WorkFolder | None = None,
) -> NetworkSharpness:
    """Measures of one network over batches in memory.

    Parameters
    ----------
    network : Module
        Stays as it is.
    loss : callable
        ``loss(outputs, targets)``, averaged over the batch.
    batches : re-iterable of (inputs, targets)
        On the network's device.
    options : SharpnessOptions
    label : str
        What the network is called in messages.
    advance : callable, optional
        Called for every gradient, and every pair of points of the average case.
    cache : WorkFolder, optional
        Keeps each finished part.
    """
    device, dtype = device_of(network, label), resolve_dtype(options.dtype)
    if options.normalize_logits:
        network = with_normalised_logits(network, loss, label)
    surface = LossSurface(network, loss, device, dtype)
    state = surface.anchor(network.state_dict(), label)
    check_same_function(surface, state, network, batches, (label, label))
    with clear_errors(label, surface.model, batches, surface.loss):
        at = _Place(network, loss, batches, options, label, StackedGradients(surface, state, surface.parameter_names))
        return at.measured(advance, cache)


@dataclass
class _Place:
    """A network where it stands, and what is measured there."""

    network: nn.Module
    loss: Loss
    batches: Iterable[Any]
    options: SharpnessOptions
    label: str
    gradients: StackedGradients

    def measured(self, advance: Advance | None, cache: WorkFolder | None) -> NetworkSharpness:
        (here,) = example_losses(self.gradients, self.gradients.centre[None], self.batches)
        mean, se = mean_and_se(here)
        base = xr.Dataset({"loss": mean, "loss_se": se})
        found = NetworkSharpness(base)
        parts: dict[str, Callable[[], xr.Dataset]] = {}
        if "worst" in self.options.measures:
            parts["worst"] = lambda: self._worst(found, mean, advance)
        if "average" in self.options.measures:
            parts["average"] = lambda: self._average(found, advance)
        if "flatness" in self.options.measures:
            parts["flatness"] = lambda: self._flatness(found)
        for name, compute in parts.items():

            def finished(compute: Callable[[], xr.Dataset] = compute) -> xr.Dataset:
                return schema.finish(base.assign(compute()), "sharpness")

            part = finished() if cache is None else cache.part(name, mean, finished)
            found.take_samples(part)
            own = [key for key in part.data_vars if not str(key).startswith(_SAMPLES)]
            found.ds = found.ds.assign({key: part[key] for key in own})
        found.ds = found.ds.assign_coords(neighbourhood=list(self.options.worst))
        if self.options.is_scalar:
            found.ds = found.ds.squeeze("radius_index") if "radius_index" in found.ds.dims else found.ds
        return found

    def _worst(self, found: NetworkSharpness, loss: float, advance: Advance | None) -> xr.Dataset:
        options = self.options
        rises = found.rises = worst_case(self.gradients, self.batches, options.worst_case, advance)
        rise, one = _mean_and_se(rises.found), _mean_and_se(rises.first)
        table = {
            "rise": rise[0], "rise_se": rise[1], "one_step": one[0], "one_step_se": one[1],
            "relative": 100 * rise[0] / (1 + loss), "radius": np.array(list(options.worst.values())),
        }  # fmt: skip
        if options.second_order:
            found_, se = self._each(self._largest_rises, np.full((2, *rise[0].shape), np.nan))
            table |= {"rise_quadratic": found_, "rise_quadratic_se": se}
        ds = _table(table)
        ds = ds.assign(rise_start=(("radius_index", "neighbourhood", "start"), rises.start.swapaxes(0, 1)))
        return _with_samples(ds, "rise", found=rises.found, first=rises.first, start=rises.start)

    def _average(self, found: NetworkSharpness, advance: Advance | None) -> xr.Dataset:
        options = self.options
        averages = found.averages = average_case(
            self.gradients, self.batches, options.average, options.n_directions, options.seed, advance
        )
        se, direction_se, data_se, _ = averages.errors()
        low, high = averages.interval()
        radii = np.array(list(options.average.values()))
        table = {
            "average": averages.mean, "average_se": se, "average_direction_se": direction_se,
            "average_data_se": data_se, "average_low": low, "average_high": high, "average_radius": radii,
        }  # fmt: skip
        if options.second_order:
            ends = ("", "_se", "_direction_se", "_data_se")
            of_unit = self._each(self._mean_rise, np.full((len(ends), len(radii)), np.nan))
            table |= {
                f"average_quadratic{end}": radii**2 * one[:, None] for end, one in zip(ends, of_unit, strict=True)
            }
        return _with_samples(_table(table), "average", **vars(averages))

    def _each(self, measure: Callable[[HessianOperator, str, torch.Tensor], Array], unknown: Array) -> Array:
        """Numbers of the Hessian in each neighbourhood, ``(number, kind, ...)``; ``unknown`` where there is none."""
        if self._hessian is None:
            return unknown
        scales = {kind: scale_of(kind, self.gradients.state, self.gradients.names) for kind in self.options.worst}
        return np.stack([measure(self._hessian, kind, scale) for kind, scale in scales.items()], axis=1)

    def _largest_rises(self, op: HessianOperator, kind: str, scale: torch.Tensor) -> Array:
        """Largest rises of the second-order expansion and their errors for examples, ``(2, radius)``."""
        radii = self.options.worst[kind]
        rises, points = largest_rises(op, self._gradient, kind, scale, radii, self.options.seed)
        se = np.full(len(radii), np.nan)
        if np.isfinite(rises).all():
            try:
                se = np.array([own.se for own in rise_influences(op, points, rises)])
            except CurvatureError as error:
                self._warn_of_no_error("largest rises", error)
        return np.stack([rises, se])

    def _mean_rise(self, op: HessianOperator, kind: str, scale: torch.Tensor) -> Array:
        """Mean rise of the second-order expansion at radius 1, its error, and the error's parts, ``(4,)``."""
        how = kind, scale, self.options.n_directions, self.options.seed
        try:
            crossed = example_half_forms(op, *how)
        except CurvatureError as error:
            self._warn_of_no_error("mean rises", error)
            forms = half_forms(op, *how)
            se = forms.std(ddof=1) / len(forms) ** 0.5
            return np.array([forms.mean(), se, se, np.nan])
        se, direction_se, data_se, _ = crossed.errors()
        return np.array([crossed.mean, se, direction_se, data_se])

    def _warn_of_no_error(self, of: str, error: PnError) -> None:
        warnings.warn(
            f"{self.label}: second-order {of} have no error for the choice of examples: {error}", stacklevel=2
        )

    @cached_property
    def _batches_that_count(self) -> Iterable[Any]:
        """Without those in which all targets are ignored; as they are if there are none."""
        some = _Counting(self.batches, self.gradients.surface.loss)
        return self.batches if sum(1 for _ in some) == sum(1 for _ in self.batches) else some

    @cached_property
    def _hessian(self) -> HessianOperator | None:
        return self._operator("no second-order values to compare with")

    @cached_property
    def _gradient(self) -> torch.Tensor:
        assert self._hessian is not None
        return self._hessian.gradient()

    def _operator(self, without: str, layer: str | None = None) -> HessianOperator | None:
        """The Hessian, or a warning that says what there is not."""
        try:
            op = HessianOperator(
                self.network, self.loss, self._batches_that_count, params=layer, dtype=self.gradients.centre.dtype,
                device=self.gradients.centre.device, expected_products=100,
            )  # fmt: skip
            _ = op.product_check
            (here,) = example_losses(self.gradients, self.gradients.centre[None], self.batches)
            if abs(op.loss() - here.mean()) > _SAME_LOSS * (abs(here.mean()) + _SMALLEST_LOSS):
                raise ModelError("the loss of its batches is not the mean over their examples")
        except PnError as error:
            warnings.warn(f"{self.label}: {without}: {error}", stacklevel=2)
            return None
        return op

    def _weight_uses(self) -> list[WeightUse]:
        """Products of weights in a pass over a few examples; none where only the loss can call the network."""
        surface = self.gradients.surface
        try:
            inputs, _ = first_examples(next(iter(self._batches_that_count)), 2)
            return weight_uses(surface.model, move(inputs, surface.device, surface.dtype))
        except Exception:  # of anyone's network, which has been run by its loss before
            return []

    def _flatness(self, found: NetworkSharpness) -> xr.Dataset:
        network, layer = self.network, self.options.layer
        uses = self._weight_uses()
        name = last_weight(network, uses) if layer is None else weight_of(network, layer)
        without = "no relative flatness"
        op = None
        if name is None:
            warnings.warn(f"{self.label}: {without}: it has no trainable weight matrix", stacklevel=2)
        else:
            op = self._operator(without, name)
        values = dict.fromkeys(("", "_se", "_probe_se", "_data_se", "_low", "_high"), np.nan)
        if op is not None and name is not None:
            try:
                flat = found.flatness = relative_flatness(
                    op, network.get_parameter(name), self.options.seed, output_dim=output_dim(network, name, uses)
                )
                low, high = flat.interval()
                values = {"": flat.value, "_se": flat.se, "_probe_se": flat.probe_se, "_data_se": flat.data_se,
                          "_low": low, "_high": high}  # fmt: skip
            except PnError as error:
                warnings.warn(f"{self.label}: {without}: {error}", stacklevel=2)
        ds = xr.Dataset({f"relative_flatness{end}": float(value) for end, value in values.items()})
        ds = ds.assign(flatness_layer=name or "")
        if found.flatness is None:
            return ds
        flat, own = found.flatness, found.flatness.influence
        numbers = np.array([flat.value, flat.se, flat.probe_se, flat.data_se, flat.dof])
        return _with_samples(ds, "flatness", numbers=numbers, weight=own.weight, form=own.form, spread=own.spread)


class _Counting:
    """Batches in which some target counts."""

    def __init__(self, batches: Iterable[Any], loss: Loss) -> None:
        self.batches, self.loss = batches, loss

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch in self.batches if counts(self.loss, batch[1]))


def _mean_and_se(values: Array) -> tuple[Array, Array]:
    """Of each row ``(..., N)``."""
    pairs = np.array([mean_and_se(row) for row in values.reshape(-1, values.shape[-1])])
    return pairs[:, 0].reshape(values.shape[:-1]), pairs[:, 1].reshape(values.shape[:-1])


def _with_samples(ds: xr.Dataset, kind: str, **samples: Array) -> xr.Dataset:
    """What the numbers are means of, for a later call that compares networks and does not measure this part again."""
    names = {f"{_SAMPLES}{kind}_{name}": values for name, values in samples.items()}
    return ds.assign({key: ([f"{key}_{i}" for i in range(np.ndim(v))], v) for key, v in names.items()})


def _table(columns: Mapping[str, Array]) -> xr.Dataset:
    """Numbers ``(kind, radius)`` as variables."""
    return xr.Dataset({name: (("radius_index", "neighbourhood"), values.T) for name, values in columns.items()})

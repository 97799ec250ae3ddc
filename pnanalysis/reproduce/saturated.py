"""S9: saturation of the tanh network by iteration, and the sweep that looks for where it changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import xarray as xr

from pnanalysis.estimates import Estimate
from pnanalysis.reproduce.accuracy import CLAIM, Arms, repelled
from pnanalysis.reproduce.cells import Result
from pnanalysis.reproduce.markdown import UNKNOWN as DASH
from pnanalysis.reproduce.markdown import Links, blocks, failures, number, p_text, significant, table, with_interval
from pnanalysis.reproduce.plan import Plan
from pnanalysis.reproduce.settings import PERSISTENT, RESTART, control_of
from pnanalysis.reproduce.statistics import HOLDS, UNKNOWN, Claim, claim, differences, over_seeds, paired
from pnanalysis.significance import LEVEL, holm

_QUANTILE = 98
_NOTHING = "Not yet known at this scale: no cell is done."


def at_end(result: Result, of: Callable[[xr.Dataset], xr.DataArray]) -> np.ndarray:
    """A number of every iteration after the last epoch, averaged over the tanh layers, shape (iteration,)."""
    return of(result.dataset("saturation").isel(epoch=-1)).mean("layer").values


def _measure(ds: xr.Dataset) -> xr.DataArray:
    return ds.saturation_measure


def _percentile(ds: xr.Dataset) -> xr.DataArray:
    return ds.abs_percentile.sel(quantile=_QUANTILE)


def _distance(ds: xr.Dataset) -> xr.DataArray:
    """Of the percentile from the asymptote of tanh, which is at 1."""
    return 1 - _percentile(ds)


def _shown(estimate: Estimate) -> str:
    return with_interval(estimate, 4)


def _tiny(estimate: Estimate) -> str:
    """A number that may be close to zero, with significant digits; its error is at most that of six digits of 1."""
    ends = "" if math.isnan(estimate.low) else f" ({estimate.low:.2g} to {estimate.high:.2g})"
    return significant(estimate.value, 2) + ends


#: What is listed by iteration, and how numbers are shown.
QUANTITIES: dict[str, tuple[Callable[[xr.Dataset], xr.DataArray], Callable[[Estimate], str]]] = {
    "saturation measure": (_measure, _shown),
    "98th percentile of |activation|: distance from the asymptote, 1": (_distance, _tiny),
    "saturated share": (lambda ds: ds.saturated_share, _shown),
}
_DEFINITIONS = (
    "The saturation measure is that of Rakitianskaia and Engelbrecht: the mean absolute activation, taken in bins "
    "between the asymptotes, 0 for activations in the middle, 1/2 for uniform and 1 for saturated ones. The saturated "
    "share is the part of activations within 0.05 of an asymptote. The paper shows the 98th percentile; claims are "
    "judged by the saturation measure instead, which tells networks apart where that percentile is close to 1 in all "
    "of them. Cells keep six digits of percentiles, and so their distance from 1 to about 1e-6."
)


def section(arms: Arms, links: Links, figure: str = "") -> str:
    """What the page says about saturation by iteration."""
    results = {arm: _measured(arms, arm) for arm in (PERSISTENT, RESTART)}
    if not any(results.values()):
        return _NOTHING
    parts = []
    for arm, found in results.items():
        if found:
            names = {PERSISTENT: "persistent iteration", RESTART: "restart"}
            text = "means over layers after the last epoch, and over seeds"
            columns = [f"{names[arm]} ({text})", *QUANTITIES, "saturation measure − that of the plain model"]
            parts.append(table(columns, _by_iteration(found)))
    found_claims = table(CLAIM, [each.row for each in claims(arms)])
    return blocks([_DEFINITIONS, *parts, figure, found_claims, _champions([*results[PERSISTENT].values()])])


def claims(arms: Arms) -> list[Claim]:
    """Differences in the saturation measure that say whether repulsion lowers it."""
    persistent, restart = (_measured(arms, arm) for arm in (PERSISTENT, RESTART))
    first, last, later = (_by_seed(persistent, of) for of in (_plain, _last, _later))
    others = _by_seed(restart, _later)
    none = dict.fromkeys(persistent, 0.0)
    starts = _by_seed(restart, _plain)
    return [
        claim(text, differences(values, beside), sign=-1, paper=said, digits=4, main=main)
        for text, said, values, beside, main in (
            ("the last persistent iteration is less saturated than the plain model", "yes", last, first, True),
            ("persistent iterations are on average less saturated than the plain model", "yes", later, first, True),
            ("restarts are on average less saturated than the plain model", DASH, others, starts, False),
            ("persistent iterations are on average less saturated than restarts", DASH, later, others, True),
            ("saturation falls from one persistent iteration to the next (slope)", "yes",
             _by_seed(persistent, _slope), none, False),
        )
    ]  # fmt: skip


def _measured(arms: Arms, arm: str) -> dict[int, Result]:
    return {seed: result for seed, result in arms.finished(arm).items() if result.has("saturation")}


def _by_iteration(results: Mapping[int, Result]) -> list[list[str]]:
    columns = {
        name: np.stack([at_end(result, of) for result in results.values()]) for name, (of, _) in QUANTITIES.items()
    }
    measure = columns["saturation measure"]
    change = measure - measure[:, :1]
    return [
        ["0 (plain)" if i == 0 else str(i),
         *(shown(over_seeds(columns[name][:, i])) for name, (_, shown) in QUANTITIES.items()),
         with_interval(over_seeds(change[:, i]), 4, signed=True) if i else DASH]
        for i in range(measure.shape[1])
    ]  # fmt: skip


def _by_seed(results: Mapping[int, Result], of: Callable[[np.ndarray], float]) -> dict[int, float]:
    """A number of the saturation measures by iteration, for each seed."""
    return {seed: of(at_end(result, _measure)) for seed, result in results.items()}


def _plain(values: np.ndarray) -> float:
    return float(values[0])


def _last(values: np.ndarray) -> float:
    return float(values[-1])


def _later(values: np.ndarray) -> float:
    """The mean of the iterations after the plain one."""
    return float(values[1:].mean()) if len(values) > 1 else math.nan


def _slope(values: np.ndarray) -> float:
    """Of a line through the iterations after the plain one, to which each of them is compared elsewhere."""
    return float(np.polyfit(np.arange(len(values) - 1), values[1:], 1)[0]) if len(values) > 3 else math.nan


def _champions(results: list[Result]) -> str:
    """Which iterations are the champions, and what the paper says of its own."""
    if not results:
        return ""
    champions = ", ".join(f"{result.champion} (seed {result.cell.seed})" for result in results)
    return (
        f"Champions: iteration {champions}. The paper's is iteration 5; it notes that its accuracies do not rise "
        "steadily with the iteration, so that less saturation need not mean a better network."
    )


@dataclass(frozen=True)
class _Point:
    """One point of the sweep: differences to the plain model, paired by seed, and those of as many restarts."""

    variant: str
    results: Mapping[int, Result]
    control: Mapping[int, Result]

    @cached_property
    def changes(self) -> dict[int, float]:
        """From the plain model to the mean persistent iteration, by seed."""
        return _by_seed(self.results, lambda values: _later(values) - _plain(values))

    @property
    def beyond_restarts(self) -> Estimate:
        """Of the mean persistent iteration to the mean restart, of equal cost."""
        return paired(_by_seed(self.results, _later), _by_seed(self.control, _later))

    def test_errors(self) -> Estimate:
        """Of the mean persistent iteration to the mean restart, in points."""
        errors = [
            {seed: 100 * float(r.final_errors("test")[1:].mean()) for seed, r in each.items()}
            for each in (self.results, self.control)
        ]
        return paired(*errors)


def _points(plan: Plan) -> list[_Point]:
    setting = plan.setting("S9-sweep")

    def measured(variant: str, arm: str) -> dict[int, Result]:
        found = plan.results("S9-sweep", variant, arm)
        return {r.cell.seed: r for r in found if r.is_finished and r.has("saturation")}

    controls = {name: measured(name, RESTART) for name in setting.variants if RESTART in setting.arms_of(name)}
    return [
        _Point(name, measured(name, PERSISTENT), controls.get(control_of(name), {}))
        for name in setting.variants
        if PERSISTENT in setting.arms_of(name)
    ]


def _less_saturated(points: Sequence[_Point]) -> list[tuple[float, str]]:
    """For each point Holm's p-value of any change to the plain model, for all points together, and a verdict by it."""
    found = [claim("", [*point.changes.values()], sign=-1) for point in points]
    return [
        (float(p), each.verdict if p <= LEVEL else UNKNOWN)
        for p, each in zip(holm([each.p for each in found]), found, strict=True)
    ]


def sweep_claims(plan: Plan) -> list[Claim]:
    """Whether saturation falls at any point of the sweep, and whether it does at one that differs from restarts."""
    points = _points(plan)
    known = [point for point in points if point.results]
    if not known:
        return []
    judged = _less_saturated(points)
    holds = [point.variant for point, (_, verdict) in zip(points, judged, strict=True) if verdict == HOLDS]
    tested = sum(not math.isnan(p) for p, _ in judged)
    here = f"at {len(holds)} of {tested} tested points, of {len(points)}"
    here += f": {', '.join(holds)}" if holds else ""
    text = "at some point of the sweep persistent iterations are on average less saturated than the plain model (Holm)"
    n = str(max(len(point.results) for point in known))
    return [Claim(text, DASH, here, n, HOLDS if holds else UNKNOWN)]


def sweep(plan: Plan, links: Links, figure: str = "") -> str:
    """What the page says about the sweep: every point of it."""
    points, setting = _points(plan), plan.setting("S9-sweep")
    every = [result for name in setting.variants for arm in setting.arms_of(name)
             for result in plan.results("S9-sweep", name, arm)]  # fmt: skip
    rows = []
    for point, (p, judged) in zip(points, _less_saturated(points), strict=True):
        options = setting.variants[point.variant]
        plain = over_seeds([*_by_seed(point.results, _plain).values()])
        by_seed = [f"[{repelled(r)}: {number(point.changes[seed], 4, signed=True)}]({_link(r, links)})"
                   for seed, r in point.results.items()]  # fmt: skip
        controls = [f"[seed {seed}]({_link(r, links)})" for seed, r in point.control.items()]
        rows.append(
            [str(options["model_options"]["width"]), _scale(options), f"{options['lam']:g}",
             with_interval(plain, 4), ", ".join(by_seed) or DASH,
             with_interval(over_seeds([*point.changes.values()]), 4, signed=True),
             with_interval(point.beyond_restarts, 4, signed=True),
             with_interval(point.test_errors(), 2, signed=True), p_text(p), judged, ", ".join(controls) or DASH]
        )  # fmt: skip
    columns = ["width", "initial std", "λ", "saturation measure, plain", "iterations − plain, by the layer repelled",
               "their mean", "iterations − restarts", "test error, iterations − restarts, points", "p, Holm",
               "less saturated", "restarts"]  # fmt: skip
    done = sum(bool(point.results) for point in points)
    text = (
        f"{done} of {len(points)} points have a cell. Each point is one strength λ, initial scale and width; all are "
        "listed, whatever they show. Numbers are means over the iterations after the plain one, and over layers. "
        "*Less saturated* is judged by the change to the plain model, with p-values adjusted by Holm's step-down for "
        f"all points together.{_power(plan, len(points))} Restarts of the same width and scale are a control of equal "
        "cost, which all strengths share."
    )
    return blocks(
        [text, table(columns, rows), figure, _conclusion(plan), _by_layer(points, plan), failures(every, links)]
    )


def _power(plan: Plan, n_points: int) -> str:
    """How large a change has to be to be told from none, in a sentence."""
    from scipy.stats import t as student_t  # here, so that command lines start without SciPy

    n = plan.n_seeds("S9-sweep")
    if n < 2:
        return ""
    least = float(student_t.ppf(1 - LEVEL / (2 * n_points), n - 1)) / math.sqrt(n)
    return (
        f" With {n} seeds, a change then has to be {least:.0f} times its standard deviation over seeds, and seeds "
        "differ in the layer that is repelled, which is the same one at all points: a change in one layer alone cannot "
        "be told from none in this way."
    )


def _by_layer(points: Sequence[_Point], plan: Plan) -> str:
    """Changes of each layer with the strength, over widths and initial scales."""
    setting = plan.setting("S9-sweep")
    changes: dict[str, dict[float, dict[str, float]]] = {}  # by layer, strength, and control
    for point in points:
        for seed, result in point.results.items():
            name = f"{repelled(result)} (seed {seed})"
            at = changes.setdefault(name, {}).setdefault(float(setting.variants[point.variant]["lam"]), {})
            at[control_of(point.variant)] = point.changes[seed]
    found = []
    for layer, by_strength in sorted(changes.items(), key=lambda entry: entry[0].rpartition("seed")[2]):
        weakest, *stronger = sorted(by_strength)
        for lam in stronger:
            beside = [each - by_strength[weakest][name] for name, each in by_strength[lam].items()
                      if name in by_strength[weakest]]  # fmt: skip
            found.append((layer, f"{lam:g}", f"{weakest:g}", beside))
    estimates = [over_seeds(beside) for *_, beside in found]
    if all(math.isnan(each.low) for each in estimates):
        return ""
    adjusted = holm([each.tested().p if not math.isnan(each.low) else math.nan for each in estimates])
    rows = [
        [layer, lam, weakest, with_interval(each, 4, signed=True),
         f"{sum(change < 0 for change in beside)} of {len(beside)}", p_text(float(p))]
        for (layer, lam, weakest, beside), each, p in zip(found, estimates, adjusted, strict=True)
    ]  # fmt: skip
    text = (
        "Whether saturation changes with the strength, layer by layer: chains of the same seed, width and initial "
        "scale, which start at the same point, beside the chain of the weakest strength. Intervals are over widths and "
        "scales. A layer is known from a single seed, whose start it shares. This comparison was not planned: it was "
        "added when the changes of seeds 0 and 1 of the scale `cpu` had been seen, and before those of others."
    )
    columns = ["layer repelled", "λ", "beside λ", "saturation measure, difference", "lower at", "p, Holm"]
    return blocks([text, table(columns, rows)])


def _scale(options: Mapping[str, object]) -> str:
    """The standard deviation of initial weights of hidden layers, as text."""
    std = options.get("init_std")
    width = options["model_options"]["width"]  # type: ignore[index]
    return f"Xavier ({width**-0.5:.3g})" if std is None else f"{std:g}"


def _conclusion(plan: Plan) -> str:
    found = sweep_claims(plan)
    if not found:
        return "Nothing is concluded yet: no point has a cell."
    (each,) = found
    if each.verdict == UNKNOWN:
        return f"At which point repulsion lowers saturation is **{UNKNOWN}**: less saturated {each.here}."
    return f"Persistent iterations are on average less saturated than the plain model {each.here}. **Holds** there."


def _link(result: Result, links: Links) -> str:
    return links.cell(result.cell).partition("](")[2].removesuffix(")")


class Change(NamedTuple):
    """Of the saturation measure, from the plain model to the mean iteration of one chain."""

    width: str
    scale: str
    lam: float
    layer: str
    value: float


def changes(plan: Plan) -> list[Change]:
    """All that cells of the sweep show, for the figure."""
    setting = plan.setting("S9-sweep")
    found = []
    for point in _points(plan):
        options = setting.variants[point.variant]
        width, scale, lam = str(options["model_options"]["width"]), _scale(options), float(options["lam"])
        for seed, result in point.results.items():
            found.append(Change(width, scale, lam, f"{repelled(result)} (seed {seed})", point.changes[seed]))
    return found


def by_iteration(arms: Arms) -> dict[str, dict[int, np.ndarray]]:
    """The saturation measure by arm, seed and iteration, for the figure."""
    return {
        arm: {seed: at_end(result, _measure) for seed, result in found.items()}
        for arm in (PERSISTENT, RESTART)
        if (found := _measured(arms, arm))
    }

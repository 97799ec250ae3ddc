"""S9: saturation of the tanh network by iteration, and the sweep that looks for where it changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from pnanalysis.estimates import Estimate
from pnanalysis.reproduce.accuracy import CLAIM, Arms
from pnanalysis.reproduce.cells import Result
from pnanalysis.reproduce.markdown import UNKNOWN as DASH
from pnanalysis.reproduce.markdown import Links, blocks, failures, p_text, table, with_interval
from pnanalysis.reproduce.plan import Plan
from pnanalysis.reproduce.settings import PERSISTENT, RESTART, control_of
from pnanalysis.reproduce.statistics import FAILS, HOLDS, UNKNOWN, Claim, claim, over_seeds, paired
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


#: What is listed by iteration; the asymptotes of tanh are at -1 and 1.
QUANTITIES: dict[str, Callable[[xr.Dataset], xr.DataArray]] = {
    "saturation measure": _measure,
    "98th percentile of |activation|": _percentile,
    "its distance from the asymptote": lambda ds: 1 - _percentile(ds),
    "saturated share": lambda ds: ds.saturated_share,
}


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
    persistent = list(results[PERSISTENT].values())
    return blocks([*parts, figure, table(CLAIM, [each.row for each in claims(arms)]), _order(persistent)])


def claims(arms: Arms) -> list[Claim]:
    """Differences in the saturation measure that say whether repulsion lowers it."""
    persistent, restart = (_measured(arms, arm) for arm in (PERSISTENT, RESTART))
    first, last, later = (_by_seed(persistent, of) for of in (_plain, _last, _later))
    others = _by_seed(restart, _later)
    none = dict.fromkeys(persistent, 0.0)
    found = []
    for text, said, values, beside in (
        ("the last persistent iteration is less saturated than the plain model", "yes", last, first),
        ("persistent iterations are on average less saturated than the plain model", "yes", later, first),
        ("saturation falls with the iteration (slope)", "yes", _by_seed(persistent, _slope), none),
        ("persistent iterations are on average less saturated than restarts", "–", later, others),
    ):
        n = len(values.keys() & beside.keys())
        difference = paired(values, beside)
        found.append(claim(text, difference, n, sign=-1, paper=said, digits=4, main="slope" not in text))
    return found


def _measured(arms: Arms, arm: str) -> dict[int, Result]:
    return {seed: result for seed, result in arms.finished(arm).items() if result.has("saturation")}


def _by_iteration(results: Mapping[int, Result]) -> list[list[str]]:
    columns = [np.stack([at_end(result, of) for result in results.values()]) for of in QUANTITIES.values()]
    change = columns[0] - columns[0][:, :1]
    return [
        ["0 (plain)" if i == 0 else str(i), *(with_interval(over_seeds(values[:, i]), 4) for values in columns),
         with_interval(over_seeds(change[:, i]), 4, signed=True) if i else DASH]
        for i in range(columns[0].shape[1])
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
    return float(np.polyfit(np.arange(len(values)), values, 1)[0]) if len(values) > 2 else math.nan


def _order(results: list[Result]) -> str:
    """The paper's remark that saturation does not fall monotonically, and which iteration is the champion."""
    if not results:
        return ""
    values = [at_end(result, _measure) for result in results]
    monotone = sum(bool((np.diff(each) <= 0).all()) for each in values)
    champions = ", ".join(f"{result.champion} (seed {result.cell.seed})" for result in results)
    n = len(values[0])
    return (
        f"The paper remarks that saturation does not fall monotonically. It does in {monotone} of {len(results)} "
        f"chains here, which decides nothing: {n} values without any trend are in falling order once in "
        f"{math.factorial(n):,} times, and a slow fall with noise hardly more often. Champions (the paper's: iteration "
        f"5): {champions}."
    )


@dataclass(frozen=True)
class _Point:
    """One point of the sweep: differences to the plain model, paired by seed, and those of as many restarts."""

    variant: str
    results: Mapping[int, Result]
    control: Mapping[int, Result]

    @property
    def change(self) -> Estimate:
        """Of the mean persistent iteration to the plain model."""
        return paired(_by_seed(self.results, _later), _by_seed(self.results, _plain))

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
    changes = [point.change for point in points]
    adjusted = holm([each.tested().p if not math.isnan(each.low) else math.nan for each in changes])
    return [
        (float(p), UNKNOWN if not p <= LEVEL else HOLDS if change.value < 0 else FAILS)
        for p, change in zip(adjusted, changes, strict=True)
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
        cells = [*point.results.values(), *point.control.values()]
        rows.append(
            [str(options["model_options"]["width"]), _scale(options), f"{options['lam']:g}",
             with_interval(plain, 4), with_interval(point.change, 4, signed=True),
             with_interval(point.beyond_restarts, 4, signed=True), with_interval(point.test_errors(), 2, signed=True),
             str(len(point.results)), p_text(p), judged,
             ", ".join(f"[{r.cell.seed} {r.cell.arm}]({_link(r, links)})" for r in cells) or DASH]
        )  # fmt: skip
    columns = ["width", "initial std", "λ", "saturation measure, plain", "iterations − plain", "iterations − restarts",
               "test error, iterations − restarts, points", "seeds", "p, Holm", "less saturated", "cells"]  # fmt: skip
    done = sum(bool(point.results) for point in points)
    text = (
        f"{done} of {len(points)} points have a cell. Each point is one strength λ, initial scale and width; all are "
        "listed, whatever they show. Numbers are means over the iterations after the plain one, and over layers. "
        "*Less saturated* is judged by the change to the plain model, with p-values adjusted by Holm's step-down for "
        "all points together. Restarts of the same width and scale are a control of equal cost, which all strengths "
        "share."
    )
    return blocks([text, table(columns, rows), figure, _conclusion(plan), failures(every, links)])


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


def changes(plan: Plan) -> list[tuple[str, str, float, Estimate]]:
    """Width, initial scale, strength and change of the saturation measure of each point with a cell, for the figure."""
    setting = plan.setting("S9-sweep")
    found = []
    for point in _points(plan):
        options = setting.variants[point.variant]
        if point.results:
            width = str(options["model_options"]["width"])
            found.append((width, _scale(options), float(options["lam"]), point.change))
    return found


def by_iteration(arms: Arms) -> dict[str, np.ndarray]:
    """The saturation measure by arm, shape (seed, iteration), for the figure."""
    found = {arm: [at_end(r, _measure) for r in _measured(arms, arm).values()] for arm in (PERSISTENT, RESTART)}
    return {arm: np.stack(values) for arm, values in found.items() if values}

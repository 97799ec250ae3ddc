"""S9: saturation of the tanh network by iteration, and the sweep that looks for where it changes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import xarray as xr

from pnanalysis.estimates import Estimate
from pnanalysis.reproduce.accuracy import CLAIM, Arms
from pnanalysis.reproduce.cells import Result
from pnanalysis.reproduce.markdown import Links, blocks, failures, table, with_interval
from pnanalysis.reproduce.plan import Plan
from pnanalysis.reproduce.settings import PERSISTENT, RESTART
from pnanalysis.reproduce.statistics import FAILS, HOLDS, UNKNOWN, Claim, over_seeds, verdict

_QUANTILE = 98


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
    persistent, restart = results[PERSISTENT], results[RESTART]
    if not persistent and not restart:
        return "Not yet known at this scale: no cell is done."
    parts = []
    for arm, found in results.items():
        if found:
            names = {PERSISTENT: "persistent iteration", RESTART: "restart"}
            text = "means over layers after the last epoch, and over seeds"
            parts.append(table([f"{names[arm]} ({text})", *QUANTITIES], _by_iteration(found)))
    return blocks([*parts, figure, table(CLAIM, [claim.row for claim in claims(arms)]), _order(persistent)])


def claims(arms: Arms) -> list[Claim]:
    """Differences in the saturation measure that say whether repulsion lowers it."""
    persistent, restart = _measured(arms, PERSISTENT), _measured(arms, RESTART)
    found = []
    for text, said, difference in (
        ("the last persistent iteration is less saturated than the plain model", "yes", _last_minus_plain(persistent)),
        ("the mean persistent iteration is less saturated than the plain model", "yes", _later_minus_plain(persistent)),
        ("saturation falls with the iteration (slope)", "yes", over_seeds([_slope(each) for each in persistent])),
        ("the mean persistent iteration is less saturated than the mean restart", "–", _against(persistent, restart)),
    ):
        here = with_interval(difference, 4, signed=True)
        found.append(Claim(text, said, here, str(len(persistent)), verdict(difference, -1), "slope" not in text))
    return found


def _measured(arms: Arms, arm: str) -> list[Result]:
    return [result for result in arms.finished(arm).values() if result.has("saturation")]


def _by_iteration(results: list[Result]) -> list[list[str]]:
    columns = [np.stack([at_end(result, of) for result in results]) for of in QUANTITIES.values()]
    return [
        ["0 (plain)" if i == 0 else str(i), *(with_interval(over_seeds(values[:, i]), 4) for values in columns)]
        for i in range(columns[0].shape[1])
    ]


def _last_minus_plain(results: list[Result]) -> Estimate:
    values = [at_end(result, _measure) for result in results]
    return over_seeds([float(each[-1] - each[0]) for each in values])


def _later_minus_plain(results: list[Result]) -> Estimate:
    values = [at_end(result, _measure) for result in results]
    return over_seeds([float(each[1:].mean() - each[0]) for each in values])


def _slope(result: Result) -> float:
    values = at_end(result, _measure)
    return float(np.polyfit(np.arange(len(values)), values, 1)[0]) if len(values) > 2 else math.nan


def _against(persistent: list[Result], restart: list[Result]) -> Estimate:
    first, second = (
        {result.cell.seed: float(at_end(result, _measure)[1:].mean()) for result in results}
        for results in (persistent, restart)
    )
    return over_seeds([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])


def _order(results: list[Result]) -> str:
    """The paper's remark that saturation does not fall monotonically, and which iteration is the champion."""
    if not results:
        return ""
    monotone = sum(bool((np.diff(at_end(result, _measure)) <= 0).all()) for result in results)
    champions = ", ".join(f"{result.champion} (seed {result.cell.seed})" for result in results)
    # one chain may be monotone, or not, by chance
    judged = UNKNOWN if len(results) < 2 or 0 < monotone < len(results) else FAILS if monotone else HOLDS
    return (
        f"Saturation falls monotonically in {monotone} of {len(results)} chains; the paper says that it is not "
        f"monotone: **{judged}**. Champions (the paper's: iteration 5): {champions}."
    )


def sweep(plan: Plan, links: Links) -> str:
    """What the page says about the sweep: every point of it."""
    rows, failed, n_done = [], [], 0
    setting = plan.setting("S9-sweep")
    for variant in (name for name in setting.variants if PERSISTENT in setting.arms_of(name)):
        results = plan.results("S9-sweep", variant, PERSISTENT)
        failed += [result for result in results if not result.is_finished]
        finished = [result for result in results if result.is_finished]
        n_done += bool(finished)
        difference, later = _last_minus_plain(finished), _later_minus_plain(finished)
        errors = [100 * (r.final_errors("test")[-1] - r.final_errors("test")[0]) for r in finished]
        plain = over_seeds([float(at_end(result, _measure)[0]) for result in finished])
        rows.append(
            [variant, with_interval(plain, 4), with_interval(difference, 4, signed=True),
             with_interval(later, 4, signed=True), with_interval(over_seeds(errors), 2, signed=True),
             str(len(finished)), verdict(difference, -1), ", ".join(f"[{r.cell.seed}]({_link(r, links)})"
                                                                    for r in finished) or "–"]
        )  # fmt: skip
    columns = ["point", "saturation measure, plain", "last − plain", "mean of later − plain",
               "test error, last − plain, points", "seeds", "less saturated", "cells by seed"]  # fmt: skip
    text = (
        f"{n_done} of {len(rows)} points have a cell. Each point is one strength, initial scale and width; all are "
        "listed, whatever they show, and their intervals are not adjusted for the number of points."
    )
    return blocks([text, table(columns, rows), failures(failed, links)])


def _link(result: Result, links: Links) -> str:
    return links.cell(result.cell).partition("](")[2].removesuffix(")")


def by_iteration(arms: Arms) -> dict[str, np.ndarray]:
    """The saturation measure by arm, shape (seed, iteration), for the figure."""
    found = {arm: [at_end(result, _measure) for result in _measured(arms, arm)] for arm in (PERSISTENT, RESTART)}
    return {arm: np.stack(values) for arm, values in found.items() if values}

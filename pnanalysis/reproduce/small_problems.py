"""S1 and S2: the two-well surface and the kink regression."""

from __future__ import annotations

import math

import numpy as np

from pnanalysis.estimates import Estimate
from pnanalysis.reproduce.cells import Result
from pnanalysis.reproduce.markdown import Links, blocks, failures, number, significant, table, with_interval
from pnanalysis.reproduce.plan import Plan
from pnanalysis.reproduce.settings import PERSISTENT, RESTART
from pnanalysis.reproduce.statistics import FAILS, HOLDS, UNKNOWN, over_seeds, share, verdict

_DEEP = -1.4  # a descent that ends below this value is in the deeper well, whose bottom is at -1.534
PLATEAU, _MARGIN = 4.2, 0.01  # loss of the stuck networks of S2; one has left if it is 1 % below
_MARKS = (1, 2, 5, 10, 12, 20, 50, 99)


def two_well(plan: Plan, links: Links) -> str:
    """What the page says about S1."""
    persistent, restart = (plan.results("S1", "", arm) for arm in (PERSISTENT, RESTART))
    rows, judged = [], UNKNOWN
    for result in persistent:
        ds = result.dataset("descent")
        ends, values = ds.end.values, ds.end_value.values
        for i, paper in enumerate(("(2, -2)", "the other well, the global one")):
            place = f"({ends[i, 0]:.3f}, {ends[i, 1]:.3f})"
            rows.append(["plain" if i == 0 else f"persistent iteration {i}", paper, place, number(values[i], 3)])
        judged = HOLDS if values[0] > _DEEP > values[1] else FAILS
    for result in restart:
        values = result.dataset("descent").end_value.values[1:]  # the first one is the plain descent
        deep = share(int((values < _DEEP).sum()), len(values))
        text = f"{_percent(deep)} of {len(values)} random starts end in the global well"
        rows.append(["restarts", UNKNOWN_CELL, text, UNKNOWN_CELL])
    claim = f"Persistent iteration 1 leaves the plain model's well for the deeper one: **{judged}**."
    if not rows:
        return "Not yet known at this scale: no cell is done."
    results = [*persistent, *restart]
    return blocks(
        [table(["descent", "paper", "ends at", "value"], rows), claim, failures(results, links), links.cells(results)]
    )


UNKNOWN_CELL = "–"


def kink(plan: Plan, variant: str, links: Links) -> str:
    """What the page says about one data set of S2."""
    losses = {arm: final_losses(plan.results("S2", variant, arm)) for arm in (PERSISTENT, RESTART)}
    results = [result for arm in (PERSISTENT, RESTART) for result in plan.results("S2", variant, arm)]
    chains, restarts = losses[PERSISTENT], losses[RESTART]
    rows, claims = [], []
    if restarts.size:
        stuck = share(int((restarts >= left_below()).sum()), restarts.size)
        rows.append(["re-initialisations that stay on the plateau", "most", f"{_percent(stuck)} of {restarts.size:,}"])
        best = np.median(restarts.min(0))
        rows.append([f"best loss of {len(restarts)} restarts, median", "0.33", significant(best)])
        claims.append(("Most re-initialisations are stuck on the plateau", _above_half(stuck)))
    if chains.size:
        left = np.minimum.accumulate(chains, axis=0) < left_below()
        for mark in (m for m in _MARKS if m < len(chains)):
            part = share(int(left[mark].sum()), chains.shape[1])
            of = f"{_percent(part)} of {chains.shape[1]} chains"
            rows.append([f"chains that have left by iteration {mark}", _paper_of(mark), of])
        best, at = np.median(chains.min(0)), np.median(chains.argmin(0))
        text = f"{significant(best)} (median iteration {at:.0f})"
        rows.append([f"best loss of {len(chains)} iterations, median", "0.10 (iteration 11)", text])
        few = min(12, len(chains) - 1)
        early = share(int(left[few].sum()), chains.shape[1])
        claims.append((f"Chains leave the plateau within {few} iterations", _above_half(early)))
    if chains.size and restarts.size and chains.shape[1] == restarts.shape[1]:
        n = min(len(chains), len(restarts))
        ratio = over_seeds(np.log10(chains[:n].min(0)) - np.log10(restarts[:n].min(0)))
        text = f"{with_interval(ratio, signed=True)}, {chains.shape[1]} starts"
        rows.append([f"log10 of the best loss of {n}: persistent − restarts", "-0.52", text])
        claims.append((f"The best of {n} persistent iterations has a lower loss than the best of {n} restarts",
                       verdict(ratio, -1)))  # fmt: skip
    if not rows:
        return "Not yet known at this scale: no cell is done."
    sentences = " ".join(f"{claim}: **{judged}**." for claim, judged in claims)
    return blocks(
        [table(["", "paper", "here"], rows), sentences, failures(results, links), links.cells(results)]
    )  # fmt: skip


def final_losses(results: list[Result]) -> np.ndarray:
    """Final losses of all chains, or sets of restarts, shape (iteration, start)."""
    found = [result.dataset("ensemble").final_loss.values for result in results if result.is_finished]
    return np.concatenate(found, axis=1) if found else np.empty((0, 0))


def left_below() -> float:
    """The loss below which a network has left the plateau."""
    return (1 - _MARGIN) * PLATEAU


def _paper_of(mark: int) -> str:
    return "within a few iterations" if mark == 5 else UNKNOWN_CELL


def _above_half(part: Estimate) -> str:
    """Whether a share is that of most, by its interval."""
    if math.isnan(part.low):
        return UNKNOWN
    return HOLDS if part.low > 0.5 else FAILS if part.high < 0.5 else UNKNOWN


def _percent(part: Estimate) -> str:
    return f"{100 * part.value:.1f} % ({100 * part.low:.1f} to {100 * part.high:.1f})"

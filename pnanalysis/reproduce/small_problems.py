"""S1 and S2: the two-well surface and the kink regression."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import xarray as xr

from pnanalysis.estimates import Estimate
from pnanalysis.reproduce.accuracy import CLAIM
from pnanalysis.reproduce.cells import Result
from pnanalysis.reproduce.markdown import UNKNOWN as DASH
from pnanalysis.reproduce.markdown import Links, blocks, failures, number, significant, table
from pnanalysis.reproduce.plan import Plan
from pnanalysis.reproduce.settings import PERSISTENT, RESTART
from pnanalysis.reproduce.statistics import FAILS, HOLDS, UNKNOWN, Claim, claim, share
from pnanalysis.significance import LEVEL, mcnemar

#: Values below which a descent has arrived in the deeper well, whose bottom is at -1.534, or in one of the two.
_DEEP, _ARRIVED = -1.4, -0.99
PLATEAU, _MARGIN = 4.2, 0.01  # loss of the stuck networks of S2; one has left if it is 1 % below
_WINDOW = "x drawn from -4 to 4 and y from -4 to 2"
_MARKS = (1, 2, 5, 12, 20, 50, 99)
_FEW = 12  # iterations, within which the paper's chain reaches its best loss
_ROUND_OFF = float(np.finfo(np.float32).eps) ** 2  # squared error that rounding alone gives an output of size one
_NOTHING = "Not yet known at this scale: no cell is done."


def two_well(plan: Plan, links: Links) -> str:
    """What the page says about S1."""
    results = [result for arm in (PERSISTENT, RESTART) for result in plan.results("S1", "", arm)]
    rows = []
    for result in _finished(results, PERSISTENT):
        ds = result.dataset("descent")
        for i, paper in enumerate(("(2, -2)", "the other well, the global one")):
            x, y = ds.end.values[i]
            name = "plain" if i == 0 else f"persistent iteration {i}"
            rows.append([name, paper, f"({x:.3f}, {y:.3f})", number(float(ds.end_value[i]), 3)])
    if not rows:
        return blocks([_NOTHING, failures(results, links)])
    return blocks(
        [
            table(["descent", "paper", "ends at", "value"], rows),
            table(CLAIM, [each.row for each in two_well_claims(plan)]),
            failures(results, links),
            links.cells(results),
        ]
    )


def descents(plan: Plan, arm: str) -> xr.Dataset | None:
    """The descents of an arm of S1, or ``None`` if its cell is not done."""
    found = _finished(plan.results("S1", "", arm), arm)
    return found[0].dataset("descent") if found else None


def wells(ds: xr.Dataset) -> np.ndarray:
    """Where each descent ends, shape (iteration,): 2 in the deeper well, 1 in the other, 0 on the way to either."""
    return np.digitize(-ds.end_value.values, [-_ARRIVED, -_DEEP], right=True)


def two_well_claims(plan: Plan) -> list[Claim]:
    """Whether repulsion leads to the deeper well, and how often another start does."""
    found = []
    for result in _finished(plan.results("S1", "", PERSISTENT), PERSISTENT):
        values = result.dataset("descent").end_value.values
        judged = HOLDS if values[0] > _DEEP > values[1] else FAILS
        here = f"f = {values[0]:.3f}, then {values[1]:.3f}"
        found.append(Claim("iteration 1 leaves the plain model's well for the deeper one", "yes", here, "1", judged))
    for result in _finished(plan.results("S1", "", RESTART), RESTART):
        on_the_way, _, in_deep = np.bincount(wells(result.dataset("descent"))[1:], minlength=3)  # 0 is the plain one
        n = result.dataset("descent").sizes["iteration"] - 1
        deep = share(int(in_deep), n)
        text = f"a plain descent from a random start ends in the deeper well ({_WINDOW})"
        here = f"{_percent(deep)} of {n}; one of two, the cost of the chain, in {_one_of_two(deep)}"
        here += f"; {on_the_way} have not arrived in either well" if on_the_way else ""
        found.append(Claim(text, DASH, here, f"{n} starts", DASH))
    return found


def _one_of_two(deep: Estimate) -> str:
    """How often at least one of two independent descents does what a share of them does."""
    return _percent(replace(deep, **{name: 1 - (1 - getattr(deep, name)) ** 2 for name in ("value", "low", "high")}))


def kink(plan: Plan, variant: str, links: Links) -> str:
    """What the page says about one data set of S2."""
    results = [result for arm in (PERSISTENT, RESTART) for result in plan.results("S2", variant, arm)]
    chains, restarts = (final_losses(plan, variant, arm) for arm in (PERSISTENT, RESTART))
    rows = []
    for losses, name, paper in (
        (restarts, "restarts", "0.33"),
        (chains, "trainings of a chain", "0.10 (iteration 11)"),
    ):
        if losses.size:
            rows += [
                [f"best loss of {n} {name}, median", paper * (n == len(losses)) or DASH, significant(_best(losses[:n]))]
                for n in _lengths(len(losses))
            ]
            off, stuck = trainings_until_off(losses)
            until = significant(float(np.median(off))) + (f"; {stuck} of {len(off)} never" if stuck else "")
            rows.append([f"{name} until off the plateau, median", DASH, until])
    if chains.size:
        for mark in (m for m in _MARKS if m < len(chains)):
            rows.append([f"chains that have left by iteration {mark}", DASH, _of_chains(chains, mark)])
    if chains.size and restarts.size:
        for mark in (m for m in _MARKS if m < min(len(chains), len(restarts))):
            rows.append([f"sets of {mark + 1} restarts of which one has left", DASH, _of_chains(restarts, mark)])
    if not rows:
        return blocks([_NOTHING, failures(results, links)])
    return blocks(
        [
            table(["", "paper", "here"], rows),
            table(CLAIM, [each.row for each in kink_claims(plan, variant)]),
            _about_best(plan, variant),
            failures(results, links),
            links.cells(results),
        ]
    )


def _about_best(plan: Plan, variant: str) -> str:
    """Why the best losses are given for two numbers of trainings."""
    chains, restarts = _common(plan, variant)
    n = min(len(chains), len(restarts))
    if len(_lengths(n)) < 2:
        return ""
    few = [f"{_left_by(losses, _FEW - 1)} of {losses.shape[1]}" for losses in (chains, restarts)]
    best = [_best(losses[:n]) for losses in (chains, restarts)]
    text = (
        f"A network has left the plateau if its loss is below {left_below():.3g}. Losses below {_ROUND_OFF:.1e}, which "
        "is round-off, count as that. Best losses depend on the number of trainings. Of "
        f"{_FEW} trainings, as many as the paper's chain took to its best loss, at least one has left in {few[0]} "
        f"chains and in {few[1]} sets of restarts. The best losses of {n} trainings have a median of "
        f"{significant(best[0])} in chains, and of {significant(best[1])} among restarts."
    )
    if best[0] > best[1]:
        text += (
            " Every iteration is pushed from its minimum by all earlier ones, which presumably is why chains level off "
            "above what single restarts reach."
        )
    return text


def kink_claims(plan: Plan, variant: str) -> list[Claim]:
    """What the paper says about S2, over starts instead of seeds: a cell has many."""
    chains, restarts = (final_losses(plan, variant, arm) for arm in (PERSISTENT, RESTART))
    found = []
    if restarts.size:
        stuck = share(int((restarts >= left_below()).sum()), restarts.size)
        here = f"{_percent(stuck)} of {restarts.size:,}"
        text = "most re-initialisations stay on the plateau"
        found.append(Claim(text, "most of 100", here, _starts(restarts), _above_half(stuck)))
    if chains.size:
        few = min(_FEW, len(chains) - 1)
        early = share(_left_by(chains, few), chains.shape[1])
        text = f"most chains leave the plateau within {few} iterations"
        found.append(Claim(text, "one chain, which does", _of_chains(chains, few), _starts(chains), _above_half(early)))
    return found + compared_claims(plan, variant)


def compared_claims(plan: Plan, variant: str) -> list[Claim]:
    """Chains beside restarts of equal cost, paired by start."""
    chains, restarts = _common(plan, variant)
    n = min(len(chains), len(restarts))
    if not n:
        return []
    chains, restarts = chains[:n], restarts[:n]
    found = [_more_chains_leave(chains, restarts)]
    sooner = trainings_until_off(chains)[0] - trainings_until_off(restarts)[0]
    text = f"a chain is off the plateau after fewer trainings than restarts (at most {n} are counted)"
    found.append(claim(text, sooner, sign=-1, unit="starts"))
    for k in _lengths(n):
        # a loss may be exactly zero: below the squared round-off of an output, one is as good as another
        best = [np.log10(np.maximum(losses[:k].min(0), _ROUND_OFF)) for losses in (chains, restarts)]
        text = f"the best loss of {k} trainings of a chain is lower than that of {k} restarts (log10)"
        paper = -0.52 if k == 100 else math.nan
        found.append(claim(text, best[0] - best[1], sign=-1, paper=paper, unit="starts"))
    return found


def _more_chains_leave(chains: np.ndarray, restarts: np.ndarray) -> Claim:
    """How many starts leave by their chain and not by as many restarts, among those whose plain training is stuck."""
    k = min(_FEW + 1, len(chains))
    stuck = chains[0] >= left_below()
    left = [(losses[:k, stuck] < left_below()).any(0) for losses in (chains, restarts)]
    only = [int((left[i] & ~left[1 - i]).sum()) for i in range(2)]
    p = float(mcnemar(*only)) if sum(only) else math.nan
    judged = UNKNOWN if not p <= LEVEL else HOLDS if only[0] > only[1] else FAILS
    here = f"{left[0].sum()} chains and {left[1].sum()} sets of restarts; only the chain for {only[0]}, only restarts "
    here += f"for {only[1]}"
    text = f"of the starts that are stuck at first, more leave by {k} trainings of a chain than by {k} restarts"
    return Claim(text, DASH, here, f"{stuck.sum()} starts", judged, p=p)


def trainings_until_off(losses: np.ndarray) -> tuple[np.ndarray, int]:
    """How many trainings each start needs until one is off the plateau, and for how many starts none is.

    Those count as many trainings as there are, which is a lower bound.
    """
    off = losses < left_below()
    until = np.where(off.any(0), off.argmax(0) + 1, len(losses)).astype(float)
    return until, int((~off.any(0)).sum())


def _lengths(n: int) -> list[int]:
    """The numbers of trainings of which best losses are compared."""
    return [_FEW, n] if n > _FEW else [n] if n else []


def final_losses(plan: Plan, variant: str, arm: str, seeds: frozenset[int] | None = None) -> np.ndarray:
    """Final losses of all chains, or sets of restarts, of these seeds, shape (iteration, start)."""
    results = _finished(plan.results("S2", variant, arm), arm)
    chosen = [result for result in results if seeds is None or result.cell.seed in seeds]
    found = [result.dataset("ensemble").final_loss.values for result in chosen]
    return np.concatenate(found, axis=1) if found else np.empty((0, 0))


def left_below() -> float:
    """The loss below which a network has left the plateau."""
    return (1 - _MARGIN) * PLATEAU


def _common(plan: Plan, variant: str) -> tuple[np.ndarray, np.ndarray]:
    """Final losses of both arms for the seeds that both have: the same starts, in the same order."""
    seeds = [{r.cell.seed for r in _finished(plan.results("S2", variant, arm), arm)} for arm in (PERSISTENT, RESTART)]
    both = frozenset(seeds[0] & seeds[1])
    return final_losses(plan, variant, PERSISTENT, both), final_losses(plan, variant, RESTART, both)


def _finished(results: list[Result], arm: str) -> list[Result]:
    return [result for result in results if result.cell.arm == arm and result.is_finished]


def _best(losses: np.ndarray) -> float:
    """The median over starts of the best loss, as the number of one of them: between two there may be a gulf."""
    return float(np.quantile(losses.min(0), 0.5, method="inverted_cdf"))


def _left_by(losses: np.ndarray, iteration: int) -> int:
    return int((losses[: iteration + 1].min(0) < left_below()).sum())


def _of_chains(losses: np.ndarray, iteration: int) -> str:
    part = share(_left_by(losses, iteration), losses.shape[1])
    return f"{_percent(part)} of {losses.shape[1]}"


def _starts(losses: np.ndarray) -> str:
    return f"{losses.shape[1]} starts"


def _above_half(part: Estimate) -> str:
    """Whether a share is that of most, by its interval."""
    if math.isnan(part.low):
        return UNKNOWN
    return HOLDS if part.low > 0.5 else FAILS if part.high < 0.5 else UNKNOWN


def _percent(part: Estimate) -> str:
    return f"{100 * part.value:.1f} % ({100 * part.low:.1f} to {100 * part.high:.1f})"

"""Means over seeds with intervals, differences paired by seed, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pnanalysis.estimates import Estimate, mean_and_se, proportion
from pnanalysis.reproduce.markdown import number, with_interval

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "not yet known at this scale"

#: The rule behind every verdict, as the page states it.
RULE = (
    "A claim is that a difference has a certain sign. It **holds** if the 95 % interval of the difference lies on that "
    "side of zero, it **does not hold** if the interval lies on the other side, and it is **not yet known at this "
    "scale** if the interval contains zero or there is none: with fewer than two seeds, "
    "or seeds that agree to the last digit. Intervals are Student's over seeds, of "
    "differences paired by seed. With three seeds they reach 2.5 standard deviations of these differences to either "
    "side (with five, 1.2): a smaller mean difference cannot be told from none. "
    "All seeds share one test set, so the "
    "intervals are about training, not about other test images. A verdict is about the sign alone: whether the paper's "
    "number lies inside the interval is said beside it. That number is of one run, without an error, and a single "
    "accuracy on 5,000 images is known to 0.6 points (standard error).\n\n"
    "Verdicts are not adjusted for the number of claims, except in S9-sweep. In the summary, *p, Holm* is, for all of "
    "its claims with a p-value together: of claims with at most 0.05 in that column, any is false with a chance of at "
    "most 5 %.\n\n"
    "Three experiments are judged otherwise. S1 is deterministic, so its one descent decides. S2 has many starts in "
    "place of seeds: its intervals are over starts, and *most* of them is more than half, by the 95 % interval "
    "(Wilson's) of the share. In S7 a constant cannot be shown, only refuted: the claim does not hold if the means of "
    "the gradient over the two halves of a trajectory differ by more than chance explains, in any layer and iteration "
    "in which it changes (5 % for all of these together, Bonferroni's bound); it holds only if the gradient never "
    "changes, and is not yet known otherwise."
)
#: Differences up to these are of round-off: relative to the numbers, and of percentages that were subtracted.
_ROUND_OFF, _OF_PERCENTAGES = 1e-9, 1e-12


@dataclass(frozen=True)
class Claim:
    """A claim with what the paper says, what was found, from how many seeds or starts, and whether it holds.

    Attributes
    ----------
    text : str
    paper, here : str
        Numbers as they are shown.
    n : str
    verdict : str
    main : bool
        Whether it belongs to the summary.
    p : float
        Two-sided p-value of no difference; NaN where there is none.
    """

    text: str
    paper: str
    here: str
    n: str
    verdict: str
    main: bool = True
    p: float = math.nan

    @property
    def has_control(self) -> bool:
        """Whether it is about a difference that has been tested."""
        return not math.isnan(self.p)

    @property
    def row(self) -> list[str]:
        """As a row of a table."""
        return [self.text, self.paper, self.here, self.n, self.verdict]


def claim(
    text: str,
    difference: Estimate,
    n: int | str,
    *,
    sign: int = 1,
    paper: float | str = "–",
    digits: int = 2,
    main: bool = True,
) -> Claim:
    """A claim about a difference, judged by its interval.

    Parameters
    ----------
    text : str
    difference : Estimate
    n : int or str
        From how many seeds, or starts.
    sign : {1, -1, 0}
        Of the difference that is claimed; 0 for one that is shown and not judged.
    paper : float or str
        The paper's number; of a number it is said whether it lies inside the interval.
    digits : int
        Decimals.
    main : bool
    """
    if not isinstance(paper, str):
        inside = "" if math.isnan(difference.low) else ", outside"
        inside = ", inside" if difference.low <= paper <= difference.high else inside
        paper = "–" if math.isnan(paper) else f"{number(paper, digits, signed=True)}{inside}"
    judged = verdict(difference, sign) if sign else "–"
    p = difference.tested().p if sign and not math.isnan(difference.low) else math.nan
    return Claim(text, paper, with_interval(difference, digits, signed=True), str(n), judged, main, p)


def over_seeds(values: Sequence[float] | np.ndarray) -> Estimate:
    """The mean of one number per seed with Student's 95 % interval, which a single seed does not have.

    Nor do seeds that all give the same number, up to round-off: errors are counts, so that a few seeds may agree by
    chance, and an interval without width would claim certainty.

    Parameters
    ----------
    values : sequence of float
        NaN for seeds without a number: they are left out.
    """
    known = np.asarray([value for value in values if not math.isnan(value)], dtype=float)
    if not len(known):
        return Estimate(math.nan)
    mean, se = mean_and_se(known)
    if len(known) == 1 or np.ptp(known) <= _ROUND_OFF * np.abs(known).max() + _OF_PERCENTAGES:
        return Estimate(mean)
    estimate = Estimate(mean, se, dof=len(known) - 1)
    low, high = estimate.interval()
    return Estimate(mean, estimate.se, low, high, dof=estimate.dof)


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Estimate:
    """The mean of ``first - second`` over the seeds that both have, with its interval."""
    return over_seeds([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])


def verdict(difference: Estimate, sign: int = 1) -> str:
    """Whether a difference has the claimed sign, by :data:`RULE`.

    Parameters
    ----------
    difference : Estimate
        With the ends of its interval, if it has one.
    sign : {1, -1}
        1 if the claim is that the difference is positive.
    """
    low, high = sorted((sign * difference.low, sign * difference.high))
    if math.isnan(low) or math.isnan(high):
        return UNKNOWN
    if low > 0:
        return HOLDS
    return FAILS if high < 0 else UNKNOWN


def share(count: int, n: int) -> Estimate:
    """A share of ``n`` independent starts with Wilson's 95 % interval."""
    return proportion(count / n, n) if n else Estimate(math.nan)


def rank(value: float, others: Sequence[float] | np.ndarray) -> tuple[int, int]:
    """How many of the others are smaller, and how many there are."""
    known = np.asarray(others, dtype=float)
    known = known[np.isfinite(known)]
    return int((known < value).sum()), len(known)


def pooled_rank_p(ranks: Sequence[tuple[int, int]]) -> float:
    """How probable ranks as low as these are together, if each number is one of its others.

    Parameters
    ----------
    ranks : sequence of (int, int)
        For each seed, how many of the others are not larger, and how many there are.

    Returns
    -------
    float
        The exact one-sided probability that independent ranks, uniform from 0 to the number of others, have no larger
        sum; NaN without ranks.
    """
    if not ranks:
        return math.nan
    probability = np.ones(1)
    for _, n in ranks:
        probability = np.convolve(probability, np.full(n + 1, 1 / (n + 1)))
    return float(min(probability[: sum(below for below, _ in ranks) + 1].sum(), 1.0))

"""Means over seeds with intervals, differences paired by seed, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pnanalysis.estimates import Estimate, mean_and_se, proportion
from pnanalysis.reproduce.markdown import number, with_interval

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "not yet known at this scale"

#: Seeds, or starts, that a verdict needs: an interval of two rests on a single difference between them.
FEWEST = 3
#: The rule behind every verdict, as the page states it.
RULE = (
    "A claim is that a difference has a certain sign. It **holds** if the 95 % interval of the difference lies on that "
    "side of zero, it **does not hold** if the interval lies on the other side, and it is **not yet known at this "
    "scale** if the interval contains zero or there is none: with fewer than three seeds, "
    "or seeds that agree to the last digit. Intervals are Student's over seeds, of "
    "differences paired by seed, which takes these differences for normal. With three seeds they reach 2.5 standard "
    "deviations of the differences to either side (with five, 1.2; those of two seeds, which are shown and decide "
    "nothing, 9): a smaller mean difference cannot be told from none. "
    "All seeds share one test set, so the "
    "intervals are about training, not about other test images. A verdict is about the sign alone: whether the paper's "
    "number lies inside the interval is said beside it. That number is of one run, without an error, and the standard "
    "error of an accuracy on 5,000 images alone is 0.7 points at 50 to 65 %, and 0.4 at 92 %. The page is written anew "
    "when cells are added, so that verdicts are final only once all seeds are done.\n\n"
    "Verdicts are not adjusted for the number of claims, except in S7 and S9-sweep. In the summary, *p, Holm* is "
    "adjusted, for all of its claims with a p-value together: the chance that any claim with at most 0.05 in that "
    "column is false is at most 5 %.\n\n"
    "Three experiments are judged otherwise. S1 is deterministic, so its one descent decides. S2 has many starts in "
    "place of seeds: its intervals are over starts, *most* of them is more than half, by the 95 % interval "
    "(Wilson's) of the share, and shares of the same starts are compared by McNemar's exact test. In S7 a constant "
    "cannot be shown, only refuted: the claim does not hold if the means of "
    "the gradient over the two halves of a trajectory differ by more than chance explains, in any layer and iteration "
    "in which it changes (5 % for all of these together, Bonferroni's bound); it holds only if the gradient never "
    "changes, and is not yet known otherwise. Its second claim is about the trajectories that were measured, which a "
    "count decides."
)
#: Decimals that are added at most.
_MOST_MORE = 6
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
    def row(self) -> list[str]:
        """As a row of a table."""
        return [self.text, self.paper, self.here, self.n, self.verdict]


def claim(
    text: str,
    differences: Sequence[float] | np.ndarray,
    *,
    sign: int = 1,
    paper: float | str = "–",
    digits: int = 2,
    main: bool = True,
    unit: str = "",
) -> Claim:
    """A claim about a difference, judged by its interval.

    Parameters
    ----------
    text : str
    differences : sequence of float
        One for each seed, or start; NaN where it is unknown.
    sign : {1, -1, 0}
        Of the difference that is claimed; 0 for one that is shown and not judged.
    paper : float or str
        The paper's number; of a number it is said whether it lies inside the interval.
    digits : int
        Decimals; more are shown where an end of the interval would be rounded to the zero on which the verdict depends.
    main : bool
    unit : str
        What the differences are of; of seeds by default.
    """
    difference, n = over_seeds(differences), int(np.isfinite(np.asarray(differences, dtype=float)).sum())
    if not isinstance(paper, str):
        inside = "" if math.isnan(difference.low) else ", outside"
        inside = ", inside" if difference.low <= paper <= difference.high else inside
        paper = "–" if math.isnan(paper) else f"{number(paper, digits, signed=True)}{inside}"
    judged = verdict(difference, sign) if sign else "–"
    p = difference.tested().p if sign and n >= FEWEST and not math.isnan(difference.low) else math.nan
    here = with_interval(difference, _digits(difference, digits), signed=True)
    return Claim(text, paper, here, f"{n} {unit}".rstrip(), judged, main, p)


def _digits(difference: Estimate, digits: int) -> int:
    """As many decimals, or a few more so that neither end of an interval without zero is rounded to zero."""
    nearest = min(abs(difference.low), abs(difference.high))
    if math.isnan(nearest) or difference.low <= 0 <= difference.high:
        return digits
    return next((more for more in range(digits, digits + _MOST_MORE) if round(nearest, more)), digits)


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


def differences(first: Mapping[int, float], second: Mapping[int, float]) -> list[float]:
    """``first - second`` of the seeds that both have."""
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Estimate:
    """The mean of ``first - second`` over the seeds that both have, with its interval."""
    return over_seeds(differences(first, second))


def verdict(difference: Estimate, sign: int = 1) -> str:
    """Whether a difference has the claimed sign, by :data:`RULE`.

    Parameters
    ----------
    difference : Estimate
        With the ends of its interval, if it has one, and its degrees of freedom.
    sign : {1, -1}
        1 if the claim is that the difference is positive.
    """
    low, high = sorted((sign * difference.low, sign * difference.high))
    if math.isnan(low) or math.isnan(high) or difference.dof < FEWEST - 1:
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

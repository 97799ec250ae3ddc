"""A number with its error: how it is printed, and when two of them differ significantly."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

#: Standard errors beyond which a single difference counts as significant.
SIGMAS = 2.0


@dataclass(frozen=True)
class Estimate:
    """A number with a standard error, an interval, or both, and how it is printed.

    Attributes
    ----------
    value : float
    se : float
        Standard error; NaN where it is not known, 0 for an exact number.
    low, high : float
        Ends of an interval; NaN where there is none.
    dof : float
        Degrees of freedom behind the standard error (``inf``: known, or very many).
    percent, signed, whole : bool
        Print in per cent; always with a sign; as a count, without decimals.
    """

    value: float
    se: float = math.nan
    low: float = math.nan
    high: float = math.nan
    dof: float = math.inf
    percent: bool = False
    signed: bool = False
    whole: bool = False

    def text(self, **style: bool) -> str:
        """As printed, ``12.34 ± 0.56 %`` for one; a dash for what is unknown.

        ``style`` overrides ``percent``, ``signed`` or ``whole``. An interval is printed where there is no standard
        error.
        """
        shown = replace(self, **style) if style else self
        if math.isnan(self.value):
            return "–"
        sign = "+" if shown.signed else ""
        if shown.percent:
            error = "" if math.isnan(self.se) else f" ± {100 * self.se:.2f}"
            return f"{100 * self.value:{sign}.2f}{error} %"
        form = f"{sign}z.0f" if shown.whole else f"{sign}.4g"
        value, low, high = (f"{number:{form}}" for number in (self.value, self.low, self.high))
        if math.isnan(self.se) and self.low < self.high:
            return value if low == value == high else f"{value} ({low} to {high})"
        error = "" if math.isnan(self.se) else f" ± {self.se:.2g}"
        return f"{value}{error}"

    def minus(self, other: Estimate) -> Estimate:
        """The difference of two independent estimates."""
        return Estimate(self.value - other.value, math.hypot(self.se, other.se), percent=self.percent)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Two-sided Student interval from the standard error and its degrees of freedom."""
        if self.se == 0:
            return self.value, self.value
        from scipy.stats import t as student_t  # here, so that command lines start without SciPy

        half = float(student_t.ppf(0.5 + level / 2, self.dof)) * self.se
        return self.value - half, self.value + half

    def is_significant(self, sigmas: float = SIGMAS) -> bool:
        """Whether a difference is beyond its error: ``sigmas`` standard errors, its interval, or both if it has both.

        Without an error nothing is significant.
        """
        beyond_error = math.isnan(self.se) or abs(self.value) > sigmas * self.se
        beyond_interval = math.isnan(self.low) or self.low > 0 or self.high < 0
        known = not (math.isnan(self.se) and math.isnan(self.low))
        return known and not math.isnan(self.value) and beyond_error and beyond_interval

    def direction(self, sigmas: float = SIGMAS, where: str = "on this test set") -> str:
        """A difference as ``lower`` or ``higher``, or that there is no significant one ``where``."""
        if not self.is_significant(sigmas):
            return f"no significant difference {where}"
        return "lower" if self.value < 0 else "higher"

    def in_points(self, sigmas: float = SIGMAS, where: str = "on this test set") -> str:
        """A difference of two fractions in percentage points, and its :meth:`direction`."""
        return f"{100 * self.value:+.2f} ± {100 * self.se:.2f} points ({self.direction(sigmas, where)})"


def proportion(value: float, n: int) -> Estimate:
    """A fraction of n examples, with its binomial standard error, printed in per cent."""
    se = math.sqrt(value * (1 - value) / n) if n and 0 <= value <= 1 else math.nan
    return Estimate(value, se, percent=True)


def significance_threshold(n_pairs: int) -> float:
    """Standard errors beyond which one of so many differences is significant, by Bonferroni's correction.

    Keeps the chance of any false claim among all pairs what it is for a single pair at :data:`SIGMAS`.
    """
    return SIGMAS if n_pairs <= 1 else -NormalDist().inv_cdf(NormalDist().cdf(-SIGMAS) / n_pairs)


def mean_and_se(values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean over examples ``(N,)`` and its standard error (NaN for a single example)."""
    n = len(values)
    with np.errstate(invalid="ignore", over="ignore"):  # losses far out may overflow
        return float(values.mean()), float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else math.nan


def ratio(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """``a / b``, NaN where ``b`` is zero, negative or unknown."""
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)

"""A number and its standard error: how it is printed, and when two of them are told apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

#: Standard errors beyond which a difference is claimed, where one is looked at.
SIGMAS = 2.0


@dataclass(frozen=True)
class Measured:
    """A number with its standard error, or an interval, or both (NaN where there is none)."""

    value: float
    se: float = math.nan
    low: float = math.nan
    high: float = math.nan

    def text(self, percent: bool = False, signed: bool = False, whole: bool = False) -> str:
        """As printed: ``12.34 ± 0.56 %``, or the interval where there is no error; a dash for what is unknown.

        Counts are printed without decimals (``whole``).
        """
        if math.isnan(self.value):
            return "–"
        sign = "+" if signed else ""
        if percent:
            error = "" if math.isnan(self.se) else f" ± {100 * self.se:.2f}"
            return f"{100 * self.value:{sign}.2f}{error} %"
        form = f"{sign}z.0f" if whole else f"{sign}.4g"
        value, low, high = (f"{number:{form}}" for number in (self.value, self.low, self.high))
        if math.isnan(self.se) and self.low < self.high:
            return value if low == value == high else f"{value} ({low} to {high})"
        error = "" if math.isnan(self.se) else f" ± {self.se:.2g}"
        return f"{value}{error}"

    def minus(self, other: Measured) -> Measured:
        """The difference of two independent measurements."""
        return Measured(self.value - other.value, math.hypot(self.se, other.se))

    def told(self, sigmas: float = SIGMAS) -> bool:
        """Whether it differs from zero: by so many standard errors, and beyond its interval; never without either."""
        by_error = math.isnan(self.se) or abs(self.value) > sigmas * self.se
        by_interval = math.isnan(self.low) or self.low > 0 or self.high < 0
        known = not (math.isnan(self.se) and math.isnan(self.low))
        return known and not math.isnan(self.value) and by_error and by_interval

    def verdict(self, sigmas: float = SIGMAS, by: str = "this test set") -> str:
        """A difference in one word, or that ``by`` could tell none."""
        if not self.told(sigmas):
            return f"no difference that {by} could tell"
        return "lower" if self.value < 0 else "higher"

    def as_points(self, sigmas: float = SIGMAS, by: str = "this test set") -> str:
        """A difference of two shares, in points of per cent, and the verdict."""
        return f"{100 * self.value:+.2f} ± {100 * self.se:.2f} points ({self.verdict(sigmas, by)})"


@dataclass(frozen=True)
class Shown:
    """A measured number and how to print it."""

    measured: Measured
    percent: bool = False
    signed: bool = False
    whole: bool = False

    def text(self) -> str:
        """As printed: see :meth:`Measured.text`."""
        return self.measured.text(self.percent, self.signed, self.whole)


def share(value: float, n: int) -> Measured:
    """A share of n examples, with its binomial standard error."""
    return Measured(value, math.sqrt(value * (1 - value) / n) if n and 0 <= value <= 1 else math.nan)


def mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean over examples ``(N,)`` and its standard error (NaN for a single example)."""
    n = len(values)
    with np.errstate(invalid="ignore", over="ignore"):  # losses far out may overflow
        return float(values.mean()), float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else math.nan


def ratio(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """``a / b``, NaN where ``b`` is zero, negative or unknown."""
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)


def told_beyond(n_pairs: int) -> float:
    """Standard errors beyond which one of so many differences is claimed: two for one, more for many (Bonferroni)."""
    return SIGMAS if n_pairs <= 1 else -NormalDist().inv_cdf(NormalDist().cdf(-SIGMAS) / n_pairs)

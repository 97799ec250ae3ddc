"""A number with its error: how it is printed, and when a difference counts as significant."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pnanalysis.significance import LEVEL, p_value, share_interval

#: One side of an interval over the other, or over the half-width that a standard error gives, beyond which ± misleads.
_LOPSIDED, _WIDE = 1.5, 2.0


@dataclass(frozen=True)
class Estimate:
    """A number with a standard error, an interval, or both, and how it is printed.

    Attributes
    ----------
    value : float
    se : float
        Standard error; NaN where it is not known, 0 for an exact number.
    low, high : float
        Ends of a 95 % interval; NaN where there is none.
    dof : float
        Degrees of freedom behind the standard error (``inf``: known, or very many).
    data_se : float
        The part of ``se`` that comes from the choice of examples, where random probes add another; NaN otherwise.
    p : float
        Of a difference: its p-value, adjusted where it is one of several; NaN where it has not been tested.
    percent, signed, whole : bool
        Print in per cent; always with a sign; as a count, without decimals.
    """

    value: float
    se: float = math.nan
    low: float = math.nan
    high: float = math.nan
    dof: float = math.inf
    data_se: float = math.nan
    p: float = math.nan
    percent: bool = False
    signed: bool = False
    whole: bool = False

    def text(self, **style: bool) -> str:
        """As printed, ``12.34 ± 0.56 %`` for one; a dash for what is unknown.

        ``style`` overrides ``percent``, ``signed`` or ``whole``. The two parts of a standard error are printed
        separately, as ``9.8 ± 0.2 (probes) ± 0.9 (examples)``. An interval takes their place where there is no standard
        error, or where it says less: ``0.00 (0.00 to 0.76) %`` for a mistake in none of 500 examples.
        """
        shown = replace(self, **style) if style else self
        if math.isnan(self.value):
            return "–"
        error = shown._interval_text() if shown._needs_interval() else shown._se_text()
        return f"{shown._number(self.value)}{error}{' %' if shown.percent else ''}"

    def _number(self, value: float) -> str:
        sign = "+" if self.signed else ""
        if self.percent:
            return f"{100 * value:{sign}z.2f}"
        return f"{value:{sign}z.0f}" if self.whole else f"{value:{sign}.4g}"

    def _needs_interval(self) -> bool:
        below, above = self.value - self.low, self.high - self.value
        if not self.low < self.high:
            return False
        is_lopsided = max(below, above) > _LOPSIDED * min(below, above)
        return math.isnan(self.se) or is_lopsided or min(below, above) > _WIDE * 1.96 * self.se

    def _interval_text(self) -> str:
        number, low, high = map(self._number, (self.value, self.low, self.high))
        return "" if low == number == high else f" ({low} to {high})"

    def _se_text(self) -> str:
        def error(se: float) -> str:
            return f" ± {100 * se:.2f}" if self.percent else f" ± {se:.2g}"

        if math.isnan(self.se):
            return ""
        if math.isnan(self.data_se):
            return error(self.se)
        probes = math.sqrt(max(self.se**2 - self.data_se**2, 0.0))
        is_sampled = probes > 1e-3 * self.se
        return f"{error(probes)} (probes)" * is_sampled + f"{error(self.data_se)} (examples)"

    def minus(self, other: Estimate) -> Estimate:
        """The difference of two independent estimates, tested; its interval is made from theirs if both have one.

        References
        ----------
        R. Newcombe, Statistics in Medicine 17 (1998) 873, method 10.
        """
        value, mine, others = self.value - other.value, (self.low, self.high), (other.low, other.high)
        low = value - math.hypot(self.value - mine[0], others[1] - other.value)
        high = value + math.hypot(mine[1] - self.value, other.value - others[0])
        return Estimate(value, math.hypot(self.se, other.se), low, high, percent=self.percent).tested()

    def tested(self, floor: float = 0.0) -> Estimate:
        """With the p-value of being zero; a value not beyond ``floor``, its round-off, is none."""
        return replace(self, p=float(p_value(self.value, self.se, self.low, self.high, self.dof, floor)))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Two-sided Student interval from the standard error and its degrees of freedom."""
        if self.se == 0:
            return self.value, self.value
        from scipy.stats import t as student_t  # here, so that command lines start without SciPy

        half = float(student_t.ppf(0.5 + level / 2, self.dof)) * self.se
        return self.value - half, self.value + half

    @property
    def is_significant(self) -> bool:
        """Whether a difference is more than chance, by its p-value; without one nothing is."""
        return self.p <= LEVEL

    def direction(self, where: str = "on this test set") -> str:
        """A difference as ``lower`` or ``higher``, or that there is no significant one ``where``."""
        if not self.is_significant:
            return f"no significant difference {where}"
        return "lower" if self.value < 0 else "higher"

    def in_points(self, where: str = "on this test set") -> str:
        """A difference of two fractions in percentage points, and its :meth:`direction`."""
        number = self.text(signed=True, percent=True).removesuffix(" %")
        return f"{number} points ({self.direction(where)})"


@dataclass(frozen=True)
class OutlierCount(Estimate):
    """A number of outliers, with the p-value of the gap that sets them apart."""

    gap_p: float = math.nan

    def text(self, **style: bool) -> str:
        """Such as ``9 (p 0.002)``, or that there is no gap."""
        if self.value == 0:
            return "no gap"
        return super().text(**style) + ("" if math.isnan(self.gap_p) else f" (p {self.gap_p:.2g})")


def proportion(value: float, n: float, se: float = math.nan) -> Estimate:
    """A fraction of n examples with its standard error, binomial unless given, and Wilson's interval; in per cent."""
    if math.isnan(se) and n and 0 <= value <= 1:
        se = math.sqrt(value * (1 - value) / n)
    low, high = share_interval(value, se, n)
    return Estimate(value, se, float(low), float(high), percent=True)


def mean_and_se(values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean over examples ``(N,)`` and its standard error (NaN for a single example)."""
    n = len(values)
    with np.errstate(invalid="ignore", over="ignore"):  # losses far out may overflow
        return float(values.mean()), float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else math.nan


def ratio(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """``a / b``, NaN where ``b`` is zero, negative or unknown."""
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)

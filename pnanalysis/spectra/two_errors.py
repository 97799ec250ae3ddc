"""Numbers with two errors: that of random vectors, and that of the choice of examples."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import t as student_t

from pnanalysis.arrays import Array
from pnanalysis.spectra.data_error import variance_of_forms

#: Of the variance over groups, at least so much is taken for that of examples: it is known to a third of itself.
_LEAST = 0.5
#: Degrees of freedom where next to nothing of the variance is that of examples.
_FEWEST_DOF = 2.0


@dataclass(frozen=True)
class Moment:
    """Numbers of all blocks with their errors.

    Attributes
    ----------
    value : ndarray, shape (...)
    probe_se : ndarray, shape (...)
        Standard errors for the random vectors; 0 where there are none.
    probe_dof : int
    form : ndarray, shape (group, ...)
        What each group of examples adds to the numbers to first order; see
        :class:`pnanalysis.spectra.data_error.Influence`.
    noise : ndarray, shape (...)
        What random vectors add to the variance of these, over the groups.
    share : ndarray, shape (group,)
    deviation : ndarray, shape (q, ...), optional
        Random vectors' contributions to the error: times independent normal numbers, their sum has its covariance.
    """

    value: Array
    probe_se: Array
    probe_dof: int
    form: Array
    noise: Array
    share: Array
    deviation: Array | None = None

    @property
    def data_se(self) -> Array:
        """Standard errors for the choice of examples; NaN without groups."""
        variance = variance_of_forms(self.share, self.form)
        return np.asarray(np.sqrt(np.maximum(variance - self.noise, _LEAST * variance)))

    @property
    def data_dof(self) -> Array:
        """Degrees of freedom of these (Satterthwaite's): fewer, the more of the variance is noise that is taken off."""
        variance = variance_of_forms(self.share, self.form)
        with np.errstate(divide="ignore", invalid="ignore"):
            left = np.where(variance > 0, 1 - self.noise / variance, 1.0)
        n_groups = int((self.share > 0).sum())
        return np.asarray(np.maximum((n_groups - 1) * np.maximum(left, 0) ** 2, _FEWEST_DOF))

    @property
    def se(self) -> Array:
        """Of both, as far as they are known."""
        return np.asarray(np.hypot(self.probe_se, np.nan_to_num(self.data_se)))

    @property
    def half_width(self) -> Array:
        """Of the 95 % interval."""
        probes = student_t.ppf(0.975, self.probe_dof) * self.probe_se
        examples = student_t.ppf(0.975, self.data_dof) * np.nan_to_num(self.data_se)
        return np.asarray(np.hypot(probes, examples))

    def root(self) -> Moment:
        """Square roots, to first order; NaN of estimates that are not positive, unless all they come from is zero."""
        is_zero = (self.value == 0) & (self.probe_se == 0) & (self.form == 0).all(0)
        size = np.sqrt(np.where((self.value > 0) | is_zero, self.value, np.nan))
        return replace(self.divided(np.where(is_zero, 1.0, 2 * size)), value=size)

    def merged(self, member: Array) -> Moment:
        """Sums over blocks, of numbers without random vectors; ``member`` is (sum, block)."""
        form = self.form @ member.T
        zeros = np.zeros(len(member))
        return Moment(member @ self.value, zeros, self.probe_dof, form, zeros, self.share)

    def divided(self, by: Array) -> Moment:
        """Divided by known numbers."""
        deviation = None if self.deviation is None else self.deviation / by
        return Moment(
            self.value / by, self.probe_se / by, self.probe_dof, self.form / by, self.noise / by**2, self.share,
            deviation,
        )  # fmt: skip


def group_factors(share: Array) -> Array:
    """Of the squared influence of each group in the variance."""
    n = int((share > 0).sum())
    return np.asarray(share**2 * n / max(n - 1, 1))


__all__ = ["Moment", "group_factors"]

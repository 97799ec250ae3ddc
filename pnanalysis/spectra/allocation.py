"""What a budget of products is spent on: deflation, probes of many steps, probes of a single product."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pnanalysis.spectra.quadrature import ritz
from pnanalysis.spectra.sample import LanczosCoefficients

#: Deflating steps between two decisions on whether to go on deflating.
STEPS_PER_DECISION = 4
#: The smallest fraction of a budget for deflation. A few steps say little about what more would bring, because Ritz
#: values converge late and then fast.
SMALLEST_FRACTION = 0.2
#: The largest fraction of a budget for deflation.
LARGEST_FRACTION = 0.45
#: The most deflating steps: their basis stays in memory.
MOST_DEFLATED = 256
#: Deflation pays if it brings the variance of what probes estimate below this fraction of that without deflation.
PAYING_FRACTION = 0.5
#: Fraction of a budget that goes into probes of a single product.
SINGLE_FRACTION = 0.1
#: Fewer probes of a single product say too little about their own error.
FEWEST_SINGLE = 3
#: See :func:`default_steps`; the error is flat around this value, on spectra of networks and of random matrices.
STEPS_FACTOR = 0.45
#: A Ritz value whose residual is below this fraction of its distance to the mean counts as one eigenvalue.
CONVERGED = 1e-2


def default_steps(n_products: int, n_parameters: int) -> int:
    """Lanczos steps per probe when ``n_products`` are to be divided among probes: ``STEPS_FACTOR (n P)^(1/3)``.

    With ``m`` steps per probe, the nodes are ``1/m`` of the bulk apart, and ``n/m`` probes of ``P`` dimensions know
    the bulk's masses to ``sqrt(m / (n P))``. The sum of the two is smallest at a multiple of ``(n P)^(1/3)``.
    """
    steps = round(STEPS_FACTOR * (n_products * n_parameters) ** (1 / 3))
    return int(max(min(steps, n_products, n_parameters), 1))


def n_single_products(n_products: int) -> int:
    """How many of a budget of products go into probes of a single product; 0 where these would be too few."""
    n = round(SINGLE_FRACTION * n_products)
    return n if n >= FEWEST_SINGLE else 0


def steps_per_probe(n_products: int, n_steps: int, most: int) -> int:
    """Steps of the next probe where products are divided among probes of about ``n_steps``, and of ``most`` at most."""
    n_probes = max(round(n_products / n_steps), -(-n_products // most), 1)
    return -(-n_products // n_probes)


def shares(n_products: int, n_parts: int) -> list[int]:
    """Products divided among parts as evenly as whole numbers allow; the larger shares first."""
    return [n_products // n_parts + (index < n_products % n_parts) for index in range(n_parts)]


@dataclass(frozen=True)
class DeflationGain:
    """What deflating a Krylov space brings, in sums of squared (centred) eigenvalues.

    The variance of what probes estimate is proportional to that sum over the eigenvalues they see. It is estimated
    from the coefficients so far: converged Ritz values stand for one eigenvalue each, and the others for the rest of
    the spectrum, in proportion to their Gauss weights.

    Attributes
    ----------
    total, left : float
        The sum over all eigenvalues, and over those of the complement.
    next_step : float
        By how much one more step reduces it: ``(alpha - c)^2 + 2 beta^2``, averaged over the last ones.
    trace : float
        Sum of the eigenvalues themselves.
    """

    total: float
    left: float
    next_step: float
    trace: float

    @classmethod
    def of(cls, probe: LanczosCoefficients, n_parameters: int) -> DeflationGain:
        """From the coefficients of the Krylov space."""
        value, weight, residual = ritz(probe.alpha, probe.beta)
        single = residual < CONVERGED * np.abs(value - weight @ value)
        if single.all():
            return cls(0.0, 0.0, 0.0, float(value.sum()))
        fraction = np.where(single, 0, weight)
        fraction /= fraction.sum()
        centre = fraction @ value
        squared = (value - centre) ** 2
        n_rest = n_parameters - single.sum()
        left = n_rest * (fraction @ squared) - squared[~single].sum()
        # averaged over the last steps: single coefficients scatter
        last = slice(-STEPS_PER_DECISION, None)
        gain = np.mean((probe.alpha[last] - centre) ** 2 + 2 * probe.beta[last] ** 2)
        trace = value[single].sum() + n_rest * centre
        return cls(float(left + squared.sum()), float(left), float(gain), float(trace))

    def is_enough(self, n_left: int) -> bool:
        """Whether the next of ``n_left`` products is better spent on a probe of the complement than on one more step.

        The variance of what ``n`` products for probes estimate is proportional to ``left / n``: a step reduces both.
        """
        return self.left == 0 or self.next_step * n_left < self.left

    def pays(self, n_left: int, n_products: int) -> bool:
        """Whether probes with ``n_left`` of ``n_products`` know far more than with all of them and no deflation."""
        return self.left * n_products <= PAYING_FRACTION * self.total * n_left

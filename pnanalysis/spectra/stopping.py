"""When a spectrum is known well enough: target errors, within a budget of products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pnanalysis.checks import positive
from pnanalysis.errors import CurvatureError
from pnanalysis.spectra.quadrature import ritz

if TYPE_CHECKING:
    from pnanalysis.spectra.allocation import DeflationGain
    from pnanalysis.spectra.sample import LanczosCoefficients, SpectrumSample

#: Quantities whose error can be a target. That of ``lambda_max`` is its residual bound, those of others are standard
#: errors.
QUANTITIES = ("trace", "frobenius_norm", "effective_rank", "lambda_max")


@dataclass(frozen=True)
class Until:
    """Target errors, relative to the quantities themselves; all of them are to be reached.

    Attributes
    ----------
    targets : mapping of str to float
        By quantity, one of :data:`QUANTITIES`.
    errors_of : callable
        The relative errors, by quantity, that a sample has left so far.
    """

    targets: Mapping[str, float]
    errors_of: Callable[[SpectrumSample], Mapping[str, float]]

    @property
    def of_moments(self) -> bool:
        """Whether single products bring all targets nearer that probes can reach."""
        return not set(self.targets) - {"trace", "frobenius_norm", "lambda_max"}

    def is_reached(self, errors: Mapping[str, float]) -> bool:
        """Whether no error is above its target."""
        return all(errors[name] <= target for name, target in self.targets.items())

    def is_within_reach(self, probe: LanczosCoefficients, gain: DeflationGain) -> bool:
        """Whether, after so much deflation, as many products again for probes will do, by the error of the trace."""
        value, _, residual = ritz(probe.alpha, probe.beta)
        if residual[-1] > self.targets.get("lambda_max", np.inf) * abs(value[-1]):
            return False
        others = [target for name, target in self.targets.items() if name != "lambda_max"]
        return not others or (2 * max(gain.left, 0.0) / len(value)) ** 0.5 <= min(others) * abs(gain.trace)

    def text(self, errors: Mapping[str, float]) -> str:
        """The errors so far and their targets, in a few words."""
        return ", ".join(f"{name} ±{errors[name]:.2g} (to {target:.2g})" for name, target in self.targets.items())


def checked_targets(until: Any) -> dict[str, float] | None:
    """Targets by quantity, as given to an analysis; ``None`` where there are none.

    Raises
    ------
    PnError
        If it is no mapping of known quantities to positive numbers.
    """
    if until is None:
        return None
    known = ", ".join(QUANTITIES)
    if not isinstance(until, Mapping) or not until:
        raise CurvatureError(f"until is {until!r}; give relative errors by name, such as {{'trace': 0.02}} ({known})")
    for name, target in until.items():
        if name not in QUANTITIES:
            raise CurvatureError(f"until has no quantity {name!r}; choose among {known}")
        positive(**{f"until[{name!r}]": target})
    return {name: float(target) for name, target in until.items()}

"""What sampling a spectrum is told, and what it brings."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pnanalysis.arrays import Array
from pnanalysis.spectra.data_feed import Receiver
from pnanalysis.spectra.memory import Storage
from pnanalysis.spectra.merged import MergedSpaces
from pnanalysis.spectra.stopping import Until


@dataclass(frozen=True)
class SamplingSettings:
    """How a spectrum is sampled: see :func:`pnanalysis.spectra.density.spectral_density`.

    ``data`` receives vectors on the way, see :mod:`pnanalysis.spectra.data_feed`; it has no influence on the sample.
    """

    n_lanczos: int
    n_probes: int
    n_hvp: int | None
    deflate: bool
    seed: int
    storage: Storage
    max_memory_bytes: int | None = None
    symmetry_tolerance: float | None = None
    state: Path | None = None
    save_every: float = 300.0
    data: Receiver | None = None
    until: Until | None = None

    @property
    def budget(self) -> int:
        """The most products."""
        return self.n_hvp or self.n_lanczos * self.n_probes


@dataclass(frozen=True)
class LanczosCoefficients:
    """The tridiagonal matrix of one start vector, in float64, and the part it plays in the spectrum.

    Attributes
    ----------
    alpha, beta : ndarray
        ``(m,)`` each; see :class:`pnanalysis.spectra.lanczos.Lanczos`.
    n_before : int
        Directions that had been deflated before.
    sampled : bool
        Whether the start vector is a random probe of what was left then.
    deflated : bool
        Whether later probes ran in the complement of its Krylov space.
    """

    alpha: Array
    beta: Array
    n_before: int = 0
    sampled: bool = True
    deflated: bool = False

    def first(self, n_steps: int) -> LanczosCoefficients:
        """The coefficients of the first steps."""
        return replace(self, alpha=self.alpha[:n_steps], beta=self.beta[:n_steps])


@dataclass
class SpectrumSample:
    """The coefficients of all start vectors, in the order in which they ran, and the products spent on them.

    Attributes
    ----------
    n_parameters : int
    method : str
        ``"exact"``, ``"deflated"`` or ``"plain"``.
    probes : list of LanczosCoefficients
    single : list of LanczosCoefficients
        Of probes of a single product, in the complement of all that was deflated.
    n_hvp : int
        Products spent.
    asymmetry : float
        See :meth:`pnanalysis.spectra.lanczos.Lanczos.skew`; NaN where it was not measured.
    rounding : float
        See :meth:`pnanalysis.spectra.lanczos.Lanczos.rounding`: the largest of all start vectors.
    until_reached : bool
        Whether target errors were given and reached.
    merged : MergedSpaces or None
        How the deflated spaces are coupled, if that is known.
    """

    n_parameters: int
    method: str
    probes: list[LanczosCoefficients] = field(default_factory=list)
    single: list[LanczosCoefficients] = field(default_factory=list)
    n_hvp: int = 0
    asymmetry: float = np.nan
    rounding: float = 0.0
    until_reached: bool = False
    merged: MergedSpaces | None = None

    @property
    def n_deflated(self) -> int:
        return sum(len(probe.alpha) for probe in self.probes if probe.deflated)

    @property
    def n_free(self) -> int:
        return self.n_parameters - self.n_deflated

"""How the products are spent: one Krylov space is taken out exactly, the rest of the spectrum is sampled by probes.

Let ``Q`` be the ``k`` Lanczos vectors of one random start vector, ``T = Q'HQ`` and ``B`` the operator compressed to
the orthogonal complement of ``Q``. In a basis of the two, ``H`` is block diagonal except for one entry, beta, on
either side. Hence, whether or not any Ritz value has converged,

- ``tr H = tr T + tr B`` exactly, and ``|H|_F^2 = |T|_F^2 + |B|_F^2 + 2 beta^2``;
- the measure that gives each of the ``k`` Ritz values the mass ``1/P`` and the spectrum of ``B`` the remaining
  ``(P - k)/P`` is within ``2 beta / P`` of the spectrum of ``H`` in Wasserstein-1 distance (the nuclear norm of the
  coupling bounds the sum of the eigenvalue shifts).

The probes of ``B`` no longer see the large eigenvalues, whose random mass causes nearly all the error of plain
stochastic Lanczos quadrature. This holds only if the probes stay orthogonal to *everything* that was given mass. Ritz
values inside the cluster at zero may therefore be counted as well, because their directions are removed from the
probes too.

Given a budget, the probes run one after the other, and the Krylov space of each is deflated for those after it. Each
probe then gives an estimate of its own (everything before it exactly, the rest by quadrature). The estimates' errors
are uncorrelated, because each is unbiased given everything before it, so they are averaged by their expected
precision. The first Krylov space counts as a probe too where deflation brings little, as in a spectrum without
outliers: then nothing is lost against probes alone. The last tenth of the budget goes into probes of a single product
in the complement of all that is deflated by then, which sharpen the trace and the Frobenius norm
(:mod:`pnanalysis.spectra.moments`). The deflated spaces together give the Ritz values that outliers, edges and bounds
are read from (:mod:`pnanalysis.spectra.merged`). Given numbers of steps and probes instead, the probes run in lockstep.

References
----------
Bhattacharjee, Jayaram, Musco, Musco and Ray, Improved spectral density estimation via explicit and implicit
deflation, arXiv 2410.21690. Meyer, Musco, Musco and Woodruff, Hutch++, arXiv 2010.09649 (the same split, for the
trace). Mirsky's inequality for the eigenvalue shifts: Bhatia, Matrix Analysis (1997), IV.62.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
from torch import Tensor

from pnanalysis.errors import CurvatureError
from pnanalysis.spectra.allocation import (
    FEWEST_SINGLE,
    LARGEST_FRACTION,
    MOST_DEFLATED,
    SMALLEST_FRACTION,
    STEPS_PER_DECISION,
    DeflationGain,
    default_steps,
    n_single_products,
    steps_per_probe,
)
from pnanalysis.spectra.data_feed import DataFeed
from pnanalysis.spectra.exact import all_columns
from pnanalysis.spectra.ghosts import without_ghosts
from pnanalysis.spectra.lanczos import STEPS_PER_CHECK, Lanczos, Saver, largest_asymmetry
from pnanalysis.spectra.linear_operator import (
    ROUND_OFF,
    LinearOperator,
    arithmetic,
    round_off,
)
from pnanalysis.spectra.memory import probes_at_once, singles_at_once, vectors_at_once
from pnanalysis.spectra.merged import Couplings, MergedSpaces
from pnanalysis.spectra.plan import check_fits, equal_probes, fewest_columns, is_exact
from pnanalysis.spectra.random_vectors import random_unit_vectors
from pnanalysis.spectra.sample import LanczosCoefficients, SamplingSettings, SpectrumSample
from pnanalysis.spectra.sharing import processes_of
from pnanalysis.terminal.progress import Advance

#: Single products between two looks at the error that they are to reach.
SINGLE_PER_CHECK = 8
#: Eigenvalues whose squares a float64 holds, with those of far smaller ones.
SMALLEST_SCALE, LARGEST_SCALE = 1e-140, 1e140
#: A skew part is worth a warning from here on, by the arithmetic of the products: sums over examples that cancel leave
#: more of it in single precision (3e-5 in a seven-layer network) than in the largest eigenvalue. Else ten times the
#: round-off.
SKEW_TOLERANCE = {"float64": 1e-6, "float32": 2e-4}


def sample_spectrum(
    operator: LinearOperator, settings: SamplingSettings, advance: Advance | None = None
) -> SpectrumSample:
    """Spend the products: deflate (if the settings say so), then probe.

    Raises
    ------
    CurvatureError
        If a product is not finite, the operator is not symmetric, its eigenvalues are too small or too large to be
        squared, or the memory does not suffice.

    Warns
    -----
    UserWarning
        If the operator has a larger skew part than round-off explains (:data:`SKEW_TOLERANCE`).
    """
    processes_of(operator).by_all(lambda: check_fits(operator.shape[0], settings))
    sample = _Sampler(operator, settings, advance).sampled()
    magnitude = max(float(np.abs(probe.alpha).max()) for probe in sample.probes)
    if magnitude and not SMALLEST_SCALE <= magnitude <= LARGEST_SCALE:
        small = magnitude < 1
        raise CurvatureError(
            f"the eigenvalues of the operator are about {magnitude:.0e}, too {'small' if small else 'large'} for "
            f"float64 to hold their squares; multiply the loss by a {'large' if small else 'small'} number"
        )
    own = round_off(operator)
    tolerance = max(SKEW_TOLERANCE.get(arithmetic(operator), 0), settings.storage.round_off)
    if arithmetic(operator) not in SKEW_TOLERANCE or getattr(operator, "by_differences", False):
        tolerance = max(tolerance, 10 * own)
    if sample.asymmetry > tolerance:
        warnings.warn(
            f"the operator is not quite symmetric: its skew part changes products by {sample.asymmetry:.1e} of its "
            f"norm, where round-off explains {tolerance:.0e}; eigenvalues smaller than that mean nothing",
            stacklevel=3,
        )
    return sample


class _Sampler:
    """One spectrum in the making."""

    def __init__(self, operator: LinearOperator, settings: SamplingSettings, advance: Advance | None) -> None:
        self.operator = operator
        self.settings = settings
        self.decided = processes_of(operator).decided
        self.feed = DataFeed(operator, settings.data, settings.seed)
        self.sample = SpectrumSample(operator.shape[0], "deflated" if settings.deflate else "plain")
        self._next_vector = 1  # random vector 0 is that of the first deflated space
        self._couplings: Couplings | None = None  # of the spaces that are deflated in turn
        self._norm, self._rounding = 0.0, 0.0  # of the operator, and of what rounding vectors changes
        self._bar = advance
        self._text = ""

    def sampled(self) -> SpectrumSample:
        """Spend all products, or as many as reach the targets."""
        settings, n_parameters = self.settings, self.sample.n_parameters
        if is_exact(n_parameters, settings):
            return all_columns(self.operator, settings, self.feed, self._advance)
        if not settings.deflate:
            plan = equal_probes(n_parameters, settings)
            for n_steps in dict.fromkeys(plan):
                self._probe_in_lockstep(None, plan.count(n_steps), min(n_steps, n_parameters))
                if self._is_reached():
                    break
        elif settings.n_hvp is None and settings.n_probes > 1:
            basis = self._deflate(settings.n_lanczos)
            n_steps = min(settings.n_lanczos, self.sample.n_free)
            if n_steps:
                self._probe_in_lockstep(basis, settings.n_probes - 1, n_steps)
        else:
            self._probe_in_turn(settings.budget)
        return self.sample

    def _deflate(self, capacity: int) -> Tensor:
        """Deflate the Krylov space of one random vector, ``capacity`` steps of it; returns its basis ``(P, k)``."""
        settings = self.settings
        probes_at_once(settings.storage, self.sample.n_parameters, capacity, 1, 0, settings.max_memory_bytes)
        lanczos, saver = self._start("deflation", range(1), capacity)
        while lanczos.step < capacity and not _is_exhausted(lanczos):
            lanczos.extend(min(STEPS_PER_CHECK, capacity - lanczos.step), self._advance, saver)
        self._finish(lanczos, saver, sampled=False, deflated=True)
        return lanczos.basis[0, :, : self.sample.n_deflated]

    def _probe_in_lockstep(self, deflated: Tensor | None, n_probes: int, n_steps: int) -> None:
        """Run Lanczos on random vectors, as many at once as fit in memory."""
        settings = self.settings
        n_parameters, n_deflated = self.sample.n_parameters, self.sample.n_deflated
        at_once = probes_at_once(
            settings.storage, n_parameters, n_steps, n_probes, n_deflated, settings.max_memory_bytes
        )
        for done in range(0, n_probes, at_once):
            vectors = self._vectors(min(at_once, n_probes - done))
            lanczos, saver = self._start(f"probes-{vectors[0]}-{vectors[-1]}", vectors, n_steps, deflated)
            lanczos.extend(n_steps - lanczos.step, self._advance, saver)
            self._finish(lanczos, saver)

    def _probe_in_turn(self, budget: int) -> None:
        """Deflate as long as that reduces the error most, then run one probe after the other, then single products.

        Each runs in the complement of all before it.
        """
        columns = self._columns(budget)
        if columns.shape[1] >= min(budget, self.sample.n_parameters):  # else the memory is short
            self._couplings = Couplings()
        for_probes = budget - n_single_products(budget)
        self._deflate_first(columns, budget, for_probes)
        left = for_probes - self.sample.n_hvp
        until = self.settings.until
        n_steps = default_steps(max(left if until is None else 2 * self.sample.n_hvp, 1), self.sample.n_parameters)
        while left > 0 and not self._is_reached():
            room = min(self.sample.n_free, columns.shape[1] - self.sample.n_deflated)
            if room < 1 or (until is not None and until.of_moments and any(p.sampled for p in self.sample.probes)):
                break
            left -= self._probe_behind(columns, steps_per_probe(left, n_steps, room), left)
        self._single_products(columns, budget)

    def _columns(self, budget: int) -> Tensor:
        """One block of memory for the deflated vectors and, behind them, the basis of the probe that is running."""
        settings, n_parameters = self.settings, self.sample.n_parameters
        wanted = min(budget, n_parameters)
        n_columns = vectors_at_once(settings.storage, n_parameters, wanted, settings.max_memory_bytes)
        return settings.storage.columns(n_parameters, max(n_columns, fewest_columns(n_parameters, budget)))

    def _deflate_first(self, columns: Tensor, budget: int, for_probes: int) -> None:
        """Deflate the Krylov space of a first vector as far as that pays; if it does not, that is the first probe."""
        n_columns, n_parameters, until = columns.shape[1], self.sample.n_parameters, self.settings.until
        as_probe = min(steps_per_probe(for_probes, default_steps(for_probes, n_parameters), n_columns), n_parameters)
        most = max(min(int(LARGEST_FRACTION * budget), MOST_DEFLATED, max(n_columns - as_probe, n_columns // 2)), 1)
        lanczos, saver = self._start(
            "deflation", range(1), max(most, as_probe), storage=columns[:, : max(most, as_probe)]
        )
        earliest = SMALLEST_FRACTION * budget if until is None else 2 * STEPS_PER_DECISION
        decision = -int(-earliest // STEPS_PER_DECISION) * STEPS_PER_DECISION
        # Each decision depends on the steps before it only: the same ones are taken after an interruption.
        while decision < most and not _is_exhausted(lanczos):
            if lanczos.step < decision:
                lanczos.extend(decision - lanczos.step, self._advance, saver)
            elif self._is_deflated_enough(_coefficients(lanczos)[0].first(decision), budget):
                break
            else:
                decision += STEPS_PER_DECISION
        decision = min(decision, most)
        if not _is_exhausted(lanczos):
            lanczos.extend(max(decision - lanczos.step, 0), self._advance, saver)
        gain = DeflationGain.of(_coefficients(lanczos)[0].first(decision), n_parameters)
        pays = self.decided(gain.pays(budget - decision, budget))
        is_probe = until is None and not _is_exhausted(lanczos) and not pays
        if is_probe:
            lanczos.extend(max(as_probe - lanczos.step, 0), self._advance, saver)
        self._finish(lanczos, saver, sampled=is_probe, deflated=True)

    def _is_deflated_enough(self, coefficients: LanczosCoefficients, budget: int) -> bool:
        gain, step = DeflationGain.of(coefficients, self.sample.n_parameters), len(coefficients.alpha)
        until = self.settings.until
        within_reach = until is not None and until.is_within_reach(coefficients, gain)
        return self.decided(gain.is_enough(budget - step) or within_reach)

    def _probe_behind(self, columns: Tensor, n_steps: int, left: int) -> int:
        """Run one probe in the complement of all that is deflated, and deflate it too if others follow and fit.

        Returns the products spent.
        """
        n_before = self.sample.n_deflated
        [vector] = self._vectors(1)
        lanczos, saver = self._start(
            f"probe-{vector}",
            range(vector, vector + 1),
            n_steps,
            columns[:, :n_before],
            columns[:, n_before : n_before + n_steps],
        )
        lanczos.extend(n_steps - lanczos.step, self._advance, saver)
        # deflating it means that the next basis must go behind it
        following = n_steps if left > n_steps else 1
        self._finish(lanczos, saver, deflated=n_before + n_steps + following <= columns.shape[1])
        return n_steps

    def _single_products(self, columns: Tensor, budget: int) -> None:
        """Spend what is left on probes of a single product, several at once where their vectors are short."""
        settings, n_before = self.settings, self.sample.n_deflated
        deflated, behind = columns[:, :n_before], columns[:, n_before:]
        few = singles_at_once(settings.storage, self.sample.n_parameters)
        at_once = min(max((behind.shape[1] + 3) // 4, 1), few, behind.shape[1], self.sample.n_free)
        if at_once < 1 or budget - self.sample.n_hvp < FEWEST_SINGLE:
            return
        if settings.until is not None:
            at_once = min(at_once, SINGLE_PER_CHECK)
        while self.sample.n_hvp < budget and not self._is_reached():
            vectors = self._vectors(min(at_once, budget - self.sample.n_hvp))
            lanczos, saver = self._start(
                f"single-{vectors[0]}-{vectors[-1]}", vectors, 1, deflated, behind[:, : len(vectors)]
            )
            lanczos.extend(1 - lanczos.step, self._advance, saver)
            self._finish(lanczos, saver, single=True)
            del lanczos, saver  # and their vectors, before the next ones are drawn

    def _vectors(self, n: int) -> range:
        """The next random vectors."""
        self._next_vector += n
        return range(self._next_vector - n, self._next_vector)

    def _start(
        self, name: str, vectors: range, capacity: int, deflated: Tensor | None = None, storage: Tensor | None = None
    ) -> tuple[Lanczos, Saver | None]:
        """Lanczos on random vectors, and what saves it, after it has restored what an unfinished call left."""
        settings = self.settings
        if storage is None:
            storage = settings.storage.columns(self.sample.n_parameters, len(vectors) * settings.storage.kept(capacity))
        lanczos = Lanczos(
            self.operator,
            random_unit_vectors(self.operator, vectors, settings.seed),
            capacity,
            deflated,
            settings.storage.dtype,
            settings.storage.device,
            settings.symmetry_tolerance or max(largest_asymmetry(self.operator), settings.storage.round_off),
            storage,
            reorthogonalise=settings.storage.mode != "none",
        )
        if settings.state is None:
            return lanczos, None
        label = f"seed {settings.seed}, {lanczos.n_deflated} deflated, {capacity} steps, {settings.n_hvp} products"
        if settings.until is not None:
            label += f", until {dict(settings.until.targets)}"
        saver = Saver(settings.state / f"{name}.safetensors", label, settings.save_every)
        saver.resume(lanczos)
        self._advance(lanczos.step * lanczos.n_probes)
        return lanczos, saver

    def _finish(
        self,
        lanczos: Lanczos,
        saver: Saver | None,
        sampled: bool = True,
        deflated: bool = False,
        single: bool = False,
    ) -> None:
        """Save the final state, add the coefficients to the sample, and hand the vectors on."""
        if saver is not None:
            saver(lanczos, force=True)
        sample, n_before = self.sample, self.sample.n_deflated
        found = [
            replace(probe, n_before=n_before, sampled=sampled, deflated=deflated) for probe in _coefficients(lanczos)
        ]
        (sample.single if single else sample.probes).extend(found)
        sample.n_hvp += lanczos.step * lanczos.n_probes
        sample.asymmetry = float(np.fmax(sample.asymmetry, lanczos.skew()))
        # in the complement of large eigenvalues the norm is smaller, of which this is then a part
        self._norm = max(self._norm, lanczos.norm)
        self._rounding = max(self._rounding, lanczos.rounding())
        sample.rounding = self._rounding / self._norm if self._norm else 0.0
        if not lanczos.reorthogonalise:
            return
        if lanczos.deflated is not None:
            self.feed.probed(lanczos)
        elif not deflated:
            self.feed.plain(lanczos)
        if deflated:
            self.feed.deflated(lanczos)
            if self._couplings is not None:
                self._couplings.add(lanczos)
                sample.merged = MergedSpaces(self._couplings.parts, self._couplings.overlaps())

    def _is_reached(self) -> bool:
        """Whether all targets are reached; there must be a probe to tell."""
        until = self.settings.until
        if until is None or not any(probe.sampled for probe in self.sample.probes):
            return False
        errors = until.errors_of(self.sample)
        self._text = until.text(errors)
        self._advance(0)
        self.sample.until_reached = self.decided(until.is_reached(errors))
        return self.sample.until_reached

    def _advance(self, n_products: float) -> None:
        if self._bar is not None:
            self._bar(n_products, self._text)


def _is_exhausted(lanczos: Lanczos) -> bool:
    """Whether the Krylov space of the first vector is invariant, and does not grow any more."""
    return lanczos.sizes()[0] < lanczos.step


def _coefficients(lanczos: Lanczos) -> list[LanczosCoefficients]:
    """The coefficients of each start vector, without the zeros after a breakdown."""
    alpha, beta = lanczos.coefficients()
    pairs = [(a[:size], b[:size]) for a, b, size in zip(alpha, beta, lanczos.sizes(), strict=True)]
    if not lanczos.reorthogonalise:
        own = ROUND_OFF[str(lanczos.dtype).removeprefix("torch.")]
        pairs = [without_ghosts(*pair, own) for pair in pairs]
    return [LanczosCoefficients(*pair) for pair in pairs]

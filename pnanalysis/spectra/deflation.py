"""Where the products go: one Krylov space taken out exactly, the rest sampled by probes.

Let ``Q`` be the ``k`` Lanczos vectors of one random start vector, ``T = Q'HQ`` and ``B`` the operator compressed to
the orthogonal complement of ``Q``. In the basis of the two, ``H`` is block diagonal but for one entry, beta, on
either side. So, whatever has converged and whatever has not,

- ``tr H = tr T + tr B`` exactly, and ``|H|_F^2 = |T|_F^2 + |B|_F^2 + 2 beta^2``;
- giving each of the ``k`` Ritz values the mass ``1/P`` and the spectrum of ``B`` the remaining ``(P - k)/P`` is
  within ``2 beta / P`` of the spectrum of ``H`` in Wasserstein-1 distance (the nuclear norm of the coupling bounds
  the sum of the eigenvalue shifts).

The probes of ``B`` no longer see the large eigenvalues, whose random mass makes up nearly all the error of plain
stochastic Lanczos quadrature. This holds only if the probes stay orthogonal to *everything* that was given mass:
Ritz values inside the cluster at zero may well be counted, for their directions are taken out of the probes too.

Given a budget, the probes run in turn and each one's Krylov space is deflated for those after it. Each probe then
gives an estimate of its own (everything before it exactly, the rest by quadrature); their errors are uncorrelated,
for each is unbiased given all that went before, and they are averaged by their expected precision. With numbers of
steps and probes given instead, the probes run in lockstep, which costs less time a product.

References
----------
Bhattacharjee, Jayaram, Musco, Musco and Ray, Improved spectral density estimation via explicit and implicit
deflation, arXiv 2410.21690. Meyer, Musco, Musco and Woodruff, Hutch++, arXiv 2010.09649 (the same split, for the
trace). Mirsky's inequality for the eigenvalue shifts: Bhatia, Matrix Analysis (1997), IV.62.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from pnanalysis.errors import CurvatureError
from pnanalysis.spectra.lanczos import STEPS_PER_CHECK, SYMMETRY_TOLERANCE, Lanczos, Saver
from pnanalysis.spectra.linear_operator import LinearOperator, empty_columns, random_unit_vectors
from pnanalysis.spectra.memory import probes_at_once, vectors_at_once
from pnanalysis.spectra.quadrature import ritz

Advance = Callable[[float], None]

#: The deflating run pauses to look at the spectrum once in so many steps.
STEPS_PER_LOOK = 4
#: The deflating run takes at least this share of a budget: what a short run shows says little about what a longer
#: one would, for Ritz values converge late and then fast...
SMALLEST_SHARE = 0.2
#: ... at most this one...
LARGEST_SHARE = 0.5
#: ... and so many steps (its basis stays in memory).
MOST_DEFLATED = 256
#: See :func:`default_steps`; the error is flat around this value, on spectra of networks and of random matrices.
STEPS_FACTOR = 0.45
#: Where the budget covers all P columns and P is at most this, they are all measured and the spectrum is exact.
LARGEST_EXACT = 5000


@dataclass(frozen=True)
class Settings:
    """How a spectrum is sampled: see :func:`pnanalysis.spectra.density.spectral_density`."""

    n_lanczos: int
    n_probes: int
    n_hvp: int | None
    deflate: bool
    seed: int
    basis_dtype: torch.dtype
    basis_device: torch.device
    max_memory_bytes: int | None = None
    symmetry_tolerance: float | None = None
    state: Path | None = None
    save_every: float = 300.0


@dataclass(frozen=True)
class Run:
    """Lanczos coefficients of one start vector, in float64: ``alpha`` and ``beta`` ``(m,)``, and the run's part.

    ``n_before`` directions had been deflated when it ran. ``sampled``: it is a random probe of what was left then.
    ``deflated``: the probes after it ran in the complement of its Krylov space.
    """

    alpha: np.ndarray
    beta: np.ndarray
    n_before: int = 0
    sampled: bool = True
    deflated: bool = False


@dataclass
class Sample:
    """What was measured."""

    n_parameters: int
    method: str
    runs: list[Run] = field(default_factory=list)
    n_hvp: int = 0

    @property
    def n_deflated(self) -> int:
        return sum(len(run.alpha) for run in self.runs if run.deflated)

    @property
    def n_free(self) -> int:
        return self.n_parameters - self.n_deflated


def default_steps(n_products: int, n_parameters: int) -> int:
    """Lanczos steps a probe when ``n_products`` are to be shared among probes: ``STEPS_FACTOR (n P)^(1/3)``.

    With ``m`` steps a probe the nodes are ``1/m`` of the bulk apart, and ``n/m`` probes of ``P`` dimensions know its
    masses to ``sqrt(m / (n P))``. The sum of the two is least at a multiple of ``(n P)^(1/3)``.
    """
    return max(min(round(STEPS_FACTOR * (n_products * n_parameters) ** (1 / 3)), n_products), 1)


def deflated_enough(run: Run, n_left: int, n_parameters: int) -> bool:
    """Whether the next product is better spent on a probe of the complement than on one more deflating step.

    With ``n`` products left for probes, the variance of what they estimate goes as ``V / n``, where ``V`` is the
    sum of squared (centred) eigenvalues of the complement. One more step takes ``(alpha - c)^2 + 2 beta^2`` off
    ``V`` and one off ``n``. ``V`` is estimated from the run itself: converged Ritz values stand for one eigenvalue
    each, the others share what is left of the spectrum in proportion to their Gauss weights.
    """
    value, weight, residual = ritz(run.alpha, run.beta)
    single = residual < 1e-2 * np.abs(value - weight @ value)
    if single.all():
        return True
    share = np.where(single, 0, weight)
    share /= share.sum()
    centre = share @ value
    squared = (value - centre) ** 2
    left = (n_parameters - single.sum()) * (share @ squared) - squared[~single].sum()
    gain = np.mean((run.alpha[-STEPS_PER_LOOK:] - centre) ** 2 + 2 * run.beta[-STEPS_PER_LOOK:] ** 2)
    return bool(gain * n_left < left)


def sample_spectrum(operator: LinearOperator, settings: Settings, advance: Advance | None = None) -> Sample:
    """Spend the products: deflate (if asked to), then probe.

    Raises
    ------
    CurvatureError
        If a product is not finite, the operator is not symmetric, or the memory does not suffice.
    """
    n_parameters = operator.shape[0]
    budget = settings.n_hvp or settings.n_lanczos * settings.n_probes
    if settings.deflate and n_parameters <= min(budget, LARGEST_EXACT):
        return _exact(operator, settings, advance)
    sample = Sample(n_parameters, "deflated" if settings.deflate else "plain")
    if settings.n_hvp is not None and not settings.deflate:
        n_steps = default_steps(budget, n_parameters)
        _probe_in_lockstep(operator, settings, sample, None, max(budget // n_steps, 1), n_steps, advance)
    elif not settings.deflate:
        _probe_in_lockstep(operator, settings, sample, None, settings.n_probes, settings.n_lanczos, advance)
    elif settings.n_hvp is None and settings.n_probes > 1:
        basis = _deflate(operator, settings, sample, settings.n_lanczos, advance)
        n_steps = min(settings.n_lanczos, sample.n_free)
        if n_steps:
            _probe_in_lockstep(operator, settings, sample, basis, settings.n_probes - 1, n_steps, advance)
    else:
        _probe_in_turn(operator, settings, sample, budget, advance)
    return sample


def _exact(operator: LinearOperator, settings: Settings, advance: Advance | None) -> Sample:
    """All the eigenvalues, from P products with unit vectors: no more than the budget, and no error."""
    n = operator.shape[0]
    eye = torch.eye(n, dtype=operator.dtype, device=operator.device)
    matrix = torch.empty_like(eye)
    for block in torch.arange(n).split(max(settings.n_probes, 1)):
        matrix[:, block] = operator.matmat(eye[:, block])
        if advance is not None:
            advance(len(block))
    matrix = matrix.double()
    if not bool(torch.isfinite(matrix).all()):
        raise CurvatureError("a product of the operator held NaN or infinite values; check the weights and the data")
    gap = float(torch.linalg.matrix_norm(matrix - matrix.T) / (torch.linalg.matrix_norm(matrix) + 1e-300)) / 2
    if gap > (settings.symmetry_tolerance or SYMMETRY_TOLERANCE[operator.dtype]):
        raise CurvatureError(
            f"the operator is not symmetric: its skew part is {gap:.1%} of it; every product must use the same data, "
            "with nothing random in the model (dropout, augmentation)"
        )
    eigenvalues = torch.linalg.eigvalsh((matrix + matrix.T) / 2).cpu().numpy()
    return Sample(n, "exact", [Run(eigenvalues, np.zeros(n), sampled=False, deflated=True)], n_hvp=n)


def _deflate(
    operator: LinearOperator, settings: Settings, sample: Sample, capacity: int, advance: Advance | None
) -> torch.Tensor:
    """Deflate the Krylov space of one random vector, ``capacity`` steps of it; returns its basis ``(P, k)``."""
    limits = (settings.basis_dtype, settings.basis_device, 0, settings.max_memory_bytes)
    probes_at_once(operator.shape[0], capacity, 1, *limits)
    run = _start(operator, settings, range(1), capacity)
    saver = _saver(settings, run, "deflation", advance)
    while run.step < capacity and run.sizes()[0] == run.step:
        run.extend(min(STEPS_PER_CHECK, capacity - run.step), advance, saver)
    _finish(run, sample, saver, sampled=False, deflated=True)
    return run.basis[0, :, : sample.n_deflated]


def _probe_in_lockstep(
    operator: LinearOperator,
    settings: Settings,
    sample: Sample,
    deflated: torch.Tensor | None,
    n_probes: int,
    n_steps: int,
    advance: Advance | None,
) -> None:
    """Run Lanczos from random vectors, as many at once as fit in memory."""
    at_once = probes_at_once(
        operator.shape[0],
        n_steps,
        n_probes,
        settings.basis_dtype,
        settings.basis_device,
        sample.n_deflated,
        settings.max_memory_bytes,
    )
    for first in range(0, n_probes, at_once):
        indices = range(1 + first, 1 + min(first + at_once, n_probes))
        run = _start(operator, settings, indices, n_steps, deflated)
        saver = _saver(settings, run, f"probes-{indices[0]}-{indices[-1]}", advance)
        run.extend(n_steps - run.step, advance, saver)
        _finish(run, sample, saver)


def _probe_in_turn(
    operator: LinearOperator, settings: Settings, sample: Sample, budget: int, advance: Advance | None
) -> None:
    """Deflate as long as it pays, then run one probe after the other, each in the complement of all before it."""
    n_parameters = operator.shape[0]
    longest = default_steps(budget, n_parameters)
    limits = (settings.basis_dtype, settings.basis_device)
    n_columns = vectors_at_once(n_parameters, min(budget, n_parameters), *limits, settings.max_memory_bytes)
    if n_columns < min(2 * longest, budget, n_parameters):  # one probe beside as many deflated vectors, or nothing
        n_columns = min(2 * longest, budget, n_parameters)
        probes_at_once(n_parameters, n_columns, 1, *limits, max_memory_bytes=settings.max_memory_bytes)
    columns = empty_columns(n_parameters, n_columns, settings.basis_dtype, settings.basis_device)
    capacity = max(min(int(LARGEST_SHARE * budget), MOST_DEFLATED, max(n_columns - longest, n_columns // 2)), 1)
    run = _start(operator, settings, range(1), capacity, storage=columns[:, :capacity])
    saver = _saver(settings, run, "deflation", advance)
    while run.step < capacity and run.sizes()[0] == run.step:
        if run.step >= SMALLEST_SHARE * budget and deflated_enough(_runs(run)[0], budget - run.step, n_parameters):
            break
        run.extend(min(STEPS_PER_LOOK - run.step % STEPS_PER_LOOK, capacity - run.step), advance, saver)
    _finish(run, sample, saver, sampled=False, deflated=True)
    left = budget - sample.n_hvp
    n_probes = max(round(left / default_steps(left, n_parameters)), 1)
    for index in range(1, n_probes + 1):
        n_steps = min(left // n_probes, sample.n_free, n_columns - sample.n_deflated)
        if n_steps < 1:
            break
        n_before = sample.n_deflated
        storage = columns[:, n_before : n_before + n_steps]
        run = _start(operator, settings, range(index, index + 1), n_steps, columns[:, :n_before], storage)
        saver = _saver(settings, run, f"probe-{index}", advance)
        run.extend(n_steps - run.step, advance, saver)
        room_for_another = n_before + 2 * n_steps <= n_columns
        _finish(run, sample, saver, deflated=room_for_another and index < n_probes)


def _start(
    operator: LinearOperator,
    settings: Settings,
    indices: range,
    capacity: int,
    deflated: torch.Tensor | None = None,
    storage: torch.Tensor | None = None,
) -> Lanczos:
    return Lanczos(
        operator,
        random_unit_vectors(operator, indices, settings.seed),
        capacity,
        deflated,
        settings.basis_dtype,
        settings.basis_device,
        settings.symmetry_tolerance,
        storage,
    )


def _saver(settings: Settings, run: Lanczos, name: str, advance: Advance | None) -> Saver | None:
    """The run's saver, once it has picked up what there was of the run."""
    if settings.state is None:
        return None
    label = f"seed {settings.seed}, {run.n_deflated} deflated, {run.capacity} steps, {settings.n_hvp} products"
    saver = Saver(settings.state / f"{name}.safetensors", label, settings.save_every)
    saver.resume(run)
    if advance is not None:
        advance(run.step * run.n_probes)
    return saver


def _finish(run: Lanczos, sample: Sample, saver: Saver | None, sampled: bool = True, deflated: bool = False) -> None:
    if saver is not None:
        saver(run, force=True)
    n_before = sample.n_deflated
    sample.runs += [replace(part, n_before=n_before, sampled=sampled, deflated=deflated) for part in _runs(run)]
    sample.n_hvp += run.step * run.n_probes


def _runs(run: Lanczos) -> list[Run]:
    alpha, beta = run.alpha.double().cpu().numpy(), run.beta.double().cpu().numpy()
    return [Run(a[:size], b[:size]) for a, b, size in zip(alpha, beta, run.sizes(), strict=True)]

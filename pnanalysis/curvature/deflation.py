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

References
----------
Bhattacharjee, Jayaram, Musco, Musco and Ray, Improved spectral density estimation via explicit and implicit
deflation, arXiv 2410.21690. Meyer, Musco, Musco and Woodruff, Hutch++, arXiv 2010.09649 (the same split, for the
trace). Mirsky's inequality for the eigenvalue shifts: Bhatia, Matrix Analysis (1997), IV.62.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from pnanalysis.curvature.lanczos import STEPS_PER_CHECK, SYMMETRY_TOLERANCE, LanczosRun, Saver
from pnanalysis.curvature.linear import LinearOperator, random_unit_vectors
from pnanalysis.curvature.memory import basis_bytes, probes_at_once
from pnanalysis.curvature.quadrature import ritz
from pnanalysis.errors import CurvatureError

#: The deflating run pauses to look at the spectrum once in so many steps.
STEPS_PER_LOOK = 4
#: The deflating run may take at most this share of a budget...
LARGEST_SHARE = 0.5
#: ... and so many steps (its basis stays in memory).
MOST_DEFLATED = 256
#: Where the budget covers all P columns and P is at most this, they are all measured and the spectrum is exact.
LARGEST_EXACT = 5000


@dataclass(frozen=True)
class Settings:
    """How a spectrum is sampled: see :func:`pnanalysis.curvature.density.spectral_density`."""

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


@dataclass
class Recurrence:
    """Lanczos coefficients of one start vector, in float64: ``alpha`` and ``beta`` ``(m,)``."""

    alpha: np.ndarray
    beta: np.ndarray


@dataclass
class Sample:
    """What was measured: the deflated Krylov space (if any) and the probes of its complement."""

    n_parameters: int
    method: str
    deflation: Recurrence | None = None
    probes: list[Recurrence] = field(default_factory=list)
    n_hvp: int = 0

    @property
    def n_deflated(self) -> int:
        return 0 if self.deflation is None else len(self.deflation.alpha)


def default_steps(n_products: int) -> int:
    """Lanczos steps a probe when ``n_products`` are to be shared among probes: ``2.5 sqrt(n)``, 10 to 100.

    More steps resolve the bulk more finely, more probes know its masses better; on spectra of trained networks and
    of random matrices the error is flat around this choice.
    """
    return int(np.clip(2.5 * np.sqrt(n_products), 10, 100))


def deflated_enough(run: Recurrence, n_left: int, n_parameters: int) -> bool:
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


def sample_spectrum(
    operator: LinearOperator, settings: Settings, advance: Callable[[float], None] | None = None
) -> Sample:
    """Spend the products: deflate (if asked to), then probe.

    Raises
    ------
    CurvatureError
        If a product is not finite, the operator is not symmetric, or the memory does not suffice.
    """
    n_parameters = operator.shape[0]
    budget = settings.n_hvp or settings.n_lanczos * settings.n_probes
    if not settings.deflate:
        sample = Sample(n_parameters, "plain")
        _probe(operator, settings, sample, None, *_probe_shape(settings, budget, 0), advance)
        return sample
    if n_parameters <= min(budget, LARGEST_EXACT):
        return _exact(operator, settings, advance)
    sample = Sample(n_parameters, "deflated")
    basis = _deflate(operator, settings, sample, budget, advance)
    n_free = n_parameters - sample.n_deflated
    if n_free:
        n_probes, n_steps = _probe_shape(settings, budget, sample.n_hvp)
        _probe(operator, settings, sample, basis, n_probes, min(n_steps, n_free), advance)
    return sample


def _probe_shape(settings: Settings, budget: int, spent: int) -> tuple[int, int]:
    """Number of probes and steps a probe."""
    if settings.n_hvp is None and settings.n_probes > 1:
        return settings.n_probes - (spent > 0), settings.n_lanczos
    left = budget - spent
    if not spent and settings.n_hvp is None:
        return 1, settings.n_lanczos
    n_probes = max(round(left / default_steps(left)), min(2, left))
    return n_probes, left // n_probes


def _exact(operator: LinearOperator, settings: Settings, advance: Callable[[float], None] | None) -> Sample:
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
    return Sample(n, "exact", Recurrence(eigenvalues, np.zeros(n)), n_hvp=n)


def _deflate(
    operator: LinearOperator,
    settings: Settings,
    sample: Sample,
    budget: int,
    advance: Callable[[float], None] | None,
) -> torch.Tensor:
    """Run Lanczos from one random vector; returns its basis ``(k, P)``."""
    adaptive = settings.n_hvp is not None or settings.n_probes == 1
    capacity = _deflation_capacity(operator, settings, budget) if adaptive else settings.n_lanczos
    limits = (settings.basis_dtype, settings.basis_device, 0, settings.max_memory_bytes)
    probes_at_once(operator.shape[0], capacity, 1, *limits)
    run = _start(operator, settings, range(1), capacity, None)
    saver = _saver(settings, "deflation", f"{capacity} of {budget}")
    _resume(run, saver, advance)
    pause = STEPS_PER_LOOK if adaptive else STEPS_PER_CHECK
    while run.step < capacity and run.sizes()[0] == run.step:
        left = budget - run.step
        if adaptive and run.step >= 2 * pause and deflated_enough(_recurrences(run)[0], left, operator.shape[0]):
            break
        run.extend(min(pause - run.step % pause, capacity - run.step), advance, saver)
    if saver is not None:
        saver(run, force=True)
    sample.deflation = _recurrences(run)[0]
    sample.n_hvp = run.step
    return run.basis[0, : sample.n_deflated]


def _deflation_capacity(operator: LinearOperator, settings: Settings, budget: int) -> int:
    """The most steps the deflating run may take: a share of the budget, and of the memory if that is bounded."""
    capacity = min(int(LARGEST_SHARE * budget), MOST_DEFLATED, operator.shape[0])
    if settings.max_memory_bytes is not None:
        n_vectors = settings.max_memory_bytes // basis_bytes(operator.shape[0], -2, 1, settings.basis_dtype)
        capacity = min(capacity, n_vectors - default_steps(budget) - 3)
    return max(capacity, 1)


def _probe(
    operator: LinearOperator,
    settings: Settings,
    sample: Sample,
    deflated: torch.Tensor | None,
    n_probes: int,
    n_steps: int,
    advance: Callable[[float], None] | None,
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
        saver = _saver(settings, f"probes-{indices[0]}-{indices[-1]}", f"{sample.n_deflated} {n_steps}")
        _resume(run, saver, advance)
        run.extend(n_steps - run.step, advance, saver)
        if saver is not None:
            saver(run, force=True)
        sample.probes += _recurrences(run)
        sample.n_hvp += n_steps * len(indices)


def _start(
    operator: LinearOperator, settings: Settings, indices: range, capacity: int, deflated: torch.Tensor | None
) -> LanczosRun:
    return LanczosRun(
        operator,
        random_unit_vectors(operator, indices, settings.seed),
        capacity,
        deflated,
        settings.basis_dtype,
        settings.basis_device,
        settings.symmetry_tolerance,
    )


def _resume(run: LanczosRun, saver: Saver | None, advance: Callable[[float], None] | None) -> None:
    if saver is not None:
        saver.resume(run)
    if advance is not None and run.step:
        advance(run.step * len(run.alpha))


def _saver(settings: Settings, name: str, label: str) -> Saver | None:
    if settings.state is None:
        return None
    return Saver(settings.state / f"{name}.safetensors", f"seed {settings.seed}, {label}", settings.save_every)


def _recurrences(run: LanczosRun) -> list[Recurrence]:
    alpha, beta = run.alpha.double().cpu().numpy(), run.beta.double().cpu().numpy()
    return [Recurrence(a[:size], b[:size]) for a, b, size in zip(alpha, beta, run.sizes(), strict=True)]

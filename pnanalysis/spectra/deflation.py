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
precision. Given numbers of steps and probes instead, the probes run in lockstep, which takes less time per product.

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
from pnanalysis.spectra.data_feed import DataFeed, Receiver
from pnanalysis.spectra.lanczos import SMALLEST_SCALE, STEPS_PER_CHECK, SYMMETRY_TOLERANCE, Lanczos, Saver
from pnanalysis.spectra.linear_operator import LinearOperator, checked_product, empty_columns, random_unit_vectors
from pnanalysis.spectra.memory import probes_at_once, vectors_at_once
from pnanalysis.spectra.quadrature import ritz

Advance = Callable[[float], None]

#: Deflating steps between two decisions on whether to go on deflating.
STEPS_PER_DECISION = 4
#: The smallest fraction of a budget for deflation. A few steps say little about what more would bring, because Ritz
#: values converge late and then fast.
SMALLEST_FRACTION = 0.2
#: The largest fraction of a budget for deflation.
LARGEST_FRACTION = 0.5
#: The most deflating steps: their basis stays in memory.
MOST_DEFLATED = 256
#: See :func:`default_steps`; the error is flat around this value, on spectra of networks and of random matrices.
STEPS_FACTOR = 0.45
#: Up to this P, a budget that covers all P columns is spent on them, and the spectrum is exact.
LARGEST_EXACT = 5000
#: A Ritz value whose residual is below this fraction of its distance to the mean counts as one eigenvalue.
CONVERGED = 1e-2


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
    basis_dtype: torch.dtype
    basis_device: torch.device
    max_memory_bytes: int | None = None
    symmetry_tolerance: float | None = None
    state: Path | None = None
    save_every: float = 300.0
    data: Receiver | None = None


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

    alpha: np.ndarray
    beta: np.ndarray
    n_before: int = 0
    sampled: bool = True
    deflated: bool = False


@dataclass
class SpectrumSample:
    """The coefficients of all start vectors, in the order in which they ran, and the products spent on them."""

    n_parameters: int
    method: str
    probes: list[LanczosCoefficients] = field(default_factory=list)
    n_hvp: int = 0

    @property
    def n_deflated(self) -> int:
        return sum(len(probe.alpha) for probe in self.probes if probe.deflated)

    @property
    def n_free(self) -> int:
        return self.n_parameters - self.n_deflated


def default_steps(n_products: int, n_parameters: int) -> int:
    """Lanczos steps per probe when ``n_products`` are to be divided among probes: ``STEPS_FACTOR (n P)^(1/3)``.

    With ``m`` steps per probe, the nodes are ``1/m`` of the bulk apart, and ``n/m`` probes of ``P`` dimensions know
    the bulk's masses to ``sqrt(m / (n P))``. The sum of the two is smallest at a multiple of ``(n P)^(1/3)``.
    """
    return max(min(round(STEPS_FACTOR * (n_products * n_parameters) ** (1 / 3)), n_products), 1)


def deflated_enough(probe: LanczosCoefficients, n_left: int, n_parameters: int) -> bool:
    """Whether the next product is better spent on a probe of the complement than on one more deflating step.

    With ``n`` products left for probes, the variance of what they estimate is proportional to ``V / n``, where ``V``
    is the sum of squared (centred) eigenvalues of the complement. One more step reduces ``V`` by
    ``(alpha - c)^2 + 2 beta^2`` and ``n`` by one. ``V`` is estimated from the coefficients so far: converged Ritz
    values stand for one eigenvalue each, and the others for the rest of the spectrum, in proportion to their Gauss
    weights.
    """
    value, weight, residual = ritz(probe.alpha, probe.beta)
    single = residual < CONVERGED * np.abs(value - weight @ value)
    if single.all():
        return True
    fraction = np.where(single, 0, weight)
    fraction /= fraction.sum()
    centre = fraction @ value
    squared = (value - centre) ** 2
    left = (n_parameters - single.sum()) * (fraction @ squared) - squared[~single].sum()
    # averaged over the last steps: single coefficients scatter
    last = slice(-STEPS_PER_DECISION, None)
    gain = np.mean((probe.alpha[last] - centre) ** 2 + 2 * probe.beta[last] ** 2)
    return bool(gain * n_left < left)


def sample_spectrum(
    operator: LinearOperator, settings: SamplingSettings, advance: Advance | None = None
) -> SpectrumSample:
    """Spend the products: deflate (if the settings say so), then probe.

    Raises
    ------
    CurvatureError
        If a product is not finite, the operator is not symmetric, its eigenvalues are too small to be squared, or the
        memory does not suffice.
    """
    sample = _sample(operator, settings, advance)
    magnitude = max(float(np.abs(probe.alpha).max()) for probe in sample.probes)
    if 0 < magnitude < SMALLEST_SCALE:
        raise CurvatureError(
            f"the eigenvalues of the operator are about {magnitude:.0e}, too small for float64 to hold their squares; "
            "multiply the loss by a large number"
        )
    return sample


def _sample(operator: LinearOperator, settings: SamplingSettings, advance: Advance | None) -> SpectrumSample:
    n_parameters = operator.shape[0]
    budget = settings.n_hvp or settings.n_lanczos * settings.n_probes
    if settings.deflate and n_parameters <= min(budget, LARGEST_EXACT):
        return _exact(operator, settings, advance)
    sample = SpectrumSample(n_parameters, "deflated" if settings.deflate else "plain")
    feed = DataFeed(settings.data, settings.seed)
    if settings.n_hvp is not None and not settings.deflate:
        n_steps = min(default_steps(budget, n_parameters), n_parameters)
        _probe_in_lockstep(operator, settings, sample, None, max(budget // n_steps, 1), n_steps, feed, advance)
    elif not settings.deflate:
        _probe_in_lockstep(operator, settings, sample, None, settings.n_probes, settings.n_lanczos, feed, advance)
    elif settings.n_hvp is None and settings.n_probes > 1:
        basis = _deflate(operator, settings, sample, settings.n_lanczos, feed, advance)
        n_steps = min(settings.n_lanczos, sample.n_free)
        if n_steps:
            _probe_in_lockstep(operator, settings, sample, basis, settings.n_probes - 1, n_steps, feed, advance)
    else:
        _probe_in_turn(operator, settings, sample, budget, feed, advance)
    return sample


def _exact(operator: LinearOperator, settings: SamplingSettings, advance: Advance | None) -> SpectrumSample:
    """All the eigenvalues, from P products with unit vectors."""
    n = operator.shape[0]
    eye = torch.eye(n, dtype=operator.dtype, device=operator.device)
    matrix = torch.empty_like(eye)
    for block in torch.arange(n).split(max(settings.n_probes, 1)):
        matrix[:, block] = checked_product(operator, eye[:, block])
        if advance is not None:
            advance(len(block))
    matrix = matrix.double()
    if not bool(torch.isfinite(matrix).all()):
        raise CurvatureError("a product of the operator held NaN or infinite values; check the weights and the data")
    # the tiny number is for the zero matrix
    skew = float(torch.linalg.matrix_norm(matrix - matrix.T) / (torch.linalg.matrix_norm(matrix) + 1e-300)) / 2
    if skew > (settings.symmetry_tolerance or SYMMETRY_TOLERANCE[operator.dtype]):
        raise CurvatureError(
            f"the operator is not symmetric: its skew part has {skew:.1%} of its norm; every product must use the same "
            "data, with nothing random in the model (dropout, augmentation)"
        )
    matrix = (matrix + matrix.T) / 2
    feed = DataFeed(settings.data, settings.seed)
    if feed.wanted:
        values, vectors = torch.linalg.eigh(matrix)
        eigenvalues = values.cpu().numpy()
        feed.exact(eigenvalues, vectors)
    else:
        eigenvalues = torch.linalg.eigvalsh(matrix).cpu().numpy()
    return SpectrumSample(
        n, "exact", [LanczosCoefficients(eigenvalues, np.zeros(n), sampled=False, deflated=True)], n_hvp=n
    )


def _deflate(
    operator: LinearOperator,
    settings: SamplingSettings,
    sample: SpectrumSample,
    capacity: int,
    feed: DataFeed,
    advance: Advance | None,
) -> torch.Tensor:
    """Deflate the Krylov space of one random vector, ``capacity`` steps of it; returns its basis ``(P, k)``."""
    limits = (settings.basis_dtype, settings.basis_device, 0, settings.max_memory_bytes)
    probes_at_once(operator.shape[0], capacity, 1, *limits)
    lanczos = _start(operator, settings, range(1), capacity)
    saver = _saver(settings, lanczos, "deflation", advance)
    while lanczos.step < capacity and lanczos.sizes()[0] == lanczos.step:  # until the Krylov space is exhausted
        lanczos.extend(min(STEPS_PER_CHECK, capacity - lanczos.step), advance, saver)
    _finish(lanczos, sample, saver, sampled=False, deflated=True)
    feed.deflated(lanczos)
    return lanczos.basis[0, :, : sample.n_deflated]


def _probe_in_lockstep(
    operator: LinearOperator,
    settings: SamplingSettings,
    sample: SpectrumSample,
    deflated: torch.Tensor | None,
    n_probes: int,
    n_steps: int,
    feed: DataFeed,
    advance: Advance | None,
) -> None:
    """Run Lanczos on random vectors, as many at once as fit in memory."""
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
        lanczos = _start(operator, settings, indices, n_steps, deflated)
        saver = _saver(settings, lanczos, f"probes-{indices[0]}-{indices[-1]}", advance)
        lanczos.extend(n_steps - lanczos.step, advance, saver)
        _finish(lanczos, sample, saver)
        if deflated is None:
            feed.plain(lanczos)
        else:
            feed.probed(lanczos)


def _probe_in_turn(
    operator: LinearOperator,
    settings: SamplingSettings,
    sample: SpectrumSample,
    budget: int,
    feed: DataFeed,
    advance: Advance | None,
) -> None:
    """Deflate as long as that reduces the error most, then run one probe after the other.

    Each runs in the complement of all before it.
    """
    n_parameters = operator.shape[0]
    longest = default_steps(budget, n_parameters)
    limits = (settings.basis_dtype, settings.basis_device)
    n_columns = vectors_at_once(n_parameters, min(budget, n_parameters), *limits, settings.max_memory_bytes)
    # the least that makes sense is one probe and as many deflated vectors; if that does not fit, probes_at_once raises
    if n_columns < min(2 * longest, budget, n_parameters):
        n_columns = min(2 * longest, budget, n_parameters)
        probes_at_once(n_parameters, n_columns, 1, *limits, max_memory_bytes=settings.max_memory_bytes)
    # one block of memory for the deflated vectors and, behind them, the basis of the probe that is running
    columns = empty_columns(n_parameters, n_columns, settings.basis_dtype, settings.basis_device)
    capacity = max(min(int(LARGEST_FRACTION * budget), MOST_DEFLATED, max(n_columns - longest, n_columns // 2)), 1)
    lanczos = _start(operator, settings, range(1), capacity, storage=columns[:, :capacity])
    saver = _saver(settings, lanczos, "deflation", advance)
    while lanczos.step < capacity and lanczos.sizes()[0] == lanczos.step:
        if lanczos.step >= SMALLEST_FRACTION * budget and deflated_enough(
            _coefficients(lanczos)[0], budget - lanczos.step, n_parameters
        ):
            break
        lanczos.extend(
            min(STEPS_PER_DECISION - lanczos.step % STEPS_PER_DECISION, capacity - lanczos.step), advance, saver
        )
    _finish(lanczos, sample, saver, sampled=False, deflated=True)
    feed.deflated(lanczos)
    left = budget - sample.n_hvp
    n_probes = max(round(left / default_steps(left, n_parameters)), 1)
    for index in range(1, n_probes + 1):
        n_steps = min(left // n_probes, sample.n_free, n_columns - sample.n_deflated)
        if n_steps < 1:
            break
        n_before = sample.n_deflated
        storage = columns[:, n_before : n_before + n_steps]
        lanczos = _start(operator, settings, range(index, index + 1), n_steps, columns[:, :n_before], storage)
        saver = _saver(settings, lanczos, f"probe-{index}", advance)
        lanczos.extend(n_steps - lanczos.step, advance, saver)
        # deflating a probe means that the next one's basis must go behind it
        room_for_another = n_before + 2 * n_steps <= n_columns
        deflated = room_for_another and index < n_probes
        _finish(lanczos, sample, saver, deflated=deflated)
        feed.probed(lanczos)
        if deflated:
            feed.deflated(lanczos)


def _start(
    operator: LinearOperator,
    settings: SamplingSettings,
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


def _saver(settings: SamplingSettings, lanczos: Lanczos, name: str, advance: Advance | None) -> Saver | None:
    """What saves the state, after it has restored the one that an earlier, unfinished call left."""
    if settings.state is None:
        return None
    label = f"seed {settings.seed}, {lanczos.n_deflated} deflated, {lanczos.capacity} steps, {settings.n_hvp} products"
    saver = Saver(settings.state / f"{name}.safetensors", label, settings.save_every)
    saver.resume(lanczos)
    if advance is not None:
        advance(lanczos.step * lanczos.n_probes)
    return saver


def _finish(
    lanczos: Lanczos, sample: SpectrumSample, saver: Saver | None, sampled: bool = True, deflated: bool = False
) -> None:
    """Save the final state, and add the coefficients to the sample."""
    if saver is not None:
        saver(lanczos, force=True)
    n_before = sample.n_deflated
    sample.probes += [
        replace(probe, n_before=n_before, sampled=sampled, deflated=deflated) for probe in _coefficients(lanczos)
    ]
    sample.n_hvp += lanczos.step * lanczos.n_probes


def _coefficients(lanczos: Lanczos) -> list[LanczosCoefficients]:
    """The coefficients of each start vector, without the zeros after a breakdown."""
    alpha, beta = lanczos.alpha.double().cpu().numpy(), lanczos.beta.double().cpu().numpy()
    return [LanczosCoefficients(a[:size], b[:size]) for a, b, size in zip(alpha, beta, lanczos.sizes(), strict=True)]

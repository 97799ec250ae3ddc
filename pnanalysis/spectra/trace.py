"""Estimates of the trace alone, when the rest of the spectrum is not needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pnanalysis.checks import human
from pnanalysis.errors import CurvatureError
from pnanalysis.estimates import Estimate
from pnanalysis.spectra.free_memory import free_bytes
from pnanalysis.spectra.inner_products import inner_products
from pnanalysis.spectra.linear_operator import NOT_FINITE, LinearOperator, as_operator, checked_product, round_off
from pnanalysis.spectra.memory import DEFAULT_FRACTION
from pnanalysis.spectra.random_vectors import random_unit_vectors
from pnanalysis.spectra.sharing import part_of, processes_of

#: Vectors that Hutchinson's estimate multiplies at a time, and keeps.
_PROBES_AT_ONCE = 10


@dataclass(frozen=True)
class TraceEstimate(Estimate):
    """A trace with its standard error, its 95 % interval, and how it was estimated.

    Attributes
    ----------
    n_hvp : int
        Products spent.
    method : str
        ``"xtrace"``, ``"hutch++"`` or ``"hutchinson"``.
    """

    n_hvp: int = 0
    method: str = ""


def trace_estimate(
    operator: Any, method: str = "xtrace", n_hvp: int = 100, seed: int = 0, max_memory_bytes: int | None = None
) -> TraceEstimate:
    """Estimate the trace of a symmetric operator.

    Parameters
    ----------
    operator : LinearOperator or matrix
        Anything :func:`pnanalysis.as_operator` takes.
    method : {"xtrace", "hutch++", "hutchinson"}
        ``"hutchinson"`` averages ``g'Hg`` over random ``g``. ``"hutch++"`` spends a third of the products on a
        random sketch of the range, a third on the exact trace there and a third on Hutchinson's estimate in the
        complement. ``"xtrace"`` uses every vector for both, by leaving each out of the sketch in turn, and is the most
        accurate where the spectrum decays.
    n_hvp : int
        Largest number of products with the operator. From P products on, the trace is computed exactly from the
        diagonal.
    seed : int
        Seed of the random vectors, which are the same on every device.
    max_memory_bytes : int, optional
        Bound on the vectors that Hutch++ and XTrace keep, 60 % of the free memory by default. Where they take more, the
        products are divided among several independent estimates, whose mean is less accurate than one of all products
        would be.

    Returns
    -------
    TraceEstimate
        The standard error is that of a mean over vectors, the interval is Student's. The leave-one-out estimates of
        XTrace are not quite independent: with 15 vectors its standard error is about 15 % too small, and the 95 %
        intervals cover the true trace in 90 % of cases.

    Raises
    ------
    CurvatureError
        If the method is unknown, the budget too small for it, a product not finite, or the vectors that Hutch++ and
        XTrace keep do not fit in memory for the fewest products.

    Notes
    -----
    If the spectrum is computed anyway, ``ds.trace`` of :func:`pnanalysis.spectral_density` is as accurate or better
    for the same number of products: a Krylov space captures the large eigenvalues better than a random sketch.

    References
    ----------
    Meyer, Musco, Musco and Woodruff, arXiv 2010.09649. Epperly, Tropp and Webber, arXiv 2301.07825. The
    normalisation of projected vectors: Epperly, arXiv 2512.15929.
    """
    operator = as_operator(operator)
    if method not in _METHODS:
        raise CurvatureError(f"method is {method!r}; choose one of {', '.join(_METHODS)}")
    estimator, fewest = _METHODS[method]
    if n_hvp < fewest:
        raise CurvatureError(f"n_hvp is {n_hvp}; {method} takes at least {fewest} products")
    if not part_of(operator).is_all and method != "hutchinson":
        raise CurvatureError(f"{method} takes whole vectors, which processes divide here; give method='hutchinson'")
    if n_hvp >= operator.shape[0]:
        estimate, spent = _exact(operator), operator.shape[0]
    else:
        each = n_hvp if method == "hutchinson" else _at_once(operator, method, n_hvp, fewest, max_memory_bytes)
        found = [estimator(operator, each, seed, first) for first in range(0, n_hvp - each + 1, each)]
        estimate, spent = _mean_of([one for one, _ in found]), sum(n for _, n in found)
    low, high = estimate.interval()
    return TraceEstimate(estimate.value, estimate.se, low, high, dof=estimate.dof, n_hvp=spent, method=method)


def _exact(operator: LinearOperator) -> Estimate:
    eye = torch.eye(operator.shape[0], dtype=operator.dtype, device=operator.device)
    part = part_of(operator)
    return Estimate(float(part.add((part.of(eye) * _product(operator, part.of(eye))).double().sum())), 0.0)


def _hutchinson(operator: LinearOperator, n_hvp: int, seed: int, first: int) -> tuple[Estimate, int]:
    # For g uniform on the unit sphere, the mean of P g'Hg is the trace; its variance is below that of a Gaussian g.
    samples = []
    for block in torch.split(torch.arange(n_hvp), _PROBES_AT_ONCE):
        probes = random_unit_vectors(operator, block.tolist(), seed)
        samples.append(inner_products(probes, _product(operator, probes), part_of(operator).add))
    return _mean(operator.shape[0] * torch.cat(samples)), n_hvp


def _hutch_plus_plus(operator: LinearOperator, n_hvp: int, seed: int, first: int) -> tuple[Estimate, int]:
    n_sketch, n_probes = _shares(n_hvp)
    sketch = random_unit_vectors(operator, range(first, first + n_sketch), seed)
    sketch = _product(operator, sketch).double()
    basis, _ = torch.linalg.qr(sketch)
    del sketch
    within = float(inner_products(basis, _product(operator, basis)).sum())
    probes = random_unit_vectors(operator, range(first + n_sketch, first + n_sketch + n_probes), seed).double()
    probes -= basis @ (basis.T @ probes)
    # Normalised again, projected vectors are uniform on the sphere of the complement, which reduces the variance.
    probes /= torch.linalg.vector_norm(probes, dim=0)
    rest = _mean((operator.shape[0] - n_sketch) * inner_products(probes, _product(operator, probes)))
    return Estimate(within + rest.value, rest.se, dof=rest.dof), 2 * n_sketch + n_probes


def _shares(n_hvp: int) -> tuple[int, int]:
    """Vectors of the sketch of Hutch++, which take two products each, and probes of the complement."""
    return n_hvp // 3, n_hvp - 2 * (n_hvp // 3)


def _hutch_plus_plus_bytes(n_parameters: int, n_hvp: int, dtype: torch.dtype) -> int:
    """Of the basis, the probes, and the operator's copy of these and its products."""
    n_sketch, n_probes = _shares(n_hvp)
    return n_parameters * (8 * (n_sketch + n_probes) + n_probes * max(8, 2 * dtype.itemsize))


def _xtrace_bytes(n_parameters: int, n_hvp: int, dtype: torch.dtype) -> int:
    """Of the probes, the basis, and the operator's copy of this and its products, which float64 takes the place of."""
    converted = 0 if dtype == torch.float64 else 8
    return n_parameters * (n_hvp // 2) * (16 + max(2 * dtype.itemsize, dtype.itemsize + converted))


def _xtrace(operator: LinearOperator, n_hvp: int, seed: int, first: int) -> tuple[Estimate, int]:
    """XTrace of Epperly, Tropp and Webber: all leave-one-out estimates from a single QR factorisation."""
    m = n_hvp // 2
    n_parameters = operator.shape[0]
    probes = random_unit_vectors(operator, range(first, first + m), seed).double().mul_(n_parameters**0.5)
    products = _product(operator, probes).double()
    basis, triangle = torch.linalg.qr(products)
    del products  # the basis times the triangle
    image = _product(operator, basis).double()
    core = basis.T @ image
    round_off_error = round_off(operator) * float(torch.linalg.matrix_norm(core))
    diagonal = triangle.diagonal().abs()
    # Round-off of products in lower precision fills the sketch by directions that are as good as others; but a sketch
    # whose rank is lower even in float64 leaves nothing to tell what is there because of one probe alone.
    missing = diagonal <= m * torch.finfo(torch.float64).eps * diagonal.max()
    if bool(missing.any()):
        # The probes that are left do not depend on the directions of the first ones.
        rank = min(int(missing.double().argmax()), m - 2)
        return _widened(_in_complement(probes, basis, triangle, image, rank), round_off_error), 2 * m
    # Column i of `normal` is the direction of the sketch, in its basis, that is there because of probe i alone;
    # projecting it out gives the basis of the other probes.
    normal = torch.linalg.solve_triangular(triangle, torch.eye(m).to(triangle), upper=True).T
    normal = normal / torch.linalg.vector_norm(normal, dim=0)
    coordinates = basis.T @ probes
    along_normal = (coordinates * normal).sum(0)
    without = coordinates - normal * along_normal
    within = core.trace() - (normal * (core @ normal)).sum(0)
    cross = ((probes.T @ image).T * without).sum(0)
    rest = (without * (core @ without)).sum(0) - cross + along_normal * (normal * triangle).sum(0)
    # The projected probe's squared norm, to normalise it in the P - m + 1 dimensions of its complement.
    squared_norm = inner_products(probes, probes) - (without**2).sum(0)
    return _widened(_mean(within + (n_parameters - m + 1) / squared_norm * rest), round_off_error), 2 * m


def _in_complement(
    probes: torch.Tensor, basis: torch.Tensor, triangle: torch.Tensor, image: torch.Tensor, rank: int
) -> Estimate:
    """The trace within a basis of the first few products, and Hutchinson's estimate in the complement by the others."""
    inside, its_image, n_outside = basis[:, :rank], image[:, :rank], len(probes) - rank
    samples = []
    for probe, column in zip(probes[:, rank:].T, triangle[:, rank:].T, strict=True):  # few vectors at a time
        along = inside.T @ probe
        outside = (probe - inside @ along)[:, None]
        product = (basis @ column - its_image @ along)[:, None]
        samples.append(n_outside * inner_products(outside, product) / inner_products(outside, outside))
    rest = _mean(torch.cat(samples))
    return Estimate(float((inside * its_image).sum()) + rest.value, rest.se, dof=rest.dof)


def _widened(estimate: Estimate, error: float) -> Estimate:
    """The estimate with an error that its samples share, and do not show."""
    return Estimate(estimate.value, math.hypot(estimate.se, error), dof=estimate.dof)


def _mean(samples: torch.Tensor) -> Estimate:
    """Mean of independent samples ``(n,)``, with its standard error."""
    n = len(samples)
    return Estimate(float(samples.mean()), float(samples.std() / n**0.5), dof=n - 1)


def _product(operator: LinearOperator, vectors: torch.Tensor) -> torch.Tensor:
    """Products ``(P, k)``, in the operator's dtype and finite."""
    product = checked_product(operator, vectors)
    # if sums are finite, all terms are, which takes no more memory to find out
    finite = bool(torch.isfinite(product.sum(0)).all()) or bool(torch.isfinite(product).all())
    if not all(part_of(operator).processes.gathered(finite)):
        raise CurvatureError(NOT_FINITE)
    return product


def _mean_of(estimates: list[Estimate]) -> Estimate:
    """Of independent estimates with as many vectors each."""
    n = len(estimates)
    squares = sum(one.se**2 for one in estimates)
    return Estimate(sum(one.value for one in estimates) / n, squares**0.5 / n, dof=sum(one.dof for one in estimates))


def _at_once(operator: LinearOperator, method: str, n_hvp: int, fewest: int, max_memory_bytes: int | None) -> int:
    """Products of each estimate, of which there are as many as it takes for the vectors of each to fit into memory."""
    limit = int(DEFAULT_FRACTION * free_bytes(operator.device)) if max_memory_bytes is None else max_memory_bytes
    limit = int(processes_of(operator).least(limit))
    n_parameters, needed = operator.shape[0], _BYTES[method]
    fitting = next((n for n in range(n_hvp, fewest - 1, -1) if needed(n_parameters, n, operator.dtype) <= limit), 0)
    if not fitting:
        raise CurvatureError(
            f"{fewest} products for {n_parameters:,} parameters take "
            f"{human(needed(n_parameters, fewest, operator.dtype))} of vectors, the "
            f"bound is {human(limit)}: give method='hutchinson', which keeps {_PROBES_AT_ONCE} vectors"
        )
    n_groups = min(-(-n_hvp // fitting), n_hvp // fewest)
    return min(n_hvp // n_groups, fitting)


_Estimator = Callable[[LinearOperator, int, int, int], tuple[Estimate, int]]
#: By method: the estimator and the fewest products it takes.
_METHODS: dict[str, tuple[_Estimator, int]] = {
    "xtrace": (_xtrace, 4),
    "hutch++": (_hutch_plus_plus, 6),
    "hutchinson": (_hutchinson, 2),
}
#: Bytes that vectors take of so many parameters, for so many products of an operator's dtype.
_BYTES: dict[str, Callable[[int, int, torch.dtype], int]] = {"xtrace": _xtrace_bytes, "hutch++": _hutch_plus_plus_bytes}

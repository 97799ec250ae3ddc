"""Estimates of the trace, for when the rest of the spectrum is not needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pnanalysis.errors import CurvatureError
from pnanalysis.estimates import Estimate
from pnanalysis.spectra.linear_operator import LinearOperator, as_operator, random_unit_vectors


@dataclass(frozen=True)
class TraceEstimate(Estimate):
    """A trace with its standard error, 95 % interval and cost."""

    n_hvp: int = 0
    method: str = ""


def trace_estimate(operator: Any, method: str = "xtrace", n_hvp: int = 100, seed: int = 0) -> TraceEstimate:
    """Estimate the trace of a symmetric operator.

    Parameters
    ----------
    operator : LinearOperator or matrix
        Anything :func:`pnanalysis.as_operator` takes.
    method : {"xtrace", "hutch++", "hutchinson"}
        ``"hutchinson"`` averages ``g'Hg`` over random ``g``. ``"hutch++"`` spends a third of the products on a
        random sketch of the range, a third on the exact trace there and a third on Hutchinson in the complement.
        ``"xtrace"`` uses every vector for both, leaving each out in turn, and is the most accurate where the
        spectrum decays.
    n_hvp : int
        The most products to spend. With P or more, the trace is computed exactly, from the diagonal.
    seed : int

    Returns
    -------
    TraceEstimate
        The standard error is that of a mean over vectors, the interval Student's. XTrace's left-out estimates are
        not quite independent: with 15 vectors its error is some 15 % too small, and 90 % of the intervals hold.

    Raises
    ------
    CurvatureError
        For an unknown method, a budget too small for it, or a product that is not finite.

    Notes
    -----
    With the spectrum at hand, ``ds.trace`` of :func:`pnanalysis.spectral_density` is as accurate or better for the
    same products, since a Krylov space holds the large eigenvalues better than a random sketch.

    References
    ----------
    Meyer, Musco, Musco and Woodruff, arXiv 2010.09649. Epperly, Tropp and Webber, arXiv 2301.07825. The
    normalisation of projected vectors: Epperly, arXiv 2512.15929.
    """
    operator = as_operator(operator)
    if method not in _METHODS:
        raise CurvatureError(f"method is {method!r}; choose one of {', '.join(_METHODS)}")
    estimator, least = _METHODS[method]
    if n_hvp < least:
        raise CurvatureError(f"n_hvp is {n_hvp}; {method} takes at least {least} products")
    n_parameters = operator.shape[0]
    if n_hvp >= n_parameters:
        eye = torch.eye(n_parameters, dtype=operator.dtype, device=operator.device)
        estimate, spent = Estimate(float(_product(operator, eye).diagonal().sum()), 0.0), n_parameters
    else:
        estimate, spent = estimator(operator, n_hvp, seed)
    return TraceEstimate(
        estimate.value, estimate.se, *estimate.interval(), dof=estimate.dof, n_hvp=spent, method=method
    )


def _hutchinson(operator: LinearOperator, n_hvp: int, seed: int) -> tuple[Estimate, int]:
    probes = random_unit_vectors(operator, range(n_hvp), seed).double()
    return _mean(operator.shape[0] * (probes * _product(operator, probes)).sum(0)), n_hvp


def _hutch_plus_plus(operator: LinearOperator, n_hvp: int, seed: int) -> tuple[Estimate, int]:
    n_sketch = n_hvp // 3
    n_probes = n_hvp - 2 * n_sketch
    vectors = random_unit_vectors(operator, range(n_sketch + n_probes), seed).double()
    range_, _ = torch.linalg.qr(_product(operator, vectors[:, :n_sketch]))
    within = float((range_ * _product(operator, range_)).sum())
    probes = vectors[:, n_sketch:]
    probes = probes - range_ @ (range_.T @ probes)
    probes = probes / torch.linalg.vector_norm(probes, dim=0)
    rest = _mean((operator.shape[0] - n_sketch) * (probes * _product(operator, probes)).sum(0))
    return Estimate(within + rest.value, rest.se, dof=rest.dof), 2 * n_sketch + n_probes


def _xtrace(operator: LinearOperator, n_hvp: int, seed: int) -> tuple[Estimate, int]:
    m = n_hvp // 2
    n_parameters = operator.shape[0]
    probes = random_unit_vectors(operator, range(m), seed).double() * n_parameters**0.5
    basis, triangle = torch.linalg.qr(_product(operator, probes))
    image = _product(operator, basis)
    core = basis.T @ image
    diagonal = triangle.diagonal().abs()
    if float(diagonal.min()) <= m * torch.finfo(operator.dtype).eps * float(diagonal.max()):
        return Estimate(float(core.trace()), 0.0), 2 * m  # the sketch holds the whole range
    # column i of `normal` is the direction of the sketch that only probe i spans
    normal = torch.linalg.solve_triangular(triangle, torch.eye(m).to(triangle), upper=True).T
    normal = normal / torch.linalg.vector_norm(normal, dim=0)
    seen = basis.T @ probes
    seen_normal = (seen * normal).sum(0)
    without = seen - normal * seen_normal
    exact = core.trace() - (normal * (core @ normal)).sum(0)
    quadratic = ((probes.T @ image).T * without).sum(0)
    rest = (without * (core @ without)).sum(0) - quadratic + seen_normal * (normal * triangle).sum(0)
    free = (probes**2).sum(0) - (without**2).sum(0)
    return _mean(exact + (n_parameters - m + 1) / free * rest), 2 * m


def _mean(samples: torch.Tensor) -> Estimate:
    n = len(samples)
    return Estimate(float(samples.mean()), float(samples.std() / n**0.5), dof=n - 1)


def _product(operator: LinearOperator, vectors: torch.Tensor) -> torch.Tensor:
    """Products in the operator's dtype, handed on in float64."""
    product = operator.matmat(vectors.to(operator.dtype)).double()
    if not bool(torch.isfinite(product).all()):
        raise CurvatureError("a product of the operator held NaN or infinite values; check the weights and the data")
    return product


_Estimator = Callable[[LinearOperator, int, int], tuple[Estimate, int]]
#: method: (how, fewest products)
_METHODS: dict[str, tuple[_Estimator, int]] = {
    "xtrace": (_xtrace, 4),
    "hutch++": (_hutch_plus_plus, 6),
    "hutchinson": (_hutchinson, 2),
}

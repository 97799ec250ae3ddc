"""Spectra of matrices that need no network, as sorted eigenvalues."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

#: Edge of the semicircular bulk below, and the strength of a rank-one spike from which on it leaves that bulk.
EDGE, THRESHOLD = 1.0, 0.5


def _wigner(n: int, rng: np.random.Generator) -> np.ndarray:
    square = rng.standard_normal((n, n))
    return EDGE * (square + square.T) / np.sqrt(8 * n)


def _marchenko_pastur(n: int, rng: np.random.Generator, observations_per_dimension: float) -> np.ndarray:
    factor = rng.standard_normal((n, int(n * observations_per_dimension)))
    return np.linalg.eigvalsh(factor @ factor.T / factor.shape[1])


def spiked_wigner(n: int, n_spikes: int, strength: float, seed: int = 0) -> np.ndarray:
    """Eigenvalues of a semicircular bulk with orthogonal rank-one spikes.

    Parameters
    ----------
    n, n_spikes : int
    strength : float
        In units of the threshold of Baik, Ben Arous and Peche, below which a spike does not leave the bulk. A spike of
        ``s`` thresholds is an eigenvalue near ``(s + 1 / s) / 2`` edges.
    """
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.standard_normal((n, n_spikes)))[0]
    return np.linalg.eigvalsh(_wigner(n, rng) + strength * THRESHOLD * directions @ directions.T)


def _mostly_zeros(n: int, rng: np.random.Generator) -> np.ndarray:
    n_positive, n_negative = n // 12, n // 24
    positive, negative = rng.lognormal(0, 1.5, n_positive), -0.2 * rng.lognormal(0, 1.5, n_negative)
    return np.concatenate([negative, np.zeros(n - n_positive - n_negative), positive])


_MAKE: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "Wigner": lambda n, rng: np.linalg.eigvalsh(_wigner(n, rng)),
    "Marchenko-Pastur 2": lambda n, rng: _marchenko_pastur(n, rng, 2.0),
    "Marchenko-Pastur 1/2": lambda n, rng: _marchenko_pastur(n, rng, 0.5),
    "uniform": lambda n, rng: (np.arange(n) + 0.5) / n,
    "arcsine": lambda n, rng: np.cos(np.pi * (np.arange(n) + 0.5) / n),
    "power law -1": lambda n, rng: 1 / np.arange(1.0, n + 1),
    "power law -1/2": lambda n, rng: np.arange(1.0, n + 1) ** -0.5,
    "lognormal": lambda n, rng: rng.lognormal(0, 1, n),
    "Wigner and 10 spikes": lambda n, rng: spiked_wigner(n, 10, 3.0),
    "mostly zeros": _mostly_zeros,
}
ANALYTIC = tuple(_MAKE)
#: Those without any gap near their ends.
GAPLESS = ANALYTIC[:8]


def _density_quantiles(n: int, edge_low: float, edge_high: float, power: int) -> np.ndarray:
    """Quantiles of the density ``sqrt((b - x) (x - a)) / x^power`` between ``a`` and ``b``."""
    x = np.linspace(edge_low, edge_high, 400_001)[1:-1]
    mass = np.cumsum(np.sqrt((edge_high - x) * (x - edge_low)) / x**power)
    return np.interp((np.arange(n) + 0.5) / n, mass / mass[-1], x)


def large_spectrum(name: str, n: int = 20_000) -> np.ndarray:
    """The same at a size at which no matrix is decomposed: quantiles of the limits of the random ones.

    Spikes are ten values between 1.5 and 6 edges.
    """
    if name.startswith("Marchenko-Pastur"):
        ratio = 1 / {"2": 2.0, "1/2": 0.5}[name.split()[1]]  # dimensions per observation
        n_positive = round(n * min(1.0, 1 / ratio))
        bulk = _density_quantiles(n_positive, (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2, 1)
        return np.append(np.zeros(n - n_positive), bulk)
    if name.startswith("Wigner"):
        bulk = EDGE * _density_quantiles(n, -1.0, 1.0, 0)
        return np.append(bulk[:-10], EDGE * np.linspace(1.5, 6.0, 10)) if "spikes" in name else bulk
    return analytic_spectrum(name, n)


def analytic_spectrum(name: str, n: int = 1200) -> np.ndarray:
    """The sorted eigenvalues ``(n,)`` of one of :data:`ANALYTIC`."""
    return np.sort(_MAKE[name](n, np.random.default_rng(0)))

"""What the numbers of a spectrum truly are, and how often stated intervals hold them."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

#: Numbers whose intervals are bounds rather than statistical; those of the negative part are in part, by what the
#: quadrature leaves open.
BOUNDS = (
    "lambda_max", "lambda_min", "bulk_edge_low", "bulk_edge_high", "gap_ratio", "class_ratio", "class_gap",
    "negative_mass", "negative_curvature",
)  # fmt: skip


def rounded(number: Any) -> float | None:
    """As it is saved: JSON knows no NaN."""
    return round(float(number), 4) if np.isfinite(number) else None


def exact_statistics(
    eigenvalues: np.ndarray, *, negative_threshold: float = 1e-3, ridge: float = 1.0, n_classes: int = 10
) -> dict[str, float]:
    """Numbers of a spectrum, by the names they have in a dataset.

    Parameters
    ----------
    eigenvalues : ndarray
        ``(P,)``, ascending.
    negative_threshold : float
        Relative to the largest magnitude: eigenvalues below minus so much count as negative.
    ridge : float
        Of the effective dimension.
    n_classes : int
    """
    size, positive = np.abs(eigenvalues), np.maximum(eigenvalues, 0)
    top, trace = eigenvalues[::-1], float(eigenvalues.sum())
    return {
        "trace": trace,
        "frobenius_norm": float(np.sqrt((eigenvalues**2).sum())),
        "lambda_max": float(top[0]),
        "lambda_min": float(eigenvalues[0]),
        "negative_mass": float((eigenvalues < -negative_threshold * size.max()).mean()),
        "negative_curvature": float(size[eigenvalues < 0].sum() / size.sum()),
        "effective_rank": float(size.sum() ** 2 / (size**2).sum()),
        "effective_dimension": float((positive / (positive + ridge)).sum()),
        "class_ratio": float(top[0] / top[n_classes - 1]),
        "class_gap": float(top[0] / top[n_classes]),
        "class_trace": float(top[:n_classes].sum()) / trace if trace else np.nan,
    }


def exact_density(eigenvalues: np.ndarray, grid: np.ndarray, kernel_width: float) -> np.ndarray:
    """The spectral density ``(grid,)``, smoothed by a Gaussian kernel."""
    kernel = np.exp(-0.5 * ((grid[:, None] - eigenvalues) / kernel_width) ** 2)
    return kernel.mean(1) / (kernel_width * np.sqrt(2 * np.pi))


def mass_points(eigenvalues: np.ndarray, n_points: int = 49) -> np.ndarray:
    """Points with equal shares of the eigenvalues between them, ascending; fewer where many eigenvalues coincide."""
    scale = np.abs(eigenvalues).max()
    levels = np.arange(1, n_points + 1) / (n_points + 1)
    return np.unique(np.round(np.quantile(eigenvalues, levels) / scale, 6)) * scale


def exact_edges(eigenvalues: np.ndarray, ds: xr.Dataset) -> dict[str, float]:
    """Edges of what is left without the outliers that a dataset counts."""
    above, below = int(ds.n_outliers), int(ds.n_outliers_negative)
    high = float(eigenvalues[-1 - above])
    return {
        "bulk_edge_low": float(eigenvalues[below]),
        "bulk_edge_high": high,
        "gap_ratio": float(eigenvalues[-1]) / high if high > 0 else np.nan,
    }


class Tally:
    """Values, intervals and true values of the numbers of a spectrum, over seeds."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.rows: dict[str, list[tuple[float, float, float, float]]] = {}

    def add(self, ds: xr.Dataset, truth: dict[str, float]) -> None:
        """Count the numbers that have an interval."""
        for name, exact in truth.items():
            if f"{name}_low" in ds:
                value, low, high = (float(ds[f"{name}{end}"]) for end in ("", "_low", "_high"))
                if np.isfinite([low, high, exact]).all():
                    self.rows.setdefault(name, []).append((value, low, high, exact))

    def held(self, name: str) -> np.ndarray:
        """Which intervals hold the true value, up to the round-off of that, ``(n,)`` of bool."""
        _, low, high, exact = np.array(self.rows[name]).T
        slack = self._round_off(exact)
        return (low - slack <= exact) & (exact <= high + slack)

    def summary(self, n: int) -> dict[str, list[float | None]]:
        """By name: how often the interval holds, its half-width in units of 1.96 RMS errors, how often it is given."""
        found = {}
        for name, rows in self.rows.items():
            value, low, high, exact = np.array(rows).T
            rms = float(np.sqrt(np.mean((value - exact) ** 2)))
            # a fraction that is truly zero can only be bounded, and a number that is known exactly has no error
            is_sampled = (exact != 0).any() and rms > 1e3 * self._round_off(exact).max()
            width = np.mean(high - low) / 2 / (1.96 * rms) if is_sampled else np.nan
            found[name] = [rounded(np.mean(self.held(name))), rounded(width), rounded(len(rows) / n)]
        return found

    def _round_off(self, exact: np.ndarray) -> np.ndarray:
        return 1e-12 * np.maximum(np.abs(exact), self.scale)

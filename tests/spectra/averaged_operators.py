"""Averages of random matrices of small rank, of which everything is known exactly."""

from __future__ import annotations

import numpy as np
import torch


class SyntheticAverage:
    """``H = sum_g w_g A_g' diag(c_g) A_g + ridge I``, with factors ``(group, rank, P)`` and ``(group, rank)``."""

    def __init__(
        self, factors: np.ndarray, coefficients: np.ndarray, weights: np.ndarray, ridge: float = 0.0, examples: str = ""
    ) -> None:
        self.factors, self.coefficients, self.group_weights = factors, coefficients, weights
        self.ridge, self.group_digest = ridge, examples
        self.shape = (factors.shape[2],) * 2
        self.device, self.dtype = torch.device("cpu"), torch.float64
        self.n_products = 0

    @property
    def matrix(self) -> np.ndarray:
        return self.matmat(torch.eye(self.shape[0], dtype=self.dtype)).numpy()

    @staticmethod
    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values))

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return self.matmat(v[:, None])[:, 0]

    def matmat(self, V: torch.Tensor) -> torch.Tensor:
        self.n_products += V.shape[1]
        rows = self.factors.reshape(-1, self.shape[0])
        scales = (self.group_weights[:, None] * self.coefficients).reshape(-1, 1)
        return torch.from_numpy(rows.T @ (scales * (rows @ V.numpy()))) + self.ridge * V

    def forms(self, U: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
        left, right = (self.factors @ W.numpy() for W in (U, V))
        return torch.from_numpy(np.einsum("gr,grk,grk->kg", self.coefficients, left, right, optimize=True))

    def product_without_data(self, V: torch.Tensor) -> torch.Tensor:
        return self.ridge * V

    def subset(self, parts: list[int], n_parts: int, seed: int = 0, expected_products: int = 1000) -> SyntheticAverage:
        order = np.random.default_rng(seed).permutation(len(self.group_weights))
        keep = np.sort(np.concatenate([np.array_split(order, n_parts)[part] for part in parts]))
        weights = self.group_weights[keep]
        return SyntheticAverage(self.factors[keep], self.coefficients[keep], weights / weights.sum(), self.ridge)


class Population:
    """Examples to draw: heavy-tailed sizes, a few directions that many share, and some negative curvature.

    Parameters
    ----------
    n_parameters, rank : int
    spikes : tuple of float
        Sizes of the shared directions; equal ones give a degenerate largest eigenvalue.
    tail : float
        Standard deviation of the logarithm of an example's size.
    """

    def __init__(
        self,
        n_parameters: int = 300,
        rank: int = 4,
        spikes: tuple[float, ...] = (12.0, 8.0, 6.0),
        tail: float = 1.0,
        negative: float = 0.2,
    ) -> None:
        self.n_parameters, self.rank, self.tail, self.negative = n_parameters, rank, tail, negative
        self.spikes = np.array(spikes)

    def draw(self, n: int, seed: int, shift: float = 0.0) -> SyntheticAverage:
        """An average over ``n`` examples. ``shift`` makes another network of the same examples."""
        rng = np.random.default_rng([seed, 17])
        p = self.n_parameters
        factors = rng.standard_normal((n, self.rank, p)) / np.sqrt(p)
        scale = np.exp(self.tail * rng.standard_normal((n, 1)) - self.tail**2 / 2)
        for j, spike in enumerate(self.spikes):
            factors[:, j % self.rank, j] += np.sqrt(spike) * rng.standard_normal(n) * (1 + shift)
        if shift:
            other = np.random.default_rng([seed, 18])
            factors += shift * other.standard_normal(factors.shape) / np.sqrt(p)
        signs = np.where(rng.random((n, self.rank)) < self.negative, -0.3, 1.0)
        coefficients = scale * signs * np.linspace(1, 0.5, self.rank)
        return SyntheticAverage(factors, coefficients, np.full(n, 1 / n), examples=f"{seed} {n}")

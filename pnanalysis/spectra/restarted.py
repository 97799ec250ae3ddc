r"""A few extreme eigenpairs in a fixed number of vectors: Lanczos with thick restarts.

When the basis is full, the best Ritz vectors replace it and Lanczos goes on from them. In the basis of ``k`` kept Ritz
vectors and those that follow, the operator is diagonal on the former, tridiagonal on the latter, and couples the two by
one row, whose entries are the residuals of the kept Ritz values. What has been found is never lost, and a product costs
as much as in ordinary Lanczos. Every vector is orthogonalised against all others twice, so that no eigenvalue is found
more often than it is there. (Of an eigenvalue that is there twice, a single start vector may miss one.)

References
----------
Wu and Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, SIAM J. Matrix Anal. Appl. 22
(2000).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.checks import at_least, check_seed, one_of
from pnanalysis.errors import CurvatureError
from pnanalysis.io.unfinished import Unfinished
from pnanalysis.spectra.inner_products import combinations, norms, orthogonalised, recombine
from pnanalysis.spectra.lanczos import BREAKDOWN, basis_dtype
from pnanalysis.spectra.linear_operator import (
    NOT_FINITE,
    LinearOperator,
    as_operator,
    checked_product,
    contiguous_columns,
    empty_columns,
    round_off,
)
from pnanalysis.spectra.pairs_plan import default_vectors, vectors_of_search
from pnanalysis.spectra.random_vectors import random_unit_vectors
from pnanalysis.spectra.sharing import part_of, processes_of
from pnanalysis.terminal.progress import Advance

#: Which eigenvalues: the largest, the smallest (most negative), or those of the largest magnitude.
WHICH = ("largest", "smallest", "magnitude")


@dataclass(frozen=True)
class EigenPairs:
    """Approximate eigenpairs, the wanted end of the spectrum first.

    Attributes
    ----------
    value : ndarray
        Ritz values ``(k,)``.
    residual : ndarray
        ``|H v - value v|``, ``(k,)``: an eigenvalue lies within it of each value.
    vector : torch.Tensor
        Orthonormal Ritz vectors ``(P, k)``, or this process's part of them.
    n_hvp : int
        Products spent.
    converged : bool
        Whether all residuals are within the tolerance.
    scale : float
        Largest magnitude of any Ritz value, those of the other end included.
    """

    value: Array
    residual: Array
    vector: Tensor
    n_hvp: int
    converged: bool
    scale: float = np.nan


def extreme_pairs(
    operator: Any,
    k: int = 10,
    which: str = "largest",
    *,
    n_vectors: int | None = None,
    tolerance: float = 1e-3,
    max_hvp: int = 1000,
    max_memory_bytes: int | None = None,
    seed: int = 0,
    start: Tensor | None = None,
    advance: Advance | None = None,
    state: Unfinished | None = None,
    name: str = "pairs",
) -> EigenPairs:
    """The ``k`` eigenpairs at one end of the spectrum of a symmetric operator.

    Parameters
    ----------
    operator : LinearOperator or matrix
        Anything :func:`pnanalysis.as_operator` takes.
    k : int
    which : {"largest", "smallest", "magnitude"}
    n_vectors : int, optional
        Vectors between restarts, more than ``k``; the larger their number, the fewer the products. Default:
        ``2 k + 10``. If there is no room for so many, as many as there is room for, but at least ``k + 4``.
    tolerance : float
        Stop when all residuals are below this fraction of the largest magnitude found. Round-off of the products bounds
        what can be reached.
    max_hvp : int
        Stop after so many products in any case.
    max_memory_bytes : int, optional
        Bound on the memory for these vectors, those to work with and the pairs at the end. By default 60 % of what is
        free, unless ``n_vectors`` is given, which is then taken as it is.
    seed : int
        Of the random start vector.
    start : torch.Tensor, optional
        Vectors ``(P, s)`` whose sum is started from instead: those of a similar operator (a warm start).
    advance : callable, optional
        Called with the products of each step.
    state : Unfinished, optional
        Where the basis is saved, now and then and when the search is interrupted, and the pairs once they are found;
        with what is saved there the search goes on, in as many vectors, to end with the same numbers.
    name : str
        Of this search among those that are saved there.

    Returns
    -------
    EigenPairs

    Raises
    ------
    CurvatureError
        If ``k`` or ``n_vectors`` does not fit P, there is no room for so many vectors, or a product is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> pairs = extreme_pairs(np.diag(np.arange(100.0)), k=2)
    >>> pairs.value.round(3)
    array([99., 98.])
    """
    operator = as_operator(operator)
    n_parameters = operator.shape[0]
    at_least(1, k=k, max_hvp=max_hvp, n_vectors=n_vectors)
    check_seed(seed=seed)
    one_of(WHICH, which=which)
    wanted = default_vectors(k, n_parameters) if n_vectors is None else n_vectors
    if not k < wanted <= n_parameters and not k == wanted == n_parameters:
        raise CurvatureError(
            f"k is {k} and n_vectors {wanted} for {n_parameters:,} parameters; give k < n_vectors <= parameters"
        )
    saved = None if state is None else state.load(name)
    if saved is not None and saved[1]["done"]:
        return _loaded(*saved, operator.device)
    if saved is not None:
        wanted = len(saved[0]["matrix"])
    elif n_vectors is None or max_memory_bytes is not None:
        wanted = vectors_of_search(operator, k, wanted, max_memory_bytes)
    n_vectors = wanted
    solver = _Restarted(operator, k, which, n_vectors, tolerance)
    if saved is None:
        solver.begin(random_unit_vectors(operator, [0], seed) if start is None else start.sum(1, keepdim=True))
    else:
        solver.restore(*saved)
    with solver.saved_on_interrupt(state, name):
        while True:
            while solver.size < n_vectors and not solver.is_invariant:
                solver.step()
                if state is not None and state.is_due:
                    solver.save(state, name)
                if advance is not None:
                    advance(1)
            if solver.is_invariant or solver.n_hvp + n_vectors - k > max(max_hvp, n_vectors) or solver.has_converged():
                break
            solver.restart()
        found = solver.pairs()
    if state is not None:
        _save(found, state, name)
    return found


def _save(pairs: EigenPairs, state: Unfinished, name: str) -> None:
    """Pairs that have been found take the place of the unfinished search."""
    tensors = {
        "value": torch.from_numpy(pairs.value), "residual": torch.from_numpy(pairs.residual), "vector": pairs.vector,
    }  # fmt: skip
    state.save(name, tensors, done=True, n_hvp=pairs.n_hvp, converged=pairs.converged, scale=pairs.scale)


def _loaded(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], device: torch.device) -> EigenPairs:
    value, residual = tensors["value"].numpy(), tensors["residual"].numpy()
    vector = contiguous_columns(tensors["vector"].to(device))
    return EigenPairs(value, residual, vector, numbers["n_hvp"], numbers["converged"], numbers["scale"])


class _Restarted:
    """The basis, the operator on it, and the vector that comes next."""

    def __init__(self, operator: LinearOperator, k: int, which: str, n_vectors: int, tolerance: float) -> None:
        self.operator, self.k, self.which = operator, k, which
        self.tolerance = max(tolerance, round_off(operator))
        self.dtype = basis_dtype(operator)
        self.add, self.decided = part_of(operator).add, processes_of(operator).decided
        self.basis = empty_columns(part_of(operator).length, n_vectors, self.dtype, operator.device)
        self.matrix = np.zeros((n_vectors, n_vectors))
        self.size, self.n_hvp, self.beta = 0, 0, 0.0
        self.following: Tensor = self.basis[:, :0]
        self.is_invariant = False
        self._is_whole = True  # not between two parts of a step

    def save(self, state: Unfinished, name: str) -> None:
        """Write all that the search goes on with."""
        if self._is_whole:
            tensors = {"basis": self.basis[:, : self.size].T, "following": self.following[:, 0]}
            tensors["matrix"] = torch.from_numpy(self.matrix)
            state.save(
                name, tensors, done=False, size=self.size, n_hvp=self.n_hvp, beta=self.beta,
                is_invariant=self.is_invariant,
            )  # fmt: skip

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Go on with what was saved."""
        self.size, self.n_hvp, self.beta = numbers["size"], numbers["n_hvp"], numbers["beta"]
        self.is_invariant, self.matrix = numbers["is_invariant"], tensors["matrix"].numpy()
        self.basis[:, : self.size] = tensors["basis"].T.to(self.basis)
        self.following = tensors["following"][:, None].to(self.basis)

    @contextmanager
    def saved_on_interrupt(self, state: Unfinished | None, name: str) -> Iterator[None]:
        """Save what there is if the body ends early."""
        try:
            yield
        except BaseException:
            if state is not None:
                self.save(state, name)
            raise

    def begin(self, vector: Tensor) -> None:
        """Start from one vector ``(P, 1)``."""
        vector = vector.to(self.basis)
        self.following = vector / norms(vector, self.add).to(self.dtype)

    def step(self) -> None:
        """Add the next vector to the basis, with one product."""
        j = self.size
        self.basis[:, j] = self.following[:, 0]
        product = contiguous_columns(checked_product(self.operator, self.following).to(self.basis))
        rest, (coordinates,) = orthogonalised(product, [self.basis[:, : j + 1]], self.add)
        lengths = [float(norms(vectors, self.add)) for vectors in (rest, product)]
        length, size, alpha = self.decided((*lengths, float(coordinates[j])))
        if not np.isfinite(length):
            raise CurvatureError(NOT_FINITE)
        self._is_whole = False
        self.n_hvp += 1
        self.matrix[j, j] = alpha
        self.size, self.beta = j + 1, length
        scale = max(np.abs(self.matrix).max(), size)
        if length <= BREAKDOWN[self.operator.dtype] * scale or self.size == self.operator.shape[0]:
            self.is_invariant, self.beta = True, 0.0
        else:
            self.following = rest / length
            if self.size < len(self.matrix):
                self.matrix[j, j + 1] = self.matrix[j + 1, j] = length
        self._is_whole = True

    def has_converged(self) -> bool:
        """Whether the residuals of all wanted pairs are within the tolerance."""
        value, _, residual = self._ritz()
        largest = float(np.abs(value).max())
        converged = bool((residual[: self.k] <= self.tolerance * (largest or 1.0)).all()) or self.is_invariant
        return self.decided(converged)

    def pairs(self) -> EigenPairs:
        """The wanted Ritz pairs."""
        value, vector, residual = self._ritz()
        k = min(self.k, self.size)
        vectors = combinations(self.basis[:, : self.size], torch.from_numpy(vector[:, :k].copy()).to(self.basis))
        # the order in memory is that of a saved copy, for the round-off of products depends on it
        vectors = contiguous_columns(vectors)
        largest = float(np.abs(value).max())
        return EigenPairs(value[:k], residual[:k], vectors, self.n_hvp, self.has_converged(), largest)

    def restart(self) -> None:
        """Replace the basis by the best Ritz vectors: the wanted ones, and half of the others to speed up the rest."""
        value, vector, _ = self._ritz()
        n_kept = min(self.k + (self.size - self.k) // 2, self.size - 1)
        self._is_whole = False
        recombine(self.basis[:, : self.size], torch.from_numpy(vector[:, :n_kept].copy()).to(self.basis))
        signed = self.beta * vector[-1, :n_kept]
        self.matrix[:] = 0
        self.matrix[np.arange(n_kept), np.arange(n_kept)] = value[:n_kept]
        self.matrix[:n_kept, n_kept] = self.matrix[n_kept, :n_kept] = signed
        self.size = n_kept
        self._is_whole = True

    def _ritz(self) -> tuple[Array, Array, Array]:
        """Ritz values, coordinates of their vectors in the basis, and residuals; the wanted ones first."""
        # signs of eigenvectors may differ between machines
        value, vector = self.decided(tuple(np.linalg.eigh(self.matrix[: self.size, : self.size])))
        order = wanted_first(value, self.which)
        return value[order], vector[:, order], self.beta * np.abs(vector[-1, order])


def wanted_first(value: Array, which: str) -> NDArray[np.intp]:
    """The order that puts eigenvalues ``(n,)`` with the wanted ones first; see :data:`WHICH`."""
    key = {"largest": -value, "smallest": value, "magnitude": -np.abs(value)}[which]
    return np.argsort(key, kind="stable")


__all__ = ["WHICH", "EigenPairs", "extreme_pairs", "wanted_first"]

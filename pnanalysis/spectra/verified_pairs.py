"""A few extreme eigenpairs that have been checked: with residuals of their own, and none left out.

Lanczos from one start vector finds one vector of each eigenspace: of an eigenvalue that is there twice, it may miss
one. So a search starts from a random vector in the orthogonal complement of what has been found, until it finds nothing
more. The matrix is also multiplied with the vectors once more: these products give the values and their residuals, and
are compared with what Lanczos tells.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.checks import at_least, check_seed, one_of, positive
from pnanalysis.errors import CurvatureError
from pnanalysis.io.unfinished import Unfinished
from pnanalysis.spectra.inner_products import combinations, coordinates, norms, orthogonalised, recombine, residual_gram
from pnanalysis.spectra.lanczos import BREAKDOWN, largest_asymmetry
from pnanalysis.spectra.linear_operator import (
    NOT_FINITE,
    LinearOperator,
    arithmetic,
    as_operator,
    checked_product,
    contiguous_columns,
    empty_columns,
    not_symmetric,
    round_off,
)
from pnanalysis.spectra.memory import singles_at_once
from pnanalysis.spectra.pairs_plan import N_SEARCH, PairsPlan, plan_pairs, storage_of
from pnanalysis.spectra.random_vectors import random_unit_vectors
from pnanalysis.spectra.restarted import WHICH, EigenPairs, extreme_pairs, wanted_first
from pnanalysis.spectra.sharing import part_of
from pnanalysis.spectra.subspaces import AngleBounds, angle_bounds
from pnanalysis.terminal.progress import Advance

#: Residual of a first look at the complement, relative to the last value that was found.
_ROUGH = 0.02
#: Length of what is left of a unit vector of the complement without what lies along those that have been found.
_INSIDE = 0.99
#: Square of the same of directions of their span: as many as there are vectors, unless these depend on one another.
_NEW = 0.5


@dataclass(frozen=True)
class VerifiedPairs:
    """Eigenpairs with bounds, the wanted end of the spectrum first.

    Attributes
    ----------
    value : ndarray
        Ritz values ``(k,)``.
    residual : ndarray
        ``|H v - value v|`` by a product of its own, ``(k,)``.
    vector : torch.Tensor
        Orthonormal Ritz vectors ``(P, k)``.
    converged : ndarray
        Whether each residual is within the tolerance, ``(k,)``.
    noise : float
        Norm of the error of products: round-off.
    angles : AngleBounds
    rest : (float, float) or None
        The most wanted Ritz value of the complement and its residual; ``None`` where there is none.
    complete : bool
        Whether the complement has been searched and holds nothing that is wanted more.
    scale : float
        Largest magnitude of the eigenvalues that were seen, at either end.
    n_hvp : int
        Products spent.
    """

    value: Array
    residual: Array
    vector: Tensor
    converged: NDArray[np.bool_]
    noise: float
    angles: AngleBounds
    rest: tuple[float, float] | None
    complete: bool
    scale: float
    n_hvp: int

    @property
    def bound(self) -> Array:
        """An eigenvalue lies within it of each value, ``(k,)``: residual and round-off."""
        return self.residual + self.noise


def verified_pairs(
    operator: Any,
    k: int = 10,
    which: str = "largest",
    *,
    tolerance: float = 1e-4,
    max_hvp: int = 1000,
    n_vectors: int | None = None,
    max_memory_bytes: int | None = None,
    plan: PairsPlan | None = None,
    seed: int = 0,
    start: Tensor | None = None,
    advance: Advance | None = None,
    state: Unfinished | None = None,
    name: str = "pairs",
) -> VerifiedPairs:
    """The ``k`` eigenpairs at one end of the spectrum of a symmetric operator, with bounds.

    Parameters
    ----------
    operator : LinearOperator or matrix
        Anything :func:`pnanalysis.as_operator` takes.
    k : int
        All of them where there are fewer.
    which : {"largest", "smallest", "magnitude"}
    tolerance : float
        Residuals to reach, relative to the largest magnitude of the eigenvalues; not below the round-off of products.
    max_hvp : int
        The most products, after which what has been found is returned, and what has not converged is said. Each pair
        takes two at least, one more where there are others.
    n_vectors, max_memory_bytes : int, optional
        Vectors between restarts, and the bound on the memory for all vectors that are held at a time: see
        :func:`pnanalysis.spectra.restarted.extreme_pairs`.
    plan : PairsPlan, optional
        Of :func:`pnanalysis.spectra.pairs_plan.plan_pairs`, which has looked at both already.
    seed : int
        Of the random start vectors.
    start : torch.Tensor, optional
        Vectors ``(P, s)`` of a similar operator to start from.
    advance : callable, optional
        Called with the products of each step.
    state : Unfinished, optional
        Where unfinished searches are saved and taken up again, to end with the same numbers: see
        :func:`pnanalysis.spectra.restarted.extreme_pairs`.
    name : str
        Of these pairs among those that are saved there.

    Returns
    -------
    VerifiedPairs

    Raises
    ------
    CurvatureError
        If a product is not finite, the operator is not symmetric, processes divide its vectors among them,
        ``max_hvp`` is too small for so many pairs, or there is no room for the vectors.

    Warns
    -----
    UserWarning
        If pairs have not converged, or wanted ones may have been left out.

    Examples
    --------
    >>> import numpy as np
    >>> pairs = verified_pairs(np.diag([3.0, 3.0, 1.0, -5.0]), k=2)
    >>> pairs.value.round(6), pairs.angles.cluster
    (array([3., 3.]), array([0, 0]))
    """
    operator = as_operator(operator)
    if not part_of(operator).is_all:
        raise CurvatureError(
            "verified pairs take whole vectors, which processes divide here; take a DistributedOperator"
        )
    at_least(1, k=k, max_hvp=max_hvp)
    check_seed(seed=seed)
    one_of(WHICH, which=which)
    positive(tolerance=tolerance)
    n_parameters = operator.shape[0]
    k = min(k, n_parameters)
    check_limit(max_hvp, k, n_parameters)
    plan = plan or plan_pairs(
        operator, k, max_hvp, n_vectors=n_vectors, max_memory_bytes=max_memory_bytes, state=state, name=name
    )
    first = extreme_pairs(
        operator, k, which, n_vectors=plan.n_vectors, tolerance=tolerance, max_hvp=max_hvp - k, seed=seed, start=start,
        advance=advance, state=state, name=name,
    )  # fmt: skip
    found = _Found(operator, first, which, advance, state, name, plan.n_search)
    accuracy = max(tolerance, round_off(operator)) * first.scale
    del first  # and its vectors, which have been turned
    rest: tuple[float, float] | None = None
    complete = found.size == n_parameters
    for round_ in range(1, 2 * k + 2):
        wanted = max(k - found.size, 1)
        if complete or not found.has_room(wanted, max_hvp):
            break
        more = found.search(wanted, round_, seed, tolerance, max_hvp)
        if not len(more.value):  # nothing but round-off of zero
            rest, complete = (0.0, round_off(operator) * found.scale), found.size >= k
            continue
        missed = found.size < k or _is_beyond(more.value[0], found.value[k - 1], which, accuracy)
        if missed:
            found.add(more.vector)
            complete = found.size == n_parameters
            rest = None
        else:
            rest, complete = (float(more.value[0]), float(more.residual[0])), True
    if found.size > k:
        rest = _more_wanted(rest, (float(found.value[k]), float(found.residuals()[0][k])), which)
    return _verified(found.first(k), rest, complete, accuracy, which)


def check_limit(max_hvp: int, k: int, n_parameters: int) -> None:
    """Refuse a limit of products within which ``k`` pairs cannot be found and verified.

    Raises
    ------
    CurvatureError
    """
    k = min(k, n_parameters)
    fewest = k + min(k + 1, n_parameters)
    if max_hvp < fewest:
        raise CurvatureError(f"max_hvp is {max_hvp}; {k} pairs of {n_parameters:,} parameters take {fewest} at least")


class _Complement:
    """An operator between the vectors orthogonal to some others, which round-off brings back: ``QHQ + s (1 - Q)``.

    ``Q`` is ``1 - VV'``, and ``s`` an eigenvalue that nobody wants.
    """

    def __init__(self, operator: LinearOperator, V: Tensor, unwanted: float) -> None:
        self.operator, self.V, self.unwanted = operator, V, unwanted
        self.shape, self.device, self.dtype = operator.shape, operator.device, operator.dtype
        self.arithmetic, self.round_off = arithmetic(operator), round_off(operator)

    def off(self, V: Tensor) -> Tensor:
        """Vectors ``(P, k)`` less what lies along those that are left out."""
        return orthogonalised(contiguous_columns(V.to(self.V)), [self.V])[0]

    def matvec(self, v: Tensor) -> Tensor:
        return self.matmat(v[:, None])[:, 0]

    def matmat(self, V: Tensor) -> Tensor:
        inside = self.off(V)
        product = self.off(checked_product(self.operator, inside).to(inside))
        return product.add_(inside.neg_().add_(V.to(inside)), alpha=self.unwanted)


class _Found:
    """Vectors that were found, their products, and the Ritz values of their span."""

    def __init__(
        self, operator: LinearOperator, pairs: EigenPairs, which: str, advance: Advance | None,
        state: Unfinished | None = None, name: str = "pairs", n_search: int = N_SEARCH,
    ) -> None:  # fmt: skip
        self.operator, self.which, self.advance, self.state, self.name = operator, which, advance, state, name
        self.n_search = n_search
        self.value, self.vector, self.n_hvp, self.scale = pairs.value, pairs.vector, pairs.n_hvp, pairs.scale
        self.product = self._times(self.vector)
        self._check(pairs)
        self._rotate()

    @property
    def size(self) -> int:
        return self.vector.shape[1]

    def has_room(self, k: int, max_hvp: int) -> bool:
        """Whether the products that are left are enough to find ``k`` pairs of the complement and verify them."""
        k = min(k, self.operator.shape[0] - self.size)
        return self.n_hvp + k + (k + 1) <= max_hvp

    def search(self, k: int, index: int, seed: int, tolerance: float, max_hvp: int) -> EigenPairs:
        """The most wanted pairs of the orthogonal complement, from a random vector in it."""
        unwanted = {"largest": -self.scale, "smallest": self.scale, "magnitude": 0.0}[self.which]
        complement = _Complement(self.operator, self.vector, unwanted)
        start = complement.off(random_unit_vectors(self.operator, [index], seed))
        k, n_parameters = min(k, self.operator.shape[0] - self.size), self.operator.shape[0]
        last = float(self.value[-1])
        # a rough answer is enough where nothing is near what has been found
        for attempt, accuracy in enumerate((max(tolerance, _ROUGH * abs(last) / (self.scale or 1.0)), tolerance)):
            left = max_hvp - self.n_hvp - k  # those that verify what is found are kept
            n_vectors = min(k + self.n_search, n_parameters, left)
            if attempt and n_vectors <= k:
                break
            more = extreme_pairs(
                complement, k, self.which, n_vectors=n_vectors, tolerance=accuracy, max_hvp=left, start=start,
                advance=self.advance, state=self.state, name=f"{self.name}-{index}-{attempt}",
            )  # fmt: skip
            self.n_hvp += more.n_hvp
            self.scale = max(self.scale, more.scale)
            start, away = more.vector, float(more.residual[0])
            sign = {"largest": 1, "smallest": -1, "magnitude": np.sign(more.value[0])}[self.which]
            if k == 1 and not _is_beyond(float(more.value[0]) + sign * away, last, self.which, 0.0):
                break
        # a space that is exhausted goes on with round-off, which may lie among what was found, or partly so
        genuine = (norms(complement.off(more.vector)) > _INSIDE).cpu()
        if not genuine.all():
            kept = np.flatnonzero(genuine.numpy())
            more = replace(
                more,
                value=more.value[kept],
                residual=more.residual[kept],
                vector=more.vector[:, genuine.to(start.device)],
            )
        return more

    def add(self, vectors: Tensor) -> None:
        """Take more vectors ``(P, m)``, or rather what is new in their span."""
        vectors = orthogonalised(contiguous_columns(vectors), [self.vector])[0]
        # in an exhausted space round-off tilts them towards what was found, and what is left of them to one another
        square, mixing = np.linalg.eigh(coordinates(vectors, vectors).cpu().double().numpy())
        new = square > _NEW
        vectors = combinations(vectors, torch.from_numpy(mixing[:, new] / np.sqrt(square[new])).to(vectors))
        self.vector = _side_by_side(self.vector, vectors)
        self.product = _side_by_side(self.product, self._times(vectors))
        self._rotate()

    def first(self, k: int) -> _Found:
        """The wanted ones alone."""
        self.value, self.vector, self.product = self.value[:k], self.vector[:, :k], self.product[:, :k]
        return self

    def residuals(self) -> tuple[Array, Array]:
        """Their norms ``(k,)`` and inner products ``(k, k)``."""
        value = torch.from_numpy(self.value).to(self.vector)
        gram: Array = residual_gram(self.product, self.vector, value).cpu().double().numpy()
        return np.sqrt(np.diag(gram)), gram

    def _times(self, vectors: Tensor) -> Tensor:
        n = vectors.shape[1]
        product = empty_columns(len(vectors), n, vectors.dtype, vectors.device)
        together = singles_at_once(storage_of(self.operator), len(vectors))  # one at a time where they are long
        for part in (slice(begin, begin + together) for begin in range(0, n, together)):
            product[:, part] = checked_product(self.operator, vectors[:, part])
            done = min(part.stop, n) - part.start
            self.n_hvp += done
            if self.advance is not None:
                self.advance(done)
        if not bool(torch.isfinite(norms(product)).all()):
            raise CurvatureError(NOT_FINITE)
        return product

    def _check(self, pairs: EigenPairs) -> None:
        """Compare products with what Lanczos tells of them: it takes the operator to be symmetric."""
        image = coordinates(self.vector, self.product).cpu().double().numpy()
        off = float(np.linalg.norm(image - np.diag(pairs.value), 2))
        allowed = max(largest_asymmetry(self.operator), 100 * BREAKDOWN[self.vector.dtype])
        if off > allowed * pairs.scale:
            raise not_symmetric(
                self.operator, f"its eigenvalues by Lanczos and by further products differ by {off / pairs.scale:.1%}"
            )

    def _rotate(self) -> None:
        """Rayleigh and Ritz: the combinations of the vectors that diagonalise the operator on their span."""
        image = coordinates(self.vector, self.product).cpu().double().numpy()
        value, mixing = np.linalg.eigh((image + image.T) / 2)
        order = wanted_first(value, self.which)
        self.value, mixing = value[order], mixing[:, order]
        turn = torch.from_numpy(mixing.copy()).to(self.vector)
        recombine(self.vector, turn)
        recombine(self.product, turn)


def _is_beyond(value: float, last: float, which: str, accuracy: float) -> bool:
    """Whether an eigenvalue of the complement is wanted more than the last one that was found."""
    ahead = {"largest": value - last, "smallest": last - value, "magnitude": abs(value) - abs(last)}[which]
    return bool(ahead > accuracy)


def _more_wanted(one: tuple[float, float] | None, other: tuple[float, float], which: str) -> tuple[float, float]:
    """Of two Ritz values with residuals the one that is wanted more."""
    return other if one is None or wanted_first(np.array([other[0], one[0]]), which)[0] == 0 else one


def _verified(
    found: _Found, rest: tuple[float, float] | None, complete: bool, accuracy: float, which: str
) -> VerifiedPairs:
    residual, gram = found.residuals()
    noise = round_off(found.operator) * found.scale
    converged = residual <= accuracy + noise
    everything = found.size == found.operator.shape[0]
    if rest is None and not everything:
        rest = float(found.value[-1]), float(residual[-1])  # nothing is known of what comes next
    if not converged.all():
        others = "" if complete else ", nor is it known whether eigenvalues were left out, as repeated ones may be"
        warnings.warn(
            f"{(~converged).sum()} of {len(converged)} eigenpairs have not converged after {found.n_hvp} products "
            f"(largest residual {residual.max():.2g}){others}; raise max_hvp, or the tolerance",
            stacklevel=3,
        )
    elif not complete:
        warnings.warn(
            f"after {found.n_hvp} products it is not known whether eigenvalues were left out, as copies of repeated "
            "ones may be; raise max_hvp",
            stacklevel=3,
        )
    angles = angle_bounds(found.value, gram, rest, which, noise)
    return VerifiedPairs(
        found.value, residual, found.vector, converged, noise, angles, rest, complete, found.scale, found.n_hvp
    )


def _side_by_side(first: Tensor, second: Tensor) -> Tensor:
    """Columns of both, each of them contiguous, which concatenation would not leave them."""
    n = first.shape[1]
    both = empty_columns(len(first), n + second.shape[1], first.dtype, first.device)
    both[:, :n], both[:, n:] = first, second
    return both


__all__ = ["VerifiedPairs", "check_limit", "verified_pairs"]

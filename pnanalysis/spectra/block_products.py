r"""What products with a few random vectors tell about every block of a symmetric matrix at once.

The parameters are divided into blocks; :math:`P_l` keeps the entries of block :math:`l`. Half of the products go into a
Lanczos basis :math:`V` of the whole matrix, from which a part of it is known exactly, :math:`T = V K V^\top` with the
tridiagonal :math:`K` of Lanczos and its coupling to the next vector, so that
:math:`H - T = (I - \Pi) H (I - \Pi)` in the space orthogonal to the basis. The other half multiply vectors
:math:`z_a` of independent random signs. All that is kept of these products are the forms

.. math:: M_l[a, b] = z_a^\top P_l H z_b

of each block, for the matrix of each group of examples by itself where the operator has groups. From them follow
traces, Frobenius norms and energies between blocks with their errors: see :mod:`pnanalysis.spectra.block_moments`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.checks import human
from pnanalysis.errors import CurvatureError
from pnanalysis.spectra.block_diagonal import DiagonalSums
from pnanalysis.spectra.block_state import BlockState
from pnanalysis.spectra.free_memory import free_bytes
from pnanalysis.spectra.inner_products import combinations, coordinates
from pnanalysis.spectra.lanczos import Lanczos, basis_dtype, largest_asymmetry
from pnanalysis.spectra.linear_operator import NOT_FINITE, LinearOperator, checked_product, not_symmetric
from pnanalysis.spectra.memory import basis_limit
from pnanalysis.spectra.random_vectors import random_signs, random_unit_vectors

#: Sign vectors that are multiplied at a time, at most.
_AT_ONCE = 16
#: Sign vectors that there must be at least.
FEWEST_PROBES = 8
#: Part of the free memory that the forms may take.
_FORMS_FRACTION = 0.25


class GroupedOperator(LinearOperator, Protocol):
    """An operator that is a sum over groups of examples, and whose products can be had group by group."""

    @property
    def shares(self) -> Array:
        """The part of the whole that each group's matrix is weighed by, ``(group,)``."""
        ...

    def matmat_by_group(self, V: Tensor) -> Iterator[tuple[int, Tensor]]:
        """What each group adds to the products with vectors ``(P, k)``; what no example has is left out."""
        ...

    def product_without_data(self, V: Tensor) -> Tensor:
        """Products with what no example has."""
        ...


@dataclass(frozen=True)
class Partition:
    """How the entries of a vector are divided into blocks.

    Attributes
    ----------
    names : tuple of str
        Of the blocks.
    owner, length : tuple of int
        The block and the length of each run of entries, in their order.
    """

    names: tuple[str, ...]
    owner: tuple[int, ...]
    length: tuple[int, ...]

    @property
    def sizes(self) -> Array:
        """Entries in each block, ``(block,)``."""
        return np.bincount(self.owner, self.length, len(self.names)).astype(np.int64)

    @property
    def spans(self) -> Iterator[tuple[int, slice]]:
        """The block of each run of entries, and where it lies."""
        begin = 0
        for owner, length in zip(self.owner, self.length, strict=True):
            yield owner, slice(begin, begin + length)
            begin += length

    def products(self, A: Tensor, B: Tensor) -> Array:
        """``A' P_l B`` of vectors ``(P, m)`` and ``(P, n)`` for every block: ``(block, m, n)``, summed in float64."""
        found = np.zeros((len(self.names), A.shape[1], B.shape[1]))
        for owner, span in self.spans:
            found[owner] += coordinates(A[span], B[span]).cpu().numpy()
        return found

    def sums(self, values: Array) -> Array:
        """Sums ``(block, ...)`` over entries ``(P, ...)``."""
        found = np.zeros((len(self.names), *values.shape[1:]))
        for owner, span in self.spans:
            found[owner] += values[span].sum(0)
        return found


@dataclass(frozen=True)
class Plan:
    """What products are spent on.

    Attributes
    ----------
    n_hvp : int
        All of them.
    seed : int
    diagonal : bool
        Whether the diagonal itself is wanted.
    max_memory_bytes : int, optional
        For vectors; 60 % of what is free by default.
    is_reached : callable, optional
        Whether the forms so far will do.
    state : Path, optional
        A folder for unfinished work.
    save_every : float
        Seconds between two saves.
    """

    n_hvp: int
    seed: int = 0
    diagonal: bool = False
    max_memory_bytes: int | None = None
    is_reached: Callable[[BlockForms], bool] | None = field(default=None, compare=False)
    state: Path | None = None
    save_every: float = 300.0


@dataclass(frozen=True)
class BlockForms:
    """Forms of every block.

    Attributes
    ----------
    partition : Partition
    forms : ndarray, shape (group, block, q, q)
        What each group adds to ``z_a' P_l H z_b``; where there are no groups, a single one.
    rest : ndarray, shape (block, q, q)
        What no example has.
    known : ndarray, shape (block, q, q)
        The same forms of ``T``.
    known_trace, known_energy : ndarray, shapes (block,) and (block, block)
        Traces of ``T``'s diagonal blocks and squared Frobenius norms of all its blocks.
    share : ndarray, shape (group,)
        Of each group in the whole.
    n_known, n_hvp : int
        Products that ``T`` took, and all of them.
    diagonal : DiagonalSums, optional
    """

    partition: Partition
    forms: NDArray[np.float32]
    rest: Array
    known: Array
    known_trace: Array
    known_energy: Array
    share: Array
    n_known: int
    n_hvp: int
    diagonal: DiagonalSums | None = None

    @property
    def n_probes(self) -> int:
        """Sign vectors, ``q``."""
        return int(self.forms.shape[-1])

    @property
    def total(self) -> Array:
        """``M_l[a, b]`` of the whole matrix, ``(block, q, q)``."""
        return np.asarray(self.forms.sum(0, dtype=np.float64) + self.rest)

    def first(self, q: int) -> BlockForms:
        """Those of the first ``q`` sign vectors."""
        cut = (..., slice(q), slice(q))
        return BlockForms(
            self.partition, self.forms[cut], self.rest[cut], self.known[cut], self.known_trace, self.known_energy,
            self.share, self.n_known, self.n_known + q, self.diagonal,
        )  # fmt: skip

    def without_rest(self) -> BlockForms:
        """Those of the data's matrix: ``T`` stays as it is, for any known matrix can be taken off."""
        return replace(self, rest=np.zeros_like(self.rest))

    def merged(self, partition: Partition, member: Array) -> BlockForms:
        """The forms of larger blocks, the sums of those that ``member`` (block, block of these) says."""
        forms = np.einsum("ml,glab->gmab", member.astype(self.forms.dtype), self.forms, optimize=True)
        rest, known = (np.einsum("ml,lab->mab", member, part, optimize=True) for part in (self.rest, self.known))
        return BlockForms(
            partition, forms, rest, known, member @ self.known_trace, member @ self.known_energy @ member.T,
            self.share, self.n_known, self.n_hvp, self.diagonal,
        )  # fmt: skip


@dataclass(frozen=True)
class _Known:
    """The matrix ``T = B K B'``."""

    basis: Tensor
    core: Array

    def times(self, V: Tensor) -> Tensor:
        """Products with vectors ``(P, k)``."""
        if not self.basis.shape[1]:
            return torch.zeros_like(V)
        inside = torch.from_numpy(self.core).to(V.device, torch.float64) @ coordinates(self.basis, V).double()
        return combinations(self.basis, inside.to(V.dtype))

    def diagonal(self) -> Tensor:
        """The diagonal, ``(P,)``."""
        found = torch.zeros(len(self.basis), dtype=self.basis.dtype, device=self.basis.device)
        core = torch.from_numpy(self.core).to(self.basis)
        for rows in torch.split(torch.arange(len(found)), 2**16):
            part = self.basis[rows[0] : rows[-1] + 1]
            found[rows[0] : rows[-1] + 1] = ((part @ core) * part).sum(1)
        return found


def block_forms(
    operator: LinearOperator | GroupedOperator, partition: Partition, plan: Plan,
    advance: Callable[[float], None] = lambda steps: None,
) -> BlockForms:  # fmt: skip
    """Forms of every block, from products with shared vectors.

    Parameters
    ----------
    operator : LinearOperator or GroupedOperator
        Of more than ``plan.n_hvp`` parameters.
    partition : Partition
    plan : Plan
    advance : callable
        Called with the products of each step.

    Raises
    ------
    CurvatureError
        If the operator is not symmetric or not finite, or memory does not suffice.
    """
    n_known, n_probes, at_once = _amounts(operator, plan)
    share = operator.shares if hasattr(operator, "shares") else np.ones(1)
    _check_forms_fit(len(share) * len(partition.names) * n_probes**2)
    state = BlockState.of(plan.state, plan.save_every)
    known = _known_part(operator, n_known, plan.seed, state, advance)
    signs = random_signs(operator.shape[0], range(n_probes), plan.seed, operator.device)
    inside = partition.products(known.basis, signs.to(known.basis.dtype)) if n_known else None
    forms = np.zeros((len(share), len(partition.names), n_probes, n_probes), dtype=np.float32)
    rest = np.zeros(forms.shape[1:])
    sums = DiagonalSums.zeros(operator.shape[0], len(share)) if plan.diagonal else None
    begin = state.restore(forms, rest, sums)
    advance(begin)
    found = BlockForms(
        partition, forms, rest, *_known_forms(partition, known, inside, rest.shape), share, n_known,
        n_known + n_probes, sums,
    )  # fmt: skip
    try:
        for start in range(begin, n_probes, at_once):
            stop = min(start + at_once, n_probes)
            chunk = signs[:, start:stop].to(operator.dtype)
            total = torch.zeros_like(chunk)
            for group, product in by_group(operator, chunk):
                forms[group, :, :, start:stop] += partition.products(signs.to(product.dtype), product)
                total += product
                if sums is not None:
                    sums.add_group(group, chunk, product, start)
            if hasattr(operator, "product_without_data"):
                own = operator.product_without_data(chunk)
                rest[:, :, start:stop] = partition.products(signs.to(own.dtype), own)
                total += own
            if sums is not None:
                sums.add_total(chunk, total - known.times(chunk.to(known.basis.dtype)).to(total.dtype))
            state.done = stop
            advance(stop - start)
            if plan.is_reached is not None and stop >= FEWEST_PROBES and plan.is_reached(found.first(stop)):
                break
            state.save_if_due(forms, rest, sums)
    except KeyboardInterrupt:
        state.save(forms, rest, sums)
        raise
    found = found.first(state.done)
    if sums is not None:
        sums.finish(known.diagonal().double().cpu().numpy(), state.done, share)
    _check(operator, found)
    return found


def _amounts(operator: LinearOperator, plan: Plan) -> tuple[int, int, int]:
    """Products for the known part, sign vectors, and how many of them at a time, by the memory that there is."""
    n_parameters, each = operator.shape[0], basis_dtype(operator).itemsize
    limit = basis_limit(n_parameters, basis_dtype(operator), operator.device, plan.max_memory_bytes)
    n_probes = max(plan.n_hvp - plan.n_hvp // 2, FEWEST_PROBES)
    vectors = (limit // n_parameters - n_probes) // each  # signs take a byte
    at_once = int(np.clip(vectors // 6, 1, _AT_ONCE))
    n_known = int(np.clip(vectors - 4 * at_once - 2, 0, plan.n_hvp - n_probes))
    if vectors < 4:
        raise CurvatureError(
            f"blocks of {n_parameters:,} parameters by {plan.n_hvp} products need "
            f"{human((n_probes + 4 * each) * n_parameters)} for vectors, the bound is {human(limit)}: lower n_hvp"
        )
    return n_known, plan.n_hvp - n_known, at_once


def _check_forms_fit(n: int) -> None:
    limit = int(_FORMS_FRACTION * free_bytes(torch.device("cpu")))
    if 2 * 4 * n > limit:
        raise CurvatureError(
            f"the forms of all blocks take {human(8 * n)}, of which {human(limit)} are there: take fewer blocks, or "
            "lower n_hvp"
        )


def _known_part(
    operator: LinearOperator, n_known: int, seed: int, state: BlockState, advance: Callable[[float], None]
) -> _Known:
    """The part of the matrix that Lanczos knows."""
    if n_known < 1:
        empty = torch.zeros(operator.shape[0], 0, dtype=basis_dtype(operator), device=operator.device)
        return _Known(empty, np.zeros((0, 0)))
    lanczos = Lanczos(operator, random_unit_vectors(operator, [0], seed), n_known)
    saver = state.lanczos_saver(seed, n_known)
    if saver is not None:
        saver.resume(lanczos)
    advance(lanczos.step)
    lanczos.extend(n_known - lanczos.step, advance, saver)
    if saver is not None:
        saver(lanczos, force=True)
    size = lanczos.sizes()[0]
    alpha, beta = (part[0, :size] for part in lanczos.coefficients())
    core = np.diag(np.append(alpha, 0.0)) + np.diag(beta, 1) + np.diag(beta, -1)
    return _Known(torch.cat([lanczos.basis[0, :, :size], lanczos.following], dim=1), core)


def _known_forms(
    partition: Partition, known: _Known, inside: Array | None, shape: tuple[int, ...]
) -> tuple[Array, Array, Array]:
    """Forms, traces and energies of the known part, by blocks."""
    n_blocks = len(partition.names)
    if inside is None:
        return np.zeros(shape), np.zeros(n_blocks), np.zeros((n_blocks, n_blocks))
    forms = np.einsum("lra,rb->lab", inside, known.core @ inside.sum(0), optimize=True)
    along = known.core @ partition.products(known.basis, known.basis)
    energy = np.einsum("kij,lji->kl", along, along, optimize=True)
    return forms, np.trace(along, axis1=1, axis2=2), energy


def by_group(operator: LinearOperator | GroupedOperator, V: Tensor) -> Iterator[tuple[int, Tensor]]:
    """What each group adds to products with vectors ``(P, k)``; of an operator without groups, a single one."""
    if hasattr(operator, "matmat_by_group"):
        yield from operator.matmat_by_group(V)
    else:
        yield 0, checked_product(operator, V)


def _check(operator: LinearOperator, found: BlockForms) -> None:
    """Refuse products that are not finite, or not those of a symmetric matrix.

    Raises
    ------
    CurvatureError
    """
    whole = found.total.sum(0)
    if not np.isfinite(whole).all():
        raise CurvatureError(NOT_FINITE)
    size = float(np.sqrt(np.mean(whole**2)))
    asymmetry = float(np.sqrt(np.mean((whole - whole.T) ** 2))) / size if size else 0.0
    if asymmetry > largest_asymmetry(operator):
        raise not_symmetric(operator, f"u.Hv and v.Hu of random signs differ by {asymmetry:.1%}")


__all__ = ["FEWEST_PROBES", "BlockForms", "GroupedOperator", "Partition", "Plan", "block_forms", "by_group"]

"""Lanczos on several start vectors in lockstep, with full reorthogonalisation.

:class:`Lanczos` builds, for each of ``k`` start vectors, an orthonormal basis of its Krylov space and the tridiagonal
matrix of the operator on it. All start vectors share one ``matmat`` per step. Orthogonalisation is two passes of
classical Gram-Schmidt (CGS2), as matrix products with one preallocated basis. Sums over the P entries of vectors are
those of :mod:`pnanalysis.spectra.inner_products`, which keep their digits at any P.

References
----------
Parlett, The Symmetric Eigenvalue Problem (1998), ch. 13; Giraud, Langou, Rozloznik and van den Eshof, Numer. Math.
101 (2005): twice is enough.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal

from pnanalysis.arrays import Array
from pnanalysis.errors import CurvatureError, ProcessLost
from pnanalysis.io.unfinished import warn_unsaved
from pnanalysis.spectra.inner_products import combinations, inner_products, norms, orthogonalised, wide_dtype
from pnanalysis.spectra.lanczos_state import restore_state, save_state
from pnanalysis.spectra.linear_operator import (
    LinearOperator,
    arithmetic,
    checked_product,
    contiguous_columns,
    empty_columns,
    not_symmetric,
    round_off,
)
from pnanalysis.spectra.sharing import Part, part_of, processes_of

#: Steps between two checks that all products were finite. Reading the flag waits for the device, which otherwise
#: computes ahead.
STEPS_PER_CHECK = 16
#: A Krylov space counts as invariant once beta falls to this fraction of the operator's norm. Products in single and
#: double precision are long sums, each entry off by tens of roundings; half precision rounds a sum once, at its end.
BREAKDOWN = {
    torch.float64: 50 * torch.finfo(torch.float64).eps,
    torch.float32: 50 * torch.finfo(torch.float32).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
    torch.float16: torch.finfo(torch.float16).eps,
}
#: Largest relative difference of u.Hv and v.Hu that round-off in the products may explain, by their arithmetic.
SYMMETRY_TOLERANCE = {"float64": 1e-6, "float32": 1e-2, "tf32": 0.1, "float16": 0.1, "bfloat16": 0.2}
#: Relative difference of a product from an earlier one that round-off may explain.
SAME_PRODUCT = 1e-3
#: Where an operator says itself that its products are not precise, up to this.
_MOST_ASYMMETRY = 0.2
#: Products whose norm is further from 1 than this power of two, either way, are scaled by a power of two, which rounds
#: nothing: sums of their squares in single precision stay away from overflow and underflow.
LARGEST_EXPONENT = 30


def largest_asymmetry(operator: LinearOperator) -> float:
    """Relative difference of u.Hv and v.Hu that the products of an operator may have."""
    if getattr(operator, "by_differences", False):  # whose errors are known, and are relative to the norm
        return math.inf
    return max(SYMMETRY_TOLERANCE[arithmetic(operator)], min(10 * round_off(operator), _MOST_ASYMMETRY))


class Lanczos:
    """Lanczos iterations on ``k`` start vectors, which can be extended, saved and resumed.

    Parameters
    ----------
    operator : LinearOperator
        Symmetric, ``(P, P)``.
    start : torch.Tensor
        Start vectors ``(P, k)``, not zero; normalised here.
    capacity : int
        The most steps that can be taken; memory for the basis is allocated at once.
    deflated : torch.Tensor, optional
        Orthonormal vectors ``(P, d)``, columns of ``D``. The iterations then work in their orthogonal complement: on
        the compression ``(I - D D') H (I - D D')``.
    dtype, device : optional
        Of the basis, float32 or float64; the operator's own by default, float32 if that is a half precision.
        ``float64`` for a float32 operator keeps the recurrence exact to the operator's own error; ``device="cpu"``
        keeps the basis in host memory, at one transfer per step.
    symmetry_tolerance : float, optional
        See :meth:`asymmetry`. Default: :data:`SYMMETRY_TOLERANCE` of the arithmetic of the products.
    storage : torch.Tensor, optional
        Where to keep the basis: ``(P, k * capacity)`` on ``device``, with contiguous columns. In half precision, the
        vectors are rounded before products are taken of them.
    reorthogonalise : bool
        ``False`` keeps the last two vectors only (``storage`` has two per start vector) and orthogonalises against
        those: see :mod:`pnanalysis.spectra.ghosts`.

    Attributes
    ----------
    alpha, beta : torch.Tensor
        ``(k, step)``, diagonal and off-diagonal of the tridiagonal matrices; ``beta[:, -1]`` couples the Krylov
        space with the rest.
    basis : torch.Tensor
        ``(k, P, step)``, orthonormal columns for each start vector.
    step : int
        Steps taken.

    Raises
    ------
    CurvatureError
        If ``capacity`` is less than 1 or more than the dimensions that are not deflated, or ``dtype`` is neither
        float32 nor float64.

    Notes
    -----
    Of an operator whose vectors several processes hold in parts (:mod:`pnanalysis.spectra.sharing`), all vectors here
    are this process's part, and ``P`` is how many entries that has; coefficients and what follows from them are equal
    in all processes.

    When the Krylov space of a start vector is exhausted (beta falls to roundoff), its later basis vectors, alpha
    and beta are zero: :meth:`sizes` gives the number of columns that count. Values are read back from the device
    only for one flag in sixteen steps.
    """

    def __init__(
        self,
        operator: LinearOperator,
        start: torch.Tensor,
        capacity: int,
        deflated: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        symmetry_tolerance: float | None = None,
        storage: torch.Tensor | None = None,
        reorthogonalise: bool = True,
    ) -> None:
        n_parameters = operator.shape[0]
        self.operator = operator
        self.processes, self.part = processes_of(operator), part_of(operator)
        self.capacity = capacity
        self.deflated = deflated
        self.dtype = basis_dtype(operator, dtype)
        self.device = torch.device(device or operator.device)
        self.symmetry_tolerance = symmetry_tolerance or largest_asymmetry(operator)
        n_free = n_parameters - self.n_deflated
        if not 1 <= self.capacity <= n_free:
            raise CurvatureError(
                f"n_lanczos is {self.capacity}, but it must lie between 1 and {n_free}, the number of "
                f"{'parameters' if self.deflated is None else 'directions that are not deflated'}"
            )
        k = start.shape[1]
        self.reorthogonalise = reorthogonalise
        n_kept = self.capacity if reorthogonalise else min(2, self.capacity)
        if storage is None:
            storage = empty_columns(self.part.length, k * n_kept, self.dtype, self.device)
        self._basis = storage.T.view(k, n_kept, self.part.length).mT
        # coefficients are sums over all entries, which come in float64 wherever there is one
        zeros = partial(torch.zeros, dtype=wide_dtype(self.device), device=self.device)
        self._alpha, self._beta = zeros(k, self.capacity), zeros(k, self.capacity)
        self._norm = zeros(k)  # largest |H q| so far: a lower bound of the operator's norm
        self._mirror = zeros(k)  # q0 . (H q1), see asymmetry
        self._skew = zeros(k)  # sum of squared q_i . (H q_j), i < j - 1, see skew
        self._rounding = zeros(k)  # largest error of a column of the tridiagonal matrix, see rounding
        # without reorthogonalisation a space never ends, and finds again what it has found
        self._breakdown = (
            max(BREAKDOWN[operator.dtype], BREAKDOWN[self.dtype]) if reorthogonalise else torch.finfo(self.dtype).eps
        )
        self.exponent: int | None = None  # all products are in units of two to this power; known from the first one
        self._finite = torch.ones((), dtype=torch.bool, device=self.device)
        self.step = 0
        vectors, _ = self._orthogonalise(start.to(self.device, self.dtype), 0)
        self._next = self._rounded(vectors.div_(self._norms(vectors)))

    @property
    def n_probes(self) -> int:
        """Start vectors, ``k``."""
        return len(self._alpha)

    @property
    def n_deflated(self) -> int:
        """Deflated vectors, ``d``."""
        return 0 if self.deflated is None else self.deflated.shape[1]

    @property
    def alpha(self) -> torch.Tensor:
        return self._alpha[:, : self.step] * self.unit

    @property
    def beta(self) -> torch.Tensor:
        return self._beta[:, : self.step] * self.unit

    @property
    def unit(self) -> float:
        """What products are measured in: a power of two, 1 unless they are very large or very small."""
        return 2.0 ** (self.exponent or 0)

    @property
    def basis(self) -> torch.Tensor:
        if not self.reorthogonalise:
            raise CurvatureError("no basis is kept without reorthogonalisation")
        return self._basis[:, :, : self.step]

    @property
    def following(self) -> torch.Tensor:
        """The vectors that the next step would start from, ``(P, k)``; zero after a breakdown."""
        return self._next

    def sizes(self) -> list[int]:
        """Dimension of each start vector's Krylov space so far (less than ``step`` after a breakdown)."""
        ends = (self._beta[:, : self.step] == 0).double()
        ended = ends.cumsum(1) - ends
        return self.processes.decided([int(size) for size in (ended == 0).sum(1).tolist()])

    def extend(
        self, n_steps: int, advance: Callable[[float], None] | None = None, saver: Saver | None = None
    ) -> Lanczos:
        """Take ``n_steps`` more steps: ``n_steps * k`` products.

        Parameters
        ----------
        n_steps : int
        advance : callable, optional
            Called with ``k`` after each step (a progress bar).
        saver : Saver, optional
            Saves the state at intervals, and when interrupted.

        Raises
        ------
        CurvatureError
            If a product holds NaN or infinite values, or the operator is not symmetric.
        """
        try:
            for _ in range(n_steps):
                self._advance()
                if advance is not None:
                    advance(self.n_probes)
                if self.step % STEPS_PER_CHECK == 0:
                    self._check()
                if saver is not None:
                    saver(self)
        except (KeyboardInterrupt, ProcessLost):
            if saver is not None and self.step:
                saver.interrupted(self)
            raise
        self._check()
        return self

    def asymmetry(self) -> float:
        """How far ``q0 . (H q1)`` is from ``q1 . (H q0)``, relative to ``|H q0|``; the worst of the probes.

        Both numbers come from the first two steps, on a random vector: the check costs no product. It is zero by
        definition in the complement of deflated vectors, where the products may be nothing but roundoff; the
        iterations that gave the deflated vectors were checked themselves.
        """
        if self.step < 2 or self.deflated is not None:
            return 0.0
        scale = torch.hypot(self._alpha[:, 0], self._beta[:, 0])
        gap = torch.where(self._beta[:, 0] > 0, (self._mirror - self._beta[:, 0]).abs(), 0)
        return float((gap / torch.where(scale > 0, scale, 1)).max())

    def skew(self) -> float:
        """Size of the operator's skew part: ``|S q|`` for random ``q`` (rms), relative to the largest ``|H q|``.

        Where ``H`` is symmetric, its product with a basis vector is orthogonal to all earlier ones but the last; what
        is found along them instead is ``2 q_i . (S q_j)``, or round-off. NaN for fewer than three steps, in the
        complement of deflated vectors, where products may be nothing but round-off, and for a basis in half precision,
        whose own round-off is of the same kind.
        """
        sizes = torch.tensor(self.sizes(), dtype=torch.float64)
        pairs = float(((sizes - 1) * (sizes - 2) / 2).clamp_min(0).sum())
        norm = float(self._norm.max())
        coarse = self._basis.dtype == torch.float16
        if pairs == 0 or norm == 0 or self.deflated is not None or coarse or not self.reorthogonalise:
            return float("nan")
        return float((self.operator.shape[0] * self._skew.double().sum() / pairs).sqrt()) / 2 / norm

    @property
    def is_rounded(self) -> bool:
        """Whether vectors are kept in less precision than is computed in."""
        return self._basis.dtype != self.dtype

    @property
    def norm(self) -> float:
        """The largest length of a product so far: a lower bound of the operator's norm."""
        return self.processes.decided(float(self._norm.max()) * self.unit)

    def rounding(self) -> float:
        """How far the tridiagonal matrices are off because vectors are rounded to be kept.

        A rounded vector has not quite length 1, is not quite orthogonal to the others, and is not quite what the
        recurrence asks for: for each column, the root of the sum of the squares of these errors, which are measured as
        the vectors are kept; twice the largest of all columns. The norm of the error, by which eigenvalues are off
        at most, is hardly larger, for it has no more than a few entries of that size in each row and column.
        """
        return self.processes.decided(2 * float(self._rounding.max()) * self.unit)

    def _check(self) -> None:
        if not self.processes.decided(bool(self._finite)):
            if hasattr(self.operator, "check_finite"):
                self.operator.check_finite()  # names the batch
            raise CurvatureError(
                f"a product of the operator held NaN or infinite values (by Lanczos step {self.step}); "
                "check the weights, the data and the dtype"
            )
        asymmetry = self.asymmetry()
        if self.processes.decided(asymmetry > self.symmetry_tolerance):
            found = f"u.Hv and v.Hu differ by {asymmetry:.1%} of |Hu| for two probe vectors"
            raise not_symmetric(self.operator, found)

    def _advance(self) -> None:
        """One step."""
        # Interrupted at any line, this leaves the state as it was: nothing beyond `step` counts, and what is replaced
        # changes together at the end.
        j = self.step
        self._basis[:, :, self.place(j)] = self._next.T
        product = self._product(self._next)
        self._alpha[:, j] = inner_products(product, self._next, self.part.add)
        if j == 1:
            self._mirror.copy_(inner_products(product, self._basis[:, :, 0].T, self.part.add))
        norm = norms(product, self.part.add)
        self._finite &= torch.isfinite(norm).all()  # as all entries are then
        self._norm = torch.maximum(self._norm, norm)
        vectors, coordinates = self._orthogonalise(product, j + 1)
        del product  # as large as all that is worked with below
        outside = coordinates[: max(j - 1, 0)].to(self._skew.dtype).square().sum(0)
        beta = norms(vectors, self.part.add)
        alive = beta > self._breakdown * self._norm
        self._beta[:, j] = torch.where(alive, beta, 0)
        # zero after a breakdown or NaN (which spares the later batches); a mask and not a branch, which would wait for
        # the device
        unrounded = vectors.div_(beta.to(self.dtype)).masked_fill_(~alive, 0)
        following, rounding = self._rounded(unrounded), self._rounding
        if self.is_rounded:
            squares = self._squared_errors(j, outside, coordinates)
            lost = norms(unrounded.sub_(following), self.part.add)
            rounding = torch.maximum(
                rounding, torch.addcmul(squares, lost * self._beta[:, j], lost * self._beta[:, j]).sqrt()
            )
        self._rounding, self._skew = rounding, self._skew + outside
        self._next, self.step = following, j + 1

    def _squared_errors(self, j: int, outside: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
        """Of the column of a vector that was rounded: its length, and what it has along earlier ones."""
        length = self._alpha[:, j] * (inner_products(self._next, self._next, self.part.add) - 1)
        before = coordinates[j - 1] - self._beta[:, j - 1] if j > 0 else torch.zeros_like(length)
        return outside + length.square() + before.square()

    def _product(self, V: torch.Tensor) -> torch.Tensor:
        """Products with vectors ``(P, k)``, in :attr:`unit`, in the basis's dtype and on its device."""
        product = contiguous_columns(checked_product(self.operator, V).to(self.device, self.dtype))
        if self.exponent is None:
            self.exponent = self.processes.decided(_exponent_of(product, self.part))
        return product / self.unit if self.exponent else product

    def _norms(self, vectors: torch.Tensor) -> torch.Tensor:
        return norms(vectors, self.part.add).to(self.dtype)

    def _orthogonalise(self, vectors: torch.Tensor, n_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Project vectors ``(P, k)`` off the deflated ones and the first ``n_columns`` of the basis.

        Also returns their coordinates in that basis, ``(n_columns, k)``.
        """
        spaces = [] if self.deflated is None else [self.deflated]
        rest, coordinates = orthogonalised(vectors, [*spaces, self._basis[:, :, :n_columns]], self.part.add)
        return rest, coordinates[-1]

    def _rounded(self, vectors: torch.Tensor) -> torch.Tensor:
        """What is left of vectors once they are stored."""
        return vectors.to(self._basis.dtype).to(self.dtype)

    def place(self, step: int) -> int:
        """The column of the basis for the vector of a step."""
        return step if self.reorthogonalise else step % 2

    def n_kept(self, step: int) -> int:
        """How many vectors are kept after so many steps."""
        return min(step, self._basis.shape[2])

    def ritz_vectors(self, coefficients: torch.Tensor, probe: int = 0) -> torch.Tensor:
        """Vectors ``(P, c)`` with the given coordinates ``(step, c)`` in one start vector's basis."""
        return combinations(self.basis[probe], coefficients.to(self.device, self.dtype))

    def coefficients(self) -> tuple[Array, Array]:
        """:attr:`alpha` and :attr:`beta` in float64; those of the first process, in all that share the operator."""
        alpha, beta = (part[:, : self.step].double().cpu().numpy() * self.unit for part in (self._alpha, self._beta))
        return self.processes.decided((alpha, beta))

    def ritz_pairs(self, probe: int = 0) -> tuple[Array, Array]:
        """Ritz values ``(m,)``, ascending, and coordinates ``(m, m)`` of the Ritz vectors in one start vector's basis.

        In float64; ``m`` is the dimension of the Krylov space.
        """
        size = self.sizes()[probe]
        alpha, beta = (part[probe, :size] for part in self.coefficients())
        # signs of eigenvectors, and bases of those of equal values, may differ between machines
        return self.processes.decided(tuple(eigh_tridiagonal(alpha, beta[:-1])))

    def first_products(self, probes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised start vectors ``(P, c)`` of some probes, and their products with the (compressed) operator."""
        start = self._basis[probes, :, 0].T.to(self.dtype)
        following = self._next[:, probes] if self.step == 1 else self._basis[probes, :, 1].T.to(self.dtype)
        alpha, beta = (part[probes, 0].to(self.dtype) for part in (self.alpha, self.beta))
        return start, following.mul_(beta).addcmul_(start, alpha)  # a copy, as it was indexed by a list

    def save(self, path: str | Path, label: str = "") -> None:
        """Write the state (safetensors, atomically) under a label that :meth:`restore` compares.

        Raises
        ------
        OSError
            If it cannot be written; the disk may be full.
        """
        save_state(self, Path(path), label)

    def restore(self, path: str | Path, label: str = "") -> Lanczos:
        """Resume from a saved state, if there is one; all further steps are the same as without the interruption.

        One product is spent to check that the operator is still the same.

        Raises
        ------
        CurvatureError
            If the file is damaged, or was saved under another label, by other settings or for another operator.
        """
        if restore_state(self, Path(path), label):
            self._check_operator(path)
        return self

    def state(self, step: int) -> dict[str, torch.Tensor]:
        """All that the steps after the first ``step`` depend on."""
        # vectors as rows, in the order in which they lie in memory: nothing is copied to be written
        return {
            "basis": self._basis[:, :, :step].mT,  # at most as many as are kept
            "alpha": self._alpha[:, :step],
            "beta": self._beta[:, :step],
            "next": self._next.T,
            "norm": self._norm,
            "mirror": self._mirror,
            "skew": self._skew,
            "rounding": self._rounding,
        }

    def _check_operator(self, path: str | Path) -> None:
        if self.step:
            known = 0 if self.reorthogonalise else self.step - 1
            vector = self._basis[:, :, self.place(known)].T.to(self.dtype)
            alpha = inner_products(self._product(vector), vector, self.part.add)
            gap = (alpha - self._alpha[:, known]).abs() / self._norm.clamp_min(torch.finfo(self._norm.dtype).tiny)
            tolerance = max(SAME_PRODUCT, 10 * round_off(self.operator))
            if self.processes.decided(float(gap.max()) > tolerance):
                raise CurvatureError(f"{path} was saved for another operator: delete it to start again")


def _exponent_of(product: torch.Tensor, part: Part) -> int:
    """Of the power of two next to the norm of the first vector, if that is far from 1; 0 otherwise."""
    vector = product[:, :1]
    own = float(vector.abs().max()) if len(vector) else 0.0
    largest = float(np.max(part.processes.gathered(own)))
    if not 0 < largest < math.inf:  # NaN too, which is reported later
        return 0
    exponent = round(math.log2(largest) + math.log2(float(norms(vector / largest, part.add))))
    # the power itself must be a number of that dtype: near its largest one, the nearest power of two is infinite
    held = round(math.log2(torch.finfo(product.dtype).max)) - 1
    return max(-held, min(exponent, held)) if abs(exponent) > LARGEST_EXPONENT else 0


def basis_dtype(operator: LinearOperator, wanted: torch.dtype | None = None) -> torch.dtype:
    """Of a basis for products with an operator: what is wanted, or the operator's own, but at least float32.

    Raises
    ------
    CurvatureError
        If the dtype wanted is neither float32 nor float64.
    """
    if wanted not in (None, torch.float32, torch.float64):
        raise CurvatureError(
            f"basis_dtype is {wanted}, in which a basis does not stay orthogonal; give float32 or float64"
        )
    return wanted or torch.promote_types(operator.dtype, torch.float32)


class Saver:
    """Saves the state of Lanczos iterations at intervals, and restores it.

    A state that cannot be written is warned of and stops nothing.

    Parameters
    ----------
    path : path
    label : str
        Identifies the iterations; a state with another label is refused.
    every : float
        Seconds between saves.
    """

    def __init__(self, path: str | Path, label: str = "", every: float = 300.0) -> None:
        self.path = Path(path)
        self.label = label
        self.every = every
        self._last = time.monotonic()

    def resume(self, lanczos: Lanczos) -> Lanczos:
        """Restore the saved state, if there is one."""
        return lanczos.restore(self.path, self.label)

    def __call__(self, lanczos: Lanczos, force: bool = False) -> None:
        """Save if the interval has passed, or if forced."""
        due = force or time.monotonic() - self._last >= self.every
        if lanczos.part.is_all:
            due = due and lanczos.processes.is_first
        elif not force:
            due = lanczos.processes.decided(due)  # all save, or none
        if due:
            self._save(lanczos)

    def interrupted(self, lanczos: Lanczos) -> None:
        """Save what there is, without a word to other processes, which may be gone."""
        if lanczos.part.is_all:
            self(lanczos, force=True)
        elif lanczos.reorthogonalise:  # else parts of different steps do not fit together, and the saved ones do
            self._save(lanczos, alone=True)

    def _save(self, lanczos: Lanczos, alone: bool = False) -> None:
        try:
            save_state(lanczos, self.path, self.label, alone)
        except OSError as error:
            warn_unsaved(self.path, error)
        self._last = time.monotonic()

r"""Quadratic forms of the matrices of single examples, of which a curvature matrix is the mean.

The scatter of :math:`u^\top H_g v` over groups of examples tells how far the matrix of these examples is from that of
all examples that there might have been. A group is a single example where the network returns a row for each, and that
row does not depend on the others. Along two directions, the loss :math:`L` of a batch as a function of the rows of
outputs :math:`z_i` then has the second derivative

.. math:: \sum_i \partial_u z_i^\top (\nabla^2 L\, \partial_v z)_i + (\nabla L)_i^\top\, \partial_u \partial_v z_i,

whose terms belong to one example each; the first one alone is that of the Gauss-Newton matrix. All of it is forward
mode, which takes fewer operations than a product with the matrix.

Two things are tried on a few examples beforehand: the terms must add up to the form of a product, and those of an
example must be what a product over this example gives. Where they are not (batch normalisation in train mode, losses
that compare examples, networks that compute their loss themselves, functions that forward mode has wrong), a group is a
part of a batch with a product of its own, about 32 parts in all; and the whole batch, where its matrix is not the mean
over such parts either.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pnanalysis.curvature.batches import Batch, has_batch_norm
from pnanalysis.curvature.example_subset import random_parts
from pnanalysis.curvature.network_loss import LossArguments
from pnanalysis.curvature.parameters import split_vector
from pnanalysis.curvature.product_check import in_double, random_direction, tolerance
from pnanalysis.curvature.tracing import Linearisation, Product, Untraceable
from pnanalysis.errors import CurvatureError
from pnanalysis.inputs.batches import can_cut, contents, cut, tensors

if TYPE_CHECKING:
    from pnanalysis.curvature.base import CurvatureOperator

#: More examples than these are put together at random, so that what is stored of each group stays small.
_MOST_GROUPS = 4096
#: Groups where each needs a product of its own.
_PARTS = 32
#: Shapes of batches for which forms are traced.
_TRACED_SHAPES = 4

EXAMPLES, PARTS, BATCHES = "examples", "parts of batches", "batches"
Direction = list[Tensor]
#: The terms that the units of a batch add to the form of its matrix along two directions, (n,).
Form = Callable[[Direction, Direction], Tensor]


class ExampleForms:
    """Forms of the matrices of groups of examples, of an operator over batches.

    Parameters
    ----------
    op : CurvatureOperator

    Attributes
    ----------
    unit : {"examples", "parts of batches", "batches"}
        What has a matrix of its own.
    weights : ndarray, shape (G,)
        The factor of each group's matrix in the whole.
    digest : str
        Equal where examples, their order and the groups are.
    """

    def __init__(self, op: CurvatureOperator) -> None:
        self.op = op
        self.unit = _unit(op)
        self._traces = None if op._traces is None else _TracedForms(op)
        self._shares: list[NDArray[np.float64]] = []
        counted, data = [], _Digest()
        for batch in op.batches:
            data.add(batch)
            weights = op.batches.weighing.of_examples(batch).numpy()
            counted.append(weights > 0)
            self._shares.append(_shares(op, self.unit, weights))
        self._counted = np.concatenate(counted)
        sizes = [len(shares) for shares in self._shares]
        self._ends = np.cumsum([0, *sizes])
        self._groups = _groups(int(self._ends[-1]))
        factors = np.concatenate([w * each for w, each in zip(op.batches.weights, self._shares, strict=True)])
        self.weights = np.bincount(self._groups, factors)
        self.digest = data.digest(f"{len(self.weights)} groups of {self.unit} {'' if self.unit == EXAMPLES else sizes}")

    @property
    def cuts_batches(self) -> bool:
        """Whether examples can be taken one by one out of their batches."""
        return self.unit != BATCHES and can_cut(self.op._first_examples)

    def __call__(self, U: Tensor, V: Tensor) -> Tensor:
        """Forms along the columns of ``(P, k)`` matrices on the operator's device, ``(k, G)``.

        Raises
        ------
        CurvatureError
            If they are not finite.
        """
        op = self.op
        pairs = [_directions(u, v, op.parameter_shapes) for u, v in zip(U.T, V.T, strict=True)]
        found = np.zeros((len(pairs), int(self._ends[-1])))
        with op._passes():
            for i, weight, form in self._by_batch(pairs):
                each = torch.stack([form(u, v).detach() for u, v in pairs])
                found[:, self._ends[i] : self._ends[i + 1]] += weight * each.double().cpu().numpy()
        if not np.isfinite(found).all():
            raise CurvatureError(f"the quadratic forms of single {self.unit} are not finite; look at the data")
        sums = np.stack([np.bincount(self._groups, row) for row in found])
        return torch.from_numpy(np.divide(sums, self.weights, out=np.zeros_like(sums), where=self.weights > 0))

    def chosen(self, parts: Collection[int], n_parts: int, seed: int) -> NDArray[np.bool_]:
        """Which examples lie in some parts of a random partition, ``(N,)``; of those that count in the loss.

        Raises
        ------
        CurvatureError
            If there are fewer examples, or batches where these cannot be cut, than parts.
        """
        sizes = self.op.batches.sizes
        n, what = (sum(sizes), "examples") if self.cuts_batches else (len(sizes), "batches, which cannot be cut")
        if not 1 <= n_parts <= n or not set(parts) <= set(range(n_parts)) or not parts:
            raise CurvatureError(f"cannot take the parts {sorted(parts)} of {n_parts} parts of {n} {what}")
        found = np.isin(random_parts(n, n_parts, seed), list(parts))
        return found & self._counted if self.cuts_batches else np.repeat(found, sizes)

    def _by_batch(self, pairs: Sequence[tuple[Direction, Direction]]) -> Iterator[tuple[int, float, Form]]:
        """Each batch's number, its weight, and the terms of its units."""
        op, traces = self.op, self._traces
        if self.unit == BATCHES:
            for i, weight, product in op._products(pairs[0][0]):
                yield i, weight, partial(_forms_of_parts, [product], torch.ones(1))
        elif self.unit == PARTS:
            for i, weight, at in op._weighted():
                shares = torch.from_numpy(self._shares[i])
                products = [op._untraced(_part(at, piece)) for piece in _pieces(op.batches.sizes[i], len(shares))]
                yield i, weight, partial(_forms_of_parts, products, shares)
        elif traces is not None and traces.are_kept({u is v for u, v in pairs}):
            yield from ((i, weight, traces.at(i, None)) for i, weight in enumerate(op.batches.weights))
        else:
            for i, weight, at in op._weighted():
                yield i, weight, partial(op._row_forms, at) if traces is None else traces.at(i, at)


class _TracedForms:
    """Forms of examples by traced programs, for the commonest shapes of batches, compared with untraced ones first.

    Along one direction it is another program than along two, which takes more operations.

    Parameters
    ----------
    op : CurvatureOperator
    """

    def __init__(self, op: CurvatureOperator) -> None:
        self.op = op
        self._linearisations = {one: Linearisation(partial(self._function, one), op._rehearse) for one in (True, False)}
        self._shapes = {shapes for shapes, _ in Counter(op.batches.shapes).most_common(_TRACED_SHAPES)}
        self._verified: set[Any] = set()
        self._kept: dict[tuple[int, bool], Product] = {}
        self._failed = False

    def are_kept(self, kinds: Collection[bool]) -> bool:
        """Whether forms along one (True) or two directions (False) need no data any more."""
        return all((i, one) in self._kept for i in range(len(self.op.batches)) for one in kinds)

    def at(self, i: int, at: LossArguments | None) -> Form:
        """The forms of the examples of batch ``i``, whose data those that are kept do not need."""
        programs: dict[bool, Product] = {}

        def form(u: Direction, v: Direction) -> Tensor:
            one = u is v
            given = u if one else u + v
            if one not in programs:
                programs[one] = self._kept.get((i, one)) or self._program(i, at, one, given)
            return programs[one](given)[0]

        return form

    def _function(self, one: bool, at: Any, given: Direction) -> list[Tensor]:
        u = given if one else given[: len(given) // 2]
        with self.op._passes():  # the trace runs in a thread of its own, which some of the settings do not reach
            return [self.op._row_forms(at, u, u if one else given[len(u) :])]

    def _program(self, i: int, at: Any, one: bool, given: Direction) -> Product:
        op, shapes = self.op, self.op.batches.shapes[i]
        untraced = partial(self._function, one, at)
        if self._failed or shapes not in self._shapes:
            return untraced
        try:
            program, n_bytes = self._linearisations[one].at(at, given)
            if (shapes, one) not in self._verified:
                expected = untraced(given)[0]
                if not _close(program(given)[0], expected, expected, tolerance(op.dtype, op.amp)):
                    raise Untraceable("it differs from the untraced one")
                self._verified.add((shapes, one))
        except Untraceable:
            self._failed = True  # the next batch would fail the same way
            return untraced
        if op._cached_bytes + n_bytes <= op._cache_bytes:
            self._kept[i, one] = program
            op._cached_bytes += n_bytes
        return program


class _Trial:
    """Forms of a few examples, by several ways, along two random directions."""

    def __init__(self, op: CurvatureOperator) -> None:
        op._draw(0, 0)
        weights = op.batches.weighing.of_examples(op._first_examples)
        self.shares = _shares(op, EXAMPLES, weights.numpy())
        at, directions = op._few, [random_direction(op._theta, seed) for seed in (0, 1)]
        self.op: CurvatureOperator
        self.at: LossArguments
        self.u: Direction
        self.op, self.at, self.u = in_double(op, at, directions[0]) or (op, at, directions[0])
        self.v = [part.to(like) for part, like in zip(directions[1], self.u, strict=True)]
        self.can_cut = can_cut((at.inputs, at.targets))
        self.coupled = op.bn_mode == "train" and has_batch_norm(op.model)  # every example depends on all of its batch
        self.whole = self._by_product(self.at)

    def by_rows(self) -> bool:
        """Whether the terms of the examples add up, and are what a product over each example gives."""
        if self.coupled:
            return False
        found = self.op._row_forms(self.at, self.u, self.v).detach().double().cpu()
        if len(found) != len(self.shares) or not self._close(found.sum(), self.whole, found):
            return False
        if self.op.draws is not None or not self.can_cut:
            return True  # an example alone draws other numbers, or cannot be had
        counted = np.flatnonzero(self.shares)
        return all(self._close(found[i], self._of(slice(i, i + 1)), found) for i in (counted[0], counted[-1]))

    def by_parts(self) -> bool:
        """Whether the forms of two parts add up."""
        if self.coupled or not self.can_cut or len(self.shares) < 2:
            return False
        found = torch.stack([self._of(piece) for piece in _pieces(len(self.shares), 2)])
        return self._close(found.sum(), self.whole, found)

    def _of(self, piece: slice) -> Tensor:
        """The form of the matrix of some of the examples, times its factor in that of all."""
        share = 1.0 if self.op.reduction == "sum" else float(self.shares[piece].sum())
        return share * self._by_product(_part(self.at, piece)) if share else torch.zeros((), dtype=torch.float64)

    def _by_product(self, at: LossArguments) -> Tensor:
        return _inner(self.u, self.op._untraced(at)(self.v))

    def _close(self, one: Tensor, other: Tensor, forms: Tensor) -> bool:
        return _close(one, other, forms, tolerance(self.op.dtype, self.op.amp))


def _unit(op: CurvatureOperator) -> str:
    """The smallest unit of the data that has a matrix of its own."""
    trial = _Trial(op)
    for unit, holds in ((EXAMPLES, trial.by_rows), (PARTS, trial.by_parts)):
        try:
            if holds():
                return unit
        except torch.OutOfMemoryError:
            raise
        except Exception:  # outputs without rows, functions without forward mode, networks for batches of one size
            continue
    return BATCHES


def _shares(op: CurvatureOperator, unit: str, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The factor of each unit's matrix in that of its batch, given what the examples weigh in the batch's mean."""
    if unit == BATCHES:
        return np.ones(1)
    pieces = _pieces(len(weights), len(weights) if unit == EXAMPLES else -(-_PARTS // len(op.batches)))
    if op.reduction == "sum":
        return np.ones(len(pieces))
    return np.array([weights[piece].sum() for piece in pieces]) / weights.sum()


def _pieces(n: int, n_pieces: int) -> list[slice]:
    """Parts of ``n`` rows, of about the same size and none empty."""
    ends = np.linspace(0, n, min(n, n_pieces) + 1).astype(int)
    return [slice(int(start), int(end)) for start, end in pairwise(ends)]


def _part(at: LossArguments, piece: slice) -> LossArguments:
    return LossArguments(at.theta, at.others, *cut((at.inputs, at.targets), piece))


def _groups(n: int) -> NDArray[np.int64]:
    """The group of each of ``n`` units."""
    return np.arange(n) if n <= _MOST_GROUPS else random_parts(n, _MOST_GROUPS, seed=0)


def _directions(u: Tensor, v: Tensor, shapes: Sequence[torch.Size]) -> tuple[Direction, Direction]:
    """Two vectors by parameters; one and the same where they are equal."""
    first = split_vector(u, shapes)
    return first, first if u is v or torch.equal(u, v) else split_vector(v, shapes)


def _forms_of_parts(products: Sequence[Product], shares: Tensor, u: Direction, v: Direction) -> Tensor:
    return torch.stack([_inner(u, product(v)) for product in products]) * shares


def _inner(a: Direction, b: Direction) -> Tensor:
    """The inner product, as a number in double precision on the CPU."""
    return torch.stack([(one * other).sum().double() for one, other in zip(a, b, strict=True)]).sum().detach().cpu()


def _close(one: Tensor, other: Tensor, forms: Tensor, slack: float) -> bool:
    """Whether terms are equal up to round-off, relative to the sizes of all terms."""
    return float((one - other).abs().sum()) <= slack * float(forms.abs().sum())


class _Digest:
    """SHA-256 of examples in their order, however they are batched."""

    def __init__(self) -> None:
        self._leaves: list[Any] = []

    def add(self, batch: Batch) -> None:
        """Take in one more batch."""
        for i, tensor in enumerate(tensors(batch)):
            if i == len(self._leaves):
                self._leaves.append(hashlib.sha256(f"{tuple(tensor.shape[1:])}{tensor.dtype}".encode()))
            self._leaves[i].update(contents(tensor))

    def digest(self, grouping: str) -> str:
        """16 hexadecimal digits for all batches so far, in the given groups."""
        parts = [*(leaf.hexdigest() for leaf in self._leaves), grouping]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


__all__ = ["ExampleForms"]

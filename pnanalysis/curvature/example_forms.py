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
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.curvature.batches import Batch
from pnanalysis.curvature.example_subset import random_parts
from pnanalysis.curvature.network_loss import LossArguments
from pnanalysis.curvature.parameters import Named, split_vector
from pnanalysis.curvature.product_check import in_double, random_direction, tolerance
from pnanalysis.curvature.row_forms import Direction, Forms, Pair, close, row_forms
from pnanalysis.curvature.tracing import Product
from pnanalysis.errors import CurvatureError, Indivisible
from pnanalysis.evaluation.losses import example_losses
from pnanalysis.inputs.batches import can_cut, contents, cut, tensors

if TYPE_CHECKING:
    from pnanalysis.curvature.base import CurvatureOperator

#: More examples than these are put together at random, so that what is stored of each group stays small.
_MOST_GROUPS = 4096
#: Groups where each needs a product of its own.
_PARTS = 32

EXAMPLES, PARTS, BATCHES = "examples", "parts of batches", "batches"


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
    counted : ndarray of bool, shape (N,)
        Which examples count in the loss.
    digest : str
        Equal where examples, their order and the groups are.
    """

    def __init__(self, op: CurvatureOperator) -> None:
        self.op = op
        self.unit = _unit(op)
        self._of_rows = row_forms(op)
        self._shares: list[Array] = []
        counted, data = [], _Digest()
        for batch in op.batches:
            data.add(batch)
            weights = op.batches.weighing.of_examples(batch).numpy()
            counted.append(weights > 0)
            self._shares.append(_shares(op, self.unit, weights))
        self.counted: NDArray[np.bool_] = np.concatenate(counted)
        sizes = [len(shares) for shares in self._shares]
        self._ends = np.cumsum([0, *sizes])
        self._groups = _groups(int(self._ends[-1]))
        factors = np.concatenate([w * each for w, each in zip(op.batches.weights, self._shares, strict=True)])
        self.weights: Array = np.bincount(self._groups, factors).astype(np.float64)  # as it is, but for type checkers
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
            for i, weight, forms in self._by_batch(pairs):
                found[:, self._of_batch(i)] += weight * forms(pairs).detach().double().cpu().numpy()
        return self._by_group(found, "quadratic forms")

    def slopes(self, V: Tensor) -> Tensor:
        """Derivatives of the losses of the same groups along the columns of a ``(P, k)`` matrix, ``(k, G)``.

        Raises
        ------
        CurvatureError
            If they are not finite.
        """
        op = self.op
        directions = [split_vector(v, op.parameter_shapes) for v in V.T]
        found = np.zeros((len(directions), int(self._ends[-1])))
        with op._passes():
            for i, weight, at in op._weighted():
                if self.unit == EXAMPLES:
                    slopes = torch.stack([op._row_slopes(at, v) for v in directions])
                else:
                    slopes = self._slopes_of_parts(i, at, directions)
                found[:, self._of_batch(i)] += weight * slopes.detach().double().cpu().numpy()
        return self._by_group(found, "derivatives")

    def losses(self, theta: Named) -> Tensor:
        """Losses of the same groups at some parameters, ``(G,)``.

        Raises
        ------
        PnError
            If examples have no losses of their own, or these are not finite.
        """
        op = self.op
        found = np.zeros((1, int(self._ends[-1])))
        with op._passes():
            for i, weight, at in op._weighted():
                losses = self._losses_of_rows(i, at, theta) if self.unit == EXAMPLES else self._of_parts(i, at, theta)
                found[:, self._of_batch(i)] += weight * losses.detach().double().cpu().numpy()
        return self._by_group(found, "losses")[0]

    def _losses_of_rows(self, i: int, at: LossArguments, theta: Named) -> Tensor:
        """Of single examples, times their factors."""
        op = self.op
        outputs = op._loss.outputs(at, theta)
        whole = float(op._loss.of_outputs(outputs, at.targets).detach())
        if op.amp == "bf16" and isinstance(outputs, Tensor):
            outputs = outputs.float()
        each = example_losses(op.loss_fn, outputs, at.targets, check=False)[0].detach().double().cpu()
        parts = each * torch.from_numpy(self._shares[i])
        total = float(parts.sum())
        if not abs(total - whole) <= 10 * tolerance(op.dtype, op.amp) * float(parts.abs().sum()):
            raise CurvatureError(f"the losses of single examples add up to {total:.6g}, not to {whole:.6g}")
        return parts

    def _of_parts(self, i: int, at: LossArguments, theta: Named) -> Tensor:
        """Losses of parts of a batch, or of all of it, times their factors."""
        shares = self._shares[i]
        pieces = _pieces(self.op.batches.sizes[i], len(shares))
        found = [
            float(share) * self.op._loss(at if len(shares) == 1 else _part(at, piece), theta).detach().double().cpu()
            if share
            else torch.zeros((), dtype=torch.float64)
            for piece, share in zip(pieces, shares, strict=True)
        ]
        return torch.stack(found)

    def _slopes_of_parts(self, i: int, at: LossArguments, directions: Sequence[Direction]) -> Tensor:
        """Of parts of a batch, or of all of it, by a gradient of each."""
        shares, theta = self._shares[i], self.op._theta
        found = torch.zeros(len(directions), len(shares), dtype=torch.float64)
        for g, piece in enumerate(_pieces(self.op.batches.sizes[i], len(shares))):
            if shares[g]:
                gradient = self.op._loss.gradient(at if len(shares) == 1 else _part(at, piece), theta)
                found[:, g] = shares[g] * torch.stack([_inner(v, gradient) for v in directions])
        return found

    def _of_batch(self, i: int) -> slice:
        return slice(self._ends[i], self._ends[i + 1])

    def _by_group(self, found: Array, what: str) -> Tensor:
        """What units add, ``(k, n)``, as numbers of the groups that they are in."""
        if not np.isfinite(found).all():
            raise CurvatureError(f"the {what} of single {self.unit} are not finite; look at the data")
        sums = np.stack([np.bincount(self._groups, row) for row in found])
        return torch.from_numpy(np.divide(sums, self.weights, out=np.zeros_like(sums), where=self.weights > 0))

    def chosen(self, parts: Collection[int], n_parts: int, seed: int) -> NDArray[np.bool_]:
        """Which examples lie in some parts of a random partition of those that count in the loss, ``(N,)``.

        Raises
        ------
        Indivisible
            If there are fewer examples that count, or batches where these cannot be cut, than parts.
        """
        batches = self.op.batches
        counted, what = self.counted, "examples that count"
        if not self.cuts_batches:
            counted, what = np.isin(np.arange(len(batches.sizes)), batches.counting), "batches, which cannot be cut"
        n = int(counted.sum())
        if not 1 <= n_parts <= n or not set(parts) <= set(range(n_parts)) or not parts:
            raise Indivisible(f"cannot take the parts {sorted(parts)} of {n_parts} parts of {n} {what}")
        found = np.zeros(len(counted), dtype=np.bool_)
        found[counted] = np.isin(random_parts(n, n_parts, seed), list(parts))
        return found if self.cuts_batches else np.repeat(found, batches.sizes)

    def _by_batch(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, float, Forms]]:
        """Number and weight of each batch that counts, and the terms of its units."""
        op = self.op
        if self.unit == BATCHES:
            for i, weight, product in op._products(pairs[0][0]):
                yield i, weight, partial(_forms_of_parts, [product], torch.ones(1))
        elif self.unit == PARTS:
            for i, weight, at in op._weighted():
                shares = torch.from_numpy(self._shares[i])
                pieces = _pieces(op.batches.sizes[i], len(shares))
                products = [
                    op._untraced(_part(at, piece)) if share else None  # which would be 0 / 0
                    for piece, share in zip(pieces, shares, strict=True)
                ]
                yield i, weight, partial(_forms_of_parts, products, shares)
        elif self._of_rows.need_no_data(pairs):
            yield from ((i, op.batches.weights[i], partial(self._of_rows, i, None)) for i in op.batches.counting)
        else:
            yield from ((i, weight, partial(self._of_rows, i, at)) for i, weight, at in op._weighted())


class _Trial:
    """Forms of a few examples, by several ways, along two random directions."""

    def __init__(self, op: CurvatureOperator) -> None:
        _ = op.product_check  # takes much memory, and is made once, before vectors take more
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
        self.coupled = op.bn_mode == "train"  # every example depends on all of its batch
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
        return close(one, other, forms, tolerance(self.op.dtype, self.op.amp))


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


def _shares(op: CurvatureOperator, unit: str, weights: Array) -> Array:
    """The factor of each unit's matrix in that of its batch, given what the examples weigh in the batch's mean."""
    if unit == BATCHES:
        return np.ones(1)
    pieces = _pieces(len(weights), len(weights) if unit == EXAMPLES else -(-_PARTS // len(op.batches)))
    if op.reduction == "sum":
        return np.ones(len(pieces))
    return np.array([float(weights[piece].sum()) for piece in pieces]) / (float(weights.sum()) or 1.0)


def _pieces(n: int, n_pieces: int) -> list[slice]:
    """Parts of ``n`` rows, of about the same size and none empty."""
    ends = np.linspace(0, n, min(n, n_pieces) + 1).astype(int)
    return [slice(int(start), int(end)) for start, end in pairwise(ends)]


def _part(at: LossArguments, piece: slice) -> LossArguments:
    return LossArguments(at.theta, at.others, *cut((at.inputs, at.targets), piece))


def _groups(n: int) -> NDArray[np.int64]:
    """The group of each of ``n`` units."""
    return np.arange(n) if n <= _MOST_GROUPS else random_parts(n, _MOST_GROUPS, seed=0)


def _directions(u: Tensor, v: Tensor, shapes: Sequence[torch.Size]) -> Pair:
    """Two vectors by parameters; one and the same where they are equal."""
    first = split_vector(u, shapes)
    return first, first if u is v or torch.equal(u, v) else split_vector(v, shapes)


def _forms_of_parts(products: Sequence[Product | None], shares: Tensor, pairs: Sequence[Pair]) -> Tensor:
    nothing = torch.zeros((), dtype=torch.float64)
    forms = [[_inner(u, product(v)) if product else nothing for product in products] for u, v in pairs]
    return torch.stack([torch.stack(row) for row in forms]) * shares


def _inner(a: Direction, b: Direction) -> Tensor:
    """The inner product, as a number in double precision on the CPU."""
    return torch.stack([(one * other).sum().double() for one, other in zip(a, b, strict=True)]).sum().detach().cpu()


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

"""Products of a curvature operator by groups of examples, at the cost of products with the whole.

The examples are divided at random into groups of equal size, in each of which equally many count in the loss, and the
batches rearranged so that none mixes groups. A product goes through all batches anyway: what each group adds to it is
there for nothing. The matrix is still that of all examples, which is checked by a product.

Where examples cannot be rearranged (statistics over batches, losses that compare examples, batches that weigh by
themselves), the groups are the batches as they are given, if there are enough of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.curvature.base import CurvatureOperator
from pnanalysis.curvature.example_subset import ExampleGroups, random_parts
from pnanalysis.curvature.product_check import tolerance
from pnanalysis.errors import CurvatureError
from pnanalysis.inputs.batches import as_pair
from pnanalysis.inputs.repeatable import SameBatches
from pnanalysis.spectra.data_error import FEWEST_GROUPS
from pnanalysis.spectra.random_vectors import random_unit_vectors

#: Groups of examples.
N_GROUPS = 16


class GroupedCurvature:
    """A curvature operator with its products by groups of examples.

    Parameters
    ----------
    op : CurvatureOperator
        Of batches that lie group by group.
    ends : ndarray, shape (group,)
        Examples up to the end of each group; a single group where there are no others.

    Attributes
    ----------
    reason : str
        Why there is no error for the choice of examples; empty where there is one.
    """

    def __init__(self, op: CurvatureOperator, ends: NDArray[np.int64], reason: str = "") -> None:
        self.op, self.ends, self.reason = op, ends, reason
        self.shape, self.device, self.dtype = op.shape, op.device, op.dtype

    def matvec(self, v: Tensor) -> Tensor:
        return self.op.matvec(v)

    def matmat(self, V: Tensor) -> Tensor:
        return self.op.matmat(V)

    @property
    def arithmetic(self) -> str:
        """See :attr:`pnanalysis.curvature.base.CurvatureOperator.arithmetic`."""
        return self.op.arithmetic

    @property
    def round_off(self) -> float:
        """See :attr:`pnanalysis.curvature.base.CurvatureOperator.round_off`."""
        return self.op.round_off

    @property
    def by_differences(self) -> bool:
        """Whether products are those of finite differences, which come for all examples together."""
        return self.op.by_differences

    def check_finite(self) -> None:
        """See :meth:`pnanalysis.curvature.base.CurvatureOperator.check_finite`."""
        self.op.check_finite()

    @property
    def shares(self) -> Array:
        """The part of the whole that each group's matrix is weighed by, ``(group,)``; 1 for a single one."""
        if len(self.ends) == 1:
            return np.ones(1)
        found = np.zeros(len(self.ends))
        np.add.at(found, self.group_of_batch(), self.op.batches.weights)
        return found

    def matmat_by_group(self, V: Tensor) -> Iterator[tuple[int, Tensor]]:
        """What each group adds to the products with vectors ``(P, k)``, without regulariser."""
        if self.by_differences or len(self.ends) == 1:
            yield 0, self.op.matmat(V) - self.op.product_without_data(V)
            return
        groups = self.group_of_batch()
        total, at = torch.zeros_like(V), 0
        for batch, product in self.op.products_by_batch(V):
            if groups[batch] != at:
                yield at, total
                total, at = torch.zeros_like(V), int(groups[batch])
            total += product
        yield at, total

    def product_without_data(self, V: Tensor) -> Tensor:
        """The regulariser's part."""
        return self.op.product_without_data(V)

    def group_of_batch(self) -> NDArray[np.int64]:
        """The group of each batch; batches may be cut into more of them while products are computed."""
        last = np.cumsum(self.op.batches.sizes)
        return np.searchsorted(self.ends, last).astype(np.int64)


def in_groups(
    op: CurvatureOperator, expected_products: int, n_groups: int = N_GROUPS, seed: int = 0
) -> GroupedCurvature:  # fmt: skip
    """The same operator with its examples in groups.

    Parameters
    ----------
    op : CurvatureOperator
    expected_products : int
        Roughly how many products with the result are to come.
    n_groups : int
    seed : int
        Of the partition.

    Returns
    -------
    GroupedCurvature
        With a single group, and a ``reason``, where there are too few examples or batches.

    Raises
    ------
    CurvatureError
        If the rearranged operator is another one.
    """
    sizes = op.batches.sizes
    if op.by_differences:
        return alone(op, expected_products, "finite differences are taken over all examples together")
    can_be_rearranged = _can_be_rearranged(op)
    if can_be_rearranged and (n := int(op.example_forms.counted.sum())) >= n_groups:
        counted = op.example_forms.counted
        group = np.empty(len(counted), dtype=np.int64)
        group[counted], group[~counted] = (random_parts(k, n_groups, seed) for k in (n, len(counted) - n))
        counts = np.bincount(group)
        rearranged = ExampleGroups(op.batches.pairs, group, min(max(sizes), int(counts.max())))
        source = SameBatches(rearranged, prepare=as_pair, device=op.device)
        again = op._again(source, op.names, expected_products)
        _check_same(op, again)
        return GroupedCurvature(again, np.cumsum(counts))
    if len(op.batches.counting) >= FEWEST_GROUPS:
        ends = np.cumsum(sizes)[op.batches.counting]
        ends[-1] = sum(sizes)  # batches of which nothing counts are part of the next group, or of the last
        return GroupedCurvature(op.restricted(op.names, expected_products), ends)
    too_few = "examples cannot be taken one by one"
    if can_be_rearranged:
        too_few = f"there are {n} examples that count, fewer than {n_groups}"
    return alone(op, expected_products, f"{too_few}, and in fewer than {FEWEST_GROUPS} batches")


def alone(op: CurvatureOperator, expected_products: int, reason: str = "") -> GroupedCurvature:
    """The same operator with all examples in a single group."""
    return GroupedCurvature(op.restricted(op.names, expected_products), np.array([op.n_examples]), reason)


def _can_be_rearranged(op: CurvatureOperator) -> bool:
    """Whether the matrix depends on the examples alone, and not on how they are batched."""
    plain = op.bn_mode == "eval" and op.draws is None and op.weight in (None, "examples")
    return plain and op.batches.can_be_cut and op.example_forms.cuts_batches


def _check_same(op: CurvatureOperator, other: CurvatureOperator) -> None:
    """One product of each must agree.

    Raises
    ------
    CurvatureError
    """
    probe = random_unit_vectors(op, [1], seed=0)
    one, two = (each.matmat(probe).double() for each in (op, other))
    off = float((one - two).norm() / one.norm().clamp_min(1e-300))
    if not off <= 10 * tolerance(op.dtype, op.amp):
        raise CurvatureError(
            f"a product over the same examples in other batches differs by {off:.2g}: the loss of an example depends "
            "on its batch; take data_error='none'"
        )


__all__ = ["N_GROUPS", "GroupedCurvature", "alone", "in_groups"]

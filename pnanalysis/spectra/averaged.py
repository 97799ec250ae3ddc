"""Operators that are averages over groups of examples, and what can be asked of one group at a time."""

from __future__ import annotations

from typing import Any, Protocol, TypeGuard

import torch

from pnanalysis.arrays import Array
from pnanalysis.spectra.linear_operator import LinearOperator


class AveragedOperator(LinearOperator, Protocol):
    """A symmetric matrix ``H = sum_g w_g H_g + R`` over groups ``g`` of examples.

    A group is one example where that is possible. ``R`` is what no example has a part in: weight decay, a penalty.
    """

    @property
    def group_weights(self) -> Array:
        """``w_g``, ``(group,)``."""
        ...

    @property
    def group_digest(self) -> str:
        """Equal for two operators whose groups are the same examples in the same order."""
        ...

    def forms(self, U: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
        """``u_j' H_g v_j`` of vectors ``(P, k)``: ``(k, group)``, in float64 on the CPU.

        Raises
        ------
        CurvatureError
            If the matrices of the groups cannot be had one by one.
        """
        ...

    def product_without_data(self, V: torch.Tensor) -> torch.Tensor:
        """``R V`` for vectors ``(P, k)``; zero where there is no such part."""
        ...

    def subset(self, parts: list[int], n_parts: int, seed: int = 0, expected_products: int = 1000) -> LinearOperator:
        """The same matrix over the examples in some parts of a random partition into ``n_parts`` equal parts.

        Parameters
        ----------
        parts : list of int
            From 0 to ``n_parts - 1``.
        n_parts, seed : int
            Of the partition.
        expected_products : int
            Roughly how many products are to come.
        """
        ...


def is_averaged(operator: Any) -> TypeGuard[AveragedOperator]:
    """Whether an operator is an :class:`AveragedOperator`."""
    return callable(getattr(operator, "forms", None)) and callable(getattr(operator, "subset", None))

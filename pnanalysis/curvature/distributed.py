"""One operator over the data of several processes, each of which has its own batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from pnanalysis.curvature.base import CurvatureOperator
from pnanalysis.errors import CurvatureError
from pnanalysis.spectra.linear_operator import contiguous_columns

T = TypeVar("T")


def own_share(batches: Sequence[T], group: Any = None) -> Sequence[T]:
    """This process's part of the batches: every ``world_size``-th one, from its rank on."""
    return batches[_rank(group) :: dist.get_world_size(group)]


class DistributedOperator:
    """The mean over the data of all processes of a ``torch.distributed`` group.

    Each process builds its own operator over its own batches and wraps it; every process then calls the same
    products (or :func:`pnanalysis.spectral_density` with the same seed) and gets the same results. A product costs
    one broadcast of the vectors and one sum of the results, ``P`` numbers per vector each. There are no forms of single
    examples, of which each process has some only, and so no error for the choice of examples.

    Parameters
    ----------
    operator : CurvatureOperator
        Over this process's batches, with ``reduction="mean"``. Processes may have different numbers of examples, by
        which they count. Weight decay and penalty must be the same in every process; they count once.
    group : ProcessGroup, optional
        The default group if omitted.

    Raises
    ------
    CurvatureError
        If there is no process group, the operator sums over its data, or the processes differ in the number of
        parameters.

    Examples
    --------
    Under ``torchrun --nproc-per-node 2 script.py``::

        dist.init_process_group()
        local = pn.HessianOperator(model, loss_fn, own_share(batches))
        ds = pn.spectral_density(DistributedOperator(local))
    """

    def __init__(self, operator: CurvatureOperator, group: Any = None) -> None:
        if not dist.is_initialized():
            raise CurvatureError("there is no process group; call torch.distributed.init_process_group first")
        if operator.reduction != "mean":
            raise CurvatureError("a distributed operator needs reduction='mean'; scale the result by the examples")
        self.operator, self.group = operator, group
        self.shape, self.device, self.dtype = operator.shape, operator.device, operator.dtype
        self.arithmetic = operator.arithmetic
        sizes: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(sizes, (operator.divisor, operator.shape[0]), group)
        if len({n_parameters for _, n_parameters in sizes}) > 1:
            raise CurvatureError(f"the processes differ in their parameters: {[n for _, n in sizes]}")
        self._fraction = operator.divisor / sum(divisor for divisor, _ in sizes)

    def matvec(self, v: Tensor) -> Tensor:
        """Product with one vector: ``(P,)`` to ``(P,)``."""
        return self.matmat(v[:, None])[:, 0]

    def matmat(self, V: Tensor) -> Tensor:
        """Products with ``k`` vectors, those of the group's first process: ``(P, k)`` to ``(P, k)``."""
        V = contiguous_columns(V.to(self.device, self.dtype, copy=True))  # the broadcast writes into it
        dist.broadcast(V.T, group=self.group, group_src=0)  # torch.distributed takes contiguous tensors only
        result = contiguous_columns(self.operator.matmat(V) * self._fraction)
        dist.all_reduce(result.T, group=self.group)
        return result

    def check_finite(self) -> None:
        """Raise on every process if a product of any was not finite.

        Raises
        ------
        CurvatureError
        """
        try:
            self.operator.check_finite()
            message = None
        except CurvatureError as error:
            message = f"process {_rank(self.group)}: {error}"
        messages: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(messages, message, self.group)
        for found in messages:
            if found is not None:
                raise CurvatureError(found)


def _rank(group: Any) -> int:
    return dist.get_rank(group)


__all__ = ["DistributedOperator", "own_share"]

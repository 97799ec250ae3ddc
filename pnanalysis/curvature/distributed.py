"""One operator over the data of several processes, each of which has a part of the examples.

The processes are those of a ``torch.distributed`` group, as ``torchrun`` starts them. Each reads all batches and takes
its part of each. Whole vectors are those of the first process (:class:`DistributedOperator`), or each process holds a
part of every vector (:class:`ShardedOperator`): bases then take that part of the memory. What is done next is decided
by the first process in both cases, so that processes on unlike machines stay together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import copy
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.curvature.base import CurvatureOperator
from pnanalysis.curvature.finite_differences import FiniteDifferences
from pnanalysis.curvature.gradients import OperatorGradients
from pnanalysis.curvature.own_examples import OwnExamples, own_share
from pnanalysis.curvature.processes import (
    Processes,
    clear_errors,
    complete,
    first_process_first,
    is_first_process,
    join,
    meet,
)
from pnanalysis.errors import CurvatureError
from pnanalysis.spectra.linear_operator import contiguous_columns, dense_matrix
from pnanalysis.spectra.sharing import Part


class DistributedOperator:
    """The mean over the data of all processes of a ``torch.distributed`` group.

    Each process builds its own operator over its own batches and wraps it; every process then calls the same
    products (or :func:`pnanalysis.spectral_density` with the same seed) and gets the same results. A product costs
    one broadcast of the vectors and one sum of the results, ``P`` numbers per vector each; by finite differences, two
    sums of gradients, and errors are those of the gradient of all data.

    Parameters
    ----------
    operator : CurvatureOperator
        Over this process's batches. Processes may have different numbers of examples, by which they count. Weight decay
        and penalty must be the same in every process; they count once. Give it ``is_part=True`` with finite
        differences.
    group : ProcessGroup, optional
        The default group if omitted.
    is_idle : bool, optional
        Whether the examples of this process do not count; known of :class:`OwnExamples`.

    Attributes
    ----------
    processes : Processes
        Those of the group.
    is_first : bool
        Whether this is the process that writes files and prints.
    n_processes : int

    Raises
    ------
    CurvatureError
        If there is no process group, or the processes differ in the number of parameters.

    Examples
    --------
    Under ``torchrun --nproc-per-node 2 script.py``::

        dist.init_process_group()
        local = pn.HessianOperator(model, loss_fn, own_share(batches))
        ds = pn.spectral_density(DistributedOperator(local))
        dist.destroy_process_group()
    """

    def __init__(self, operator: CurvatureOperator, group: Any = None, *, is_idle: bool | None = None) -> None:
        self.processes = Processes(group)
        self.operator, self.group = operator, group
        self.shape, self.device, self.dtype = operator.shape, operator.device, operator.dtype
        self.arithmetic, self.by_differences = operator.arithmetic, operator.by_differences
        self.is_first, self.n_processes = self.processes.is_first, self.processes.n
        source = operator.batches.source
        self._is_idle = isinstance(source, OwnExamples) and source.is_idle if is_idle is None else is_idle
        own = (0.0 if self._is_idle else operator.divisor, operator.shape[0], operator.reduction)
        sizes = self.processes.gathered(own)
        if len({size[1:] for size in sizes}) > 1:
            raise CurvatureError(f"the processes differ in their parameters or losses: {[size[1:] for size in sizes]}")
        self.processes.by_all(self._check_parts)
        self._is_mean = operator.reduction == "mean"
        self._fraction = own[0] / sum(size[0] for size in sizes) if self._is_mean else float(not self._is_idle)
        if self.by_differences:
            operator.differences = FiniteDifferences(OperatorGradients(operator, self.processes, self._sum))

    @property
    def n_classes(self) -> int | None:
        """Number of classes of a classifier."""
        return self.processes.decided(self.operator.n_classes)

    @property
    def positive_semidefinite(self) -> bool:
        """Whether no eigenvalue is negative."""
        return bool(getattr(self.operator, "positive_semidefinite", False))

    @property
    def round_off(self) -> float:
        """Error of the products so far, relative to the norm of the matrix."""
        return self.operator.round_off

    def note_error(self, error: float) -> None:
        """Count the error of products by differences that other processes made before."""
        self.operator.note_error(error)

    @property
    def n_examples(self) -> int:
        """Number of examples in all processes."""
        source = self.operator.batches.source
        if isinstance(source, OwnExamples):
            return sum(self.processes.gathered(source.n_own))
        return sum(self.processes.gathered(0 if self._is_idle else self.operator.n_examples))

    def matvec(self, v: Tensor) -> Tensor:
        """Product with one vector: ``(P,)`` to ``(P,)``."""
        return self.matmat(v[:, None])[:, 0]

    def matmat(self, V: Tensor) -> Tensor:
        """Products with ``k`` vectors, those of the group's first process: ``(P, k)`` to ``(P, k)``."""
        V = self._of_first(V)
        if self.by_differences:  # which add up gradients
            return self.operator.matmat(V)
        result = self._own_products(V)
        with clear_errors():
            complete(dist.all_reduce(result.T, group=self.group, async_op=True), result)
        return result

    def _of_first(self, V: Tensor) -> Tensor:
        """The first process's vectors, in all."""
        V = contiguous_columns(V.to(self.device, self.dtype, copy=True))  # the broadcast writes into it
        with clear_errors():
            # torch.distributed takes contiguous tensors only
            complete(dist.broadcast(V.T, group=self.group, group_src=0, async_op=True), V)
        return V

    def _own_products(self, V: Tensor) -> Tensor:
        """What this process adds to the products."""
        if self._is_idle:
            counts = self.is_first and not self._is_mean
            return contiguous_columns(self.operator.product_without_data(V)) if counts else torch.zeros_like(V)
        result = contiguous_columns(self.operator.matmat(V) * self._fraction)
        if not self._is_mean and not self.is_first:  # what no example has counts once
            result -= self.operator.product_without_data(V)
        return result

    def to_dense(self, chunk: int = 64) -> Tensor:
        """The matrix itself, ``(P, P)``, symmetrised; for small ``P``."""
        return dense_matrix(self, chunk)

    def gradient(self) -> Tensor:
        """Gradient of the loss over the data of all processes, ``(P,)``."""
        return self._mean(self.operator.gradient())

    def loss(self) -> float:
        """The loss over the data of all processes."""
        return float(self._mean(torch.tensor([self.operator.loss()], dtype=torch.float64, device=self.device)))

    def _mean(self, own: Tensor) -> Tensor:
        """Of what each process has of the loss or its gradient."""
        if not self._is_mean:
            raise CurvatureError("loss and gradient of several processes are those of a mean; take reduction='mean'")
        return self._sum(own)

    def _sum(self, own: Tensor) -> Tensor:
        return self.processes.add(own * self._fraction)

    def product_without_data(self, V: Tensor) -> Tensor:
        """Multiply the part that no example has, of weight decay and penalty, with vectors ``(P, k)``."""
        return self.operator.product_without_data(V)

    @property
    def group_weights(self) -> Array:
        """The factor of each group's matrix in the whole, ``(G,)``; those of the first process come first."""
        own: Array = self.processes.by_all(
            lambda: np.zeros(0) if self._is_idle else self.operator.group_weights * self._fraction
        )
        return np.concatenate(self.processes.gathered(own))

    @property
    def group_digest(self) -> str:
        """Equal where all processes have the same examples in the same order."""
        return " ".join(self.processes.gathered(self.processes.by_all(lambda: self.operator.group_digest)))

    def forms(self, U: Tensor, V: Tensor) -> Tensor:
        """``u_j' H_g v_j`` for all groups of examples of all processes, ``(k, G)``, float64, on the CPU.

        The vectors are those of the first process.

        Raises
        ------
        CurvatureError
            In every process, if those of any cannot be had.
        """
        return self._forms(self._of_first(U), self._of_first(V))

    def _forms(self, U: Tensor, V: Tensor) -> Tensor:
        own = self.processes.by_all(
            lambda: np.zeros((U.shape[1], 0)) if self._is_idle else self.operator.forms(U, V).numpy()
        )
        return torch.from_numpy(np.concatenate(self.processes.gathered(own), axis=1))

    def subset(self, parts: Iterable[int], n_parts: int, seed: int = 0, expected_products: int = 1000) -> Self:
        """The same matrix over some of the examples of each process: those in these parts of a random partition."""
        parts = list(parts)

        def make() -> CurvatureOperator:
            if self._is_idle:
                return copy(self.operator)
            return self.operator.subset(parts, n_parts, seed, expected_products)

        return type(self)(self.processes.by_all(make), self.group, is_idle=self._is_idle)

    def per_layer(self) -> Iterator[tuple[str, Self]]:
        """The diagonal blocks: pairs of a layer's name and the operator on its parameters."""
        for layer, block in self.operator.per_layer():
            yield layer, type(self)(block, self.group, is_idle=self._is_idle)

    def check_finite(self) -> None:
        """Raise on every process if a product of any was not finite.

        Raises
        ------
        CurvatureError
        """
        self.processes.by_all(self.operator.check_finite)

    def _check_parts(self) -> None:
        """Refuse data whose loss is not made up of those of the parts that the processes have.

        Raises
        ------
        CurvatureError
        """
        weighing = self.operator.batches.weighing
        known_to_add = weighing.counts_examples or self.operator.reduction == "sum"
        if not known_to_add:
            raise CurvatureError(
                "the loss is not a mean over examples, as far as is known, so that several processes cannot tell what "
                "their parts weigh; say so with weight='examples' (--weight), or a function weight(inputs, targets)"
            )
        cut = isinstance(self.operator.batches.source, OwnExamples) and not self.operator.batches.source.whole
        if cut and not weighing.separates(self.operator._first_examples, self.operator.reduction):
            raise CurvatureError(
                "the loss of a batch is not made up of the losses of its examples, so that it cannot be divided among "
                "processes; divide whole batches (OwnExamples(batches, whole=True)), or use one process"
            )


class ShardedOperator(DistributedOperator):
    """The same matrix, of whose vectors each process holds a part: bases take ``1 / n_processes`` of the memory.

    Products and all other methods take this process's entries ``(p, k)`` of vectors and return those of the results
    (:attr:`part` says which), except :meth:`to_dense` and :meth:`gradient`. A product costs one gathering of the
    vectors and one scattering of the sum, ``P`` numbers per vector each, and takes three whole vectors of memory
    meanwhile.

    Attributes
    ----------
    part : Part
    """

    def __init__(self, operator: CurvatureOperator, group: Any = None, *, is_idle: bool | None = None) -> None:
        super().__init__(operator, group, is_idle=is_idle)
        n, n_processes = self.shape[0], self.n_processes
        self._chunk = -(-n // n_processes)
        begin = min(self.processes.rank * self._chunk, n)
        self.part = Part(((begin, min(begin + self._chunk, n)),), self.processes, self._chunk, n_whole=3)

    def matmat(self, V: Tensor) -> Tensor:
        """Products with ``k`` vectors, ``(p, k)`` to ``(p, k)``."""
        whole = self._whole(V)
        if self.by_differences:
            return contiguous_columns(self.part.of(self.operator.matmat(whole)))
        own = self._own_products(whole)
        del whole
        return self._scattered(own)

    def product_without_data(self, V: Tensor) -> Tensor:
        """Multiply the part that no example has, of weight decay and penalty, with vectors ``(p, k)``."""
        return self.part.of(super().product_without_data(self._whole(V)))

    def forms(self, U: Tensor, V: Tensor) -> Tensor:
        """``u_j' H_g v_j`` of vectors ``(p, k)`` for all groups of examples, ``(k, G)``, float64, on the CPU."""
        return self._forms(self._whole(U), self._whole(V))

    def _whole(self, V: Tensor) -> Tensor:
        """Whole vectors ``(P, k)``, put together of the entries of all processes."""
        V, n = V.to(self.device, self.dtype), self.shape[0]
        columns = []
        for v in V.T:
            own = v.contiguous() if len(v) == self._chunk else torch.cat([v, v.new_zeros(self._chunk - len(v))])
            gathered = v.new_empty(self._chunk * self.n_processes)
            with clear_errors():
                complete(dist.all_gather_into_tensor(gathered, own, group=self.group, async_op=True), own)
            columns.append(gathered[:n])
        return columns[0][:, None] if len(columns) == 1 else contiguous_columns(torch.stack(columns, dim=1))

    def _scattered(self, own: Tensor) -> Tensor:
        """This process's entries ``(p, k)`` of the sum of whole vectors ``(P, k)`` over all processes."""
        columns, n_all = [], self._chunk * self.n_processes
        if own.device.type == "cpu":
            with clear_errors():
                meet(self.group)  # gloo's waits for scattered sums know no timeout
        for v in own.T:
            padded = v.contiguous() if len(v) == n_all else torch.cat([v, v.new_zeros(n_all - len(v))])
            summed = v.new_empty(self._chunk)
            with clear_errors():
                complete(dist.reduce_scatter_tensor(summed, padded, group=self.group, async_op=True), padded)
            columns.append(summed[: self.part.length])
        return contiguous_columns(torch.stack(columns, dim=1))


def shared_operator(operator: CurvatureOperator, shard_basis: bool = False, group: Any = None) -> DistributedOperator:
    """An operator over the data of all processes, with whole vectors or a part of each in every process."""
    return ShardedOperator(operator, group) if shard_basis else DistributedOperator(operator, group)


__all__ = [
    "DistributedOperator",
    "OwnExamples",
    "ShardedOperator",
    "first_process_first",
    "is_first_process",
    "join",
    "own_share",
    "shared_operator",
]

"""One operator over the data of several processes, each of which has a part of the examples.

The processes are those of a ``torch.distributed`` group, as ``torchrun`` starts them. Each reads all batches and takes
its part of each; all do the same Lanczos arithmetic, with vectors and sums of products that are equal in all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.curvature.base import CurvatureOperator
from pnanalysis.curvature.batches import Batch
from pnanalysis.errors import CurvatureError, PnError, ProcessLost
from pnanalysis.inputs.batches import as_pair, batch_size, can_cut, cut
from pnanalysis.spectra.linear_operator import contiguous_columns, dense_matrix

T = TypeVar("T")
#: A process that does not answer for so long has died, or hangs.
TIMEOUT = timedelta(minutes=30)


def own_share(batches: Sequence[T], group: Any = None) -> Sequence[T]:
    """This process's part of the batches: every ``world_size``-th one, from its rank on."""
    return batches[_rank(group) :: dist.get_world_size(group)]


class OwnExamples:
    """This process's part of the examples of each batch; of batches that cannot be cut, every ``world_size``-th.

    Parameters
    ----------
    batches : re-iterable of batches
        The same in every process.
    whole : bool
        Cut none.
    group : ProcessGroup, optional
    """

    def __init__(self, batches: Iterable[Batch], whole: bool = False, group: Any = None) -> None:
        self.batches, self.whole = batches, whole
        self.rank, self.n = _rank(group), dist.get_world_size(group)

    def __iter__(self) -> Iterator[Batch]:
        for i, each in enumerate(self.batches):
            batch = as_pair(each)
            size = batch_size(batch)
            if self.whole or size < self.n or not can_cut(batch):
                if i % self.n == self.rank:
                    yield batch
                continue
            # the first processes of one batch are the last of the next, so that all have equally many
            place = self.rank if i % 2 == 0 else self.n - 1 - self.rank
            yield cut(batch, slice(place * size // self.n, (place + 1) * size // self.n))


class DistributedOperator:
    """The mean over the data of all processes of a ``torch.distributed`` group.

    Each process builds its own operator over its own batches and wraps it; every process then calls the same
    products (or :func:`pnanalysis.spectral_density` with the same seed) and gets the same results. A product costs
    one broadcast of the vectors and one sum of the results, ``P`` numbers per vector each.

    Parameters
    ----------
    operator : CurvatureOperator
        Over this process's batches. Processes may have different numbers of examples, by which they count. Weight decay
        and penalty must be the same in every process; they count once.
    group : ProcessGroup, optional
        The default group if omitted.

    Attributes
    ----------
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
    """

    def __init__(self, operator: CurvatureOperator, group: Any = None) -> None:
        if not dist.is_initialized():
            raise CurvatureError("there is no process group; call torch.distributed.init_process_group first")
        if operator.by_differences:
            raise CurvatureError("several processes take exact products, not finite differences")
        self.operator, self.group = operator, group
        self.shape, self.device, self.dtype = operator.shape, operator.device, operator.dtype
        self.arithmetic, self.is_first = operator.arithmetic, _rank(group) == 0
        self.n_processes = dist.get_world_size(group)
        sizes = self._from_all((operator.divisor, operator.shape[0], operator.reduction))
        if len({size[1:] for size in sizes}) > 1:
            raise CurvatureError(f"the processes differ in their parameters or losses: {[size[1:] for size in sizes]}")
        self._without_errors(self._from_all(self._or_error(self._check_parts)))
        self._is_mean = operator.reduction == "mean"
        self._fraction = operator.divisor / sum(size[0] for size in sizes) if self._is_mean else 1.0

    @property
    def n_classes(self) -> int | None:
        """Number of classes of a classifier."""
        return self.operator.n_classes

    @property
    def positive_semidefinite(self) -> bool:
        """Whether no eigenvalue is negative."""
        return bool(getattr(self.operator, "positive_semidefinite", False))

    @property
    def n_examples(self) -> int:
        """Number of examples in all processes."""
        return int(sum(self._from_all(self.operator.n_examples)))

    def matvec(self, v: Tensor) -> Tensor:
        """Product with one vector: ``(P,)`` to ``(P,)``."""
        return self.matmat(v[:, None])[:, 0]

    def matmat(self, V: Tensor) -> Tensor:
        """Products with ``k`` vectors, those of the group's first process: ``(P, k)`` to ``(P, k)``."""
        V = contiguous_columns(V.to(self.device, self.dtype, copy=True))  # the broadcast writes into it
        with _clear_errors():
            dist.broadcast(V.T, group=self.group, group_src=0)  # torch.distributed takes contiguous tensors only
        result = contiguous_columns(self.operator.matmat(V) * self._fraction)
        with _clear_errors():
            dist.all_reduce(result.T, group=self.group)
        if not self._is_mean:  # each process has added what no example has
            result = result - (self.n_processes - 1) * self.product_without_data(V)
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
        result = own * self._fraction
        with _clear_errors():
            dist.all_reduce(result, group=self.group)
        return result

    def product_without_data(self, V: Tensor) -> Tensor:
        """Multiply the part that no example has, of weight decay and penalty, with vectors ``(P, k)``."""
        return self.operator.product_without_data(V)

    @property
    def group_weights(self) -> Array:
        """The factor of each group's matrix in the whole, ``(G,)``; those of the first process come first."""
        found = self._from_all(self._or_error(lambda: self.operator.group_weights * self._fraction))
        return np.concatenate(self._without_errors(found))

    @property
    def group_digest(self) -> str:
        """Equal where all processes have the same examples in the same order."""
        found = self._from_all(self._or_error(lambda: [self.operator.group_digest]))
        return " ".join(digest for (digest,) in self._without_errors(found))

    def forms(self, U: Tensor, V: Tensor) -> Tensor:
        """``u_j' H_g v_j`` for all groups of examples of all processes, ``(k, G)``, float64, on the CPU.

        Raises
        ------
        CurvatureError
            In every process, if those of any cannot be had.
        """
        found = self._from_all(self._or_error(lambda: self.operator.forms(U, V).numpy()))
        return torch.from_numpy(np.concatenate(self._without_errors(found), axis=1))

    def subset(
        self, parts: Iterable[int], n_parts: int, seed: int = 0, expected_products: int = 1000
    ) -> DistributedOperator:
        """The same matrix over some of the examples of each process: those in these parts of a random partition."""
        made = self._or_error(lambda: self.operator.subset(parts, n_parts, seed, expected_products))
        self._without_errors(self._from_all(made if isinstance(made, str) else None))
        return DistributedOperator(made, self.group)

    def per_layer(self) -> Iterator[tuple[str, DistributedOperator]]:
        """The diagonal blocks: pairs of a layer's name and the operator on its parameters."""
        for layer, block in self.operator.per_layer():
            yield layer, DistributedOperator(block, self.group)

    def agreed(self, number: float) -> float:
        """The least of a number that processes may differ in, such as free memory."""
        return float(min(self._from_all(number)))

    def check_finite(self) -> None:
        """Raise on every process if a product of any was not finite.

        Raises
        ------
        CurvatureError
        """
        self._without_errors(self._from_all(self._or_error(self.operator.check_finite)))

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

    def _from_all(self, own: Any) -> list[Any]:
        found: list[Any] = [None] * self.n_processes
        with _clear_errors():
            dist.all_gather_object(found, own, self.group)
        return found

    def _or_error(self, compute: Callable[[], Any]) -> Any:
        """What is computed, or a text with the error."""
        try:
            return compute()
        except (PnError, torch.OutOfMemoryError) as error:
            return f"process {_rank(self.group)}: {error}"

    @staticmethod
    def _without_errors(found: list[Any]) -> list[Any]:
        for each in found:
            if isinstance(each, str):
                raise CurvatureError(each)
        return found


def join(device: torch.device) -> torch.device:
    """Join the group of the processes that ``torchrun`` has started; returns the device of this one.

    Raises
    ------
    CurvatureError
        If there are more processes than CUDA devices on this machine.
    """
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise CurvatureError(
                f"there are {torch.cuda.device_count()} CUDA devices for more processes; lower --nproc-per-node"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return device


def is_first_process() -> bool:
    """Whether this process is the first one of the default group, or there is no group."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


@contextmanager
def first_process_first() -> Iterator[None]:
    """Run the body in the first process of the group before it runs in the others; at once where there is no group."""
    together = dist.is_available() and dist.is_initialized()
    if together and dist.get_rank() > 0:
        dist.barrier()
    try:
        yield
    finally:
        if together and dist.get_rank() == 0:
            dist.barrier()


@contextmanager
def _clear_errors() -> Iterator[None]:
    """One sentence where another process has died."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(
            f"another process has ended, or does not answer ({str(error).splitlines()[0][:100]}); its own message says "
            "why; run the same command again to go on from what is saved"
        ) from error


def _rank(group: Any) -> int:
    return dist.get_rank(group)


__all__ = ["DistributedOperator", "OwnExamples", "first_process_first", "is_first_process", "join", "own_share"]

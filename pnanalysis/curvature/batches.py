"""The data of a curvature operator: read, moved, cut, checked, and what each batch weighs in the mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pnanalysis.curvature.batch_weights import BatchWeights
from pnanalysis.curvature.example_subset import ExampleSubset
from pnanalysis.errors import CurvatureError
from pnanalysis.inputs.batches import as_pair, batch_size, can_cut, cut, map_tensors, move, tensors
from pnanalysis.inputs.repeatable import SameBatches
from pnanalysis.inputs.splits import Batches
from pnanalysis.torch_internals import BatchNormBase

Batch = tuple[Any, Any]
#: Shapes and types of all tensors of a batch: what a trace holds for.
Shapes = tuple[Any, ...]


class WeightedBatches:
    """Batches on a device and in a precision, each with its weight in the loss over all data.

    Parameters
    ----------
    source : re-iterable of batches
        In any form that :func:`pnanalysis.inputs.batches.as_pair` knows.
    device : torch.device
    dtype : torch.dtype
        Of floating-point tensors; all others keep theirs.
    micro_batch : int, optional
        Cut larger batches into pieces of this many examples.
    reduction : {"mean", "sum"}
        Whether the loss over all data is the mean over the examples, or their sum.

    Attributes
    ----------
    sizes : list of int
        Examples in each batch.
    divisors : list of float
        What the mean over each batch divides by.
    shapes : list of tuple
        See :func:`shapes_of`.
    weighing : BatchWeights
        What the weights of batches, and of the examples in each, were found by.
    n_cut : int
        Pieces of batches that were cut.
    can_be_cut : bool
        Whether all batches can be.
    """

    weighing: BatchWeights

    def __init__(
        self,
        source: Iterable[Batch],
        device: torch.device,
        dtype: torch.dtype,
        micro_batch: int | None,
        reduction: str,
    ) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        same = isinstance(source, SameBatches | Batches | ExampleSubset)
        self.pairs = source if same else SameBatches(source, prepare=as_pair, device=device)
        self.micro_batch, self.reduction = micro_batch, reduction
        self.channels_last = False
        self.n_cut = 0
        self.can_be_cut = True
        self.sizes: list[int] = []
        self.divisors: list[float] = []
        self.shapes: list[Shapes] = []

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Batch]:
        yield from (batch for batch, _ in self._pieces())

    def _pieces(self) -> Iterator[tuple[Batch, float]]:
        """Batches, or the pieces they are cut into, and the part of its batch's examples that each has."""
        for inputs, targets in self.pairs:
            batch = move(inputs, self.device, self.dtype), move(targets, self.device, self.dtype)
            if self.channels_last:
                batch = map_tensors(batch, channels_last)
            size = batch_size(batch)
            if self.micro_batch is None or size <= self.micro_batch:
                yield batch, 1.0
                continue
            for start in range(0, size, self.micro_batch):
                stop = min(start + self.micro_batch, size)
                yield cut(batch, slice(start, stop)), (stop - start) / size

    @property
    def weights(self) -> list[float]:
        """The factor of each batch's loss in the loss over all data."""
        total = sum(self.divisors)
        share = self.source.share if isinstance(self.source, ExampleSubset) else 1.0
        return [divisor / total if self.reduction == "mean" else 1 / share for divisor in self.divisors]

    def weighted(self) -> Iterator[tuple[float, Batch]]:
        """Pairs of a batch's weight and the batch."""
        yield from zip(self.weights, self, strict=True)

    def inspect(self, prepare: Callable[[Batch], None], weights: BatchWeights, needs_statistics: bool) -> None:
        """Read all batches once: note their sizes and weights, and refuse data that no operator could be computed from.

        Parameters
        ----------
        prepare : callable
            Called with the first batch, before its loss is evaluated by anything else.
        weights : BatchWeights
        needs_statistics : bool
            Whether the network takes statistics over each batch, which a single example does not have.

        Raises
        ------
        CurvatureError
        """
        shares = []
        for index, (batch, share) in enumerate(self._pieces()):
            size = batch_size(batch)
            self.sizes.append(size)
            self.can_be_cut &= can_cut(batch)
            shares.append(share)
            if size == 0:
                raise CurvatureError(f"batch {index} is empty; leave it out")
            if size == 1 and needs_statistics:
                raise CurvatureError(
                    f"batch {index} holds one example, which has no batch statistics; "
                    "use bn_mode='eval' or make the last batch larger (drop_last)"
                )
            if index == 0:
                prepare(batch)
            if not weights.add(batch):
                raise CurvatureError(f"batch {index} has no target that counts in the loss; leave it out")
            self.shapes.append(shapes_of(batch))
        if not self.sizes:
            raise CurvatureError("there are no batches; was the loader an iterator that is used up?")
        self.n_cut = sum(share < 1 for share in shares)
        self.weighing = weights
        self.divisors, reduction = weights.finish()
        if weights.weight == "batches":  # a whole batch weighs 1
            self.divisors = [divisor * share for divisor, share in zip(self.divisors, shares, strict=True)]
        self.reduction = "sum" if reduction == "sum" else self.reduction


def shapes_of(nest: Any) -> Shapes:
    """Shapes and types of all tensors in a nest."""
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors(nest))


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any layer is a batch normalisation."""
    return any(isinstance(module, BatchNormBase) for module in model.modules())


def channels_last(tensor: Tensor) -> Tensor:
    """Images and filters with their channels last in memory; other tensors unchanged."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

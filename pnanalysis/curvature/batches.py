"""The data of a curvature operator: read, moved, cut, checked, and what each batch weighs in the mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from pnanalysis.curvature.batch_weights import RULES, BatchWeights
from pnanalysis.curvature.example_subset import ExampleSubset
from pnanalysis.errors import CurvatureError
from pnanalysis.inputs.batches import as_pair, batch_size, can_cut, channels_last, cut, map_tensors, move, tensors
from pnanalysis.inputs.repeatable import SameBatches
from pnanalysis.inputs.splits import Batches
from pnanalysis.torch_internals import BatchNormBase

NOTHING_COUNTS = "no target of the data counts in the loss; look at what it ignores (ignore_index), and at weight"

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
        0 for those without a target that counts, which nothing may be computed from: their mean is 0 / 0.
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
        yield from (piece for piece, _, _ in self._pieces())

    def _pieces(self) -> Iterator[tuple[Batch, Batch, slice | None]]:
        """Batches, or the pieces they are cut into; the batch of each, and which of its examples they are."""
        for inputs, targets in self.pairs:
            batch = move(inputs, self.device, self.dtype), move(targets, self.device, self.dtype)
            if self.channels_last:
                batch = map_tensors(batch, channels_last)
            size = batch_size(batch)
            if self.micro_batch is None or size <= self.micro_batch:
                yield batch, batch, None
                continue
            for start in range(0, size, self.micro_batch):
                part = slice(start, min(start + self.micro_batch, size))
                yield cut(batch, part), batch, part

    @property
    def weights(self) -> list[float]:
        """The factor of each batch's loss in the loss over all data."""
        total = sum(self.divisors)
        share = self.source.share if isinstance(self.source, ExampleSubset) else 1.0
        return [divisor / total if self.reduction == "mean" else 1 / share for divisor in self.divisors]

    @property
    def counting(self) -> list[int]:
        """The numbers of the batches that count."""
        return [i for i, divisor in enumerate(self.divisors) if divisor]

    def weighted(self) -> Iterator[tuple[int, float, Batch]]:
        """Number and weight of each batch that counts, and the batch."""
        for i, (weight, divisor, batch) in enumerate(zip(self.weights, self.divisors, self, strict=True)):
            if divisor:
                yield i, weight, batch

    def inspect(
        self,
        prepare: Callable[[Batch], None],
        weights: BatchWeights,
        check: Callable[[Batch], None],
        *,
        needs_statistics: bool,
        is_part: bool = False,
    ) -> None:
        """Read all batches once: note their sizes and weights, and refuse data that no operator could be computed from.

        Parameters
        ----------
        prepare : callable
            Called with the first batch that counts, before its loss is evaluated by anything else.
        weights : BatchWeights
        check : callable
            Called with every batch that counts.
        needs_statistics : bool
            Whether the network takes statistics over each batch, which a single example does not have.
        is_part : bool
            Whether others have the rest of the data, so that nothing here need count.

        Raises
        ------
        CurvatureError
        """
        self.weighing = weights
        shares, is_prepared = [], False
        for index, (batch, whole, part) in enumerate(self._pieces()):
            size = batch_size(batch)
            self.sizes.append(size)
            self.can_be_cut &= can_cut(batch)
            self.n_cut += part is not None
            shares.append(1.0)
            if size == 0:
                raise CurvatureError(f"batch {index} is empty; leave it out")
            if size == 1 and needs_statistics:
                raise CurvatureError(
                    f"batch {index} holds one example, which has no batch statistics; "
                    "use bn_mode='eval' or make the last batch larger (drop_last)"
                )
            if weights.counts(batch):
                if not is_prepared:
                    prepare(batch)
                    is_prepared = True
                check(batch)
            if part is not None and weights.weight in RULES:  # which say what whole batches weigh
                weights.add(whole)
                in_mean = weights.of_examples(whole)
                shares[-1] = float(in_mean[part].sum() / in_mean.sum())
            else:
                weights.add(batch)
            self.shapes.append(shapes_of(batch))
        if not self.sizes:
            raise CurvatureError("there are no batches; was the loader an iterator that is used up?")
        if not is_prepared and not is_part:
            raise CurvatureError(NOTHING_COUNTS)
        divisors, reduction = weights.finish()
        self.divisors = [divisor * share for divisor, share in zip(divisors, shares, strict=True)]
        self.reduction = "sum" if reduction == "sum" else self.reduction


def shapes_of(nest: Any) -> Shapes:
    """Shapes and types of all tensors in a nest."""
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors(nest))


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any layer is a batch normalisation."""
    return any(isinstance(module, BatchNormBase) for module in model.modules())


def takes_batch_statistics(prepared: nn.Module) -> bool:
    """Whether any layer of an operator's copy of a network normalises by the statistics of each batch."""
    return any(isinstance(module, BatchNormBase) and module.training for module in prepared.modules())

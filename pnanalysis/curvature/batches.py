"""The data of a curvature operator: read, moved, cut, checked, and what each batch weighs in the mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from pnanalysis.errors import CurvatureError, PnError
from pnanalysis.evaluation.losses import example_weights, known
from pnanalysis.inputs.batches import batch_size, cut, first_examples, map_tensors, move
from pnanalysis.inputs.models import Loss
from pnanalysis.torch_internals import BatchNormBase

Batch = tuple[Any, Any]


class WeightedBatches:
    """Batches on a device and in a precision, each with its weight in the loss over all data.

    Parameters
    ----------
    source : re-iterable of (inputs, targets)
    device : torch.device
    dtype : torch.dtype
        Of floating-point tensors; all others keep theirs.
    micro_batch : int, optional
        Cut larger batches into pieces of this many examples.
    weigh : callable
        ``weigh(batch)``: what the mean over the batch divides by.
    reduction : {"mean", "sum"}
        Whether the loss over all data is the mean over the examples, or their sum.
    """

    def __init__(
        self,
        source: Iterable[Batch],
        device: torch.device,
        dtype: torch.dtype,
        micro_batch: int | None,
        weigh: Callable[[Batch], float],
        reduction: str,
    ) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        self.micro_batch, self.weigh, self.reduction = micro_batch, weigh, reduction
        self.channels_last = False
        self.sizes: list[int] = []
        self.divisors: list[float] = []

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Batch]:
        for inputs, targets in self.source:
            batch = move(inputs, self.device, self.dtype), move(targets, self.device, self.dtype)
            if self.channels_last:
                batch = map_tensors(batch, channels_last)
            size = batch_size(batch)
            if self.micro_batch is None or size <= self.micro_batch:
                yield batch
                continue
            for start in range(0, size, self.micro_batch):
                yield cut(batch, slice(start, start + self.micro_batch))

    @property
    def weights(self) -> list[float]:
        """The factor of each batch's mean in the loss over all data."""
        total = sum(self.divisors)
        return [divisor / total if self.reduction == "mean" else 1.0 for divisor in self.divisors]

    def weighted(self) -> Iterator[tuple[float, Batch]]:
        """Pairs of a batch's weight and the batch."""
        yield from zip(self.weights, self, strict=True)

    def inspect(self, evaluate: Callable[[Batch], None], needs_statistics: bool) -> None:
        """Read all batches once: note their sizes, and refuse data that no operator could be computed from.

        Parameters
        ----------
        evaluate : callable
            Evaluates network and loss on a batch; tried on the first one.
        needs_statistics : bool
            Whether the network takes statistics over each batch, which a single example does not have.

        Raises
        ------
        CurvatureError
        """
        for index, batch in enumerate(self):
            size = batch_size(batch)
            if size == 0:
                raise CurvatureError(f"batch {index} is empty; leave it out")
            if size == 1 and needs_statistics:
                raise CurvatureError(
                    f"batch {index} holds one example, which has no batch statistics; "
                    "use bn_mode='eval' or make the last batch larger (drop_last)"
                )
            divisor = self.weigh(batch)
            if not divisor > 0:
                raise CurvatureError(f"batch {index} has no target that counts in the loss; leave it out")
            if index == 0:
                _evaluate_on_few(evaluate, batch)
            self.sizes.append(size)
            self.divisors.append(divisor)
        if not self.sizes:
            raise CurvatureError("there are no batches; was the loader an iterator that is used up?")
        if isinstance(self.source, DataLoader) and isinstance(self.source.sampler, RandomSampler):
            raise CurvatureError("the batches come in a new order on every pass; make the loader with shuffle=False")


def divisor_of_mean(loss: Loss, batch: Batch) -> float:
    """What the mean of a loss over a batch divides by: the examples, or the sum of their weights."""
    if known(loss) is None:
        return float(batch_size(batch))
    return float(example_weights(loss, batch[1]).sum())


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any layer is a batch normalisation."""
    return any(isinstance(module, BatchNormBase) for module in model.modules())


def channels_last(tensor: Tensor) -> Tensor:
    """Images and filters with their channels last in memory; other tensors unchanged."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def _evaluate_on_few(evaluate: Callable[[Batch], None], batch: Batch) -> None:
    """Evaluate on two examples, and on the whole batch if network or loss need more than two."""
    # Without this, an error in the user's code would first appear inside a trace, where any exception is taken to mean
    # that the model cannot be traced.
    try:
        evaluate(first_examples(batch, 2))
        return
    except PnError:
        raise
    except Exception:
        pass  # two examples may be too few for this loss; the whole batch decides
    evaluate(batch)

"""Training in one process, or in several that divide the examples of each batch.

The processes are those of a ``torch.distributed`` group, as ``torchrun`` starts them. All hold the same network and the
same data and draw the same batches. Each passes its part of a batch through the network; the gradients, weighted by the
sizes of the parts, are summed as one vector, and every process takes the same step. Layers that see the batch as a
whole do so across processes (:mod:`trainers.loop.batch_layers`), so that the curve is that of one process to round-off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pnanalysis.curvature.processes import complete, lost, meet
from pnanalysis.errors import PnError, TrainingError
from pnanalysis.evaluation.losses import example_weights, known
from pnanalysis.inputs.data import Split
from pnanalysis.inputs.models import Loss
from pnanalysis.torch_internals import BatchNormBase
from trainers.loop.batch_layers import CommonNoise, over_whole_batches
from trainers.seeds import derive_seed

T = TypeVar("T")
#: Examples of which the loss is compared with that of their parts.
_COMPARED = 64
#: What the two may differ by, relative to the values: round-off of float64, and of all else, TensorFloat-32 included.
_TOLERANCE = {torch.float64: 1e-9}
_OTHER_TOLERANCE = 3e-3


class FailedElsewhere(TrainingError):
    """Another process has failed and says why."""


class Part(NamedTuple):
    """What one process has of a batch: its rows, and what they weigh in the mean over the batch.

    ``counts`` says whether they count in sums over processes: a batch that every process computes as a whole counts in
    the first.
    """

    rows: slice
    size: int
    fraction: float = 1.0
    counts: bool = True

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the batch."""
        return self.rows == slice(0, self.size)

    def share(self, mean: Tensor) -> Tensor:
        """What the part adds to the mean over the batch, given its own mean."""
        return mean if self.fraction == 1 and self.counts else mean * (self.fraction * self.counts)


class OneProcess:
    """A training that nothing is shared with."""

    n, rank = 1, 0

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def part_of(self, size: int) -> Part:
        """The rows of a batch of ``size`` examples that this process computes."""
        return Part(slice(0, size), size)

    def backward(self, part: Part, value: Tensor, term: Tensor | None, parameters: Sequence[Tensor]) -> None:
        """Leave in ``parameters`` the gradient of the mean loss over a batch plus that of the penalty ``term``.

        ``value`` is the mean loss over this process's part.
        """
        (value if term is None else value + term).backward()

    def prepare_epoch(self, model: nn.Module, seed: int, epoch: int) -> None:
        """Seed what an epoch draws, such as the masks of dropout."""
        torch.manual_seed(derive_seed(seed, "noise", epoch))  # dropout draws from torch's global generator

    def joined(self, model: nn.Module) -> AbstractContextManager[None]:
        """A context in which layers that see a batch as a whole see those of all processes."""
        return nullcontext()

    def add_up(self, *own: Tensor) -> None:
        """Replace tensors by their sums over processes."""

    def from_first(self, compute: Callable[[], T]) -> T:
        """What ``compute()`` returns in the first process, in every process.

        Raises
        ------
        PnError
            What it raises there; :class:`FailedElsewhere` in the others.
        """
        return compute()

    def first_before_others(self, compute: Callable[[], T]) -> T:
        """``compute()`` of every process, the first one's before the others', which may need the files it makes."""
        return compute()

    def check_divisible(self, model: nn.Module, split: Split, loss: Loss, batch_size: int) -> None:
        """Refuse batches whose loss does not follow from those of the parts of each process."""


class SeveralProcesses(OneProcess):
    """The processes of the default ``torch.distributed`` group.

    Parameters
    ----------
    device : torch.device
        Of the network.

    Raises
    ------
    TrainingError
        If there is no group.
    """

    def __init__(self, device: torch.device) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise TrainingError("there is no process group; call torch.distributed.init_process_group first")
        self.n, self.rank = dist.get_world_size(), dist.get_rank()
        self.device = device
        self.noise = CommonNoise(device)
        self.part: Part | None = None

    def part_of(self, size: int) -> Part:
        """Equal parts, in the order of the processes; of a batch with fewer examples than processes, all of it."""
        if size < self.n:
            self.part = Part(slice(0, size), size, 1.0, self.is_first)
        else:
            rows = slice(self.rank * size // self.n, (self.rank + 1) * size // self.n)
            self.part = Part(rows, size, (rows.stop - rows.start) / size)
        return self.part

    def backward(self, part: Part, value: Tensor, term: Tensor | None, parameters: Sequence[Tensor]) -> None:
        """One sum over processes, of the gradients of the loss alone: the penalty is the same in all of them."""
        if part.is_whole:
            super().backward(part, value, term, parameters)
            return
        (value * part.fraction).backward()
        self._sum_gradients(parameters)
        if term is not None:
            term.backward()

    def prepare_epoch(self, model: nn.Module, seed: int, epoch: int) -> None:
        """Seed common and own noise, and copy the first process's weights, which differ at most by round-off."""
        self.noise.seed(derive_seed(seed, "noise", epoch))
        torch.manual_seed(derive_seed(seed, f"noise of process {self.rank}", epoch))
        with peers():
            for tensor in model.state_dict().values():
                whole = tensor.contiguous()
                # as bytes: gloo does not know every type
                complete(dist.broadcast(whole.view(-1).view(torch.uint8), 0, async_op=True), whole)
                if whole is not tensor:
                    tensor.copy_(whole)

    def joined(self, model: nn.Module) -> AbstractContextManager[None]:
        """Batch normalisation and dropout over whole batches, until the end of the body."""
        return over_whole_batches(model, self)

    def add_up(self, *own: Tensor) -> None:
        """One sum over processes for each tensor, in place."""
        with peers():
            for tensor in own:
                complete(dist.all_reduce(tensor, async_op=True), tensor)

    def gather(self, own: Tensor) -> list[Tensor]:
        """The tensors of one shape of all processes, in their order."""
        found = [torch.empty_like(own) for _ in range(self.n)]
        with peers():
            complete(dist.all_gather(found, own, async_op=True), own)
        return found

    def from_first(self, compute: Callable[[], T]) -> T:
        """Computed by the first process, and sent to the others."""
        found: list[Any] = [None, True]
        failure: PnError | None = None
        if self.is_first:
            try:
                found[0] = compute()
            except PnError as error:
                found, failure = [str(error), False], error
        with peers():
            meet()
            dist.broadcast_object_list(found, 0, device=self.device)
        if failure is not None:
            raise failure
        if not found[1]:
            raise FailedElsewhere(found[0])
        result: T = found[0]
        return result

    def first_before_others(self, compute: Callable[[], T]) -> T:
        """The others start once the first has ended; if it fails, they do not."""
        kept: list[T] = []
        self.from_first(lambda: kept.append(compute()))
        return kept[0] if kept else compute()

    def check_divisible(self, model: nn.Module, split: Split, loss: Loss, batch_size: int) -> None:
        """Compare the loss of some examples with those of two parts of them, in the first process.

        Raises
        ------
        TrainingError
            If they do not fit together, or there are more processes than examples in a batch.
        """
        self.from_first(lambda: check_divisible(model, split, loss, batch_size, self.n))

    def _sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        # Which parameters have a gradient travels along: one that has none in any process must keep none, for the
        # optimiser then passes it over. Only a process that lacks one reads it, since that waits for the device.
        lacking = [i for i, parameter in enumerate(parameters) if parameter.grad is None]
        has_gradient = torch.ones(len(parameters), device=self.device)
        has_gradient[lacking] = 0
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(gradient.reshape(-1) for gradient in own), has_gradient])
        self.add_up(flat)
        *sums, counts = flat.split([*(p.numel() for p in parameters), len(parameters)])
        for parameter, total in zip(parameters, sums, strict=True):
            parameter.grad = total.view(parameter.shape).to(parameter.dtype)
        for i, count in zip(lacking, counts[lacking].tolist(), strict=True):
            if not count:
                parameters[i].grad = None


def check_divisible(model: nn.Module, split: Split, loss: Loss, batch_size: int, n: int) -> None:
    """Refuse batches that cannot be divided among ``n`` processes.

    Raises
    ------
    TrainingError
        If batches have fewer examples, or their loss is not the mean of those of the examples.
    """
    smallest = min(batch_size, len(split))
    if smallest < n:
        raise TrainingError(f"a batch of {smallest} cannot be divided among {n} processes; start fewer")
    refusal = TrainingError(
        "the loss of a batch is not the mean of the losses of its examples, so that it cannot be divided among "
        "processes; train in one process"
    )
    if known(loss) is not None and len(example_weights(loss, split.targets).unique()) > 1:
        raise refusal  # classes of different weight, or targets that are ignored
    size = min(_COMPARED, len(split))
    inputs, targets = split.take(slice(0, size))
    pieces = [slice(0, size // 3), slice(size // 3, size)]
    model.eval()
    by_batch = any(isinstance(m, BatchNormBase) and m.running_mean is None for m in model.modules())
    with torch.no_grad():
        outputs = model(inputs)
        whole = float(loss(outputs, targets))
        # layers that use statistics of the batch in eval mode, too, give other outputs for other batches
        parts = [outputs[piece] if by_batch else model(inputs[piece]) for piece in pieces if piece.stop > piece.start]
        pieces = pieces[-len(parts) :]
        values = [float(loss(part, targets[piece])) for part, piece in zip(parts, pieces, strict=True)]
    together = sum(value * (piece.stop - piece.start) for value, piece in zip(values, pieces, strict=True)) / size
    slack = _TOLERANCE.get(outputs.dtype, _OTHER_TOLERANCE) * (abs(whole) + sum(map(abs, values)))
    if abs(whole - together) > slack:
        raise refusal


@contextmanager
def peers() -> Iterator[None]:
    """One sentence where another process has ended.

    Raises
    ------
    ProcessLost
    """
    try:
        yield
    except RuntimeError as error:
        raise lost(error, "repeat the command with --resume") from error

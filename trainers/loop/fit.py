"""One training: data on the device, batches by index, no synchronisation with the host inside an epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pnanalysis.checks import at_least
from pnanalysis.errors import DivergenceError, PnError, TrainingError
from pnanalysis.evaluation.forward import IGNORED
from pnanalysis.evaluation.losses import kind_of, known
from pnanalysis.inputs.data import Split
from pnanalysis.inputs.loading import first_not_finite
from pnanalysis.inputs.models import Loss, resolve_loss
from trainers.choices import check_choice
from trainers.loop.layout import image_layout
from trainers.loop.processes import OneProcess, Part, SeveralProcesses
from trainers.seeds import derive_seed

_CROP_PADDING = 4
EVALUATION_BATCH = 2000


@dataclass(frozen=True)
class Epoch:
    """The record of one epoch: means over its batches, and errors at its end (NaN without such a split)."""

    epoch: int
    train_loss: float
    penalty: float
    train_error: float
    validation_error: float
    test_error: float
    seconds: float


OnEpoch = Callable[[Epoch, nn.Module, torch.optim.Optimizer], None]
Watcher = Callable[[nn.Module, torch.optim.Optimizer], AbstractContextManager[Any]]


def fit(
    model: nn.Module,
    train: Split | tuple[Tensor, Tensor],
    *,
    epochs: int,
    batch_size: int = 256,
    lr: float = 1e-3,
    optimizer: str = "adam",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    loss: str | Loss = "cross_entropy",
    penalty: Callable[[], Tensor] | None = None,
    validation: Split | None = None,
    test: Split | None = None,
    augment: Sequence[str] = (),
    seed: int = 0,
    amp: str = "no",
    compile: bool = False,
    start_epoch: int = 0,
    optimizer_state: Mapping[str, Tensor] | None = None,
    on_epoch: OnEpoch | None = None,
    on_batch: Callable[[int], None] | None = None,
    watched_by: Watcher | None = None,
    distributed: bool = False,
) -> list[Epoch]:
    """Train ``model`` in place; data must be on the model's device.

    Parameters
    ----------
    model : torch.nn.Module
    train : Split, or (inputs, targets)
        Tensors of shape (N, ...) and (N, ...).
    epochs : int
        Last epoch to reach, counted from 1.
    batch_size, lr, optimizer, momentum, weight_decay
        ``optimizer`` is ``"adam"`` or ``"sgd"`` (which uses ``momentum``).
    loss : str or callable
        Averaged over the batch; see :func:`pnanalysis.inputs.models.resolve_loss`.
    penalty : callable, optional
        Called without arguments at every step; its value is added to the loss.
    validation, test : Split, optional
        Evaluated after every epoch, without any influence on training.
    augment : sequence of {"crop", "flip"}
        Random crops of images padded by 4 reflected pixels, and random horizontal flips, on the device.
    seed : int
        Determines the order of the batches, augmentation and dropout. Each epoch draws from a seed derived from this
        one and the epoch's number, so that a training resumed at any epoch continues identically.
    amp : {"no", "bf16"}
        Forward pass in bfloat16 under autocast; weights and accumulation stay float32.
    compile : bool
        ``torch.compile`` the network.
    start_epoch, optimizer_state
        Where to resume: the number of epochs already done, and what :func:`optimizer_tensors` returned after them.
    on_epoch : callable, optional
        ``on_epoch(record, model, optimizer)`` after each epoch.
    on_batch : callable, optional
        ``on_batch(n_examples)`` after each step, for progress.
    watched_by : callable, optional
        ``watched_by(model, optimizer)`` returns a context in which the epochs are trained, such as a
        :class:`pnanalysis.CurvatureMonitor`.
    distributed : bool
        Divide the examples of each batch among the processes of the default ``torch.distributed`` group, all of which
        make this call with the same arguments. Batch normalisation and dropout see the whole batch, so that weights and
        records are those of one process to round-off. ``on_epoch`` is called in the first process only.

    Returns
    -------
    list of Epoch

    Raises
    ------
    DivergenceError
        If the loss or, at the end of an epoch, a weight is not finite; the message says where. ``on_epoch`` is not
        called for such an epoch.
    TrainingError
        If an option is unknown, or batches cannot be divided among the processes.
    ProcessLost
        If another process has ended.

    Notes
    -----
    Several processes wait for each other at every step, for one sum of the gradients and two small messages for each
    layer of batch normalisation. Noise that is drawn anywhere but in torch's dropout layers is each process's own.
    """
    split = train if isinstance(train, Split) else Split(*train)
    check_options(optimizer, augment, amp, batch_size, epochs)
    loss_fn = resolve_loss(loss)
    sum_of_errors = error_counter(loss_fn)
    optim = make_optimizer(model, optimizer, lr, momentum, weight_decay)
    if optimizer_state:
        load_optimizer_tensors(optim, optimizer_state)
    network: nn.Module = torch.compile(model) if compile else model  # type: ignore[assignment]
    device = split.inputs.device
    processes = SeveralProcesses(device) if distributed else OneProcess()
    processes.check_divisible(model, split, loss_fn, batch_size)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    laid_out, counted = image_layout(model, split.inputs), n_counted(loss_fn, split.targets)
    records = []
    with watched_by(model, optim) if watched_by is not None else nullcontext():
        for epoch in range(start_epoch + 1, epochs + 1):
            begun = time.perf_counter()
            processes.prepare_epoch(model, seed, epoch)
            order, generator = batch_order(len(split), seed, epoch, device)
            model.train()
            sums = EpochSums(-(-len(split) // batch_size), device)
            with processes.joined(model):
                for step, index in enumerate(order.split(batch_size)):
                    part = processes.part_of(len(index))
                    inputs, targets = split.take(index[part.rows])
                    inputs = laid_out(augment_batch(inputs, augment, generator, part))
                    with autocast(device, amp):
                        outputs = network(inputs)
                        value = loss_fn(outputs, targets)
                    # Outside autocast: the penalty is computed in the precision of the parameters.
                    term = penalty() if penalty is not None else None
                    optim.zero_grad(set_to_none=True)
                    processes.backward(part, value, term, trainable)
                    optim.step()
                    errors = sum_of_errors(outputs.detach(), targets)
                    sums.add(step, len(index), part.share(value), term, errors if part.counts else 0 * errors)
                    if on_batch is not None:
                        on_batch(len(index))
            processes.add_up(sums.losses, sums.errors)
            means = processes.from_first(partial(_checked_means, sums, model, epoch, len(split), counted))
            validation_error = evaluate_error(network, validation, amp, loss_fn, processes, laid_out)
            test_error = evaluate_error(network, test, amp, loss_fn, processes, laid_out)
            record = Epoch(epoch, *means, validation_error, test_error, time.perf_counter() - begun)
            records.append(record)
            if on_epoch is not None:
                processes.from_first(partial(_reported, on_epoch, record, model, optim))
    return records


def _reported(on_epoch: OnEpoch, record: Epoch, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Call ``on_epoch``, whatever it may return."""
    on_epoch(record, model, optimizer)


def _checked_means(sums: EpochSums, model: nn.Module, epoch: int, n: int, counted: float) -> EpochMeans:
    """The means of an epoch, if they and the weights at its end are finite."""
    means = sums.means(epoch, n, counted)
    check_weights(model, epoch)
    return means


def check_weights(model: nn.Module, epoch: int) -> None:
    """Check at the end of an epoch that the weights are finite: there is no later loss that would tell.

    Raises
    ------
    DivergenceError
        The message names the first tensor that is not.
    """
    if (name := first_not_finite(model)) is not None:
        raise DivergenceError(f"{name} is not finite any more after epoch {epoch}; try a smaller --lr or --lam")


@torch.no_grad()
def evaluate_error(
    model: nn.Module,
    split: Split | None,
    amp: str = "no",
    loss: Loss | None = None,
    processes: OneProcess | None = None,
    laid_out: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """The mean error over a split, counted as by :func:`error_counter`; NaN without a split.

    Several processes take batches in turn. Inputs are ``laid_out`` by :func:`trainers.loop.layout.image_layout`.
    """
    if split is None:
        return float("nan")
    processes = processes or OneProcess()
    model.eval()
    sum_of_errors, total = error_counter(loss), torch.zeros((), dtype=torch.float64, device=split.inputs.device)
    for start in range(processes.rank * EVALUATION_BATCH, len(split), processes.n * EVALUATION_BATCH):
        inputs, targets = split.take(slice(start, start + EVALUATION_BATCH))
        with autocast(inputs.device, amp):
            outputs = model(inputs if laid_out is None else laid_out(inputs))
        total += sum_of_errors(outputs, targets)
    processes.add_up(total)
    return float(total / n_counted(loss, split.targets))


def make_optimizer(
    model: nn.Module, name: str = "adam", lr: float = 1e-3, momentum: float = 0.9, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Adam, or SGD with momentum, over the trainable parameters of a model, in fused form."""
    return tensor_optimizer([p for p in model.parameters() if p.requires_grad], name, lr, momentum, weight_decay)


def tensor_optimizer(
    parameters: list[Tensor], name: str = "adam", lr: float = 1e-3, momentum: float = 0.9, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """As :func:`make_optimizer`, over the given tensors."""
    fused = not any(parameter.is_complex() for parameter in parameters)  # which torch does not fuse
    if name == "adam":
        return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, fused=fused)
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=fused)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as a flat mapping of named tensors, to be saved."""
    state: dict[int, dict[str, object]] = optimizer.state_dict()["state"]
    return {
        f"{i}.{name}": value
        for i, entries in state.items()
        for name, value in entries.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore a state that :func:`optimizer_tensors` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def augment_batch(
    inputs: Tensor, augment: Sequence[str], generator: torch.Generator, part: Part | None = None
) -> Tensor:
    """Random crops and flips of images (N, C, H, W), drawn on the CPU so that they are the same on every device.

    If the images are a part of a batch, they are changed as they would be in the whole.
    """
    part = part or Part(slice(0, len(inputs)), len(inputs))
    if "crop" in augment:
        shifts = torch.randint(2 * _CROP_PADDING + 1, (2, part.size), generator=generator)
        inputs = _crop(inputs, shifts[:, part.rows].to(inputs.device))
    if "flip" in augment:
        flips = torch.rand(part.size, generator=generator)[part.rows].lt(0.5).to(inputs.device)
        inputs = torch.where(flips[:, None, None, None], inputs.flip(-1), inputs)
    return inputs


def _crop(inputs: Tensor, shifts: Tensor) -> Tensor:
    """Images of the same size, cut out of padded ones at ``shifts``, (2, N)."""
    n, _, height, width = inputs.shape
    padded = nn.functional.pad(inputs, [_CROP_PADDING] * 4, mode="reflect")
    rows = shifts[0][:, None] + torch.arange(height, device=inputs.device)
    columns = shifts[1][:, None] + torch.arange(width, device=inputs.device)
    examples = torch.arange(n, device=inputs.device)
    cropped = padded[examples[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (N, H, W, C)
    return cropped.permute(0, 3, 1, 2).contiguous()


class EpochMeans(NamedTuple):
    """Means over the examples of an epoch."""

    loss: float
    penalty: float
    error: float


class EpochSums:
    """Losses and errors of an epoch, kept on the device until its end: reading them earlier would stall every step.

    Parameters
    ----------
    n_steps : int
    device : torch.device
    shape : tuple of int
        ``(K,)`` for K networks trained at once.
    """

    def __init__(self, n_steps: int, device: torch.device, shape: tuple[int, ...] = ()) -> None:
        self.losses = torch.zeros(*shape, n_steps, device=device)
        self.penalties = torch.zeros(*shape, n_steps, device=device)
        self.sizes = torch.zeros(n_steps)
        self.errors = torch.zeros(shape, device=device)

    def add(self, step: int, size: int, loss: Tensor, penalty: Tensor | None, errors: Tensor) -> None:
        """Record a step over ``size`` examples: its mean loss, its penalty and the sum of its errors."""
        self.losses[..., step] = loss.detach()
        self.sizes[step] = size
        if penalty is not None:
            self.penalties[..., step] = penalty.detach()
        self.errors += errors

    def means(self, epoch: int, n: int, counted: float, network: int | None = None) -> EpochMeans:
        """Averages over the epoch's ``n`` examples, of one network among several if given; errors are of those counted.

        Raises
        ------
        DivergenceError
            If a loss was not finite.
        """
        chosen = ... if network is None else network
        losses, penalties = self.losses[chosen].cpu(), self.penalties[chosen].cpu()
        bad = (~(losses + penalties).isfinite()).nonzero()
        if len(bad):
            step = int(bad[0])
            raise DivergenceError(
                f"the loss became {float(losses[step] + penalties[step])} at epoch {epoch}, step {step + 1}; "
                "try a smaller --lr or --lam"
            )
        weights = self.sizes / n
        return EpochMeans(float(losses @ weights), float(penalties @ weights), float(self.errors[chosen]) / counted)


def error_counter(loss: Loss | None) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of a batch's outputs and targets that returns the sum of its errors, as the loss defines them.

    Under a classification loss an example's error is 0 or 1, or the fraction of its positions that are wrong where it
    has several. Those that torch's cross-entropies ignore are never wrong: the mean error is the sum divided by
    :func:`n_counted`. Class probabilities stand for their likeliest class; binary cross-entropy compares the side of
    zero. For real-valued targets of all other losses the error is the squared error, a mean over outputs.

    The function raises a :class:`TrainingError` where a loss of one's own takes outputs of another shape, which do not
    tell what its errors are.
    """
    # pnanalysis.evaluation.losses.example_errors counts the same example by example, and checks more. It takes four
    # times as long (56 instead of 13 microseconds for 256 examples of ten classes on a CPU), which at every step would
    # make the training of a small network 7 % slower.
    kind, ignored = kind_of(loss), _ignored(loss)

    def wrong_sides(outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs > 0) != (targets > 0.5)).double().reshape(len(targets), -1).mean(1).sum()

    def wrong_classes(outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            targets = targets.argmax(1)
        wrong = (outputs.argmax(1) != targets) & (targets != ignored)
        return wrong.sum() if targets.ndim == 1 else wrong.flatten(1).double().mean(1).sum()

    def squared_errors(outputs: Tensor, targets: Tensor) -> Tensor:
        if kind is None and not targets.is_floating_point():  # a custom loss: integers are taken for classes
            if outputs.shape[1:2] <= (1,) or outputs.shape[:1] + outputs.shape[2:] != targets.shape:
                raise _not_countable(outputs, targets, "classes along dim 1, or targets that are real numbers")
            return wrong_classes(outputs, targets)
        if outputs.shape != targets.shape:  # they would be broadcast
            if _without_ones(outputs) != _without_ones(targets):
                raise _not_countable(outputs, targets, "the targets' shape")
            outputs = outputs.reshape(targets.shape)
        return (outputs - targets).square().reshape(len(targets), -1).mean(1).sum()

    return {"sides": wrong_sides, "classes": wrong_classes}.get(kind or "", squared_errors)


def _without_ones(tensor: Tensor) -> tuple[int, ...]:
    """The shape without dims of one number behind the first."""
    return (len(tensor), *(size for size in tensor.shape[1:] if size != 1))


def _not_countable(outputs: Tensor, targets: Tensor, wanted: str) -> TrainingError:
    shapes = [f"(N{''.join(f', {size}' for size in tensor.shape[1:])})" for tensor in (outputs, targets)]
    number = "real" if targets.is_floating_point() else "integer"
    return TrainingError(
        f"errors cannot be counted of outputs {shapes[0]} and {number} targets {shapes[1]} under a loss of one's own, "
        f"which may mean anything by them; return outputs with {wanted}, or give one of torch's losses by name"
    )


def n_counted(loss: Loss | None, targets: Tensor) -> float:
    """Number of examples that count in the mean error: of one with several positions the fraction that the loss heeds.

    Their number, unless a classification loss ignores some of them.
    """
    if targets.is_floating_point() or kind_of(loss) not in ("classes", None):
        return len(targets)
    return float((targets != _ignored(loss)).reshape(len(targets), -1).double().mean(1).sum())


def _ignored(loss: Loss | None) -> int:
    """The class that a target must be to be ignored."""
    found = None if loss is None else known(loss)
    return IGNORED if found is None else found.ignored


def error_kind(loss: Loss | None, targets: Tensor) -> str:
    """What :func:`error_counter` sums: ``share`` (fractions of mistakes) or ``squared error``."""
    kind = kind_of(loss) or ("numbers" if targets.is_floating_point() else "classes")
    return "squared error" if kind == "numbers" else "share"


def batch_order(n: int, seed: int, epoch: int, device: torch.device) -> tuple[Tensor, torch.Generator]:
    """The examples of an epoch in the order in which they are seen, and the generator of their augmentation."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(n, generator=generator).to(device), generator


def autocast(device: torch.device, amp: str) -> AbstractContextManager[object]:
    """A context for the forward pass: bfloat16 if ``amp`` is ``"bf16"``."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if amp == "bf16" else nullcontext()


def check_options(optimizer: str, augment: Sequence[str], amp: str, batch_size: int, epochs: int) -> None:
    """Raise a :class:`TrainingError` for options that :func:`fit` does not have."""
    check_choice("optimizer", optimizer)
    check_choice("augment", augment)
    check_choice("amp", amp)
    try:
        at_least(1, batch_size=batch_size, epochs=epochs)
    except PnError as error:
        raise TrainingError(str(error)) from error

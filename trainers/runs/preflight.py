"""Checks of network, loss and data before a run begins, so that what cannot be trained leaves no run behind."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.random import fork_rng

from pnanalysis.errors import DataError, TrainingError, is_out_of_memory
from pnanalysis.evaluation.diagnosis import clear_errors, described
from pnanalysis.evaluation.forward import not_for
from pnanalysis.evaluation.losses import NOTHING_COUNTS, check_targets
from pnanalysis.inputs.copies import copied
from pnanalysis.inputs.data import SPLITS, Split, Splits
from pnanalysis.inputs.models import Loss, resolve_loss
from trainers.loop.fit import EVALUATION_BATCH, autocast, error_counter, n_counted
from trainers.recipes import Config


def check_tensors(data: Splits, config: Config) -> None:
    """Check that every split holds tensors: training draws its batches by index, which a loader cannot do.

    Raises
    ------
    DataError
    """
    for name in SPLITS:
        split = getattr(data, name)
        tensors = isinstance(split, Split) and isinstance(split.inputs, Tensor) and isinstance(split.targets, Tensor)
        if split is not None and not tensors:
            kind = "has several inputs or targets" if isinstance(split, Split) else "is a loader"
            raise DataError(f"{config.data}: the {name} split {kind}; training needs tensors (inputs, targets)")


def check_trainable(model: nn.Module, data: Splits, config: Config) -> None:
    """Pass two examples of every split through network and loss, check all targets, and try a pass of training.

    Parameters
    ----------
    model : torch.nn.Module
        On the device of the data; left in eval mode, unchanged.
    data : Splits
    config : Config
        Its loss, precision and augmentation.

    Raises
    ------
    DataError
        If there are no examples or numbers that are not finite, network or loss cannot take the data, or the targets
        do not suit the loss (see :func:`pnanalysis.evaluation.losses.check_targets`).
    TrainingError
        If the loss of a batch is not a single number, inputs that are not images are to be augmented, or the network
        cannot be trained on the last batch of an epoch (batch normalisation, on a single example).
    """
    loss = resolve_loss(config.loss)
    model.eval()
    for name in SPLITS:
        split = getattr(data, name)
        if split is None:
            continue
        label = config.data if name == "train" else f"{config.data}, {name}"
        split.check(label)
        if name == "train" and config.augment and split.inputs.ndim != 4:
            raise TrainingError(
                f"{label}: {config.augment[0]} takes images (N, C, H, W), not inputs of shape "
                f"{tuple(split.inputs.shape)}; leave out --augment"
            )
        with clear_errors(label, model, split.batches(EVALUATION_BATCH), loss):
            _check_split(model, split, loss, config.amp, label)
        if name == "train":
            _check_last_batch(model, split, config, label)


@torch.no_grad()
def _check_split(model: nn.Module, split: Split, loss: Loss, amp: str, label: str) -> None:
    inputs, targets = split.take(slice(0, 2))
    with autocast(inputs.device, amp):
        outputs = model(inputs)
        if not isinstance(outputs, Tensor):
            raise not_for(loss, outputs)
        try:  # all targets, not only two: on a GPU a target that is no class aborts the whole process
            check_targets(loss, outputs[:1].expand(len(split), *outputs.shape[1:]), split.targets)
        except DataError as error:
            raise DataError(f"{label}: {error}") from error
        value = loss(outputs, targets)
    if not isinstance(value, Tensor) or value.numel() != 1:
        given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise TrainingError(f"the loss of a batch is {given}, not a single number; average it over the batch")
    error_counter(loss)(outputs, targets)  # raises an error if the two cannot be compared
    if not n_counted(loss, split.targets):
        raise DataError(f"{label}: {NOTHING_COUNTS}")


@torch.no_grad()
def _check_last_batch(model: nn.Module, split: Split, config: Config, label: str) -> None:
    """A pass of training, of a copy, over as many examples as the last batch of an epoch has, but two at most."""
    n = min(len(split) % config.batch_size or config.batch_size, 2)
    inputs, _ = split.take(slice(0, n))
    try:
        with fork_rng([inputs.device] if inputs.is_cuda else []), autocast(inputs.device, config.amp):
            copied(model).train()(inputs)
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        wrong, instead = (
            ("the last batch of an epoch, of one example,", "choose a --batch-size that leaves more for it")
            if n == 1
            else ("these data in train mode", "look at what it does there")
        )
        raise TrainingError(f"{label}: the network cannot take {wrong} ({described(error)}); {instead}") from error

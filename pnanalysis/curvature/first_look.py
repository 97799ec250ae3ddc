"""A first look at network, loss and data: what passes need, and what makes them faster without changing the function.

All of it is tried on a few examples, and compared with the network as it is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from pnanalysis.curvature.batches import Batch, has_batch_norm
from pnanalysis.curvature.network_loss import LossArguments
from pnanalysis.curvature.prepared_copy import fold_norms, set_in_place, unfold_norms
from pnanalysis.curvature.product_check import EXAMPLES, largest_difference, tolerance
from pnanalysis.curvature.recomputed import recomputable_blocks
from pnanalysis.curvature.tracing import Untraceable, rehearse
from pnanalysis.errors import CurvatureError, PnError
from pnanalysis.evaluation.randomness import differs_between_passes
from pnanalysis.inputs.batches import can_cut, channels_last, cut, map_tensors

if TYPE_CHECKING:
    from pnanalysis.curvature.base import CurvatureOperator


def first_look(op: CurvatureOperator, batch: Batch) -> Batch:
    """Run network and loss for the first time, and fit the operator's passes to them.

    Parameters
    ----------
    op : CurvatureOperator
    batch : (inputs, targets)

    Returns
    -------
    (inputs, targets)
        A few examples of the batch, some of which count in the loss.

    Raises
    ------
    PnError
        If network or loss cannot be run on them, draw at random, or targets would be misinterpreted.
    """
    set_in_place(op._in_place, False)
    few = _tried(op, batch)
    if op._in_place and _needs_in_place(op, batch):
        few = _tried(op, batch)
    at = op._arguments(few)
    if op.draws is None:
        _check_repeatable(op, at)
    if op.bn_mode == "eval" and has_batch_norm(op.model):
        _fold_norms(op, at)
    if op.device.type == "cpu" and any(isinstance(module, nn.Conv2d) for module in op.model.modules()):
        _try_channels_last(op, batch)
        at = op._arguments(few)
    if op.checkpoint_activations:
        op._loss.recomputed = recomputable_blocks(op._loss, at, op.names)
    return few


def _tried(op: CurvatureOperator, batch: Batch) -> Batch:
    """A few examples of a batch that network and loss have been tried on; all where they need more."""
    try:
        # the check keeps all activations
        few = _first_that_count(op, batch, 1 if op.checkpoint_activations else EXAMPLES)
        op._loss.try_out(op._arguments(few))
        return few
    except (PnError, torch.OutOfMemoryError):
        raise
    except Exception:
        op._loss.try_out(op._arguments(batch))  # errors of this one are the user's to see
        return batch


def _first_that_count(op: CurvatureOperator, batch: Batch, n: int) -> Batch:
    """A few examples of a batch, from the first that counts on; the whole batch where it cannot be cut."""
    weights = op.batches.weighing.of_examples(batch)
    start = int((weights != 0).double().argmax())
    return cut(batch, slice(start, start + n)) if can_cut(batch) else batch


def _needs_in_place(op: CurvatureOperator, batch: Batch) -> bool:
    """Let layers write into their arguments again, if the network is another function otherwise."""
    at = op._arguments(batch)
    with torch.no_grad():
        apart = op._loss_at_theta(map_tensors(at, torch.clone))
        set_in_place(op._in_place, True)
        written = op._loss_at_theta(map_tensors(at, torch.clone))
    is_same = torch.allclose(apart, written, rtol=100 * torch.finfo(written.dtype).eps, atol=0, equal_nan=True)
    if is_same:
        set_in_place(op._in_place, False)
    return not is_same


def _check_repeatable(op: CurvatureOperator, at: LossArguments) -> None:
    """Refuse a network or loss that draws random numbers."""
    if differs_between_passes(op.model, at.inputs) or differs_between_passes(
        op.model, at.inputs, op.loss_fn, at.targets
    ):
        raise CurvatureError(
            "the network or its loss draws at random in eval mode: two passes over the same batch differ; average "
            "over draws=K, or make it deterministic (return the mean instead of a sample, "
            "F.dropout(..., training=self.training))"
        )


def _fold_norms(op: CurvatureOperator, at: LossArguments) -> None:
    """Fold batch normalisation into convolutions, if the network remains the same function."""
    written = op._loss.gradient(at, at.theta)
    folded = fold_norms(op.model)
    if folded:
        difference, _ = largest_difference(op._loss.gradient(at, at.theta), written, op.names)
        if difference > tolerance(op.dtype, op.amp):
            unfold_norms(folded)


def _try_channels_last(op: CurvatureOperator, batch: Batch) -> None:
    """Store images and filters with channels last, which oneDNN convolves faster, if the model can take them."""
    at: LossArguments = map_tensors(op._arguments(batch), channels_last)
    try:
        rehearse(op._loss_at_theta, at)
    except Untraceable:  # a ``view`` in the model needs channels first
        return
    op._theta, op._others = at.theta, at.others
    op.batches.channels_last = True

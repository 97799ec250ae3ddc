r"""The Hessian of a loss with respect to the network's outputs, times a direction.

For torch's cross-entropy it is known: at each position, with the probabilities :math:`p` of the classes,

.. math:: H u = c\,(p \odot u - p\,(p^\top u)),

where :math:`c` is what the position weighs in the mean. No graph of the loss is needed then, and of a large vocabulary
a few positions at a time are enough. For all other losses it is a derivative of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pnanalysis.evaluation.losses import InspectedLoss, TorchLoss, known

#: Probabilities that are held at a time, besides the outputs and the result.
_AT_ONCE = 2**24

#: ``u -> H u``, in the shape of the outputs.
OutputCurvature = Callable[[Tensor], Tensor]


def closed_form(loss: InspectedLoss, outputs: object, targets: object) -> OutputCurvature | None:
    """The Hessian of torch's cross-entropy over classes at these outputs; ``None`` for other losses and targets.

    Parameters
    ----------
    loss : InspectedLoss
    outputs : Tensor, shape (N, C, ...)
    targets : Tensor of integers, shape (N, ...)
    """
    positions = class_positions(loss, outputs, targets)
    if positions is None or not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        return None
    logits, _, weights = positions
    shape = targets.shape

    def product(u: Tensor) -> Tensor:
        pieces = max(1, _AT_ONCE // logits.shape[1])
        parts = zip(*(torch.split(tensor, pieces) for tensor in (logits, _by_position(u), weights)), strict=True)
        each = [_times(*part) for part in parts]
        curved = each[0] if len(each) == 1 else torch.cat(each)
        return curved.view(shape + curved.shape[1:]).movedim(-1, 1)

    return product


def class_positions(loss: InspectedLoss, outputs: object, targets: object) -> tuple[Tensor, Tensor, Tensor] | None:
    """Logits ``(positions, C)``, targets ``(positions,)`` and weights ``(positions, 1)`` of torch's cross-entropy.

    The weights are what the positions weigh in the mean over the batch. ``None`` for other losses and targets.
    """
    found = known(loss)
    if found is None or found.function is not F.cross_entropy:
        return None
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)) or outputs.is_complex():
        return None
    if targets.is_floating_point() or outputs.ndim < 2 or outputs.shape[:1] + outputs.shape[2:] != targets.shape:
        return None
    return _by_position(outputs.detach()), targets.flatten(), _weights(found, targets, outputs)


def _times(logits: Tensor, u: Tensor, weight: Tensor) -> Tensor:
    """The product at some positions, ``(n, C)``, in the precision of ``u``."""
    p = torch.softmax(logits.to(weight.dtype), 1)
    pu = p * u
    curved: Tensor = (pu - p * pu.sum(1, keepdim=True)) * weight
    return curved.to(u.dtype)


def _by_position(tensor: Tensor) -> Tensor:
    """Outputs ``(N, C, ...)`` as ``(positions, C)``."""
    return tensor.movedim(1, -1).flatten(0, -2)


def _weights(found: TorchLoss, targets: Tensor, outputs: Tensor) -> Tensor:
    """What each position weighs in the mean, ``(positions, 1)``, in the precision of the loss."""
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    flat, n_classes = targets.flatten(), outputs.shape[1]
    counts = flat != found.ignored
    by_class = found.options.get("weight")
    if by_class is None:
        by_class = torch.ones(n_classes, dtype=dtype, device=outputs.device)
    own = torch.where(counts, by_class.to(dtype)[torch.where(counts, flat, 0)], 0)
    smoothing = found.options.get("label_smoothing", 0.0)
    # every class has the same Hessian, so that smoothing changes weights only
    each = (1 - smoothing) * own + torch.where(counts, smoothing * by_class.to(dtype).mean(), 0)
    of_mean: Tensor = each / own.sum()
    return of_mean[:, None]

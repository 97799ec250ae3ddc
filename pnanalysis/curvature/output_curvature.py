r"""The slope of a loss in the network's outputs, and its Hessian there, times a direction.

For torch's cross-entropy both are known: at each position, with the probabilities :math:`p` of the classes and the
target :math:`t` (a unit vector, or a smoothed one),

.. math:: g = c\,p - t, \qquad H u = c\,(p \odot u - p\,(p^\top u)),

where :math:`c` is what the position weighs in the mean, and :math:`t` sums to :math:`c`. No graph of the loss is needed
then, and of a large vocabulary a few positions at a time are enough. For all other losses they are derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from pnanalysis.evaluation.losses import InspectedLoss, TorchLoss, class_indices, known

#: Probabilities that are held at a time, besides the outputs and the result.
_AT_ONCE = 2**22

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
        along = _by_position(u)
        if along.numel() <= _AT_ONCE:
            return _by_class(_times(logits, along, weights), shape)
        curved = torch.empty_like(along, memory_format=torch.contiguous_format)
        for into, *part in _pieces(curved, logits, along, weights):
            into.copy_(_times(*part))
        return _by_class(curved, shape)

    return product


def closed_form_slope(loss: InspectedLoss, outputs: object, targets: object) -> Tensor | None:
    """The slope of torch's cross-entropy at these outputs, and in their shape; ``None`` where it is not known.

    It can be differentiated once more, by reverse or forward mode, but not by torch.func's transforms.

    Parameters
    ----------
    loss : InspectedLoss
    outputs : Tensor, shape (N, C, ...)
    targets : Tensor of integers, shape (N, ...)
    """
    if class_positions(loss, outputs, targets) is None:
        return None
    slope: Tensor = _Slope.apply(outputs, loss, targets)
    return slope


class _Slope(Function):
    """The slope, of which nothing is kept but the outputs."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, loss: InspectedLoss, targets: Tensor) -> Tensor:
        found = known(loss)
        assert found is not None
        ctx.curvature = closed_form(loss, outputs, targets)
        logits, weights = _by_position(outputs), _weights(found, targets, outputs)
        targets = class_indices(found, targets)
        classes = torch.where(targets != found.ignored, targets, 0).flatten()[:, None]
        slope = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for into, z, k, target, every, total in _pieces(slope, logits, classes, *weights[:2], weights.sums):
            p = torch.softmax(z.to(total.dtype), 1).mul_(total)
            into.copy_(p.scatter_add_(1, k, -target).addcmul_(every, weights.by_class, value=-1))
        return _by_class(slope, targets.shape)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor, None, None]:
        return ctx.curvature(u), None, None

    @staticmethod
    def jvp(ctx: Any, u: Tensor, *_: None) -> Tensor:
        with torch.no_grad():  # the outputs' derivatives have a graph of their own
            curved: Tensor = ctx.curvature(u)
        return curved


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
    classes: Tensor = class_indices(found, targets)
    return _by_position(outputs.detach()), classes.flatten(), _weights(found, classes, outputs).sums


def _times(logits: Tensor, u: Tensor, weight: Tensor) -> Tensor:
    """The product at some positions, ``(n, C)``, in the precision of ``u``."""
    p = torch.softmax(logits.to(weight.dtype), 1)
    pu = p * u
    curved: Tensor = (pu - p * pu.sum(1, keepdim=True)) * weight
    return curved.to(u.dtype)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some positions at a time of tensors whose first is ``(positions, C)``."""
    n = max(1, _AT_ONCE // tensors[0].shape[1])
    return zip(*(torch.split(tensor, n) for tensor in tensors), strict=True)


def _by_position(tensor: Tensor) -> Tensor:
    """Outputs ``(N, C, ...)`` as ``(positions, C)``."""
    return tensor.movedim(1, -1).flatten(0, -2)


def _by_class(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The inverse, for targets of a shape ``(N, ...)``."""
    return tensor.view(shape + tensor.shape[1:]).movedim(-1, 1)


class _Weights(NamedTuple):
    """What each position weighs in the mean: for its target, and for each class by smoothing; ``(positions, 1)``.

    ``by_class``, (C,), are the weights of the classes. All in the precision of the loss.
    """

    of_target: Tensor
    of_all: Tensor
    by_class: Tensor

    @property
    def sums(self) -> Tensor:
        """Over all that a position is compared with: every class has the same Hessian, so that it knows these only."""
        return self.of_target + self.of_all * self.by_class.sum()


def _weights(found: TorchLoss, targets: Tensor, outputs: Tensor) -> _Weights:
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    flat, n_classes = class_indices(found, targets).flatten()[:, None], outputs.shape[1]
    counts = flat != found.ignored
    by_class = found.options.get("weight")
    if by_class is None:
        by_class = torch.ones(n_classes, dtype=dtype, device=outputs.device)
    by_class = by_class.to(dtype)
    own = torch.where(counts, by_class[torch.where(counts, flat, 0)], 0)
    smoothing = found.options.get("label_smoothing", 0.0)
    each = counts.to(dtype) * (smoothing / n_classes)
    return _Weights((1 - smoothing) * own / own.sum(), each / own.sum(), by_class)

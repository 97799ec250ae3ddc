"""The mean loss over all examples at several points of parameter space, with gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pnanalysis.errors import DataError
from pnanalysis.evaluation.losses import NOTHING_COUNTS, example_weights
from pnanalysis.inputs.batches import leading_size
from pnanalysis.sampling.stacked_gradients import StackedGradients


class MeanLoss:
    """Mean over the examples of some batches, which weigh as their examples do.

    Parameters
    ----------
    gradients : StackedGradients
    batches : re-iterable of (inputs, targets)
    """

    def __init__(self, gradients: StackedGradients, batches: Iterable[Any]) -> None:
        self.gradients, self.batches = gradients, batches

    def __call__(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Losses ``(k,)`` in float64 at some points ``(k, P)``, and their gradients ``(k, P)``.

        Raises
        ------
        DataError
            If no example counts.
        """
        loss = torch.zeros(len(points), dtype=torch.float64, device=points.device)
        slope, total = torch.zeros_like(points), 0.0
        for inputs, targets in self.batches:
            weight = batch_weight(self.gradients.surface.loss, inputs, targets)
            if weight == 0:  # every position is ignored, and the loss is 0 / 0
                continue
            values, parts = self.gradients(points, inputs, targets)
            loss += weight * values.double()
            slope.add_(parts, alpha=weight)
            total += weight
        if not total:
            raise DataError(NOTHING_COUNTS)
        return loss / total, slope / total


def batch_weight(loss: Any, inputs: Any, targets: Any) -> float:
    """What a batch weighs in the mean over all examples."""
    if loss.torch_loss is None:
        return float(leading_size(targets, inputs))
    return float(example_weights(loss, targets).sum())

"""Loss and gradient of every batch at the checkpoint that chains start from, computed once for all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pnanalysis.errors import ModelError
from pnanalysis.evaluation.losses import example_weights
from pnanalysis.inputs.batches import leading_size
from pnanalysis.sampling.stacked_gradients import StackedGradients

#: Numbers that gradients of single batches may take in memory; beyond, they are computed anew.
_KEPT = 2**27


class Anchor:
    """The checkpoint in the eyes of its batches.

    Parameters
    ----------
    gradients : StackedGradients
        Of the network around the checkpoint.
    batches : re-iterable of (inputs, targets)

    Attributes
    ----------
    point : Tensor, shape (P,)
    loss : float
        Over all batches.
    gradient : Tensor, shape (P,)
    factors : list of float
        What each batch's loss counts where all come up equally often; their mean is one.
    n_examples : int
        Examples that count in the loss: not those whose targets are all ignored.

    Raises
    ------
    ModelError
        If no example counts.
    """

    def __init__(self, gradients: StackedGradients, batches: Iterable[Any]) -> None:
        self.gradients, self.batches, self.point = gradients, batches, gradients.centre
        self._kept: list[tuple[Tensor, Tensor]] = []
        weights, losses, total = [], [], torch.zeros_like(self.point, dtype=torch.float64)
        self.n_examples = 0
        for inputs, targets in batches:
            weight, n = self._weight(inputs, targets)
            weights.append(weight)
            self.n_examples += n
            loss, gradient = self.of_batch(self.point[None], inputs, targets, weight)
            losses.append(float(loss[0]))
            total += weight * gradient[0].double()
            if (len(self._kept) + 1) * gradient.numel() <= _KEPT and len(self._kept) == len(weights) - 1:
                self._kept.append((loss, gradient))
        if not sum(weights):
            raise ModelError("no example counts in the loss, so that there is none to sample by")
        shares = [weight / sum(weights) for weight in weights]
        self.loss = sum(share * loss for share, loss in zip(shares, losses, strict=True))
        self.gradient = (total / sum(weights)).to(self.point)
        self.factors = [share * len(shares) for share in shares]

    def of_batch(self, points: Tensor, inputs: Any, targets: Any, weight: float) -> tuple[Tensor, Tensor]:
        """Losses ``(k,)`` and gradients ``(k, P)`` of a batch at some points."""
        if weight:
            return self.gradients(points, inputs, targets)
        return points.new_zeros(len(points)), torch.zeros_like(points)  # all is ignored, and the mean 0 / 0

    def at_point(self, index: int, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Loss ``(1,)`` and gradient ``(1, P)`` of a batch at the checkpoint."""
        if index < len(self._kept):
            return self._kept[index]
        return self.of_batch(self.point[None], inputs, targets, self.factors[index])

    def excess(self, points: Tensor) -> Tensor:
        """Loss of all examples above that at the checkpoint, ``(k,)``, by forward passes alone."""
        excess = torch.zeros(len(points), dtype=torch.float64, device=points.device)
        for index, (inputs, targets) in enumerate(self.batches):
            factor = self.factors[index]
            if factor:
                loss, (there, _) = self.gradients.losses(points, inputs, targets), self.at_point(index, inputs, targets)
                excess += factor / len(self.factors) * (loss.double() - there.double())
        return excess

    def _weight(self, inputs: Any, targets: Any) -> tuple[float, int]:
        """What a batch weighs in the mean, and how many of its examples count."""
        loss = self.gradients.surface.loss
        if loss.torch_loss is None:
            n = leading_size(targets, inputs)
            return n, n
        weights = example_weights(loss, targets)
        return float(weights.sum()), int((weights > 0).sum())

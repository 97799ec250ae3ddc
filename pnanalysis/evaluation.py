"""Losses and mistakes of several networks example by example, and their means and differences with paired errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pnanalysis.models import LOSSES, Loss

Array = NDArray[np.float64]


def log_probabilities(outputs: Tensor, targets: Tensor, loss: Loss) -> Tensor | None:
    """What a classifier says, as log-probabilities ``(N, classes, ...)``; ``None`` for real-valued targets.

    Binary cross-entropy makes each of its outputs a choice between two classes.
    """
    if loss is LOSSES["binary_cross_entropy"]:
        return torch.stack([F.logsigmoid(-outputs), F.logsigmoid(outputs)], dim=1).double()
    if targets.is_floating_point():
        return None
    return F.log_softmax(outputs.double(), dim=1)


def example_losses(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of each example, ``(N,)``: what ``loss`` gives for batches of one."""
    if any(loss is known for known in LOSSES.values()):
        each: Callable[..., Tensor] = loss
        return _per_example(each(outputs, targets, reduction="none"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # vmap names operations that it repeats in a loop
            return torch.func.vmap(lambda o, t: loss(o[None], t[None]))(outputs, targets)
    except (RuntimeError, ValueError, TypeError):  # a loss that looks at values or sizes
        return torch.stack([loss(outputs[i : i + 1], targets[i : i + 1]) for i in range(len(outputs))])


def _per_example(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).mean(1)


class Scores:
    """Loss and error of every network on every example.

    The error is the share of wrong classes (of an example's positions, where it has several), or the squared error
    for real-valued targets, averaged over outputs.
    """

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self.classes: int | None = None
        self._losses: list[Tensor] = []
        self._errors: list[Tensor] = []

    def add(self, outputs: Sequence[Tensor], targets: Tensor) -> None:
        """Take in a batch: each network's outputs, and the targets."""
        self._losses.append(torch.stack([example_losses(self.loss, o, targets) for o in outputs]).double().cpu())
        self._errors.append(torch.stack([self._error(o, targets) for o in outputs]).double().cpu())

    def _error(self, outputs: Tensor, targets: Tensor) -> Tensor:
        said = log_probabilities(outputs, targets, self.loss)
        if said is None:
            return _per_example((outputs - targets).square())
        self.classes = said.shape[1]
        return _per_example((said.argmax(1) != targets).double())

    @property
    def losses(self) -> Array:
        """``(k, N)``."""
        return torch.cat(self._losses, dim=1).numpy()

    @property
    def errors(self) -> Array:
        """``(k, N)``."""
        return torch.cat(self._errors, dim=1).numpy()


def paired(values: Array) -> dict[str, Any]:
    """Means over examples and their differences.

    Parameters
    ----------
    values : ndarray, shape (k, N)
        One number a network and example; the same examples for all networks.

    Returns
    -------
    dict
        ``""`` and ``"_se"``: means ``(k,)`` with standard errors; ``"_difference"`` and ``"_difference_se"``: row
        minus column ``(k, k)``, the error that of the mean of the differences, so that what makes an example easy or
        hard for all networks does not count.
    """
    k = len(values)
    mean = values.mean(1)
    difference_se = np.zeros((k, k))
    for i in range(k):
        for j in range(i):
            difference_se[i, j] = difference_se[j, i] = _se(values[i] - values[j])
    return {
        "": mean,
        "_se": np.array([_se(row) for row in values]),
        "_difference": mean[:, None] - mean[None, :],
        "_difference_se": difference_se,
    }


def _se(values: Array) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.nan

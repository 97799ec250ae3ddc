"""Losses and errors of several networks on the same examples: means, and differences with paired standard errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.estimates import mean_and_se
from pnanalysis.evaluation.batch_pass import BatchPass
from pnanalysis.evaluation.losses import linearised, log_probabilities, squared_errors


class Scores:
    """Loss and error of every network on every example.

    The error is the fraction of wrong classes (of an example's positions, where it has several), or the squared error
    for real-valued targets, averaged over outputs; NaN where the targets are neither.

    Attributes
    ----------
    classes : int or None
        Number of classes; ``None`` where mistakes cannot be counted.
    """

    def __init__(self) -> None:
        self.classes: int | None = None
        self._parts: list[Tensor] = []

    def add(self, passes: Sequence[BatchPass]) -> None:
        """Add the passes of every network over a batch.

        Raises
        ------
        ModelError
            If the loss is not a mean over examples.
        """
        self._parts.append(torch.stack([self._rows(one) for one in passes], dim=1).cpu())

    def _rows(self, one: BatchPass) -> Tensor:
        """Losses, their weights, errors and their weights, (4, N)."""
        each, weight = one.checked_examples()
        predicted, found = one.prediction, one.errors()
        if found is not None and predicted is not None:
            probabilities = log_probabilities(predicted, one.targets, one.loss)
            self.classes = None if probabilities is None else probabilities.shape[1]
        else:
            errors = None if predicted is None else squared_errors(one.loss, predicted, one.targets)
            found = (torch.full_like(each, torch.nan) if errors is None else errors, torch.ones_like(each))
        return torch.stack([part.detach().double() for part in (each, weight, *found)])

    def _all(self) -> Array:
        return torch.cat(self._parts, dim=-1).numpy()

    @property
    def n(self) -> int:
        """Number of examples, those that do not count included."""
        return sum(part.shape[-1] for part in self._parts)

    @property
    def losses(self) -> Array:
        """``(k, n)`` of the examples that count; of weighted means, what
        :func:`pnanalysis.evaluation.losses.linearised` makes of them.
        """
        each, weight, _, _ = self._all()
        return _linearised(each, weight)

    @property
    def errors(self) -> Array:
        """The same of errors; other examples may count in them."""
        _, _, each, weight = self._all()
        return _linearised(each, weight)

    @property
    def example_errors(self) -> Array:
        """``(k, N)``: the error of each example, not weighted."""
        return self._all()[2]


def _linearised(each: Array, weight: Array) -> Array:
    """Of the examples that have a weight: the others are no evidence; all where none has."""
    counted = (weight > 0).any(0)
    return linearised(each[:, counted], weight[:, counted]) if counted.any() else each


def paired(values: Array) -> dict[str, Any]:
    """Means over examples and their differences.

    Parameters
    ----------
    values : ndarray, shape (k, N)
        One number per network and example; the same examples for all networks.

    Returns
    -------
    dict
        ``""`` and ``"_se"``: means ``(k,)`` with standard errors; ``"_difference"`` and ``"_difference_se"``: row
        minus column ``(k, k)``; its standard error is that of the mean difference per example, so that what makes an
        example easy or hard for all networks cancels.
    """
    k = len(values)
    mean = values.mean(1)
    difference_se = np.zeros((k, k))
    for i in range(k):
        for j in range(i):
            difference_se[i, j] = difference_se[j, i] = mean_and_se(values[i] - values[j])[1]
    return {
        "": mean,
        "_se": np.array([mean_and_se(row)[1] for row in values]),
        "_difference": mean[:, None] - mean[None, :],
        "_difference_se": difference_se,
    }

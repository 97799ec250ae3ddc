"""How networks differ in what they compute on the same examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pnanalysis.arrays import Array
from pnanalysis.errors import ModelError
from pnanalysis.evaluation.batch_pass import BatchPass
from pnanalysis.evaluation.cka import CentredKernelAlignment
from pnanalysis.evaluation.diagnosis import clear_errors
from pnanalysis.evaluation.foreign_parameters import check_no_foreign
from pnanalysis.evaluation.forward import required_prediction
from pnanalysis.evaluation.losses import InspectedLoss, counted_positions, log_probabilities
from pnanalysis.evaluation.randomness import check_repeatable
from pnanalysis.evaluation.scores import Scores
from pnanalysis.inputs.batches import map_tensors
from pnanalysis.inputs.copies import matching_dtype
from pnanalysis.significance import share_interval
from pnanalysis.terminal.progress import Advance

_ROUND_OFF = 1e-15  # nats: smaller divergences are round-off of double precision


def evaluate(
    networks: Mapping[str, nn.Module],
    batches: Iterable[tuple[Sequence[Any], Any]],
    loss: InspectedLoss,
    advance: Advance,
    pairs: FunctionPairs | None = None,
    alignment: CentredKernelAlignment | None = None,
) -> Scores:
    """Run all networks over the same batches, once.

    Parameters
    ----------
    networks : mapping of str to Module
        By label, in eval mode and float32.
    batches : iterable
        Pairs of the inputs of every network and the targets.
    loss : InspectedLoss
    advance : callable
        Called for every batch.
    pairs, alignment : optional
        Collect from the same passes how the functions and the layers differ.

    Raises
    ------
    ModelError
        If a network draws at random, or the loss is not a mean over examples; see also :func:`forward_all`.
    DataError
        If a network or the loss cannot take the data.
    """
    scores, first = Scores(), next(iter(networks))
    with torch.no_grad():
        for batch in batches:
            inputs, targets = map_tensors(batch, lambda t: t.to(matching_dtype(t, torch.float32)))
            passes = forward_all(networks, inputs, targets, loss, alignment, check=scores.n == 0)
            with clear_errors(first, networks[first], [(inputs[0], targets)], loss):
                scores.add(passes)
                if pairs is not None:
                    pairs.add(passes)
            advance()
    return scores


class FunctionPairs:
    """Sums over examples of how two networks' outputs differ, for all pairs of ``k`` networks.

    Parameters
    ----------
    loss : callable
        With the targets, distinguishes classification from regression.
    k : int
    """

    def __init__(self, loss: InspectedLoss, k: int) -> None:
        self.loss, self.k = loss, k
        self._sums: dict[str, Array] = {}
        self._weights: Array = np.zeros(3)  # sum, sum of squares, how many are not zero

    def add(self, passes: Sequence[BatchPass]) -> None:
        """Add the passes of every network over a batch; without predictions, their differences are NaN.

        Positions that the loss ignores do not count.
        """
        n, targets = passes[0].n, passes[0].targets
        found = [one.prediction for one in passes]
        tensors = [torch.full((n, 1), torch.nan) if one is None else one for one in found]
        logs = [log_probabilities(one, targets, self.loss) for one in tensors]
        if logs[0] is None:
            counted = torch.ones_like(tensors[0], dtype=torch.float64)
            self._tally("square", [one.double() for one in tensors], lambda a, b: (a - b).square(), counted)
        else:
            scores = [p for p in logs if p is not None]
            counted = counted_positions(scores[0], targets, self.loss).double()
            self._tally("disagreement", [p.argmax(1) for p in scores], lambda a, b: (a != b).double(), counted)
            self._tally("js_divergence", scores, js_divergence, counted)
        weights = counted.reshape(n, -1).mean(1)
        self._weights += (
            torch.stack([weights.sum(), weights.square().sum(), (weights > 0).sum().double()]).cpu().numpy()
        )

    def _tally(
        self, name: str, each: list[Tensor], measure: Callable[[Tensor, Tensor], Tensor], counted: Tensor
    ) -> None:  # fmt: skip
        """Add sums over examples for ``measure(a, b)`` of every pair: of the means over the positions that count, by
        their number, and of products of these by the square of that number.
        """
        sums = self._sums.setdefault(name, np.zeros((3, self.k, self.k)))
        weights = counted.reshape(len(counted), -1).mean(1)
        for i in range(self.k):
            for j in range(i):
                values = torch.where(counted > 0, measure(each[i], each[j]), 0.0)
                whole = values.reshape(len(values), -1).mean(1)  # weight times mean
                found = torch.stack([whole.sum(), (weights * whole).sum(), whole.square().sum()]).cpu().numpy()
                sums[:, i, j] += found
                sums[:, j, i] += found

    def variables(self, accuracy: Array, classes: int | None) -> dict[str, Any]:
        """The results, as variables along (checkpoint, other).

        Parameters
        ----------
        accuracy : ndarray, shape (k,)
            Of each network on these examples.
        classes : int or None
            Number of classes; ``None`` for real-valued targets.
        """
        found: dict[str, Array] = {}
        weight, weight2, n = self._weights
        for name, (total, by_weight, squares) in self._sums.items():
            # of a ratio of two sums (W. Cochran, Sampling Techniques, section 2.11)
            with np.errstate(divide="ignore", invalid="ignore"):  # nothing may count
                mean = total / weight
                spread = np.maximum(squares - 2 * mean * by_weight + mean**2 * weight2, 0.0) / weight**2
            se = np.sqrt(spread * n / (n - 1)) if n > 1 else np.full(mean.shape, np.nan)
            if name == "square":
                root = np.sqrt(mean)
                name, mean = "rms_difference", root
                se = np.divide(se, 2 * root, out=np.zeros_like(se), where=root > 0)
            found |= {name: mean, f"{name}_se": se}
            if name == "disagreement":
                found["disagreement_low"], found["disagreement_high"] = share_interval(mean, se, n)
        if classes is not None:
            found["expected_disagreement"] = expected_disagreement(accuracy, classes)
        return {name: (("checkpoint", "other"), values) for name, values in found.items()}


def cka_variables(alignment: CentredKernelAlignment) -> dict[str, Any]:
    """CKA and its standard error as variables along (checkpoint, other, layer)."""
    cka, se = alignment.result()
    return {"cka": (("checkpoint", "other", "layer"), cka), "cka_se": (("checkpoint", "other", "layer"), se)}


def js_divergence(a: Tensor, b: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of log-probabilities ``(N, C, ...)``, along the classes."""
    middle = torch.logaddexp(a, b) - np.log(2.0)
    total = sum((p.exp() * (p - middle)).nan_to_num(nan=0.0) for p in (a, b)).sum(1) / 2  # 0 log 0 = 0
    return torch.where(total > _ROUND_OFF, total, torch.zeros_like(total))


def expected_disagreement(accuracy: Array, classes: int) -> Array:
    """``(k, k)``: disagreement of networks with these accuracies whose mistakes are independent."""
    right, wrong = np.multiply.outer(accuracy, accuracy), np.multiply.outer(1 - accuracy, 1 - accuracy)
    return 1.0 - right - wrong / max(classes - 1, 1)


def forward_all(
    networks: Mapping[str, nn.Module], inputs: Sequence[Any], targets: Any, loss: InspectedLoss,
    alignment: CentredKernelAlignment | None = None, check: bool = False,
) -> list[BatchPass]:  # fmt: skip
    """Passes of every network over its own form of the same examples.

    Parameters
    ----------
    networks, inputs, targets, loss
    alignment : CentredKernelAlignment, optional
        Compare the layers of these passes.
    check : bool
        Whether to see first that no network draws at random, and that the loss holds none of their parameters.

    Raises
    ------
    ModelError
        If there is no prediction among outputs, or predictions are not of one shape.
    DataError
        If a network cannot take its examples.
    """
    if check:
        for (label, network), x in zip(networks.items(), inputs, strict=True):
            with clear_errors(label, network, [(x, targets)], loss):
                check_repeatable(label, network, (x, targets), loss)
                check_no_foreign(label, network, (x, targets), loss)
    passes = []
    with alignment or nullcontext():  # here alone: losses may run a network again
        for (label, network), x in zip(networks.items(), inputs, strict=True):
            with clear_errors(label, network, [(x, targets)], loss):
                passes.append(BatchPass.of(network, loss, x, targets))
    if alignment is not None:
        alignment.collect(passes[0].n)
    if loss.takes_model and any(one.prediction is None for one in passes):
        return passes
    shapes = {
        label: required_prediction(one.outputs, label).shape[1:] for label, one in zip(networks, passes, strict=True)
    }
    reference = next(iter(shapes))
    for label, shape in shapes.items():
        if shape != shapes[reference]:
            first, other = (" x ".join(map(str, each)) or "1" for each in (shapes[reference], shape))
            raise ModelError(
                f"{reference} has {first} outputs, {label} has {other}: what they compute cannot be compared"
            )
    return passes

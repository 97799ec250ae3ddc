"""How far networks lie from one another as functions: predictions, probabilities and layers on the same examples.

Distance in parameters says little of this: permuting a network's hidden units moves it far and changes nothing that
it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from pnanalysis import schema
from pnanalysis.checks import at_least, one_of
from pnanalysis.evaluation.cka import CentredKernelAlignment
from pnanalysis.evaluation.forward import explained, placed, wanted
from pnanalysis.evaluation.losses import log_probabilities
from pnanalysis.evaluation.scores import Scores
from pnanalysis.inputs.batches import batch_size
from pnanalysis.inputs.data import SPLITS
from pnanalysis.inputs.models import Loss
from pnanalysis.inputs.selection import Examples, Member, members, run_all
from pnanalysis.inputs.sources import Source, resolve_device
from pnanalysis.io.runs import Run
from pnanalysis.terminal.progress import Advance, progress_bar

Array = NDArray[np.float64]

_ROUND_OFF = 1e-15  # nats: what double precision leaves of zero


def functional_distance(
    *runs: Run | Source,
    checkpoints: Sequence[str] | None = None,
    split: str = "test",
    n: int | None = None,
    batch_size: int = 256,
    cka: bool = True,
    device: str | None = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    r"""How much two or more networks differ in what they compute.

    Parameters
    ----------
    *runs : Run or Source
        Runs, or a user's own models and weights; architectures may differ, outputs may not.
    checkpoints : sequence of str, optional
        See :func:`pnanalysis.compare`.
    split : {"test", "validation", "train"}
        Examples to look at; where there is no such split, the last there is.
    n : int or None
        How many, drawn by ``seed``; all if ``None``.
    batch_size : int
        Examples at a time; fewer where that would give less than ten batches.
    cka : bool
        Compare the layers too.
    device : str or None
    seed : int
    progress : bool

    Returns
    -------
    xarray.Dataset
        Kind ``functional``, dims ``checkpoint`` and ``other``. For classifiers ``disagreement``, the share of
        examples that two networks put into different classes, ``expected_disagreement`` (see Notes), and
        ``js_divergence``, the mean Jensen-Shannon divergence of their probabilities, in nats (at most log 2). For
        real-valued targets ``rms_difference`` of the outputs. ``cka`` (checkpoint, other, layer): see
        :class:`pnanalysis.evaluation.cka.CentredKernelAlignment`. ``_se`` is a standard error, over examples or (CKA) batches.

    Raises
    ------
    PnError
        If there are fewer than two checkpoints, data sets differ, or the numbers of outputs do.

    Notes
    -----
    *The yardstick.* Two networks of accuracies :math:`a, b` among :math:`C` classes whose mistakes are independent
    of one another and fall on every wrong class alike disagree on a share

    .. math:: 1 - a b - (1 - a)(1 - b) / (C - 1)

    of the examples. Networks that find the same examples hard, or confuse the same classes, disagree on fewer.

    References
    ----------
    S. Fort, H. Hu, B. Lakshminarayanan, "Deep Ensembles: A Loss Landscape Perspective", arXiv:1912.02757
    (disagreement). For CKA see :class:`pnanalysis.evaluation.cka.CentredKernelAlignment`.
    """
    at_least(1, n=n, batch_size=batch_size)
    at_least(0, seed=seed)
    one_of(SPLITS, split=split)
    chosen = members(runs, checkpoints)
    torch_device = resolve_device(device)
    examples = Examples(chosen, torch_device)
    split = examples.nearest(split)
    networks = [member.network(torch_device) for member in chosen]
    alignment = CentredKernelAlignment(networks) if cka else None
    loss = placed(chosen[0].source.loss, torch_device, torch.float32)
    function = FunctionPairs(loss, len(chosen))
    total, batches = examples.batches(split, n, batch_size, seed)
    with progress_bar(f"{split} examples", total, progress) as advance:
        scores = evaluate(loss, chosen, networks, batches, advance, function, alignment)
    variables = function.variables(1 - scores.errors.mean(1), scores.classes)
    labels = [member.label for member in chosen]
    coords: dict[str, Any] = {"checkpoint": labels, "other": labels}
    if alignment is not None:
        variables |= aligned(alignment)
        coords["layer"] = alignment.layers
    return schema.finish(
        xr.Dataset(variables, coords=coords), "functional", **chosen[0].source.dataset_attrs(), function_split=split,
        n=function.n, batch_size=batch_size, seed=seed, device=str(torch_device), dtype="float32",
    )  # fmt: skip


def evaluate(
    loss: Loss,
    chosen: Sequence[Member],
    networks: Sequence[nn.Module],
    batches: Iterable[tuple[list[Any], Any]],
    advance: Advance,
    pairs: FunctionPairs | None = None,
    alignment: CentredKernelAlignment | None = None,
) -> Scores:
    """One pass of all networks over the same batches: their scores, and what else is asked for is told of each."""
    scores = Scores(loss)
    labels = [member.label for member in chosen]
    with torch.no_grad(), alignment or nullcontext():
        for inputs, targets in batches:
            outputs = run_all(networks, inputs, targets, labels, scores.loss)
            with explained(labels[0], networks[0], [(inputs[0], targets)], scores.loss):
                scores.add(outputs, targets)
                if pairs is not None:
                    pairs.add(outputs, targets)
            if alignment is not None:
                alignment.collect(batch_size(targets))
            advance()
    return scores


class FunctionPairs:
    """Sums over examples of how two networks' outputs differ, for all pairs of ``k`` networks.

    Parameters
    ----------
    loss : callable
        Tells classifiers from regression, with the targets.
    k : int
    """

    def __init__(self, loss: Loss, k: int) -> None:
        self.loss, self.k, self.n = loss, k, 0
        self._sums: dict[str, Array] = {}

    def add(self, outputs: Sequence[Any], targets: Any) -> None:
        """Take in a batch: each network's outputs, and the targets."""
        tensors = [wanted(one) for one in outputs]
        self.n += len(tensors[0])
        said = [log_probabilities(one, targets, self.loss) for one in tensors]
        if said[0] is None:
            self._tally("square", [one.double() for one in tensors], lambda a, b: (a - b).square())
            return
        self._tally("disagreement", [p.argmax(1) for p in said if p is not None], lambda a, b: (a != b).double())
        self._tally("js_divergence", [p for p in said if p is not None], js_divergence)

    def _tally(self, name: str, each: list[Tensor], measure: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Add the sum and the sum of squares over examples of ``measure(a, b)`` for every pair."""
        sums = self._sums.setdefault(name, np.zeros((2, self.k, self.k)))
        for i in range(self.k):
            for j in range(i):
                values = measure(each[i], each[j])
                values = values.reshape(len(values), -1).mean(1)
                both = torch.stack([values.sum(), values.square().sum()]).cpu().numpy()
                sums[:, i, j] += both
                sums[:, j, i] += both

    def variables(self, accuracy: Array, classes: int | None) -> dict[str, Any]:
        """What is known, as variables along (checkpoint, other).

        Parameters
        ----------
        accuracy : ndarray, shape (k,)
            Of the networks on these examples.
        classes : int or None
            How many there are; ``None`` for real-valued targets.
        """
        found: dict[str, Array] = {}
        for name, (total, squares) in self._sums.items():
            mean = total / self.n
            spread = np.maximum(squares / self.n - mean**2, 0.0)
            se = np.sqrt(spread / (self.n - 1)) if self.n > 1 else np.full(mean.shape, np.nan)
            if name == "square":
                root = np.sqrt(mean)
                name, mean = "rms_difference", root
                se = np.divide(se, 2 * root, out=np.zeros_like(se), where=root > 0)
            found |= {name: mean, f"{name}_se": se}
        if classes is not None:
            found["expected_disagreement"] = expected_disagreement(accuracy, classes)
        return {name: (("checkpoint", "other"), values) for name, values in found.items()}


def aligned(alignment: CentredKernelAlignment) -> dict[str, Any]:
    """CKA and its standard error as variables along (checkpoint, other, layer)."""
    cka, se = alignment.result()
    return {"cka": (("checkpoint", "other", "layer"), cka), "cka_se": (("checkpoint", "other", "layer"), se)}


def js_divergence(a: Tensor, b: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of log-probabilities ``(N, C, ...)``, along the classes."""
    middle = torch.logaddexp(a, b) - np.log(2.0)
    total = sum((p.exp() * (p - middle)).nan_to_num(nan=0.0) for p in (a, b)).sum(1) / 2  # 0 log 0 = 0
    return torch.where(total > _ROUND_OFF, total, torch.zeros_like(total))


def expected_disagreement(accuracy: Array, classes: int) -> Array:
    """``(k, k)``: what networks of these accuracies and independent mistakes would disagree on."""
    right, wrong = np.multiply.outer(accuracy, accuracy), np.multiply.outer(1 - accuracy, 1 - accuracy)
    return 1.0 - right - wrong / max(classes - 1, 1)

r"""Loss and mistakes of a network per example, for means over examples with standard errors.

An example's loss is the loss function's value for that example alone. Where the mean over a batch weighs its examples
(classes of unequal weight, ignored positions), so do the means here, and their errors are those of a ratio of two sums:

.. math:: \bar L = \sum_i w_i L_i \big/ \sum_i w_i

Each example is then represented by :math:`\bar L + (w_i / \bar w) (L_i - \bar L)`. The mean of these numbers over
examples is :math:`\bar L`, and the standard error of that mean, by the usual formula, is the linearised one of the
ratio (W. Cochran, Sampling Techniques, 3rd ed. 1977, section 2.11); the same goes for differences between networks.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from pnanalysis.arrays import Array
from pnanalysis.errors import DataError, ModelError, reason
from pnanalysis.evaluation.forward import no_class, not_for
from pnanalysis.inputs.batches import IGNORED, leading_size, move, tensors
from pnanalysis.inputs.copies import copied, in_precision
from pnanalysis.inputs.models import Loss, takes_model
from pnanalysis.torch_internals import tree_flatten, tree_unflatten

_CLASS_LOSSES = (F.cross_entropy, F.nll_loss)
_REAL_LOSSES = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
_LOGIT_LOSSES = (F.binary_cross_entropy_with_logits,)
_MODULES: dict[Any, Any] = {
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.NLLLoss: F.nll_loss,
    nn.MSELoss: F.mse_loss,
    nn.L1Loss: F.l1_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
    nn.HuberLoss: F.huber_loss,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
}
#: Said where the loss of every batch is 0 / 0.
NOTHING_COUNTS = "no example counts in the loss: all targets are ignored; choose other examples"
_OPTIONS = ("weight", "ignore_index", "label_smoothing", "pos_weight", "beta", "delta")
#: What a loss raises that cannot take one example, or cannot be vectorised.
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)
#: Deviation of a batch's loss from the mean over its examples, relative to their size, that round-off explains: of the
#: summation, in units of the precision; and on CUDA, where convolutions are computed in TensorFloat-32 by default.
_ROUND_OFF_UNITS, _TENSOR_FLOAT = 200, 1e-3


class TorchLoss(NamedTuple):
    """One of torch's own losses that is a mean over elements: its function, and the options it is called with."""

    function: Any
    options: dict[str, Any]

    @property
    def ignored(self) -> int:
        """The target that does not count."""
        return int(self.options.get("ignore_index", IGNORED))

    @property
    def kind(self) -> str:
        """``classes`` (or their probabilities), ``sides`` of zero that outputs choose between, or ``numbers``."""
        return "classes" if self.function in _CLASS_LOSSES else "sides" if self.function in _LOGIT_LOSSES else "numbers"


class InspectedLoss:
    """A loss that has been recognised once, so that its batches need not ask again what it is.

    Called like the loss itself. Every function here takes one in place of a loss.

    Attributes
    ----------
    takes_model : bool
        Whether it is called with the network and the batch: see :func:`pnanalysis.inputs.models.takes_model`.
    """

    def __init__(self, function: Loss, torch_loss: TorchLoss | None) -> None:
        self.function, self.torch_loss = function, torch_loss
        self.takes_model = torch_loss is None and takes_model(function)
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        value = self.function(outputs, class_indices(self.torch_loss, targets))
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            given = f"tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise ModelError(f"the loss {self.__name__} returns a {given}; it must return a tensor of real numbers")
        return value


def check_finite(value: Tensor) -> None:
    """Refuse a loss that is infinite or not a number where a network stands: nothing can be measured around it.

    Raises
    ------
    ModelError
    """
    if not bool(value.detach().isfinite().all()):
        raise ModelError(
            "the loss of the network is not finite; look at its weights, its data and the loss, or compute in float64"
        )


def loss_on(loss: Loss, device: torch.device, dtype: torch.dtype) -> InspectedLoss:
    """The loss, recognised, with the tensors it holds (class weights, say) on the device and in the precision given."""
    if isinstance(loss, InspectedLoss):
        loss = loss.function
    if isinstance(loss, nn.Module):
        loss = in_precision(copied(loss), dtype).to(device)  # the caller's own stays where and as it is
    elif isinstance(loss, partial):
        loss = partial(loss.func, *loss.args, **move(loss.keywords, device, dtype))
    return InspectedLoss(loss, recognise(loss))


def known(loss: Loss) -> TorchLoss | None:
    """One of torch's own mean losses, as a function, a module or a ``functools.partial``; ``None`` for all others."""
    return loss.torch_loss if isinstance(loss, InspectedLoss) else recognise(loss)


def recognise(loss: Loss) -> TorchLoss | None:
    """The result of :func:`known` for a loss that has not been inspected yet."""
    function, options = loss, {}
    if isinstance(loss, partial) and not loss.args:
        function, options = loss.func, dict(loss.keywords)
    elif type(loss) in _MODULES:
        function = _MODULES[type(loss)]
        options = {name: getattr(loss, name) for name in (*_OPTIONS, "reduction") if hasattr(loss, name)}
    if options.pop("reduction", "mean") != "mean" or not set(options) <= set(_OPTIONS):
        return None
    return TorchLoss(function, options) if function in (*_CLASS_LOSSES, *_REAL_LOSSES, *_LOGIT_LOSSES) else None


def class_indices(found: TorchLoss | None, targets: Any) -> Any:
    """Targets that are classes, as int64; all others as they are.

    Torch takes uint8 classes in the forward pass of its cross-entropies only, and no other type but int64; as an index
    into class weights uint8 is a mask.
    """
    is_classes = found is not None and isinstance(targets, Tensor) and _are_indices(found, targets)
    return targets.long() if is_classes and targets.dtype != torch.bool else targets


def kind_of(loss: Loss | None) -> str | None:
    """What a loss takes for targets (``classes``, ``sides`` or ``numbers``); ``None`` for custom losses."""
    found = None if loss is None else known(loss)
    return None if found is None else found.kind


def check_targets(loss: Loss, outputs: Any, targets: Any) -> None:
    """Refuse targets that one of torch's losses accepts but misinterprets, and targets that are not classes.

    Parameters
    ----------
    loss : callable
        Nothing is checked for custom losses.
    outputs, targets : Tensor, shape (N, ...)

    Raises
    ------
    DataError
        For classification with a single output; for targets that are not classes of the outputs; for real-valued
        targets whose shape differs from that of the outputs.
    """
    found = known(loss)
    if found is None or not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return
    if found.kind != "classes":
        if outputs.shape != targets.shape:
            raise DataError(
                f"outputs of {_shape(outputs)} and targets of {_shape(targets)} would be broadcast against each "
                f"other by {found.function.__name__}; give both one shape"
            )
        return
    if outputs.shape[1:2] in ((), (1,)):
        raise DataError(
            "cross-entropy over a single output is always zero; give --loss mse for numbers or binary_cross_entropy "
            "for two classes"
        )
    if _are_indices(found, targets) and outputs.ndim == targets.ndim + 1:
        wrong = no_class(outputs.shape[1], targets, found.ignored)
        if wrong is not None:
            raise DataError(f"the loss cannot take these data: {wrong}")


def check_own_weights(loss: Loss, targets: Any) -> None:
    """Refuse examples that add to a mean without a weight in it: label smoothing of a class whose weight is zero.

    Raises
    ------
    ModelError
    """
    found = known(loss)
    if found is None or not _are_indices(found, targets):
        return
    weight, targets = found.options.get("weight"), class_indices(found, targets)
    if weight is None or not found.options.get("label_smoothing"):
        return
    lost = {int(target) for target in targets.unique() if target != found.ignored and weight[target] == 0}
    if lost:
        raise ModelError(
            f"class {min(lost)} has no weight in the loss, but its examples add to it by label smoothing, so that they "
            "have no losses of their own; leave them out, ignore them (ignore_index), or give the class a small weight"
        )


def example_losses(loss: Loss, outputs: Any, targets: Any, check: bool = True) -> tuple[Tensor, Tensor]:
    """The loss of each example of a batch, and its weight in the batch's mean.

    Parameters
    ----------
    loss : callable
    outputs, targets : tensors, or nests of tensors whose first dims count examples
    check : bool
        Whether to look at the values of the targets, which a trace cannot.

    Returns
    -------
    loss, weight : Tensor, shape (N,)
        The loss is 0 where the weight is. Weights are 1, but for torch's cross-entropies: there each is the sum of the
        weights of the example's positions that are not ignored.

    Raises
    ------
    ModelError
        If the loss cannot be taken one example at a time, or takes no such outputs.
    DataError
        See :func:`check_targets`.
    """
    found = known(loss)
    if found is None:
        each = _one_by_one(loss, outputs, targets)
        return each, torch.ones_like(each)
    if not isinstance(outputs, Tensor):
        raise not_for(loss, outputs)
    if check:
        check_targets(loss, outputs, targets)
        check_own_weights(loss, targets)
    targets = class_indices(found, targets)
    values = found.function(outputs, targets, reduction="none", **found.options).reshape(len(targets), -1)
    if not _are_indices(found, targets):
        each = values.mean(1)
        return each, torch.ones_like(each)
    weight = example_weights(loss, targets).to(values)
    total = weight * values.shape[1]
    return values.sum(1) / torch.where(total > 0, total, torch.ones_like(total)), weight.expand(len(targets))


def example_weights(loss: Loss, targets: Any) -> Tensor:
    """Weight of each example in the mean over a batch, (N,): see :func:`example_losses`."""
    found = known(loss)
    if found is None or not _are_indices(found, targets):
        return torch.ones(leading_size(targets))
    targets = class_indices(found, targets)
    valid, weight = targets != found.ignored, found.options.get("weight")
    if weight is None:
        return valid.reshape(len(targets), -1).double().mean(1)
    classes = torch.where(valid, targets, torch.zeros_like(targets))
    counts = torch.where(valid, weight.to(targets.device)[classes], 0.0)
    return counts.reshape(len(targets), -1).double().mean(1)


def counts(loss: Loss, targets: Any) -> bool:
    """Whether any target of a batch counts: where all are ignored, its loss is 0 / 0."""
    return known(loss) is None or not isinstance(targets, Tensor) or bool(example_weights(loss, targets).any())


def _are_indices(found: TorchLoss, targets: Tensor) -> bool:
    return found.kind == "classes" and not targets.is_floating_point()


def _shape(tensor: Tensor) -> str:
    """The shape of a batch, as words."""
    return "shape (" + ", ".join(["N", *map(str, tensor.shape[1:])]) + ("," if tensor.ndim == 1 else "") + ")"


def _one_by_one(loss: Loss, outputs: Any, targets: Any) -> Tensor:
    """Values of a custom loss for batches of one example."""
    n = _n_examples(targets, outputs)
    leaves, structure = tree_flatten((outputs, targets))
    has_rows = [isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == n for leaf in leaves]
    rows = [leaf for leaf, there in zip(leaves, has_rows, strict=True) if there]

    def alone(*own: Tensor) -> Tensor:
        """The loss of one example; what is no tensor with a row for each (caches, means over the batch) is ``None``."""
        left = iter(own)
        nest = [next(left) if there else _unless_held(leaf) for leaf, there in zip(leaves, has_rows, strict=True)]
        return _scalar(loss(*tree_unflatten(nest, structure)))

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # vmap names operations that it repeats in a loop
            return vmap(lambda *own: alone(*(part.unsqueeze(0) for part in own)))(*map(torch.clone, rows))
    except _FAILURES:
        pass  # vmap cannot map a loss that branches on values or reads sizes; the loop below can
    try:
        return torch.stack([alone(*(part[i : i + 1].clone() for part in rows)) for i in range(n)])
    except _FAILURES as error:
        raise ModelError(f"the loss cannot be computed one example at a time ({reason(error)})") from error


def _n_examples(*nests: Any) -> int:
    """Rows of the first tensor that has any."""
    return next((len(tensor) for tensor in tensors(nests) if tensor.ndim), 0)


def _unless_held(leaf: Any) -> Any:
    """A number, a string or ``None`` as it is, for every example; ``None`` for everything else."""
    return leaf if isinstance(leaf, bool | int | float | str) else None


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ModelError(f"the loss of an example is {shown}; it must be a single number")
    return value.reshape(())


def check_mean(loss: Loss, whole: Tensor, each: Tensor, weight: Tensor) -> None:
    """Check that a batch's loss is the (weighted) mean over its examples; otherwise examples have no loss of their own.

    Parameters
    ----------
    loss : callable
    whole : Tensor, shape ()
        The loss of the batch.
    each, weight : Tensor, shape (N,)
        As :func:`example_losses` gives them.

    Raises
    ------
    ModelError
    """
    if known(loss) is not None:
        return  # torch's mean losses are, by definition
    batch, total = float(whole), float(weight.double().sum())
    mean = float((each.double() * weight.double()).sum()) / total if total > 0 else np.nan
    size = float((each.double().abs() * weight.double()).sum()) / total if total > 0 else np.nan
    tolerance = _TENSOR_FLOAT if each.is_cuda else _ROUND_OFF_UNITS * torch.finfo(each.dtype).eps
    if np.isfinite(batch) and not abs(mean - batch) <= tolerance * max(abs(batch), size, 1e-6):
        raise ModelError(
            f"the loss of a batch ({batch:.6g}) is not the mean over its examples ({mean:.6g}), as with a sum, or a "
            "mean over tokens or unmasked positions of which examples have unequal numbers; losses are compared "
            "example by example: average within each example first and then over examples, or give torch's own loss "
            "(ignore_index and class weights in torch.nn.CrossEntropyLoss are understood)"
        )


def class_scores(outputs: Tensor, targets: Any, loss: Loss) -> Tensor | None:
    """A classifier's logits with the classes along dim 1; ``None`` for real-valued targets.

    Binary cross-entropy makes each of its outputs a choice between two classes. Else the classes lie along dim 1, as
    torch's losses have them (N, C, ...), or along the last dim, (N, ..., C), as the targets' shape shows; where it may
    be either, only a loss of torch's own tells, and there are no scores for others.
    Real-valued targets are class probabilities under torch's cross-entropies, numbers under all other losses.
    """
    kind = kind_of(loss)
    if kind == "sides":
        return torch.stack([-outputs / 2, outputs / 2], dim=1)
    if not isinstance(targets, Tensor) or kind == "numbers":
        return None
    if targets.is_floating_point():
        return outputs if kind == "classes" and targets.shape == outputs.shape and outputs.ndim > 1 else None
    along_first = outputs.shape[:1] + outputs.shape[2:] == targets.shape and outputs.shape[1:2] > (1,)  # 1 is no choice
    along_last = outputs.shape[:-1] == targets.shape and outputs.shape[-1:] > (1,)
    if along_first and along_last and outputs.ndim > 2 and kind is None:
        return None
    if along_first:
        return outputs
    return outputs.movedim(-1, 1) if along_last else None


def log_probabilities(outputs: Tensor, targets: Any, loss: Loss) -> Tensor | None:
    """Log-probabilities of a classifier's :func:`class_scores`."""
    scores = class_scores(outputs, targets, loss)
    return None if scores is None else F.log_softmax(scores.double(), dim=1)


def counted_positions(scores: Tensor, targets: Any, loss: Loss) -> Tensor:
    """Where :func:`class_scores` ``(N, C, ...)`` count: not where the loss ignores the target, or it is no class.

    Returns
    -------
    Tensor of bool, shape (N, ...)
    """
    shape = scores.shape[:1] + scores.shape[2:]
    are_classes = isinstance(targets, Tensor) and targets.shape == shape and not targets.is_floating_point()
    if not are_classes or kind_of(loss) == "sides":
        return torch.ones(shape, dtype=torch.bool, device=scores.device)
    found = known(loss)
    ignored = IGNORED if found is None else found.ignored
    return (targets >= 0) & (targets < scores.shape[1]) & (targets != ignored)


def example_errors(loss: Loss, outputs: Tensor | None, targets: Any) -> tuple[Tensor, Tensor] | None:
    """The fraction of an example's positions that are misclassified, and the number of positions, (N,) each.

    Targets may be class indices, class probabilities (the likeliest class counts) or sides (binary cross-entropy).
    Positions that the loss ignores, or whose target is no class, do not count. ``None`` where the targets are not
    classes, or only the loss knows their order (classes along the last of several dims).
    """
    if outputs is None or not isinstance(targets, Tensor):
        return None
    scores = class_scores(outputs, targets, loss)
    if scores is None:
        return None
    valid = counted_positions(scores, targets, loss)
    if kind_of(loss) == "sides":
        true = (targets > 0.5).long()
    elif targets.is_floating_point():
        true = targets.argmax(1)
    elif outputs.shape[:1] + outputs.shape[2:] == targets.shape:
        true = targets
    else:
        return None
    wrong, valid = (part.reshape(len(targets), -1).double() for part in ((scores.argmax(1) != true) & valid, valid))
    return wrong.sum(1) / valid.sum(1).clamp_min(1), valid.mean(1)


def squared_errors(loss: Loss, outputs: Tensor, targets: Any) -> Tensor | None:
    """The squared error of each example, a mean over its outputs, (N,); ``None`` where targets are not real numbers."""
    if not isinstance(targets, Tensor) or targets.shape != outputs.shape:
        return None
    if not targets.is_floating_point() and kind_of(loss) != "numbers":
        return None
    return (outputs - targets).square().double().reshape(len(targets), -1).mean(1)


def linearised(values: Array, weights: Array) -> Array:
    """Numbers that represent the examples in means: see the module docstring.

    Parameters
    ----------
    values, weights : ndarray, shape (..., N)

    Returns
    -------
    ndarray, shape (..., N)
        ``values`` themselves where the weights are equal. Examples of no weight are represented by the mean, and the
        others scatter by so much more that the standard error is that of these alone.
    """
    total = weights.sum(-1, keepdims=True)
    if np.ptp(weights) == 0 or not (total > 0).all():
        return values
    n, counted = values.shape[-1], (weights > 0).sum(-1, keepdims=True)
    stretch = np.sqrt(counted / np.maximum(counted - 1, 1) * (n - 1) / n)
    with np.errstate(invalid="ignore", over="ignore"):  # losses far out may overflow
        mean = (values * weights).sum(-1, keepdims=True) / total
        return mean + stretch * weights * n / total * (values - mean)

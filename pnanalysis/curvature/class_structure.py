r"""What the outliers of a classifier's Gauss-Newton matrix are made of: means over classes of its examples' gradients.

For cross-entropy, let :math:`g_{ic'}` be the gradient of the loss of example :math:`i` if its label were :math:`c'`,
and :math:`p_{ic'}` the probability that the network gives that label. The Gauss-Newton matrix is a second moment,

.. math:: G = \sum_i \omega_i \sum_{c'} p_{ic'}\, g_{ic'}\, g_{ic'}^\top ,

with :math:`\omega_i` the example's weight in the loss. An analysis of variance divides it into four parts. With the
means :math:`\delta_{cc'}` over the examples of class :math:`c` and :math:`\delta_c` over :math:`c' \ne c`, all
weighted by :math:`w_{ic'} = \omega_i p_{ic'}`,

.. math::
    G = \underbrace{\sum_c w_c \delta_c \delta_c^\top}_{\text{class}}
      + \underbrace{\sum_{c \ne c'} w_{cc'} (\delta_{cc'} - \delta_c)(\delta_{cc'} - \delta_c)^\top}_{\text{cross}}
      + \underbrace{\sum_{i,\, c' \ne c} w_{ic'} (g_{ic'} - \delta_{cc'})(g_{ic'} - \delta_{cc'})^\top}_{\text{within}}
      + \underbrace{\sum_i w_{ic} g_{ic} g_{ic}^\top}_{\text{same}} .

The first has at most as many eigenvalues as there are classes C, which are the outliers of trained networks; the first
two together at most C (C - 1).

References
----------
V. Papyan, Measurements of Three-Level Hierarchical Structure in the Outliers in the Spectrum of Deepnet Hessians,
ICML 2019, arXiv:1901.08244.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pnanalysis.arrays import Array
from pnanalysis.curvature.base import CurvatureOperator
from pnanalysis.curvature.network_loss import LossArguments
from pnanalysis.curvature.output_curvature import class_positions
from pnanalysis.curvature.parameters import join_tensors, pullback, requiring_grad, split_vector
from pnanalysis.errors import CurvatureError
from pnanalysis.inputs.batches import can_cut, rows
from pnanalysis.spectra.inner_products import coordinates, norms

#: The parts of the matrix, in the order of the formula above.
LEVELS = ("class", "cross", "within", "same")
#: With more classes the means are too many.
MOST_CLASSES = 200
#: Bytes that means of pairs of classes may take; beyond these, only those of classes are computed.
_MOST_BYTES = 2**31
#: Directions of the span of means whose share of it is smaller are round-off.
_CUTOFF = {torch.float64: 1e-10, torch.float32: 1e-5}


@dataclass(frozen=True)
class ClassStructure:
    """The parts of a classifier's Gauss-Newton matrix.

    Attributes
    ----------
    n_classes : int
    level_form : ndarray
        ``v' M v`` of each of :data:`LEVELS`, ``(4, k)``; they add up to ``v' G v`` of each vector.
    class_value, cross_value : ndarray
        Eigenvalues, descending, of the part of the classes ``(C,)``, and of that with the pairs of classes
        ``(C (C - 1),)``; the latter empty where the means do not fit into memory.
    class_part, cross_part : ndarray
        Part of the squared length of each vector in the span of the means of the classes, and of pairs of classes,
        ``(k,)``.
    class_rank, cross_rank : int
        Dimensions of these spans; divided by the number of parameters, the part to expect of a random vector.
    """

    n_classes: int
    level_form: Array
    class_value: Array
    cross_value: Array
    class_part: Array
    cross_part: Array
    class_rank: int
    cross_rank: int


def class_structure(op: CurvatureOperator, V: Tensor) -> ClassStructure:
    """What a classifier's Gauss-Newton matrix is made of, along some unit vectors.

    Takes about as long as C gradients over the data, and as many again as there are vectors.

    Parameters
    ----------
    op : CurvatureOperator
        Of network, loss and data; which of the matrices does not matter.
    V : Tensor
        ``(P, k)``.

    Raises
    ------
    CurvatureError
        If the loss is not torch's cross-entropy over classes, there are more than 200 classes, the network has
        statistics of whole batches or draws at random, or two ways to compute the same number differ.
    """
    reason = why_none(op)
    if reason:
        raise CurvatureError(reason)
    return op._in_passes_that_fit(lambda: _Sums(op, V).structure())


def why_none(op: CurvatureOperator) -> str:
    """Why there is no class structure, as far as that is known beforehand; empty where there may be one."""
    if op.bn_mode == "train" or op.draws is not None:
        return "examples have no gradients of their own with statistics of batches, or with random draws"
    if op.loss_fn.takes_model:
        return "the class structure needs cross_entropy(outputs, classes)"
    return ""


def vectors_needed(n_classes: int, n_parameters: int, dtype: torch.dtype) -> int:
    """The vectors of P numbers that :func:`class_structure` keeps: means, and their sums over labels."""
    if n_classes > MOST_CLASSES:
        return 0
    return n_classes * (n_classes if _is_by_pair(n_classes, n_parameters, dtype) else 1) + n_classes


def _is_by_pair(n_classes: int, n_parameters: int, dtype: torch.dtype) -> bool:
    return n_classes * (n_classes - 1) * n_parameters * dtype.itemsize <= _MOST_BYTES


class _Sums:
    """Sums over all examples, by class and by label."""

    def __init__(self, op: CurvatureOperator, V: Tensor) -> None:
        self.op, self.V = op, V.to(op.device, op.dtype)
        self.n_classes = self._count()
        C, k = self.n_classes, V.shape[1]
        self.by_pair = _is_by_pair(C, len(V), op.dtype)
        self.weight = torch.zeros(C, C, dtype=torch.float64)
        self.first, self.second = (torch.zeros(C, C, k, dtype=torch.float64) for _ in range(2))
        labels = C if self.by_pair else 1
        self.means = torch.zeros(C, labels, len(V), dtype=op.dtype, device=op.device)
        for weight, at in self._batches():
            self._add_forms(weight, at)
        self._add_means()

    def structure(self) -> ClassStructure:
        C, k = self.n_classes, self.V.shape[1]
        others = ~torch.eye(C, dtype=torch.bool)
        w, first = self.weight * others, self.first * others[..., None]
        second = self.second * others[..., None]
        of_class = _ratio(first.sum(1).square(), w.sum(1)[:, None]).sum(0)
        of_pairs = _ratio(first.square(), w[..., None]).sum((0, 1))
        whole = second.sum((0, 1))
        same = torch.einsum("cck->k", self.second)
        forms = torch.stack([of_class, of_pairs - of_class, whole - of_pairs, same]).clamp_min(0).numpy()
        class_means = self.means.sum(1).T
        self._check(class_means, first.sum(1))
        class_value, class_part, class_rank = self._span(class_means, w.sum(1))
        cross_value, cross_part, cross_rank = np.empty(0), np.full(k, np.nan), 0
        if self.by_pair and C > 2:
            # those of a class with itself weigh nothing
            cross_value, cross_part, cross_rank = self._span(self.means.flatten(0, 1).T, w.flatten())
            cross_value = cross_value[: C * (C - 1)]
        elif self.by_pair:  # of two classes, those of pairs are those of classes
            cross_value, cross_part, cross_rank = class_value, class_part, class_rank
        return ClassStructure(
            C, forms, class_value, cross_value, class_part, cross_part, class_rank, cross_rank
        )  # fmt: skip

    def _count(self) -> int:
        at = self.op._few
        found = class_positions(self.op.loss_fn, self.op._loss.outputs(at, at.theta), at.targets)
        if found is None:
            raise CurvatureError("the class structure needs torch's cross_entropy of outputs over classes")
        n_classes = found[0].shape[1]
        if not 2 <= n_classes <= MOST_CLASSES:
            raise CurvatureError(f"the class structure takes 2 to {MOST_CLASSES} classes, not {n_classes:,}")
        return n_classes

    def _batches(self) -> Iterator[tuple[float, LossArguments]]:
        yield from ((weight, at) for _, weight, at in self.op._weighted())

    def _positions(self, at: LossArguments, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities ``(n, C)``, classes and weights of positions; those that do not count have weight 0."""
        found = class_positions(self.op.loss_fn, outputs, at.targets)
        if found is None:
            raise CurvatureError("the class structure needs torch's cross_entropy of outputs over classes")
        logits, targets, weight = found
        targets = torch.where(weight[:, 0] > 0, targets, 0)
        return torch.softmax(logits.to(weight.dtype), 1), targets, weight[:, 0]

    def _add_forms(self, batch_weight: float, at: LossArguments) -> None:
        """Slopes of all losses of all labels along the vectors, by forward derivatives of the outputs."""
        theta = requiring_grad(at.theta)
        leaves = list(theta.values())
        outputs = self.op._loss.outputs(at, theta)
        p, targets, weight = self._positions(at, outputs)
        cotangent = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(outputs, leaves, cotangent, create_graph=True, materialize_grads=True)
        w = (batch_weight * weight[:, None] * p).double().cpu()
        one_hot = torch.nn.functional.one_hot(targets.cpu(), self.n_classes).double()
        self.weight += one_hot.T @ w
        for j, v in enumerate(self.V.T):
            (pushed,) = pullback(pulled, [cotangent], split_vector(v, self.op.parameter_shapes))
            z = pushed.movedim(1, -1).flatten(0, -2).to(p.dtype)
            slope = ((p * z).sum(1, keepdim=True) - z).double().cpu()
            self.first[..., j] += one_hot.T @ (w * slope)
            self.second[..., j] += one_hot.T @ (w * slope.square())

    def _add_means(self) -> None:
        """Gradients summed over the examples of each class, for every other label or for all of them together."""
        for batch_weight, at in self._batches():
            with torch.no_grad():
                outputs = self.op._loss.outputs(at, at.theta)
            _, targets, weight = self._positions(at, outputs)
            single = at.targets.ndim == 1 and can_cut((at.inputs, at.targets))
            for c in torch.unique(targets[weight > 0]).tolist():
                chosen = (targets == c) & (weight > 0)
                if single:
                    inputs, labels = rows((at.inputs, at.targets), chosen)
                    self._add_class(c, batch_weight * weight[chosen], at._replace(inputs=inputs, targets=labels))
                else:
                    self._add_class(c, batch_weight * weight * chosen, at)

    def _add_class(self, c: int, weight: Tensor, at: LossArguments) -> None:
        """``weight`` is that of each position, 0 for those of other classes."""
        theta = requiring_grad(at.theta)
        leaves = list(theta.values())
        outputs = self.op._loss.outputs(at, theta)
        p = torch.softmax(outputs.detach().movedim(1, -1).flatten(0, -2).to(weight.dtype), 1)
        for cotangent, into in self._cotangents(c, p):
            shaped = (weight[:, None] * cotangent).view(*outputs.movedim(1, -1).shape).movedim(-1, 1).to(outputs)
            parts = torch.autograd.grad(outputs, leaves, shaped, retain_graph=True, materialize_grads=True)
            into += join_tensors(parts)

    def _cotangents(self, c: int, p: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """By the logits: of each other label, and where the sum goes."""
        if not self.by_pair:
            others = p.clone()
            others[:, c] = 0
            yield p * others.sum(1, keepdim=True) - others, self.means[c, 0]
            return
        for label in range(self.n_classes):
            if label != c:
                cotangent = p[:, label : label + 1] * p
                cotangent[:, label] -= p[:, label]
                yield cotangent, self.means[c, label]

    def _check(self, class_means: Tensor, expected: Tensor) -> None:
        """The means along the vectors, by reverse mode, are the mean slopes, by forward mode."""
        found = coordinates(class_means, self.V).cpu().double()
        size = float(norms(class_means).max()) or 1.0
        off = float((found - expected).abs().max()) / size
        if off > (1e-8 if self.op.dtype == torch.float64 else 1e-3 if self.op.amp == "no" else 5e-2):
            raise CurvatureError(f"mean gradients of classes by two ways differ by {off:.1e} of their size")

    def _span(self, sums: Tensor, weight: Tensor) -> tuple[Array, Array, int]:
        """Eigenvalues of the weighted second moment of means, parts of the vectors in their span, and its rank.

        ``sums (P, m)`` are the means times their weights ``(m,)``.
        """
        keep = np.flatnonzero(weight.numpy() > 0)
        scale = 1 / np.sqrt(weight.numpy()[keep])[:, None]
        # not the means but their inner products are scaled, of which there are fewer numbers
        gram = coordinates(sums, sums).cpu().double().numpy()[np.ix_(keep, keep)] * scale * scale.T
        value, turn = np.linalg.eigh(gram)
        held = value > _CUTOFF.get(self.op.dtype, 1e-5) * max(value.max(initial=0.0), 0.0)
        inner = coordinates(sums, self.V).cpu().double().numpy()[keep] * scale
        part = np.square(turn[:, held].T @ inner / np.sqrt(value[held])[:, None]).sum(0)
        padded = np.zeros(len(weight))
        padded[: len(value)] = np.clip(value[::-1], 0, None)
        return padded, np.minimum(part, 1.0), int(held.sum())


def _ratio(numerator: Tensor, weight: Tensor) -> Tensor:
    return torch.where(weight > 0, numerator / weight.clamp_min(1e-300), 0.0)


__all__ = ["LEVELS", "ClassStructure", "class_structure", "vectors_needed"]

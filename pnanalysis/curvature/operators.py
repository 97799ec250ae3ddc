"""Curvature matrices of a loss over data as operators: Hessian, generalised Gauss-Newton, empirical Fisher."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vjp, vmap

from pnanalysis.curvature.base import CurvatureOperator
from pnanalysis.curvature.batch_weights import BatchWeights, Weight
from pnanalysis.curvature.batches import Batch
from pnanalysis.curvature.network_loss import LossArguments, NetworkLoss
from pnanalysis.curvature.output_curvature import OutputCurvature, closed_form, closed_form_slope
from pnanalysis.curvature.parameters import Named, pullback, requiring_grad
from pnanalysis.curvature.passes import forward_twice
from pnanalysis.curvature.product_check import moved, tolerance
from pnanalysis.curvature.recomputed import dual, tangents
from pnanalysis.curvature.tracing import Product
from pnanalysis.errors import CurvatureError, PnError, reason
from pnanalysis.evaluation.losses import check_own_weights, example_losses, example_weights, known
from pnanalysis.inputs.batches import batch_size, cut
from pnanalysis.inputs.copies import as_real
from pnanalysis.torch_internals import tree_flatten, tree_map_only, tree_unflatten


class HessianOperator(CurvatureOperator):
    """The Hessian of the mean loss with respect to the chosen parameters, as an operator ``(P, P)``.

    Products are exact unless ``method="finite_difference"``; see :class:`pnanalysis.curvature.base.CurvatureOperator`
    for the parameters, attributes and methods. What the network or the loss computes under ``torch.no_grad()`` counts
    as constant, as it does for the gradient.

    Examples
    --------
    >>> import torch
    >>> model, loss_fn = torch.nn.Linear(2, 1, bias=False).double(), torch.nn.functional.mse_loss
    >>> batches = [(torch.eye(2).double(), torch.zeros(2, 1).double())]
    >>> HessianOperator(model, loss_fn, batches).to_dense()
    tensor([[1., 0.],
            [0., 1.]], dtype=torch.float64)

    References
    ----------
    B. Pearlmutter, "Fast Exact Multiplication by the Hessian", Neural Computation 6 (1994).
    """

    _differences_are_derivatives = True

    def _product(self, at: LossArguments, v: list[Tensor]) -> list[Tensor]:
        theta = at.theta
        direction = dict(zip(self.names, v, strict=True))
        slope: Named = jvp(grad(partial(self._loss, at)), (theta,), (direction,))[1]
        return list(slope.values())

    def _recomputed_product(self, at: LossArguments, v: list[Tensor]) -> list[Tensor]:
        with forward_ad.dual_level():
            theta = dual(at.theta, v)
            end, slope = self._end(at, theta)
            if not end.requires_grad:
                return [torch.zeros_like(part) for part in v]
            return tangents(torch.autograd.grad(end, list(theta.values()), slope, materialize_grads=True))

    def _row_forms(self, at: LossArguments, u: list[Tensor], v: list[Tensor]) -> Tensor:
        at_theta, of_outputs, _ = _as_functions(self._loss, at)
        along_u, along_v = (dict(zip(self.names, w, strict=True)) for w in (u, v))

        def pushed(theta: Named) -> Any:
            return jvp(at_theta, (theta,), (along_v,))

        with forward_twice():
            (outputs, by_v), (by_u, second) = jvp(pushed, (at.theta,), (along_u,))[:2]
        slope, curved = grad(of_outputs)(outputs), _curved(of_outputs, outputs, by_v)
        n = batch_size((at.inputs, at.targets))
        return _by_row(by_u, curved, n) + _by_row(slope, second, n)

    def slopes(self, V: Tensor) -> Tensor:
        r"""The derivatives :math:`v_j^\top g_g` of the losses of groups of examples, without the regulariser.

        The gradient is :math:`\sum_g w_g g_g` plus that of the regulariser, with groups and weights of :meth:`forms`.

        Parameters
        ----------
        V : Tensor, shape (P, k)

        Returns
        -------
        Tensor, shape (k, G), float64, on the CPU

        Raises
        ------
        CurvatureError
            If the shape does not fit, or derivatives are not finite.
        """
        if V.ndim != 2 or V.shape[0] != self.n_parameters:
            raise CurvatureError(f"slopes takes {self.n_parameters} rows, not shape {tuple(V.shape)}")
        V = V.to(self.device, self.dtype)
        return self._in_passes_that_fit(lambda: self.example_forms.slopes(V))

    def group_losses(self, offset: Tensor | None = None) -> Tensor:
        r"""The losses :math:`L_g` of groups of examples, at the chosen parameters plus an offset ``(P,)``.

        The loss is :math:`\sum_g w_g L_g` plus the regulariser, with groups and weights of :meth:`forms`.

        Returns
        -------
        Tensor, shape (G,), float64, on the CPU

        Raises
        ------
        PnError
            If examples have no losses of their own, or these are not finite.
        """
        theta = self._theta if offset is None else self._theta_at(offset)
        return self._in_passes_that_fit(lambda: self.example_forms.losses(theta))

    def _row_slopes(self, at: LossArguments, v: list[Tensor]) -> Tensor:
        at_theta, of_outputs, _ = _as_functions(self._loss, at)
        outputs, by_v = jvp(at_theta, (at.theta,), (dict(zip(self.names, v, strict=True)),))[:2]
        return _by_row(by_v, grad(of_outputs)(outputs), batch_size((at.inputs, at.targets)))

    def _direct(self, at: LossArguments) -> Product:
        theta = requiring_grad(at.theta)
        leaves = list(theta.values())
        end, slope = self._end(at, theta)
        if not end.requires_grad:  # it depends on none of the chosen parameters
            return lambda v: [torch.zeros_like(leaf) for leaf in leaves]
        gradient = torch.autograd.grad(end, leaves, slope, create_graph=True, materialize_grads=True)
        return lambda v: pullback(gradient, leaves, v)

    def _end(self, at: LossArguments, theta: Named) -> tuple[Tensor, Tensor | None]:
        """Where the gradient is pulled back from: the loss, or the outputs with its slope there where that is known.

        The graph of the loss of a large vocabulary would hold several arrays of the size of the outputs.
        """
        if known(self._loss.loss_fn) is None:
            return self._loss(at, theta), None
        outputs = self._loss.outputs(at, theta)
        slope = closed_form_slope(self._loss.loss_fn, outputs, at.targets)
        return (self._loss.of_outputs(outputs, at.targets), None) if slope is None else (outputs, slope)

    def _by_differences(
        self, at: LossArguments, v: list[Tensor], product: list[Tensor], step: float
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        ahead, here, behind = (self._loss.gradient(at, moved(at.theta, v, s)) for s in (step, 0.0, -step))
        return _slopes(ahead, here, step), _slopes(here, behind, step), product


class GGNOperator(CurvatureOperator):
    r"""The generalised Gauss-Newton matrix :math:`J^\top H_\ell J`, with the exact output Hessian of any loss.

    The outputs are all floating-point tensors that the network returns, in any nest of tuples, lists and mappings.

    Raises
    ------
    CurvatureError
        Also if the loss is computed inside the network, so that there are no outputs that it is a function of.

    References
    ----------
    N. Schraudolph, "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent", Neural Computation 14
    (2002).
    """

    @property
    def positive_semidefinite(self) -> bool:
        """Whether no eigenvalue is negative: torch's own losses are convex in the outputs, and so is weight decay."""
        return known(self.loss_fn) is not None and self._regulariser.penalty is None

    def _product(self, at: LossArguments, v: list[Tensor]) -> list[Tensor]:
        at_theta, of_outputs, rebuild = _as_functions(self._loss, at)
        outputs, pushed = jvp(at_theta, (at.theta,), (dict(zip(self.names, v, strict=True)),))[:2]
        known_form = self._closed_form(at, rebuild(outputs))
        curved = [known_form(*pushed)] if known_form else jvp(grad(of_outputs), (outputs,), (pushed,))[1]
        pulled = vjp(at_theta, at.theta)[1](curved)[0]
        return list(pulled.values())

    def _row_forms(self, at: LossArguments, u: list[Tensor], v: list[Tensor]) -> Tensor:
        at_theta, of_outputs, rebuild = _as_functions(self._loss, at)
        outputs, by_v = jvp(at_theta, (at.theta,), (dict(zip(self.names, v, strict=True)),))[:2]
        by_u = by_v if u is v else jvp(at_theta, (at.theta,), (dict(zip(self.names, u, strict=True)),))[1]
        known_form = self._closed_form(at, rebuild(outputs))
        curved = [known_form(*by_v)] if known_form else _curved(of_outputs, outputs, by_v)
        return _by_row(by_u, curved, batch_size((at.inputs, at.targets)))

    def _direct(self, at: LossArguments) -> Product:
        theta = requiring_grad(at.theta)
        leaves = list(theta.values())
        outputs, rebuild = _tensors_of(self._loss.outputs(at, theta))
        curvature = self._curvature(at, outputs, rebuild)
        live = [i for i, output in enumerate(outputs) if output.requires_grad]
        if not live:
            return lambda v: [torch.zeros_like(leaf) for leaf in leaves]
        ends = [outputs[i] for i in live]
        cotangents = [torch.zeros_like(end, requires_grad=True) for end in ends]
        pulled = torch.autograd.grad(ends, leaves, cotangents, create_graph=True, materialize_grads=True)

        def product(v: Any) -> list[Tensor]:
            pushed = dict(zip(live, pullback(pulled, cotangents, v), strict=True))
            curved = curvature([pushed.get(i, torch.zeros_like(output)) for i, output in enumerate(outputs)])
            return pullback(outputs, leaves, curved)

        return product

    def _recomputed_product(self, at: LossArguments, v: list[Tensor]) -> list[Tensor]:
        with forward_ad.dual_level(), torch.no_grad():
            pushed = tangents(_tensors_of(self._loss.outputs(at, dual(at.theta, v)))[0])
        theta = requiring_grad(at.theta)
        outputs, rebuild = _tensors_of(self._loss.outputs(at, theta))
        return pullback(outputs, list(theta.values()), self._curvature(at, outputs, rebuild)(pushed), keep=False)

    def _curvature(
        self, at: LossArguments, outputs: list[Tensor], rebuild: Callable[[list[Tensor]], Any]
    ) -> Callable[[list[Tensor]], list[Tensor]]:
        """The product with the Hessian of the loss in the space of outputs."""
        known_form = self._closed_form(at, rebuild(outputs))
        if known_form is not None:
            return lambda along: [known_form(*along)]
        cuts, slope = self._cut(at, outputs, rebuild)
        return partial(pullback, slope, cuts)

    def _closed_form(self, at: LossArguments, outputs: Any) -> OutputCurvature | None:
        """The same, where it is known and the network returns a single tensor."""
        return closed_form(self._loss.loss_fn, outputs, at.targets)

    def _cut(
        self, at: LossArguments, outputs: list[Tensor], rebuild: Callable[[list[Tensor]], Any]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs as leaves of a graph of their own, and the slope of the loss there."""
        cuts = [output.detach().requires_grad_() for output in outputs]
        loss = self._loss.of_outputs(rebuild(cuts), at.targets)
        if not cuts or not loss.requires_grad:
            return cuts, [torch.zeros_like(cut) for cut in cuts]
        return cuts, list(torch.autograd.grad(loss, cuts, create_graph=True, materialize_grads=True))

    def _by_differences(
        self, at: LossArguments, v: list[Tensor], product: list[Tensor], step: float
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        # v.Gv is the second derivative of the loss along the line of outputs that is tangent to the network's
        outputs, rebuild = _tensors_of(self._loss.outputs(at, at.theta))
        ahead, behind = (_tensors_of(self._loss.outputs(at, moved(at.theta, v, s)))[0] for s in (step, -step))
        forms = [
            self._form(at, outputs, rebuild, pushed)
            for pushed in (_slopes(ahead, outputs, step), _slopes(outputs, behind, step))
        ]
        return [forms[0]], [forms[1]], [_inner(v, product)]

    def _form(
        self, at: LossArguments, outputs: list[Tensor], rebuild: Callable[[list[Tensor]], Any], pushed: list[Tensor]
    ) -> Tensor:
        """Second derivative of the loss along a direction in the space of outputs, by differences."""
        length = sum(float(part.square().sum()) for part in pushed) ** 0.5
        size = sum(float(part.square().sum()) for part in outputs) ** 0.5
        h = 1e-4 * max(size, 1.0) / (length or 1.0)

        def loss(s: float) -> Tensor:
            there = [output + s * part for output, part in zip(outputs, pushed, strict=True)]
            return self._loss.of_outputs(rebuild(there), at.targets)

        form: Tensor = (loss(h) - 2 * loss(0.0) + loss(-h)) / h**2
        return form.detach()

    def _fit_passes(self, batch: Batch) -> None:
        super()._fit_passes(batch)
        outputs, rebuild = _tensors_of(self._loss.outputs(self._few, self._few.theta))
        _, slope = self._cut(self._few, outputs, rebuild)
        used = [output for output, part in zip(outputs, slope, strict=True) if bool((part != 0).any())]
        if used and all(output.ndim == 0 for output in used):
            raise CurvatureError(
                "the network returns the loss itself, of which there is no Gauss-Newton matrix; "
                "give a loss that takes the network's predictions (logits), or use the Hessian"
            )


class EmpiricalFisherOperator(CurvatureOperator):
    r"""The empirical Fisher matrix :math:`\sum_i w_i\, g_i g_i^\top / \sum_i w_i` of single examples' gradients.

    The gradient of the loss is :math:`\sum_i w_i\, g_i / \sum_i w_i`; the weights are 1 unless the loss weighs classes
    or ignores targets. Of a loss that is a sum it is :math:`\sum_i g_i g_i^\top`. Each example's loss must depend on
    that example alone, so batch normalisation in train mode is refused. The gradients are those of the data alone;
    weight decay and penalty, where given, add their Hessian.

    Raises
    ------
    CurvatureError
        Also if the loss of a batch is not a mean, or sum, over its examples.

    References
    ----------
    F. Kunstner, L. Balles, P. Hennig, "Limitations of the Empirical Fisher Approximation", arXiv:1905.12558.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._one_by_one, self._sums = "vmap", False
        super().__init__(*arguments, **options)

    @property
    def positive_semidefinite(self) -> bool:
        """Whether no eigenvalue is negative, as for every sum of squares without a penalty."""
        return self._regulariser.penalty is None

    def _product(self, at: LossArguments, v: list[Tensor]) -> list[Tensor]:
        theta = at.theta
        direction = dict(zip(self.names, v, strict=True))
        at_theta = partial(self._losses, at)
        slopes = jvp(at_theta, (theta,), (direction,))[1]
        pulled = vjp(at_theta, theta)[1](slopes * self._weights(at))[0]
        return list(pulled.values())

    def _direct(self, at: LossArguments) -> Product:
        theta = requiring_grad(at.theta)
        leaves = list(theta.values())
        losses, weights = self._losses(at, theta), self._weights(at)
        cotangent = torch.zeros_like(losses, requires_grad=True)
        pulled = torch.autograd.grad(losses, leaves, cotangent, create_graph=True, materialize_grads=True)

        def product(v: Any) -> list[Tensor]:
            (slopes,) = pullback(pulled, [cotangent], v)
            return list(
                torch.autograd.grad(losses, leaves, slopes * weights, retain_graph=True, materialize_grads=True)
            )

        return product

    def _recomputed_product(self, at: LossArguments, v: list[Tensor]) -> list[Tensor]:
        with forward_ad.dual_level(), torch.no_grad():
            (slopes,) = tangents([self._losses(at, dual(at.theta, v))])
        theta = requiring_grad(at.theta)
        return pullback([self._losses(at, theta)], list(theta.values()), [slopes * self._weights(at)], keep=False)

    def _row_forms(self, at: LossArguments, u: list[Tensor], v: list[Tensor]) -> Tensor:
        at_theta = partial(self._losses, at)
        by_v = jvp(at_theta, (at.theta,), (dict(zip(self.names, v, strict=True)),))[1]
        by_u = by_v if u is v else jvp(at_theta, (at.theta,), (dict(zip(self.names, u, strict=True)),))[1]
        forms: Tensor = by_u * by_v * self._weights(at)
        return forms

    def _rehearse(self, at: LossArguments) -> object:
        return self._losses(at, at.theta)

    def _by_differences(
        self, at: LossArguments, v: list[Tensor], product: list[Tensor], step: float
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        ahead, here, behind = (self._losses(at, moved(at.theta, v, s)).detach() for s in (step, 0.0, -step))
        forms = [(slopes.square() * self._weights(at)).sum() for slopes in _slopes([ahead, here], [here, behind], step)]
        return forms[:1], forms[1:], [_inner(v, product)]

    def _losses(self, at: LossArguments, theta: Named) -> Tensor:
        """Loss of each example, (n,)."""
        return self._examples(at, theta)[0]

    def _weights(self, at: LossArguments) -> Tensor:
        """The factor of each example in the matrix of its batch, (n,)."""
        n, like = batch_size((at.inputs, at.targets)), next(iter(at.theta.values()))
        if self.reduction == "sum" or self._sums:
            return like.new_ones(n)
        if known(self.loss_fn) is None:
            return like.new_full((n,), 1 / n)
        weights = example_weights(self.loss_fn, at.targets).to(like)
        return weights / weights.sum()

    def _examples(self, at: LossArguments, theta: Named) -> tuple[Tensor, Tensor]:
        """Loss and weight of each example, (n,) each."""
        if self._one_by_one == "passes":
            parts = [cut((at.inputs, at.targets), slice(i, i + 1)) for i in range(batch_size((at.inputs, at.targets)))]
            each = torch.stack([self._loss(LossArguments(theta, at.others, *part), theta) for part in parts])
            return each, torch.ones_like(each)
        outputs, targets = self._loss.outputs(at, theta), at.targets
        if known(self.loss_fn) is not None:
            if self.amp == "bf16":
                outputs = outputs.float()
            return example_losses(self.loss_fn, outputs, targets, check=False)

        def one(output: Any, target: Any) -> Tensor:
            return self._loss.of_outputs(*tree_map_only(Tensor, lambda part: part[None], (output, target)))

        if self._one_by_one == "vmap":
            each = vmap(one)(outputs, targets)
        else:
            n = batch_size(targets)
            each = torch.stack([one(*_example((outputs, targets), i)) for i in range(n)])
        return each, torch.ones_like(each)

    def _batch_weights(self, weight: Weight) -> BatchWeights:
        found = super()._batch_weights(weight)
        found.prefers_examples = True  # see _check_batch
        return found

    def _fit_passes(self, batch: Batch) -> None:
        if self.bn_mode == "train":
            raise CurvatureError("with bn_mode='train' an example's loss depends on its batch; use bn_mode='eval'")
        super()._fit_passes(batch)
        at = self._few
        # vmap cannot map a loss that branches on values or reads sizes, and outputs may belong to the whole batch
        for self._one_by_one in ("vmap", "loop", "passes"):
            try:
                self._examples(at, at.theta)
                break
            except (PnError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                failed = error
        else:
            raise CurvatureError(f"the loss cannot be computed one example at a time ({reason(failed)})") from failed
        self._traceable = self._one_by_one != "passes"

    def _check_batch(self, batch: Batch) -> None:
        """Refuse a loss that is neither the mean over a batch's examples, nor their sum."""
        if known(self.loss_fn) is not None:
            check_own_weights(self.loss_fn, batch[1])
            return
        at = self._arguments(batch)
        each, whole = self._losses(at, at.theta).detach().double(), float(self._loss_at_theta(at).detach())
        total, n = float(each.sum()), len(each)
        slack = 10 * tolerance(self.dtype, self.amp) * float(each.abs().sum())
        if self.reduction == "mean" and not self._sums and abs(whole * n - total) <= slack:
            return
        self._sums = abs(whole - total) <= slack
        if not self._sums:
            mean, found = ("sum", total) if self.reduction == "sum" else ("mean", total / n)
            raise CurvatureError(
                f"the loss of a batch ({whole:.6g}) is not the {mean} over its examples ({found:.6g}), so that they "
                "have no gradients of their own; where it ignores targets or weighs classes, give torch's own loss, "
                "such as nn.CrossEntropyLoss(weight=..., ignore_index=...)"
            )


def _as_functions(
    loss: NetworkLoss, at: LossArguments
) -> tuple[Callable[[Named], Any], Callable[[Any], Tensor], Callable[[list[Tensor]], Any]]:
    """The network's floating-point outputs as a function of the parameters, the loss as one of these outputs, and how
    the network returns them.
    """
    rebuild = _tensors_of(loss.outputs(at, at.theta))[1]

    def at_theta(theta: Named) -> list[Tensor]:
        return _tensors_of(loss.outputs(at, theta))[0]

    def of_outputs(outputs: list[Tensor]) -> Tensor:
        return loss.of_outputs(rebuild(outputs), at.targets)

    return at_theta, of_outputs, rebuild


def _tensors_of(outputs: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """The floating-point tensors of a nest (complex ones as pairs of real numbers), and how to put others in."""
    leaves, spec = tree_flatten(outputs)
    places = [i for i, leaf in enumerate(leaves) if _is_continuous(leaf)]
    complex_places = {i for i in places if leaves[i].is_complex()}

    def rebuild(tensors: list[Tensor]) -> Any:
        filled = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            filled[i] = torch.complex(*tensor.unbind(-1)) if i in complex_places else tensor
        return tree_unflatten(filled, spec)

    return [as_real(leaves[i]) for i in places], rebuild


def _curved(of_outputs: Callable[[Any], Tensor], outputs: list[Tensor], along: list[Tensor]) -> Any:
    """The Hessian of the loss of the outputs times a direction, by reverse mode, in which torch knows more losses."""
    return grad(lambda at: _inner(grad(of_outputs)(at), along))(outputs)


def _by_row(a: list[Tensor], b: list[Tensor], n: int) -> Tensor:
    """Inner products of the rows of tensors that have one for each of ``n`` examples, ``(n,)``."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x.ndim and len(x) == n]
    return sum(((x * y).reshape(n, -1).sum(1) for x, y in pairs), a[0].new_zeros(n))


def _example(nest: Any, i: int) -> Any:
    return tree_map_only(Tensor, lambda part: part[i], nest)


def _is_continuous(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _slopes(ahead: list[Tensor], behind: list[Tensor], step: float) -> list[Tensor]:
    return [(one - other).detach() / step for one, other in zip(ahead, behind, strict=True)]


def _inner(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([(one * other).sum() for one, other in zip(a, b, strict=True)]).sum()

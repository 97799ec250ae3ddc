"""Curvature matrices of a loss over data as operators: Hessian, generalised Gauss-Newton, empirical Fisher."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

from pnanalysis.curvature.base import CurvatureOperator, LossArguments
from pnanalysis.curvature.batches import Batch
from pnanalysis.curvature.parameters import Named, pullback, requiring_grad
from pnanalysis.curvature.tracing import Product
from pnanalysis.errors import CurvatureError
from pnanalysis.inputs.batches import batch_size


class HessianOperator(CurvatureOperator):
    """The Hessian of the mean loss with respect to the chosen parameters, as an operator ``(P, P)``.

    Products are exact (no finite differences); see :class:`pnanalysis.curvature.base.CurvatureOperator` for the
    parameters, attributes and methods.

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

    def _product(self, at: LossArguments, v: list[Tensor]) -> list[Tensor]:
        theta = at.theta
        direction = dict(zip(self.names, v, strict=True))
        slope: Named = jvp(grad(partial(self._loss, at)), (theta,), (direction,))[1]
        return list(slope.values())

    def _direct(self, at: LossArguments) -> Product:
        theta = requiring_grad(at.theta)
        leaves = list(theta.values())
        slope = torch.autograd.grad(self._loss(at, theta), leaves, create_graph=True, materialize_grads=True)
        return lambda v: pullback(slope, leaves, v)


class GGNOperator(CurvatureOperator):
    r"""The generalised Gauss-Newton matrix :math:`J^\top H_\ell J`, with the exact output Hessian of any loss.

    References
    ----------
    N. Schraudolph, "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent", Neural Computation 14
    (2002).
    """

    def _product(self, at: LossArguments, v: list[Tensor]) -> list[Tensor]:
        theta = at.theta
        direction = dict(zip(self.names, v, strict=True))
        at_theta = partial(self._outputs, at)
        outputs, pushed = jvp(at_theta, (theta,), (direction,))[:2]
        curved = jvp(grad(partial(self._data_loss, targets=at.targets)), (outputs,), (pushed,))[1]
        pulled = vjp(at_theta, theta)[1](curved)[0]
        return list(pulled.values())

    def _direct(self, at: LossArguments) -> Product:
        theta = requiring_grad(at.theta)
        leaves = list(theta.values())
        outputs = self._outputs(at, theta)
        cotangent = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(outputs, leaves, cotangent, create_graph=True, materialize_grads=True)
        cut = outputs.detach().requires_grad_()
        slope = torch.autograd.grad(self._data_loss(cut, at.targets), cut, create_graph=True)

        def product(v: Any) -> list[Tensor]:
            (pushed,) = pullback(pulled, [cotangent], v)
            (curved,) = pullback(slope, [cut], [pushed])
            return list(torch.autograd.grad(outputs, leaves, curved, retain_graph=True, materialize_grads=True))

        return product


class EmpiricalFisherOperator(CurvatureOperator):
    r"""The empirical Fisher matrix :math:`\frac1N\sum_i g_i g_i^\top` of the gradients of single examples' losses.

    Each example's loss must depend on that example alone, so batch normalisation in train mode is refused. The
    gradients are those of the data alone; weight decay and penalty, where given, add their Hessian.

    References
    ----------
    F. Kunstner, L. Balles, P. Hennig, "Limitations of the Empirical Fisher Approximation", arXiv:1905.12558.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        if options.get("bn_mode") == "train":
            raise CurvatureError("with bn_mode='train' an example's loss depends on its batch; use bn_mode='eval'")
        super().__init__(*arguments, **options)

    def _divisor_of_mean(self, batch: Batch) -> float:
        return float(batch_size(batch))

    def _losses(self, at: LossArguments, theta: Named) -> Tensor:
        """Loss of each example, (n,)."""
        outputs = self._outputs(at, theta)

        def one(output: Tensor, target: Tensor) -> Tensor:
            return self._data_loss(output[None], target[None])

        return torch.func.vmap(one)(outputs, at.targets)

    def _weight_of_example(self, at: LossArguments) -> float:
        return 1 / batch_size((at.inputs, at.targets)) if self.reduction == "mean" else 1.0

    def _product(self, at: LossArguments, v: list[Tensor]) -> list[Tensor]:
        theta = at.theta
        direction = dict(zip(self.names, v, strict=True))
        at_theta = partial(self._losses, at)
        slopes = jvp(at_theta, (theta,), (direction,))[1]
        pulled = vjp(at_theta, theta)[1](slopes * self._weight_of_example(at))[0]
        return list(pulled.values())

    def _direct(self, at: LossArguments) -> Product:
        theta = requiring_grad(at.theta)
        leaves = list(theta.values())
        losses = self._losses(at, theta)
        cotangent = torch.zeros_like(losses, requires_grad=True)
        pulled = torch.autograd.grad(losses, leaves, cotangent, create_graph=True, materialize_grads=True)

        def product(v: Any) -> list[Tensor]:
            (slopes,) = pullback(pulled, [cotangent], v)
            weighted = slopes * self._weight_of_example(at)
            return list(torch.autograd.grad(losses, leaves, weighted, retain_graph=True, materialize_grads=True))

        return product

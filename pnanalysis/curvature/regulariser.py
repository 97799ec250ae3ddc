"""Terms that are added to the loss over the data (weight decay and a penalty), and their curvature."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from pnanalysis.curvature.blocks import Block, assembled
from pnanalysis.curvature.parameters import Named, as_given, join_tensors, pullback, requiring_grad, split_vector
from pnanalysis.evaluation.forward import WithModel, within_model
from pnanalysis.inputs.functional_calls import functional_call

Penalty = Callable[[nn.Module], Tensor]


class Regulariser:
    """``weight_decay / 2 * ||theta||^2`` plus ``penalty(model)``, as a function of the chosen parameters.

    Parameters
    ----------
    model : Module
        The model that the penalty is called with.
    theta, others : mappings of str to Tensor
        The chosen parameters, and the other parameters and buffers.
    complex_names : collection of str
        The chosen parameters that are complex: see :func:`pnanalysis.inputs.copies.as_real`.
    blocks : mapping of str to Block, optional
        The chosen parts of parameters, by their labels.
    """

    def __init__(
        self,
        model: nn.Module,
        theta: Named,
        others: Named,
        weight_decay: float = 0.0,
        penalty: Penalty | None = None,
        complex_names: Collection[str] = (),
        blocks: Mapping[str, Block] | None = None,
    ) -> None:
        self.complex_names, self.blocks = complex_names, blocks or {}
        self.weight_decay, self.penalty = weight_decay, penalty
        self._caller = None if penalty is None else WithModel(model, penalty)
        self._theta, self._others = theta, others
        self._slope: tuple[Sequence[Tensor], list[Tensor]] | None = None

    def __bool__(self) -> bool:
        return bool(self.weight_decay) or self.penalty is not None

    def value(self, theta: Named) -> Tensor:
        """The scalar that is added to the loss."""
        decay = 0.5 * self.weight_decay * sum(tensor.square().sum() for tensor in theta.values())
        return torch.as_tensor(decay) + self._penalised(theta)

    def gradient(self) -> Tensor:
        """Its gradient, ``(P,)``."""
        theta = requiring_grad(self._theta)
        value = self.value(theta)
        return join_tensors(pullback([value], list(theta.values()), [torch.ones_like(value)]))

    def add_products(self, result: Tensor, V: Tensor) -> None:
        """Add its Hessian times ``V`` ``(P, k)`` to ``result`` ``(P, k)``, in place."""
        if self.weight_decay:
            result.add_(V, alpha=self.weight_decay)
        if self.penalty is None:
            return
        if self._slope is None:
            theta = requiring_grad(self._theta)
            leaves = list(theta.values())
            value = torch.as_tensor(self._penalised(theta))
            slope = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
            self._slope = slope, leaves
        shapes = [tensor.shape for tensor in self._theta.values()]
        for v, into in zip(V.T, result.T, strict=True):
            into.add_(join_tensors(pullback(*self._slope, split_vector(v, shapes))))

    def forget(self) -> None:
        """Drop what is kept between products: the parameters have changed."""
        self._slope = None

    def _penalised(self, theta: Named) -> Tensor | float:
        """The penalty, seeing the model with ``theta`` in it."""
        if self._caller is None:
            return 0.0
        state = within_model(assembled({**self._others, **as_given(theta, self.complex_names)}, self.blocks))
        value: Tensor = functional_call(self._caller, state, ())
        return value

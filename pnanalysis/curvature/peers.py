"""Operators by name, with products by this package or by another one, to check each with the same Lanczos."""

from __future__ import annotations

import gc
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from pnanalysis.curvature.base import CurvatureOperator
from pnanalysis.curvature.operators import EmpiricalFisherOperator, GGNOperator, HessianOperator
from pnanalysis.errors import CurvatureError
from pnanalysis.spectra.linear_operator import LinearOperator

OPERATORS: dict[str, type[CurvatureOperator]] = {
    "hessian": HessianOperator,
    "ggn": GGNOperator,
    "fisher": EmpiricalFisherOperator,
}
ENGINES = ("native", "pyhessian", "curvlinops")
#: Bytes that an operator keeps from which on it is worth half a second to see whether anybody still uses it.
_MUCH = 2**26
_made: WeakSet[CurvatureOperator] = WeakSet()


def make_operator(
    engine: str, kind: str, model: nn.Module, loss_fn: Any, batches: Any, **options: Any
) -> LinearOperator:
    """An operator by the names that the command line knows.

    Parameters
    ----------
    engine : {"native", "pyhessian", "curvlinops"}
        PyHessian knows the full Hessian only; curvlinops all three operators.
    kind : {"hessian", "ggn", "fisher"}
    model, loss_fn, batches, **options
        As for :class:`pnanalysis.HessianOperator`.

    Raises
    ------
    CurvatureError
        If the names are unknown, or the other package is not installed or does not support the options.
    """
    if kind not in OPERATORS:
        raise CurvatureError(f"unknown operator {kind!r}; there are {', '.join(OPERATORS)}")
    if engine not in ENGINES:
        raise CurvatureError(f"unknown engine {engine!r}; there are {', '.join(ENGINES)}")
    if any(op._cached_bytes > _MUCH for op in _made):
        gc.collect()  # the parts of an operator refer to it, so that one that nobody uses any more is not freed at once
    native = OPERATORS[kind](model, loss_fn, batches, **options)
    _made.add(native)
    if engine == "native":
        return native
    whole = native.names == [name for name, _ in model.named_parameters()]
    # the peers see the loss of the data alone: what is added to it would be missing from their products
    own = native.draws is not None or native.weight is not None or native.loss_fn.takes_model
    own = own or native.by_differences or native.checkpoint_activations or native.compile
    if not whole or native.bn_mode != "eval" or native.penalty or native.weight_decay or own:
        raise CurvatureError(
            f"{engine} takes all parameters, bn_mode='eval', a loss(outputs, targets), no penalty, no weight decay, no "
            "weight, no draws, no finite differences, no compile and no checkpoint_activations; use the native engine"
        )
    if engine == "pyhessian":
        if kind != "hessian":
            raise CurvatureError("pyhessian has the Hessian only; use curvlinops or the native engine")
        return _PyHessian(native)
    return _Curvlinops(native, kind)


class _Peer:
    """Shape, device and dtype of the native operator; products by another package, which has no forms of examples."""

    def __init__(self, native: CurvatureOperator) -> None:
        self.shape, self.device, self.dtype = native.shape, native.device, native.dtype

    def matvec(self, v: Tensor) -> Tensor:
        raise NotImplementedError

    def matmat(self, V: Tensor) -> Tensor:
        return torch.stack([self.matvec(v) for v in V.T], dim=1)


class _PyHessian(_Peer):
    """PyHessian (Yao et al., arXiv:1912.07145), over its data-loader path."""

    def __init__(self, native: CurvatureOperator) -> None:
        from pyhessian import hessian

        super().__init__(native)
        if len(set(native.batches.divisors)) > 1:
            raise CurvatureError("pyhessian weighs all batches alike; use batches of equal size and a plain mean")
        self.model = native.model
        for parameter in self.model.parameters():
            parameter.requires_grad_()
        batches = list(native.batches)
        self.peer = hessian(self.model, native.loss_fn, dataloader=batches, cuda=native.device.type == "cuda")
        self.shapes = native.parameter_shapes

    def matvec(self, v: Tensor) -> Tensor:
        from pnanalysis.curvature.parameters import join_tensors, split_vector

        _, product = self.peer.dataloader_hv_product(split_vector(v.to(self.dtype), self.shapes))
        return join_tensors(product).detach()


class _Curvlinops(_Peer):
    """curvlinops (Dangel et al., arXiv:2501.19183)."""

    def __init__(self, native: CurvatureOperator, kind: str) -> None:
        try:
            import curvlinops
        except ImportError as error:
            raise CurvatureError("curvlinops is not installed; pip install 'pnanalysis[bench]'") from error
        super().__init__(native)
        operators = {
            "hessian": curvlinops.HessianLinearOperator,
            "ggn": curvlinops.GGNLinearOperator,
            "fisher": curvlinops.EFLinearOperator,
        }
        losses = {nn.functional.cross_entropy: nn.CrossEntropyLoss(), nn.functional.mse_loss: nn.MSELoss()}
        loss_fn = losses.get(native.loss_fn.function)
        if loss_fn is None:
            raise CurvatureError("curvlinops is offered for cross_entropy and mse only; use the native engine")
        model = native.model
        for parameter in model.parameters():
            parameter.requires_grad_()
        batches = [batch for _, _, batch in native.batches.weighted()]
        self.peer = operators[kind](model, loss_fn, list(model.parameters()), batches, check_deterministic=False)

    def matvec(self, v: Tensor) -> Tensor:
        return torch.as_tensor(self.peer @ v.to(self.dtype)).detach()

    def matmat(self, V: Tensor) -> Tensor:
        return torch.as_tensor(self.peer @ V.to(self.dtype)).detach()

"""How passes over a network run: differentiable twice, in a stated precision, and leaving no trace on its modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from pnanalysis.activations.eager import eager
from pnanalysis.torch_internals import WEIGHT_NORM, without_checkpointing

#: What ``amp`` may be.
PRECISIONS = ("no", "tf32", "bf16")


@contextmanager
def autocast(device: torch.device, amp: str, note: Callable[[Any], object] | None = None) -> Iterator[None]:
    """Forward passes in bfloat16 with ``amp="bf16"``, of functions that have a second derivative.

    ``note`` is called with what the network passes to ``torch.utils.checkpoint``, which keeps all activations here.
    """
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"),
        _Rewriting(_REWRITTEN),
        without_checkpointing(note),
    ):
        yield


@contextmanager
def plain_passes(device: torch.device, amp: str, recurrent: bool = False, twice: bool = True) -> Iterator[None]:
    """Passes as written, in eager mode and in the precision ``amp``, by implementations that have second derivatives.

    All settings belong to the whole process, and are restored at the end. ``amp="tf32"`` multiplies in
    TensorFloat-32 on CUDA; everything else in full float32, where torch's own default is TensorFloat-32 in
    convolutions. ``recurrent`` says that the network has recurrent layers, whose cuDNN kernels differentiate once only,
    and not in eval mode. Fused kernels for attention, which differentiate once, remain with ``twice=False``.
    """
    backends: Any = torch.backends
    cudnn = backends.cudnn
    precision = "tf32" if amp == "tf32" else "ieee"
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.jit")  # torch's own use of it
        for backend in (backends.cuda.matmul, cudnn.conv, cudnn.rnn):
            stack.enter_context(_setting(backend, "fp32_precision", precision))
        if recurrent and device.type == "cuda":
            stack.enter_context(_setting(cudnn, "enabled", False))
        if twice:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(eager())
        yield


@contextmanager
def _setting(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Undo what the body leaves on the modules: cached masks, kept features, counters.

    A tensor that a trace leaves behind has no values, and one of another batch may be wrong for the next.
    """
    before = [(vars(module), _shallow(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for attributes, kept in before:
            attributes.clear()
            attributes.update(kept)


def _shallow(attributes: dict[str, Any]) -> dict[str, Any]:
    # one level deeper than a shallow copy: modules keep their buffers, and users their caches, in containers
    return {name: value.copy() if type(value) in (dict, list, set) else value for name, value in attributes.items()}


# -- functions whose second derivative torch lacks or has wrong, written in terms of others -----------------------


def forward_twice() -> TorchFunctionMode:
    """Functions rewritten whose statistics torch takes for constant where it differentiates twice in forward mode."""
    return _Rewriting(_REWRITTEN_FORWARD)


def _hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    return F.hardtanh(x + 3, 0.0, 6.0) / 6


def _embedding(
    indices: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Tensor:  # fmt: skip
    """An embedding whose padding is a constant in forward mode, too.

    torch gives the vector of ``padding_idx`` no gradient, but lets its tangent through: where a batch has padding, the
    two modes would be derivatives of different functions.
    """
    if padding_idx is None:
        raise _NotRewritten
    rows = F.embedding(indices, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    return torch.where(torch.eq(indices, padding_idx % len(weight))[..., None], rows.detach(), rows)


def _embedding_bag(
    indices: Tensor, weight: Tensor, offsets: Tensor | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False,
    per_sample_weights: Tensor | None = None, include_last_offset: bool = False, padding_idx: int | None = None,
) -> Tensor:  # fmt: skip
    """Bags of equal size, one a row, as an embedding and a reduction."""
    if indices.ndim != 2 or max_norm is not None or padding_idx is not None or (mode == "max" and indices.shape[1] < 1):
        raise _NotRewritten
    rows = F.embedding(indices, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[..., None]
    return rows.mean(1) if mode == "mean" else rows.sum(1) if mode == "sum" else rows.amax(1)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:  # fmt: skip
    x = _normalised(x, range(-len(shape), 0), eps)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _instance_norm(
    x: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if not use_input_stats:
        raise _NotRewritten
    x, per_channel = _normalised(x, range(2, x.ndim), eps), (-1, *[1] * (x.ndim - 2))
    x = x if weight is None else x * weight.view(per_channel)
    return x if bias is None else x + bias.view(per_channel)


def _normalised(x: Tensor, dims: Sequence[int], eps: float) -> Tensor:
    x = x if x.dtype == torch.float64 else x.float()
    centred = x - x.mean(tuple(dims), keepdim=True)
    return centred * (centred.square().mean(tuple(dims), keepdim=True) + eps).rsqrt()


_REWRITTEN: dict[Any, Callable[..., Tensor]] = {
    F.hardsigmoid: _hardsigmoid,
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    WEIGHT_NORM: _weight_norm,
}
_REWRITTEN_FORWARD: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.instance_norm: _instance_norm,
}


class _NotRewritten(Exception):
    """The arguments ask for something that the other form does not cover."""


class _Rewriting(TorchFunctionMode):
    def __init__(self, forms: Mapping[Any, Callable[..., Tensor]]) -> None:
        super().__init__()
        self.forms = forms

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.forms:
            try:
                return self.forms[func](*args, **(kwargs or {}))
            except _NotRewritten:
                pass  # then as it is: the check of products finds out
        return func(*args, **(kwargs or {}))


__all__ = ["PRECISIONS", "autocast", "forward_twice", "plain_passes", "unchanged"]

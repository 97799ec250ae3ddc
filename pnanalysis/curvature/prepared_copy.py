"""A copy of a model that is ready for products (eval mode, nothing in place, cheap batch normalisation), and precision.

The settings of precision are here because they, too, say how the copy's forward pass is run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pnanalysis.inputs.copies import copied
from pnanalysis.torch_internals import BatchNormBase, convolve

#: What ``amp`` may be.
PRECISIONS = ("no", "tf32", "bf16")

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def prepared_copy(model: nn.Module, bn_mode: str) -> nn.Module:
    """A copy in eval mode without in-place activations; with ``bn_mode="train"``, on the statistics of each batch.

    Names of parameters and buffers stay. With running statistics, a batch normalisation whose input is the output of
    one convolution, used by nothing else, becomes part of the convolution's weight and bias: it then costs no pass
    over the activations.
    """
    prepared = copied(model).eval()
    for module in prepared.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                # a constant that is not a buffer would be built into a trace, which torch refuses under transforms
                delattr(module, name)
                module.register_buffer(name, value, persistent=False)
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]  # two derivatives need the values before the activation
        if isinstance(module, BatchNormBase) and bn_mode == "train":
            module.train()
            module.track_running_stats = False  # running statistics are then neither used nor changed
    if bn_mode == "eval":
        _fold_norms(prepared)
    return prepared


def _fold_norms(model: nn.Module) -> None:
    """Let each convolution apply the batch normalisation behind it, where nothing else uses its output."""
    modules = dict(model.named_modules())
    try:
        nodes = fx.symbolic_trace(model).graph.nodes
    except Exception:  # a user's model may raise anything on symbols: it is left unchanged
        return
    calls = [node for node in nodes if node.op == "call_module"]
    times_called = Counter(node.target for node in calls)
    for node in calls:
        source: Any = node.args[0] if node.args else None
        if source not in calls or len(source.users) > 1:
            continue
        if times_called[source.target] > 1 or times_called[node.target] > 1:  # shared layers: other calls differ
            continue
        conv, norm = modules[source.target], modules[node.target]
        # exact types, for a subclass may compute something else
        if type(conv) in _CONVOLUTIONS and type(norm) in _NORMS and norm.running_mean is not None:
            conv.forward = partial(_convolve_and_normalise, conv, norm)
            norm.forward = _identity


def _convolve_and_normalise(conv: Any, norm: Any, inputs: Tensor) -> Tensor:
    """A convolution and the normalisation behind it, which is affine per channel, as one convolution."""
    # computed from the parameters in every pass, so that derivatives with respect to all of them come out right
    scale = (norm.running_var + norm.eps).rsqrt()
    shift = -norm.running_mean * scale
    if norm.affine:
        scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
    if conv.bias is not None:
        shift = shift + scale * conv.bias
    weight = conv.weight * scale.view(-1, *[1] * (conv.weight.ndim - 1))
    return convolve(conv, inputs, weight, shift)


def _identity(inputs: Tensor) -> Tensor:
    return inputs


@contextmanager
def autocast(device: torch.device, amp: str) -> Iterator[None]:
    """Forward passes that can be differentiated twice; in bfloat16 with ``amp="bf16"``."""
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"),
        sdpa_kernel(SDPBackend.MATH),  # the other kernels for attention have no second derivative
    ):
        yield


@contextmanager
def float32_precision(amp: str) -> Iterator[None]:
    """Multiply in TensorFloat-32 on CUDA with ``amp="tf32"``, and in full float32 otherwise.

    torch's own default is TensorFloat-32 in convolutions. The previous settings, which belong to the whole process,
    are restored at the end.
    """
    cudnn: Any = torch.backends.cudnn
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "tf32" if amp == "tf32" else "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


__all__ = ["PRECISIONS", "autocast", "float32_precision", "prepared_copy"]

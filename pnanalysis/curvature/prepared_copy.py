"""A copy of a model made ready for products: in eval mode, nothing in place, batch normalisation as cheap as can be."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pnanalysis.torch_internals import BatchNormBase, convolve

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def prepared_copy(model: nn.Module, bn_mode: str) -> nn.Module:
    """A copy in eval mode without in-place activations; batch normalisation optionally on batch statistics.

    Names of parameters and buffers stay. With running statistics, batch normalisation that alone follows a
    convolution becomes part of the convolution's weight and bias: no pass over the activations is left of it.
    """
    frozen = copy.deepcopy(model).eval()
    for module in frozen.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):  # a constant that is no buffer: make it one, so that it can be traced
                delattr(module, name)
                module.register_buffer(name, value, persistent=False)
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
        if isinstance(module, BatchNormBase) and bn_mode == "train":
            module.train()
            module.track_running_stats = False  # its running statistics are neither used nor changed
    if bn_mode == "eval":
        _fold_norms(frozen)
    return frozen


def _fold_norms(model: nn.Module) -> None:
    """Let each convolution apply the batch normalisation behind it, where nothing else sees its output."""
    modules = dict(model.named_modules())
    try:
        nodes = fx.symbolic_trace(model).graph.nodes
    except Exception:  # whatever a user's model may raise on symbols: leave it as it is
        return
    calls = [node for node in nodes if node.op == "call_module"]
    times = Counter(node.target for node in calls)
    for node in calls:
        source: Any = node.args[0] if node.args else None
        if source not in calls or len(source.users) > 1 or times[source.target] > 1 or times[node.target] > 1:
            continue
        conv, norm = modules[source.target], modules[node.target]
        if type(conv) in _CONVOLUTIONS and type(norm) in _NORMS and norm.running_mean is not None:
            conv.forward = partial(_convolve_and_normalise, conv, norm)
            norm.forward = _identity


def _convolve_and_normalise(conv: Any, norm: Any, inputs: Tensor) -> Tensor:
    """Both at once: the statistics make of the norm an affine map, two numbers a channel."""
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


PRECISIONS = ("no", "tf32", "bf16")


@contextmanager
def autocast(device: torch.device, amp: str) -> Iterator[None]:
    """Forward passes that can be differentiated twice, in bfloat16 where ``amp`` says so."""
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"),
        sdpa_kernel(SDPBackend.MATH),  # attention's other kernels have no second derivative
    ):
        yield


@contextmanager
def float32_precision(amp: str) -> Iterator[None]:
    """TensorFloat-32 on CUDA where ``amp`` says so and nowhere else; torch's own default has it in convolutions.

    Restored at the end: these are settings of the whole process.
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

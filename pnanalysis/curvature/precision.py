"""In which arithmetic the passes over a network run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

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

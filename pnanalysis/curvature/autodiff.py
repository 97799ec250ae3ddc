"""The few words of reverse-mode differentiation that operators share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Named = dict[str, Tensor]


def pullback(outputs: Any, inputs: Any, cotangents: Any) -> list[Tensor]:
    """Vector-Jacobian product on a graph that is kept; parts that do not depend on the inputs give zeros."""
    pairs = [(out, cotangent) for out, cotangent in zip(outputs, cotangents, strict=True) if out.requires_grad]
    if not pairs:
        return [torch.zeros_like(tensor) for tensor in inputs]
    roots, seeds = zip(*pairs, strict=True)
    return list(torch.autograd.grad(roots, inputs, seeds, retain_graph=True, materialize_grads=True))


def requiring_grad(theta: Named) -> Named:
    """The same tensors as leaves of a graph to come."""
    return {name: tensor.detach().requires_grad_() for name, tensor in theta.items()}
